"""Tiny autoencoders on disk as their author publishes them, without a config.

An encoder and a decoder (github.com/madebyollin/taesd):

    taef2_encoder.safetensors  taef2_decoder.safetensors

The keys of each half begin with a layer's number; the architecture is detected from keys and
shapes. diffusers' AutoencoderTiny leaves out the decoder's first layer, which limits the latent and
has no weights, so that its numbers are one lower:

    encoder   7.conv.0.weight <-> encoder.layers.7.conv.0.weight
    decoder   7.weight        <-> decoder.layers.6.weight
"""

from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import build_module
from sfumato.checkpoints.formats.folder import load_part
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.errors import UserError, explained
from sfumato.io.atomic import read_tensors, write_tensors
from sfumato.io.pickles import read_pickle
from sfumato.io.safetensors import require_finite

_SHIFT = {"encoder": 0, "decoder": 1}
"""The original's numbers of layers minus diffusers'."""


def load_taesd(
    source: str | Path, decoder: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> AutoencoderTiny:
    """A tiny autoencoder in eval mode.

    Args:
        source: A folder with config.json (diffusers' layout) or with one pair of files
            *encoder.safetensors and *decoder.safetensors; one file with both halves under
            diffusers' names; or the encoder's file, and then
        decoder: The decoder's file.
        dtype: Of the weights.

    Raises:
        UserError: Any other source, an unknown variant, weights that are NaN or infinite.
    """
    source = Path(source)
    if source.is_dir() and decoder is None and (source / "config.json").exists():
        autoencoder = load_part(source, dtype=dtype)
        if not isinstance(autoencoder, AutoencoderTiny):
            raise UserError(
                f"{source} holds a {type(autoencoder).__name__}: expected an AutoencoderTiny"
            )
        return autoencoder
    if source.is_dir():
        if decoder is not None:
            raise UserError(
                f"{source} is a folder and a decoder was given too: give two files, or the folder"
            )
        source, decoder = _pair(source)
    if decoder is None:
        return _build(_read(source), source, dtype)
    tensors: dict[str, Tensor] = {}
    for half, file in (("encoder", source), ("decoder", Path(decoder))):
        with explained(file):
            tensors |= from_original(half, _read(file))
    return _build(tensors, Path(f"{source} with {decoder}"), dtype)


def is_half(keys: Collection[str]) -> bool:
    """True for the keys of an encoder or a decoder alone, which begin with a layer's number."""
    return any(key.endswith(".conv.0.weight") and key.split(".")[0].isdigit() for key in keys)


def pair_of(half: Path) -> tuple[Path, Path]:
    """The encoder's and the decoder's file of a pair, of which one is named.

    Raises:
        UserError: For a name that ends in neither, and where the other file is missing.
    """
    ends = list(_SHIFT)
    own = next((end for end in ends if half.stem.endswith(end)), None)
    if own is None:
        raise UserError(
            f"{half} is one half of a tiny autoencoder: "
            "expected a name that ends in encoder or decoder, and its other half beside it"
        )
    files = [half.with_stem(half.stem.removesuffix(own) + end) for end in ends]
    for file in files:
        if not file.is_file():
            raise UserError(f"{half} is one half of a tiny autoencoder: {file} was not found")
    return files[0], files[1]


def _pair(folder: Path) -> tuple[Path, Path]:
    """The one encoder and the one decoder in a folder."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".pth")]
    encoders, decoders = ([p for p in files if p.stem.endswith(half)] for half in _SHIFT)
    starts = [
        [p.stem.removesuffix(half) for p in paths]
        for half, paths in zip(_SHIFT, (encoders, decoders), strict=True)
    ]
    if len(encoders) != 1 or starts[0] != starts[1]:
        names = ", ".join(p.name for p in [*encoders, *decoders]) or "none"
        raise UserError(
            f"{folder} has no config.json, and of files that end in encoder or decoder {names}: "
            "expected one pair; name the two files"
        )
    return encoders[0], decoders[0]


def _read(file: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth file that holds nothing else."""
    if file.suffix != ".pth":
        return read_tensors(file)
    values = read_pickle(file)
    if not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{file} holds more than tensors: expected names with tensors")
    return values


def _build(tensors: dict[str, Tensor], where: Path, dtype: torch.dtype) -> AutoencoderTiny:
    with explained(where):
        config = config_of(tensors)
    autoencoder = build_module(AutoencoderTiny(config).to_config(), tensors, where, where, dtype)
    assert isinstance(autoencoder, AutoencoderTiny)
    return autoencoder


def save_taesd(
    stem: str | Path, autoencoder: AutoencoderTiny, dtype: torch.dtype = torch.float16
) -> tuple[Path, Path]:
    """Write two files with the original keys.

    Args:
        stem: The path without `_encoder.safetensors` and `_decoder.safetensors`.
        autoencoder: The weights.
        dtype: Of the stored weights.

    Returns:
        Both paths.
    """
    stem = Path(stem)
    weights = {k: v.to(dtype) for k, v in autoencoder.state_dict().items()}
    require_finite(weights, f"the autoencoder in {str(dtype).removeprefix('torch.')}")
    paths = {half: stem.with_name(f"{stem.name}_{half}.safetensors") for half in _SHIFT}
    for half, path in paths.items():
        write_tensors(path, to_original(half, weights))
    return paths["encoder"], paths["decoder"]


def from_original(half: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one original file under our names.

    Args:
        half: "encoder" or "decoder".
        tensors: By the original names.

    Raises:
        UserError: Keys that do not begin with a layer's number.
    """
    renamed = {}
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        if not number.isdecimal() or not rest or int(number) < _SHIFT[half]:
            raise UserError(
                f"key {key!r} is not of a TAESD {half}: expected a layer's number first, "
                "such as '3.conv.0.weight'"
            )
        renamed[f"{half}.layers.{int(number) - _SHIFT[half]}.{rest}"] = tensor
    return renamed


def to_original(half: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one original file, from all of ours; the inverse of `from_original`."""
    start, renamed = f"{half}.layers.", {}
    for key, tensor in tensors.items():
        if key.startswith(start):
            number, _, rest = key.removeprefix(start).partition(".")
            renamed[f"{int(number) + _SHIFT[half]}.{rest}"] = tensor
    return renamed


def config_of(tensors: dict[str, Tensor]) -> TinyConfig:
    """The architecture, from our keys and shapes; `UserError` for an unknown network."""
    counts, convs = {}, {}
    for half in _SHIFT:
        layers = _layers(half, tensors)
        convs[half] = [tensors[f"{half}.layers.{n}.weight"] for n, kind in layers if kind == "conv"]
        places = [i for i, (_, kind) in enumerate(layers) if kind == "conv"]
        counts[half] = tuple(b - a - 1 for a, b in pairwise(places))  # blocks between convolutions
        first, *middle, last = convs[half]
        widths = {first.shape[0], last.shape[1]}
        widths |= {size for weight in middle for size in weight.shape[:2]}
        if len(widths) > 1:
            raise UserError(
                f"this {half} has convolutions of widths {sorted(widths)}: a variant of TAESD that "
                "is not supported; expected one width, as in taesd, taesdxl, taesd3, taef1 and "
                "taef2"
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
    """(number, "conv" or "block") of each layer with weights, in order.

    The first and the last are convolutions.
    """
    start, kinds = f"{half}.layers.", dict[int, str]()
    for key in tensors:
        number, _, rest = key.removeprefix(start).partition(".")
        if key.startswith(start) and number.isdecimal():
            plain = rest in ("weight", "bias") and kinds.get(int(number), "conv") == "conv"
            kinds[int(number)] = "conv" if plain else "block"
    layers = sorted(kinds.items())
    convs = [f"{start}{n}.weight" for n, kind in layers if kind == "conv"]
    whole = all(key in tensors and tensors[key].ndim == 4 for key in convs)
    if len(convs) < 3 or not whole or "block" in (layers[0][1], layers[-1][1]):
        raise UserError(
            f"the {half} is not one of TAESD ({len(layers)} layers, {len(convs)} convolutions "
            f"between blocks): give the file of the {half}"
        )
    return layers
