"""GGUF files: numbers by the published block layouts, written out here; notes, shapes and names;
and files that are damaged or of other kinds.
"""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from sfumato.checkpoints.formats.gguf import is_gguf, read_gguf
from sfumato.errors import UserError

RANDOM = np.random.default_rng(0)


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def q8_0(block: bytes) -> list[float]:
    """d, 32 signed bytes."""
    return [half(block[:2]) * signed(b) for b in block[2:]]


def q4_0(block: bytes) -> list[float]:
    """d, 16 bytes: low halves are numbers 0 to 15, high halves 16 to 31, counted from -8."""
    return [half(block[:2]) * ((b & 15) - 8) for b in block[2:]] + [
        half(block[:2]) * ((b >> 4) - 8) for b in block[2:]
    ]


def q4_k(block: bytes) -> list[float]:
    """d, m, 12 bytes with eight scales and eight minima of six bits, 128 bytes of numbers: 32 low
    halves, 32 high ones, and so on.

    The first four scales and minima are the low six bits of bytes 0-3 and 4-7; the last four have
    their low four bits in bytes 8-11 and the high two in the high bits of bytes 0-3 and 4-7.
    """
    d, m, packed, numbers = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    scales = [packed[j] & 63 for j in range(4)] + [
        (packed[j + 8] & 15) | (packed[j] >> 6) << 4 for j in range(4)
    ]
    minima = [packed[j + 4] & 63 for j in range(4)] + [
        (packed[j + 8] >> 4) | (packed[j + 4] >> 6) << 4 for j in range(4)
    ]
    result: list[float] = []
    for j in range(8):
        part = numbers[32 * (j // 2) : 32 * (j // 2) + 32]
        result += [d * scales[j] * (b >> 4 if j % 2 else b & 15) - m * minima[j] for b in part]
    return result


BLOCKS = {
    Kind.Q8_0: (34, 32, q8_0, 1),
    Kind.Q4_0: (18, 32, q4_0, 1),
    Kind.Q4_K: (144, 256, q4_k, 2),
}


def raw(kind: Kind, rows: int, blocks: int) -> np.ndarray:
    """Random blocks with small finite scales."""
    size, _, _, scales = BLOCKS[kind]
    data = RANDOM.integers(0, 256, (rows, blocks, size), np.uint8)
    for k in range(scales):
        data[..., 2 * k : 2 * k + 2] = (
            RANDOM.normal(0, 0.1, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
        )
    return data.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind | None]], **notes: Any) -> Path:
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in notes.items():
        writer.add_array(name, value) if isinstance(value, list) else writer.add_string(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: k.name)
