"""Latency of one image beside busy processes, by threads and by their way of waiting.

    python benchmarks/busy_neighbour.py [--busy 0 1] [--repeats 15]

Each way runs in a process of its own, `torch` and the model loaded: "one thread"; "spinning" is
GNU OpenMP's default, by which a waiting thread spins for milliseconds; "sfumato" is what
`import sfumato` sets (about 50 microseconds), and a run that adapts its threads; "sfumato after
torch" is the same where `torch` was imported first (inference/threads.py). The limit is the time of
one thread beside as many busy processes as leave it a core.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

from _common import print_header, print_row

WAYS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "spinning, not adapted": {"GOMP_SPINCOUNT": "300000", "FIXED_THREADS": "1"},
    "sfumato": {"GOMP_SPINCOUNT": "10000"},
    "sfumato after torch": {},
}


def measure(repeats: int) -> None:
    """Print the seconds of the first image and of the later ones, in this process."""
    import sfumato.model
    from sfumato.loading import load

    if "FIXED_THREADS" in os.environ:
        sfumato.model.adapted_threads = nullcontext
    model = load("fashion").optimized()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model.generate("ankle boot", n=1)
        seconds.append(time.perf_counter() - begin)
    print(seconds[0], statistics.median(seconds[1:]), max(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1], help="busy processes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.repeats)
        return
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}\n")
    print_header("busy processes", "way", "first image, s", "median, s", "longest, s")
    for count in options.busy:
        neighbours = [subprocess.Popen([sys.executable, "-c", "while 1: 0"]) for _ in range(count)]
        try:
            for name, environment in WAYS.items():
                command = [sys.executable, __file__, "--measure", "--repeats", str(options.repeats)]
                done = subprocess.run(
                    command, env={**os.environ, **environment}, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
                print_row(str(count), name, *(f"{float(s):.2f}" for s in done.stdout.split()))
        finally:
            for neighbour in neighbours:
                neighbour.kill()


if __name__ == "__main__":
    main()
