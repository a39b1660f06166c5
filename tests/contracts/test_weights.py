"""Looking for NaN and infinity beside a memory-mapped file: what it finds is what looking at the
tensors finds, and no page becomes resident.
"""

import sys
from pathlib import Path

import pytest
import torch

from sfumato.errors import UserError
from sfumato.io.atomic import read_tensors, write_tensors
from sfumato.io.safetensors import looked_at, require_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LARGE = 5_000_001  # more numbers than are read at a time, and no round count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, LARGE // 2, LARGE - 1])
def test_one_wrong_number_is_detected(
    dtype: torch.dtype, value: float, place: int, tmp_path: Path
) -> None:
    wrong = torch.ones(LARGE, dtype=dtype)
    wrong[place] = value
    file = tmp_path / "model.safetensors"
    write_tensors(
        file,
        {
            "a": torch.ones(7, dtype=dtype),
            "b.weight": wrong,
            "c": torch.zeros(3, dtype=torch.int64),
        },
    )
    tensors = read_tensors(file)
    messages = []
    for look in (lambda: looked_at([file], tensors, dtype), lambda: require_finite(tensors, file)):
        with pytest.raises(UserError, match=r"b\.weight has NaN or infinite numbers") as error:
            look()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sound_files_pass(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also numbers whose sum is infinite, empty tensors and scalars."""
    file = tmp_path / "model.safetensors"
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    write_tensors(
        file,
        {
            "large": large,
            "empty": torch.empty(0, 3, dtype=dtype),
            "one": torch.tensor(1.0, dtype=dtype),
        },
    )
    assert looked_at([file], read_tensors(file), dtype)


def test_converted_files_are_checked_after_the_conversion(tmp_path: Path) -> None:
    """70000 overflows float16: the file is sound, its conversion is not."""
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"a": torch.full((3,), 70000.0)})
    assert not looked_at([file], read_tensors(file), torch.float16)
    assert not looked_at([tmp_path / "model.bin"], read_tensors(file), torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of memory")
def test_no_page_of_the_mapping_becomes_resident(tmp_path: Path) -> None:
    def mapped() -> int:
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssFile")
        )
        return int(line.split()[1]) * 1024

    file = tmp_path / "model.safetensors"
    write_tensors(file, {"a": torch.ones(2**24)})
    tensors = read_tensors(file)
    before = mapped()
    assert looked_at([file], tensors, torch.float32)
    assert mapped() - before < 2**23
    require_finite(tensors, file)
    assert mapped() - before > 2**25, "otherwise the test would hold for any way to look"