def test_numbers_are_those_of_the_published_layout(kind: Kind, tmp_path: Path) -> None:
    size, count, numbers, _ = BLOCKS[kind]
    data = raw(kind, 3, 2)
    result = read_gguf(write(tmp_path / "a.gguf", {"w": (data, kind)}))
    expected = torch.tensor(
        [
            [x for k in range(2) for x in numbers(row[k * size : (k + 1) * size].tobytes())]
            for row in data
        ]
    )
    value = result.tensors["w"].load()
    assert result.kinds == {"w": kind.name} and value.shape == result.tensors["w"].shape == (
        3,
        2 * count,
    )
    assert torch.allclose(value, expected, rtol=1e-6, atol=1e-7)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize(
    "kind",
    [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1],
    ids=lambda k: k.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_as_near_as_they_were_stored(
    kind: Kind, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = RANDOM.normal(size=(5, 96)).astype(np.float32)
    file = write(
        tmp_path / "a.gguf",
        {
            "b.weight": (gguf.quants.quantize(weights, kind), kind),
            "b.bias": (weights[:, 0].copy(), None),
        },
    )
    result = read_gguf(file, dtype)
    value = result.tensors["b.weight"].load()
    assert value.dtype == result.tensors["b.weight"].dtype == dtype and value.shape == (5, 96)
    error = float((value.float() - torch.from_numpy(weights)).abs().max())
    near = {
        "F32": 0.0,
        "F16": 2e-3,
        "BF16": 2e-2,
        "Q8_0": 2e-2,
        "Q5_0": 0.15,
        "Q5_1": 0.15,
        "Q4_0": 0.3,
        "Q4_1": 0.3,
    }[kind.name]
    assert error <= max(near, 0.02 if dtype is torch.bfloat16 else 0.0)
    assert torch.equal(result.tensors["b.bias"].load(), torch.from_numpy(weights[:, 0]).to(dtype))
    value.zero_()  # its own memory, not the file's
    assert float(result.tensors["b.weight"].load().abs().max()) > 1


def test_notes_and_shapes(tmp_path: Path) -> None:
    """Dimensions are stored from the innermost; ComfyUI notes the shapes of what it had to store in
    another.
    """
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    notes = {"comfy.gguf.orig_shape.b": [1, 6, 2, 2], "general.name": "small"}
    result = read_gguf(
        write(tmp_path / "a.gguf", {"a": (values, None), "b": (values, None)}, **notes)
    )
    assert torch.equal(result.tensors["a"].load(), torch.from_numpy(values))
    assert torch.equal(
        result.tensors["b"].load(), torch.from_numpy(values).reshape(1, 6, 2, 2)
    ) and result.tensors["b"].shape == (1, 6, 2, 2)
    assert (
        result.notes["general.architecture"] == "flux" and result.notes["general.name"] == "small"
    )
    with pytest.raises(UserError, match=r"b has \(2, 3, 4\) and its note"):
        read_gguf(
            write(tmp_path / "b.gguf", {"b": (values, None)}, **{"comfy.gguf.orig_shape.b": [5, 5]})
        )


def test_other_files_are_refused(tmp_path: Path) -> None:
    good = write(
        tmp_path / "good.gguf",
        {"w": (raw(Kind.Q8_0, 4, 2), Kind.Q8_0), "v": (np.ones(40, np.float32), None)},
    )
    assert is_gguf(good) and not is_gguf(tmp_path) and not is_gguf(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="is missing"):
        read_gguf(tmp_path / "none.gguf")
    for name, data in {"empty": b"", "other": b"PK\x03\x04" * 9}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="is not a GGUF file"):
            read_gguf(tmp_path / name)
    whole = good.read_bytes()
    for cut in range(4, len(whole) - 1, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.gguf is not a whole GGUF file"):
            read_gguf(tmp_path / "cut.gguf")


def test_damaged_tables_are_refused_or_read(tmp_path: Path) -> None:
    """Any wrong byte of the table raises sfumato's own error or none, and never loops."""
    notes = {"words": ["a", "bc"], "numbers": [1, 2, 3]}
    good = write(
        tmp_path / "good.gguf", {"w": (raw(Kind.Q8_0, 4, 2), Kind.Q8_0)}, **notes
    ).read_bytes()
    refused = 0
    for place in range(4, 260):
        data = bytearray(good)
        data[place] ^= 0x81
        (tmp_path / "bent.gguf").write_bytes(bytes(data))
        try:
            for lazy in read_gguf(tmp_path / "bent.gguf").tensors.values():
                lazy.load()
        except UserError:
            refused += 1
    assert refused > 50
    long = good.replace(
        b"\x03" + bytes(7) + b"\x01\x00\x00\x00\x02",
        b"\x03" + bytes(5) + b"\x77\x00\x01\x00\x00\x00\x02",
    )
    assert long != good  # three numbers become a number of numbers that no machine counts
    (tmp_path / "long.gguf").write_bytes(long)
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        read_gguf(tmp_path / "long.gguf")


def test_kinds_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"n holds whole numbers \(I32\)"):
        read_gguf(write(tmp_path / "a.gguf", {"n": (np.ones(4, np.int32), None)}))
    with pytest.raises(UserError, match="holds no tensors"):
        read_gguf(write(tmp_path / "b.gguf", {}))
    good = write(tmp_path / "c.gguf", {"w": (raw(Kind.Q8_0, 4, 8), Kind.Q8_0)})
    name = good.read_bytes().index(b"w\x02\x00\x00\x00")
    data = bytearray(good.read_bytes())
    # Q8_K, which is for sums in a processor and never for files
    data[name + 5 + 16 : name + 5 + 20] = struct.pack("<I", 15)
    (tmp_path / "d.gguf").write_bytes(bytes(data) + bytes(4096))
    with pytest.raises(
        UserError, match="w is stored as Q8_K, which the installed package gguf cannot read"
    ):
        read_gguf(tmp_path / "d.gguf")
