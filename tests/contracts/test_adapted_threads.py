"""The number of threads of a run follows the processors that it gets, and never its images.

The clock and the number of threads are the test's own.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from threading import Thread, current_thread, main_thread

import pytest
import torch
from torch import Tensor

from sfumato.inference import threads
from sfumato.inference.threads import ThreadChoice, adapted_threads


class Machine:
    """A machine with a clock: calls take so many seconds by their number of threads."""

    def __init__(self, count: int):
        self.count = count
        self.now = self.used = 0.0
        self.seconds: dict[int, float] = {}
        self.scale = 1.0
        self.calls: list[int] = []
        self.result = {count: torch.ones(1)}

    def get_num_threads(self) -> int:
        return self.count

    def set_num_threads(self, count: int) -> None:
        if current_thread() is main_thread():
            self.count = count

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used

    def quiet(self) -> None:
        self.seconds = {4: 1 / 4, 2: 1 / 2, 1: 1.0}

    def busy(self) -> None:
        """Threads wait for one that has no processor."""
        self.seconds = {4: 1.9, 2: 1.5, 1: 1.1}

    def rate(self, count: int, most: int) -> float:
        """Return the rate of the small computation; it is no call."""
        assert count <= most == 4
        return 1 / self.seconds[count]

    def call(self) -> Tensor:
        self.calls.append(self.count)
        seconds = self.seconds[self.count]
        self.now += self.scale * seconds
        self.used += self.scale * (min(1.0, seconds) if self.seconds[4] > 1 else 1.0)
        return self.result.get(self.count, torch.ones(1))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(4)
    monkeypatch.setattr(torch, "get_num_threads", machine.get_num_threads)
    monkeypatch.setattr(torch, "set_num_threads", machine.set_num_threads)
    monkeypatch.setattr(threads, "time", machine)
    monkeypatch.setattr(threads, "_rate", machine.rate)
    yield machine


def run(machine: Machine, choice: ThreadChoice, calls: int) -> list[int]:
    """Make so many calls, and return the numbers of threads of all that ran."""
    machine.calls.clear()
    with adapted_threads():
        for _ in range(calls):
            assert torch.equal(choice("kind", machine.call), torch.ones(1))
    assert machine.count == 4, "the number of threads is restored"
    return machine.calls


def begun_quiet(machine: Machine) -> ThreadChoice:
    """Return a choice whose first call was on a quiet machine."""
    choice = ThreadChoice()
    machine.quiet()
    assert run(machine, choice, 1) == [4]
    return choice


def test_quiet_machine_keeps_all_threads(machine: Machine) -> None:
    machine.quiet()
    assert run(machine, ThreadChoice(), 50) == [4] * 50


def test_busy_machine_begins_with_one_thread(machine: Machine) -> None:
    machine.busy()
    assert run(machine, ThreadChoice(), 50) == [1] * 50


def test_begins_with_the_threads_that_help(machine: Machine) -> None:
    machine.busy()
    machine.seconds[2] = 0.9
    assert run(machine, ThreadChoice(), 1) == [2]


def test_the_number_follows_the_machine(machine: Machine) -> None:
    choice = begun_quiet(machine)
    machine.busy()
    # each trial halves the threads
    assert run(machine, choice, 5) == [4, 2, 2, 1, 1, 1, 1]
    assert run(machine, choice, 4) == [1] * 4
    machine.quiet()
    calls = run(machine, choice, 200)
    assert calls[-100:] == [4] * 100


def test_more_threads_are_not_tried_on_a_busy_machine(machine: Machine) -> None:
    choice = begun_quiet(machine)
    machine.busy()
    assert run(machine, choice, 2000)[4:] == [1] * 1998


def test_trials_of_more_threads_that_do_not_help_the_network_become_rare(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.busy()
    choice = ThreadChoice()
    run(machine, choice, 1)
    monkeypatch.setattr(threads, "_rate", lambda count, most: count)
    calls = run(machine, choice, 2000)
    assert 0 < sum(count > 1 for count in calls) < 10


def test_a_trial_that_had_bad_luck_is_made_again_soon(machine: Machine) -> None:
    choice = begun_quiet(machine)
    machine.busy()
    machine.seconds[2] = 3.0  # once, for fewer threads
    assert 1 not in run(machine, choice, 4)
    machine.busy()
    assert 1 in run(machine, choice, 20)


def test_kinds_begin_with_the_threads_of_the_latest_call(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.busy()
    choice = ThreadChoice()
    run(machine, choice, 1)
    monkeypatch.setattr(threads, "_rate", None)
    with adapted_threads():
        choice("another", machine.call)
    assert machine.calls == [1, 1]


def test_short_calls_are_warmed_up_before_their_trial(machine: Machine) -> None:
    """The first call with a number of threads chooses and prepares kernels."""
    machine.scale = 1 / 20
    choice = begun_quiet(machine)
    machine.busy()
    assert run(machine, choice, 3) == [4, 2, 2, 2, 1, 1, 1]


def test_interrupted_threads_have_waited(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that spins uses its processor while it waits."""
    choice = begun_quiet(machine)
    switches = iter(range(0, 10**6, 60))
    monkeypatch.setattr(threads, "_interruptions", lambda: next(switches))
    machine.seconds[2] = 0.2
    assert run(machine, choice, 2) == [4, 2, 2, 1]


