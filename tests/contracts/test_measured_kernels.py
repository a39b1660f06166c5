"""Kernels are chosen by their times on the machine at hand, which are kept in files.

Times are those of a clock that the kernels themselves set forward.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.models import randomised
from sfumato.errors import UserError
from sfumato.inference import prepack as packing
from sfumato.inference.prepack import Convolution, UpsamplePhases, UpsampleWhole, Winograd, prepack
from sfumato.kernels import batch_invariant, measured
from sfumato.nn.blocks import Upsample


class Clock:
    """A clock for `measured`, and kernels that take so many seconds each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def kernels(self, **seconds: float) -> dict[str, Callable[[], Callable[[], None]]]:
        def prepare(name: str) -> Callable[[], None]:
            def call() -> None:
                self.runs.append(name)
                self.now += seconds[name]

            return call

        return {name: lambda name=name: prepare(name) for name in seconds}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measured, "time", clock)
    monkeypatch.setattr(measured, "_SECONDS", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SFUMATO_KERNELS", "measured")
    return clock


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin another process."""
    monkeypatch.setattr(measured, "_SECONDS", {})


@pytest.mark.parametrize(("first", "second", "chosen"), [(1, 2, "a"), (2, 1, "b"), (1, 0.95, "a")])
def test_faster_kernel_is_taken_and_the_first_unless_it_is_clearly_slower(
    clock: Clock, first: float, second: float, chosen: str
) -> None:
    assert measured.fastest("kind", clock.kernels(a=first, b=second)) == chosen
    assert {"a", "b"} == set(clock.runs)


def test_times_are_kept_for_later_processes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured.fastest("kind", clock.kernels(a=2, b=1)) == "b"
    clock.runs.clear()
    forget(monkeypatch)
    # the times have changed, and the bits of a request must not
    assert measured.fastest("kind", clock.kernels(a=1, b=2)) == "b"
    assert clock.runs == []
    assert measured.measurements() == {"kind": {"a": 2.0, "b": 1.0}}
    assert measured.fastest("another kind", clock.kernels(a=1, b=2)) == "a"
    assert measured.fastest("kind", clock.kernels(a=1, b=2, c=0.1)) == "c"  # not measured yet


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 0}', '{"seconds": {"a": 0}}']
)
def test_broken_file_is_measured_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    assert measured.fastest("kind", clock.kernels(a=2, b=1)) == "b"
    (file,) = measured.folder().glob("*.json")
    file.write_text(content)
    forget(monkeypatch)
    clock.runs.clear()
    assert measured.fastest("kind", clock.kernels(a=1, b=2)) == "a"
    assert clock.runs
    assert json.loads(file.read_text())["seconds"] == {"a": 1.0, "b": 2.0}


def test_folder_that_cannot_be_written_is_reported_once(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measured._report_unwritten.cache_clear()
    for kind in ("kind", "another"):
        assert measured.fastest(kind, clock.kernels(a=2, b=1)) == "b"
    assert measured.fastest("kind", clock.kernels(a=1, b=2)) == "b"  # of this process
    assert caplog.text.count("SFUMATO_KERNELS=fixed") == 1


def test_other_threads_and_limits_are_other_machines(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    before = measured.folder()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    threads = measured.folder()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    measured._machine.cache_clear()  # of a process, whose environment stays
    assert len({before, threads, measured.folder()}) == 3
    measured._machine.cache_clear()


def test_fixed_measures_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_KERNELS", "fixed")
    assert measured.fastest("kind", clock.kernels(a=2, b=1)) == "a"
    assert not clock.runs and not measured.folder().exists()
    monkeypatch.setenv("SFUMATO_KERNELS", "fast")
    with pytest.raises(UserError, match="SFUMATO_KERNELS='fast': expected 'measured', or 'fixed'"):
        measured.fastest("kind", clock.kernels(a=2, b=1))


oneDNN = pytest.mark.skipif(
    not batch_invariant.FIXED_ORDER, reason="networks are packed for oneDNN on AVX2 or later"
)


@oneDNN
@pytest.mark.parametrize("last", [False, True], ids=["preferred", "other"])
def test_each_kernel_of_a_packed_network_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    kinds: list[str] = []

    def choose(kind: str, kernels: Mapping[str, object]) -> str:
        kinds.append(kind)
        return list(kernels)[-1 if last else 0]

    monkeypatch.setattr(packing, "fastest", choose)
    network = randomised(nn.Sequential(batch_invariant.Conv2d(256, 256, 3, 1, 1), Upsample(256)))
    packed = prepack(network)
    kernels = (Convolution, UpsampleWhole) if last else (Winograd, UpsamplePhases)
    assert [type(layer) for layer in packed.children()] == [*kernels]
    assert kinds == [
        "3x3 convolution of 256 channels, 64 x 64, float32",
        "upsampling of 256 channels, 64 x 64, float32",
    ]
    x = torch.randn(2, 256, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), network(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(packed(x)[1:], packed(x[1:]))
    for name, value in packed.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


@oneDNN
def test_measured_kernels_of_a_layer_run(clock: Clock) -> None:
    """The real kernels can be timed, and leave torch's random state as it was."""
    del clock  # it stands still: the preferred kernel is taken
    layer = batch_invariant.Conv2d(256, 256, 3, 1, 1).requires_grad_(False)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        packed = prepack(nn.Sequential(layer))
    assert isinstance(packed[0], Winograd)
    assert [*measured.measurements()] == []  # times of 0 seconds are not sound
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(not batch_invariant._BFLOAT16, reason="bfloat16 of oneDNN")
@pytest.mark.parametrize("kernel", ["float32", "bfloat16", "blockwise"])
def test_each_kernel_of_attention_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    offered: list[list[str]] = []

    def choose(kind: str, kernels: Mapping[str, object]) -> str:
        offered.append([*kernels])
        assert kind == "attention in bfloat16, 1 heads of 64, 2048 x 2048 tokens"
        return kernel

    monkeypatch.setattr(batch_invariant, "fastest", choose)
    q, k, v = (
        torch.randn(1, 2050, 1, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for seed in range(3)
    )
    with torch.no_grad():
        y = batch_invariant.attend(q, k, v)
        exact = F.scaled_dot_product_attention(*(p.transpose(1, 2).double() for p in (q, k, v)))
    assert offered == [["blockwise", "float32", "bfloat16"]]
    error = (y - exact.transpose(1, 2).flatten(2)).norm() / exact.norm()
    assert float(error) < 1e-2
