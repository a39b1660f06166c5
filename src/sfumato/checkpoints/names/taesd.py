"""Original TAESD files (github.com/madebyollin/taesd) <-> our names, which are diffusers'
AutoencoderTiny's.

Each half is one file whose keys begin with a layer's number. Ours leave out the decoder's first
layer, which limits the latent and has no weights, so its numbers are one lower:

    encoder  7.conv.0.weight <-> encoder.layers.7.conv.0.weight          decoder  7.weight <->
             decoder.layers.6.weight
"""

from itertools import pairwise

from torch import Tensor

from sfumato.compress.tiny import TinyConfig
from sfumato.errors import UserError

_SHIFT = {"encoder": 0, "decoder": 1}  # their numbers minus ours


def from_original(half: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of one original file ("encoder" or "decoder") as ours; `UserError` for keys that do
    not begin with a layer's number.
    """
    renamed = {}
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        if not number.isdecimal() or not rest or int(number) < _SHIFT[half]:
            raise UserError(
                f"key {key!r} is not of a TAESD {half}: expected a layer's number first, such as '3.conv.0.weight'"
            )
        renamed[f"{half}.layers.{int(number) - _SHIFT[half]}.{rest}"] = tensor
    return renamed


def to_original(half: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of one original file, of all of ours."""
    start, renamed = f"{half}.layers.", {}
    for key, tensor in tensors.items():
        if key.startswith(start):
            number, _, rest = key.removeprefix(start).partition(".")
            renamed[f"{int(number) + _SHIFT[half]}.{rest}"] = tensor
    return renamed


def config_of(tensors: dict[str, Tensor]) -> TinyConfig:
    """The architecture, from keys (ours) and shapes; `UserError` where they are not those of a
    network that we know.
    """
    counts, convs = {}, {}
    for half in _SHIFT:
        layers = _layers(half, tensors)
        convs[half] = [tensors[f"{half}.layers.{n}.weight"] for n, kind in layers if kind == "conv"]
        counts[half] = _runs([kind for _, kind in layers])
        first, *middle, last = convs[half]
        widths = {
            first.shape[0],
            last.shape[1],
            *(size for weight in middle for size in weight.shape[:2]),
        }
        if len(widths) > 1:
            raise UserError(
                f"this {half} has convolutions of widths {sorted(widths)}: a variant of TAESD that is not supported; known are those of one "
                "width, taesd, taesdxl, taesd3, taef1 and taef2"
            )
    encoder, decoder = convs["encoder"], convs["decoder"]
    return TinyConfig(
        in_channels=encoder[0].shape[1],
        out_channels=decoder[-1].shape[0],
        encoder_block_out_channels=(encoder[0].shape[0],) * len(counts["encoder"]),
        decoder_block_out_channels=(decoder[0].shape[0],) * len(counts["decoder"]),
        latent_channels=encoder[-1].shape[0],
        num_encoder_blocks=counts["encoder"],
        num_decoder_blocks=counts["decoder"],
        use_midblock_gn=any(".pool." in key for key in tensors),
    )


def _layers(half: str, tensors: dict[str, Tensor]) -> list[tuple[int, str]]:
    """(number, "conv" or "block") of each layer with weights, in order; the first and the last are
    convolutions.
    """
    start, kinds = f"{half}.layers.", dict[int, str]()
    for key in tensors:
        number, _, rest = key.removeprefix(start).partition(".")
        if key.startswith(start) and number.isdecimal():
            kinds[int(number)] = (
                "conv"
                if rest in ("weight", "bias") and kinds.get(int(number), "conv") == "conv"
                else "block"
            )
    found = sorted(kinds.items())
    convs = [f"{start}{n}.weight" for n, kind in found if kind == "conv"]
    whole = all(key in tensors and tensors[key].ndim == 4 for key in convs)
    if len(convs) < 3 or not whole or found[0][1] == "block" or found[-1][1] == "block":
        raise UserError(
            f"the {half} is not one of TAESD ({len(found)} layers, {len(convs)} convolutions between blocks): give the file of the {half}"
        )
    return found


def _runs(kinds: list[str]) -> tuple[int, ...]:
    """Blocks between one convolution and the next."""
    places = [i for i, kind in enumerate(kinds) if kind == "conv"]
    return tuple(b - a - 1 for a, b in pairwise(places))
