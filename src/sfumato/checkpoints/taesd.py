"""Tiny autoencoders from the files in which their author publishes them: an encoder and a decoder,
without a config.

    taef2_encoder.safetensors  taef2_decoder.safetensors

They hold no numbers but the weights: the architecture is read from keys and shapes (`names.taesd`).
"""

from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.folder import load_part
from sfumato.checkpoints.names.taesd import config_of, from_original, to_original
from sfumato.compress.tiny import AutoencoderTiny
from sfumato.errors import UserError
from sfumato.io.atomic import read_tensors, write_tensors
from sfumato.io.safetensors import check_keys, require_finite

_HALVES = ("encoder", "decoder")


def load_taesd(
    source: str | Path, decoder: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> AutoencoderTiny:
    """A tiny autoencoder in eval mode, in `dtype`.

    source   a folder with config.json (diffusers' layout) or with one pair of files
             *encoder.safetensors and *decoder.safetensors; one file with both halves under
             diffusers' names; or the encoder's file, and then
    decoder  the decoder's file

    `UserError` for anything else, for a variant that is not known, and for weights that are NaN or
    infinite.
    """
    source = Path(source)
    if source.is_dir() and decoder is None and (source / "config.json").exists():
        found = load_part(source, dtype=dtype)
        if not isinstance(found, AutoencoderTiny):
            raise UserError(f"{source} holds a {type(found).__name__}: expected an AutoencoderTiny")
        return found
    if source.is_dir():
        if decoder is not None:
            raise UserError(
                f"{source} is a folder and a decoder was given too: give the encoder's file with the decoder's, or the folder alone"
            )
        source, decoder = _pair(source)
    if decoder is None:
        tensors, where = read_weights(source), str(source)
    else:
        tensors, where = {}, f"{source} with {decoder}"
        for half, file in zip(_HALVES, (source, Path(decoder)), strict=True):
            try:
                tensors |= from_original(half, read_weights(file))
            except UserError as error:
                raise UserError(
                    str(error) if str(file) in str(error) else f"{file}: {error}"
                ) from error
    return _build(tensors, where, dtype)


def _pair(folder: Path) -> tuple[Path, Path]:
    """The one encoder and the one decoder in a folder."""
    found = [
        sorted(
            p
            for p in folder.iterdir()
            if p.stem.endswith(half) and p.suffix in (".safetensors", ".pth")
        )
        for half in _HALVES
    ]
    if [len(files) for files in found] != [1, 1] or found[0][0].stem.removesuffix(
        "encoder"
    ) != found[1][0].stem.removesuffix("decoder"):
        names = ", ".join(p.name for files in found for p in files) or "none"
        raise UserError(
            f"{folder} has no config.json, and of files that end in encoder or decoder {names}: expected one pair; name the two files"
        )
    return found[0][0], found[1][0]


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth file that holds nothing else (a pickle with code
    in it is refused).
    """
    if file.suffix != ".pth":
        return read_tensors(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: expected a file of weights there") from error
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds
        raise UserError(
            f"{file} is not a whole file of weights and nothing else ({type(error).__name__}): copy or download it again"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise UserError(f"{file} holds a {type(found).__name__}: expected names with tensors")
    return found


def _build(tensors: dict[str, Tensor], where: str, dtype: torch.dtype) -> AutoencoderTiny:
    try:
        with torch.device("meta"):
            network = AutoencoderTiny(config_of(tensors))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    check_keys(network.state_dict(), tensors, where)
    ready = {k: v.to(dtype) for k, v in tensors.items()}
    require_finite(ready, where)
    network.load_state_dict(ready, assign=True)
    return network.eval().requires_grad_(False)


def save_taesd(
    stem: str | Path, autoencoder: AutoencoderTiny, dtype: torch.dtype = torch.float16
) -> tuple[Path, Path]:
    """Writes `<stem>_encoder.safetensors` and `<stem>_decoder.safetensors` with the original keys,
    in `dtype`, and returns both paths.
    """
    stem = Path(stem)
    weights = {k: v.to(dtype) for k, v in autoencoder.state_dict().items()}
    require_finite(weights, f"the autoencoder in {str(dtype).removeprefix('torch.')}")
    paths = (
        stem.with_name(f"{stem.name}_encoder.safetensors"),
        stem.with_name(f"{stem.name}_decoder.safetensors"),
    )
    for half, path in zip(_HALVES, paths, strict=True):
        write_tensors(path, to_original(half, weights))
    return paths