def test_threads_stay_where_bits_would_change(machine: Machine) -> None:
    choice = begun_quiet(machine)
    machine.busy()
    machine.result = {4: torch.ones(1), 2: torch.full((1,), 1 + 1e-6), 1: torch.ones(1)}
    calls = run(machine, choice, 500)
    assert [count for count in calls if count != 4] == [2], "one trial, whose bits differ"


def test_nothing_is_adapted_outside_a_run_and_with_one_thread(machine: Machine) -> None:
    machine.busy()
    choice = ThreadChoice()
    for _ in range(5):
        choice("kind", machine.call)
    assert machine.calls == [4] * 5
    machine.count = 1
    machine.calls.clear()
    with adapted_threads():
        for _ in range(5):
            choice("kind", machine.call)
    assert machine.calls == [1] * 5


def test_long_calls_take_all_threads(machine: Machine) -> None:
    machine.seconds = {4: 8.0, 2: 9.0, 1: 20.0}
    assert run(machine, ThreadChoice(), 5) == [4] * 5
    machine.seconds = {4: 12.0, 2: 11.0, 1: 10.0}
    assert run(machine, ThreadChoice(), 5) == [1, 4, 4, 4, 4]


def test_inner_block_keeps_the_threads_of_the_outer(machine: Machine) -> None:
    machine.busy()
    choice = ThreadChoice()
    with adapted_threads():
        run_inner(choice, machine)
        assert machine.count == 1
    assert machine.count == 4


def run_inner(choice: ThreadChoice, machine: Machine) -> None:
    with adapted_threads():
        for _ in range(6):
            choice("kind", machine.call)


def test_other_python_threads_keep_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sets the number of those that begin later, too."""
    before, numbers = torch.get_num_threads(), list[int]()
    choice = ThreadChoice()

    def timed(compute: Callable[[], Tensor]) -> tuple[Tensor, float, bool]:
        return compute(), torch.get_num_threads() / 10, True  # fewer threads are faster

    monkeypatch.setattr(threads, "_timed", timed)
    try:
        torch.set_num_threads(3)
        with adapted_threads():
            for _ in range(2):
                choice("kind", lambda: torch.ones(1))
            assert torch.get_num_threads() == 1
            beside = Thread(target=lambda: numbers.append(torch.get_num_threads()))
            beside.start()
            beside.join()
        assert [*numbers, torch.get_num_threads()] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_the_small_computation_changes_no_number_of_threads() -> None:
    before, numbers = torch.get_num_threads(), list[int]()
    try:
        torch.set_num_threads(3)
        assert threads._useful_threads(3, 3) in (1, 3)
        beside = Thread(target=lambda: numbers.append(torch.get_num_threads()))
        beside.start()
        beside.join()
        assert [*numbers, torch.get_num_threads()] == [3, 3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("first", "variables", "expected"),
    [
        ("", {}, "10000"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import sys, types; sys.modules['torch'] = types.ModuleType('torch')", {}, "None"),
    ],
)
def test_spinning_is_limited_before_torch_is_loaded_unless_it_is_set(
    monkeypatch: pytest.MonkeyPatch, first: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = f"{first}\nimport os, sfumato\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
