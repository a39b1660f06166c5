"""Weights of eight bits: what fits is stored as it rounds, what does not is refused; NaN is found;
scales are multiplied, in every layout.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.checkpoints.lazy_tensor import (
    apply_scales,
    cast_for_storage,
    from_tensors,
    quantize_scaled,
    unscaled,
    write_file,
)
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.errors import NumericalError, UserError
from sfumato.io.atomic import read_tensors, write_streamed, write_tensors
from sfumato.io.safetensors import cast, looked_at, require_finite, scaled, storable

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
EVERY = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize(("dtype", "largest"), [(E4, 448.0), (E5, 57344.0)])
def test_range(dtype: torch.dtype, largest: float) -> None:
    fine = torch.tensor([0.0, 1.0, -0.3, largest, -largest])
    assert torch.equal(cast(fine, dtype).float(), fine.to(dtype).float())
    assert storable({"a": fine}, dtype)["a"].dtype == dtype
    for wrong in (largest * 1.001, -1e9, float("inf"), float("nan")):
        with pytest.raises(
            NumericalError,
            match=rf"weight b\.weight is NaN or beyond {largest:g}, the largest number of float8",
        ):
            storable({"a": fine, "b.weight": torch.tensor([1.0, wrong])}, dtype)


@pytest.mark.parametrize("dtype", [E4, E5])
def test_every_byte_that_is_no_number_is_detected(dtype: torch.dtype, tmp_path: Path) -> None:
    """In memory and in the file, one byte at a time: what torch calls finite in float32 is."""
    for byte in range(256):
        value = torch.cat([torch.zeros(5, dtype=torch.uint8), EVERY[byte : byte + 1]]).view(dtype)
        finite = bool(value.float().isfinite().all())
        file = tmp_path / "a.safetensors"
        save_file({"w": value}, file)
        for look in (
            lambda v=value: require_finite({"w": v}, "a"),
            lambda v=value, f=file: looked_at([f], {"w": v}, dtype),
        ):
            if finite:
                look()
            else:
                with pytest.raises(UserError, match="w has NaN or infinite numbers"):
                    look()


def test_scales() -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(E4)
    for scale in (
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.tensor([[0.5]]),
        torch.full((4,), 0.5),
        torch.full((4, 1), 0.5),
    ):
        assert torch.equal(scaled("w", weight, scale), weight.float() / 2)
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(scaled("w", weight, rows[:, None]), weight.float() * rows[:, None])
    for scale in (torch.ones(3), torch.ones(1, 4, 1), torch.ones(2, 2), torch.ones(4, 3)):
        if scale.numel() != 4 or 4 not in scale.shape:
            with pytest.raises(UserError, match="the scale of w has shape"):
                scaled("w", weight, scale)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_files_with_scales_are_read(name: str) -> None:
    weight, half = torch.full((2, 2), 3.0).to(E4), torch.full((2, 2), 3.0, dtype=torch.bfloat16)
    beside = {
        "a.input_scale": torch.ones(()),
        "a.scale_input": torch.ones(()),
        "scaled_fp8": torch.empty(0, dtype=E4),
    }
    table = {
        "a.weight": weight,
        f"a.{name}": torch.tensor(0.25),
        "a.bias": half[0],
        "b.weight": weight,
        "c.weight": half,
        **beside,
    }
    mark = list(b'{"format": "float8_e4m3fn"}')
    table |= {"a.comfy_quant": torch.tensor(mark, dtype=torch.uint8)}
    result = unscaled(table)
    assert result.keys() == {"a.weight", "a.bias", "b.weight", "c.weight"}
    assert (
        torch.equal(result["a.weight"], torch.full((2, 2), 0.75)) and result["b.weight"] is weight
    )
    lazy = apply_scales(from_tensors(table))
    assert {k: v.dtype for k, v in lazy.items()} == {
        "a.weight": torch.bfloat16,
        "a.bias": torch.bfloat16,
        "b.weight": E4,
        "c.weight": torch.bfloat16,
    }
    assert torch.equal(lazy["a.weight"].load().float(), result["a.weight"])
    # a scale of a tensor that is not in eight bits stays, to be refused
    other = unscaled({"c.weight": half, f"c.{name}": torch.ones(())})
    assert f"c.{name}" in other
    for text, words in (
        (b'{"format": "nvfp4"}', "format 'nvfp4' are not supported: expected float8_e4m3fn"),
        (b"{}", "no mark of a quantised layer"),
        (bytes(3), "no mark of a quantised layer"),
    ):
        with pytest.raises(UserError, match=rf"^a\.comfy_quant.* {words}"):
            unscaled(table | {"a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)})
    with pytest.raises(UserError, match=r"a\.weight has two scales"):
        unscaled(table | {"a.scale_weight": torch.ones(()), "a.weight_scale": torch.ones(())})


def test_scaled_weights_keep_their_digits() -> None:
    """Weights of any size, also far below and beyond the format's: to four bits of mantissa, and
    the largest is never cut.
    """
    torch.manual_seed(0)
    for size in (1e-9, 1e-3, 1.0, 1e6):
        weight = size * torch.randn(31, 17)
        table = from_tensors(
            {"a.weight": weight, "a.bias": weight[0].bfloat16(), "z.weight": torch.zeros(2, 2)}
        )
        held = {k: v.load() for k, v in quantize_scaled(table).items()}
        assert (
            held["a.weight"].dtype == E4
            and held["a.scale_weight"].shape == ()
            and held["a.bias"].dtype == torch.bfloat16
        )
        assert float(held["a.weight"].float().abs().max()) == 448
        back = unscaled(held)
        assert back.keys() == {"a.weight", "a.bias", "z.weight"}
        assert (
            (back["a.weight"] - weight).abs() <= weight.abs() / 15 + weight.abs().max() * 2**-18
        ).all()
        assert torch.equal(back["z.weight"], torch.zeros(2, 2))


def test_only_weights_of_layers_are_stored_in_eight_bits() -> None:
    table = {
        "a.weight": torch.ones(2, 2),
        "a.bias": torch.ones(2),
        "n.weight": torch.ones(2),
        "table": torch.ones(2, 2),
        "count": torch.ones(2).long(),
    }
    kinds = {k: v.load().dtype for k, v in cast_for_storage(from_tensors(table), E4).items()}
    half = torch.bfloat16
    assert kinds == {
        "a.weight": E4,
        "a.bias": half,
        "n.weight": half,
        "table": half,
        "count": torch.int64,
    }
    assert {
        k: v.load().dtype
        for k, v in cast_for_storage(
            from_tensors(table | {"a.bias": torch.ones(2).to(E4)}), None
        ).items()
    }["a.bias"] == E4
    with pytest.raises(NumericalError, match="beyond 448"):
        cast_for_storage(from_tensors({"a.weight": torch.full((2, 2), 500.0)}), E4)[
            "a.weight"
        ].load()


KL: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def test_a_part_in_eight_bits_is_opened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = AutoencoderKL(KLConfig.from_dict(KL)).eval()
    save_part(tmp_path / "plain", network, E4)
    rounded = {k: v.to(E4).float() for k, v in network.state_dict().items()}
    opened = load_part(tmp_path / "plain").state_dict()
    assert (
        all(torch.equal(opened[k], rounded[k]) for k in rounded) and opened.keys() == rounded.keys()
    )
    file = tmp_path / "plain" / "diffusion_pytorch_model.safetensors"
    key = "encoder.conv_in.weight"
    write_tensors(file, load_file(file) | {"encoder.conv_in.weight_scale": torch.tensor(2.0)})
    again = load_part(tmp_path / "plain", dtype=torch.bfloat16).state_dict()
    assert torch.equal(again[key], (2 * rounded[key]).bfloat16()) and torch.equal(
        again["encoder.conv_in.bias"], opened["encoder.conv_in.bias"].bfloat16()
    )
    write_tensors(file, load_file(file) | {"encoder.conv_in.weight_scale": torch.ones(3)})
    with pytest.raises(
        UserError,
        match=r"diffusion_pytorch_model\.safetensors: the scale of encoder\.conv_in\.weight",
    ):
        load_part(tmp_path / "plain")


KINDS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    E4,
    E5,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def test_files_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Every kind, also scalars and empty tensors, is read by safetensors and by sfumato.

    Tensors are aligned, and the bytes do not depend on the order of the table.
    """
    torch.manual_seed(0)
    tensors = {f"t{k}": (100 * torch.rand(3, k + 1)).to(kind) for k, kind in enumerate(KINDS)}
    tensors |= {
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4, dtype=E4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    file, count = tmp_path / "a.safetensors", []
    write_file(file, from_tensors(tensors), {"note": "ä"}, lambda: count.append(1))
    result = read_tensors(file)
    assert result.keys() == tensors.keys() and len(count) == len(tensors)
    assert all(
        torch.equal(
            result[k].view(torch.uint8) if k != "one" else result[k],
            v.contiguous().view(torch.uint8) if k != "one" else v,
        )
        for k, v in tensors.items()
    )
    data = file.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert head.pop("__metadata__") == {"format": "pt", "note": "ä"}
    for k, entry in head.items():
        assert (8 + int.from_bytes(data[:8], "little") + entry["data_offsets"][0]) % tensors[
            k
        ].dtype.itemsize == 0


def test_a_file_that_is_not_as_announced_is_not_written(tmp_path: Path) -> None:
    one, table = torch.ones(2), {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    file = tmp_path / "a.safetensors"
    for tensors in (
        [("a", one)],
        [("b", one), ("a", one)],
        [("a", one.half()), ("b", one)],
        [("a", one), ("b", torch.ones(3))],
        [("a", one), ("b", one), ("c", one)],
    ):
        with pytest.raises(ValueError, match="was announced"):
            write_streamed(file, table, iter(tensors))
    with pytest.raises(ValueError, match="numbers of 4 bytes after those of 2"):
        write_streamed(file, {"a": (torch.float16, (2,)), "b": (torch.float32, (2,))}, iter([]))
    assert not [*tmp_path.iterdir()]
    write_streamed(file, table, iter([("a", one), ("b", one)]))
    assert read_tensors(file).keys() == {"a", "b"}
