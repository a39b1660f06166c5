"""Bitwise comparison of two versions: pictures, latents, files and trained weights.

    python benchmarks/behaviour.py --before CHECKOUT [--after CHECKOUT] [--only WORDS]
                                   [--work FOLDER] [--quiet] [--arrays] [--threads N] [--list]

CHECKOUT is a clone or worktree of another commit. --after is by default the checkout of this
file. The old code makes fixtures: small random models of every family in every container,
pictures with metadata, and interrupted training runs. Then each version runs all cases on them,
in a process of its own with the same number of threads. So the new code also shows that it
opens what the old code wrote.

The table has a line for each case: its name, CPU seconds before and after, and the result.

    equal      the same dtypes, shapes and bytes; or the same class of exception, where a case
               is meant to raise
    DIFFERS    the largest difference and its place; or an error, or a case of one version only

Texts, such as the metadata of pictures and the configs of saved models, are compared key by key.
Their differences are printed as notes and don't count. The exit code is 1 if a case differs.

--only     runs the cases whose names contain one of the words, separated by commas
--work     keeps the fixtures and the results of the old code in a folder (half a gigabyte), and
           uses them again while that code, the cases and the libraries stay the same
--quiet    prints the lines of cases that differ
--arrays   keeps the tensors of saved files and what the cases write; without it, of tensors in
           files only the hashes are compared
--list     prints the names of the cases

A run takes about 30 s of one CPU core for the fixtures and 230 s for each version. The cases are
in benchmarks/_behaviour. A public name that changes gets its new name in names.py there.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

NOTES = 60
"""Notes that are printed, the most frequent first."""

MANY = 100
"""Keys from which an object is compared as a whole: vocabularies."""

HERE = Path(__file__).resolve().parent
FIXTURES = ("fixtures", "models", "encoders", "training", "commands", "names")
LIBRARIES = (
    "torch",
    "numpy",
    "pillow",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "accelerate",
)


@dataclass(frozen=True)
class Verdict:
    """A case's line in the table.

    good: it counts as equal. seconds: of CPU, before and after. notes: differences between texts.
    """

    name: str
    good: bool
    result: str
    seconds: tuple[float, float] = (0.0, 0.0)
    notes: tuple[str, ...] = ()


def main() -> int:
    """Make fixtures, run both versions, print the table."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/behaviour.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--before", type=Path, required=True, metavar="CHECKOUT", help="a checkout of the old code"
    )
    parser.add_argument(
        "--after",
        type=Path,
        default=HERE.parent,
        metavar="CHECKOUT",
        help="a checkout of the new code",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="run the cases whose name contains one of these, separated by commas",
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep fixtures and old results here"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--arrays",
        action="store_true",
        help="keep the tensors of files too, to say by how much they differ",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print the lines that show a difference only"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    arguments = parser.parse_args()
    for checkout in (arguments.before, arguments.after):
        if not (checkout / "src" / "sfumato" / "__init__.py").exists():
            sys.exit(f"{checkout} has no src/sfumato: expected a checkout of sfumato")
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
        return compare(arguments, arguments.work.resolve())
    with tempfile.TemporaryDirectory() as temporary:
        return compare(arguments, Path(temporary).resolve())


def compare(arguments: argparse.Namespace, work: Path) -> int:
    """Run both versions in a work folder, print the table, and return the exit code."""
    before, after = arguments.before.resolve(), arguments.after.resolve()
    libraries = " ".join(f"{name}={_version(name)}" for name in LIBRARIES) + f" {platform.node()}"
    key = _hash(
        before / "src",
        *(HERE / "_behaviour" / f"{name}.py" for name in FIXTURES),
        libraries,
        arguments.threads,
    )
    fixtures = _kept(work / "fixtures", key, lambda out: _child("fixtures", before, out, arguments))
    if arguments.list:
        print("\n".join(_child("list", before, work / "list", arguments, fixtures).split()))
        return 0
    key = _hash(
        before / "src",
        HERE / "_behaviour",
        libraries,
        arguments.threads,
        arguments.only,
        arguments.arrays,
        key,
    )
    name = (
        f"before-{hashlib.sha256(arguments.only.encode()).hexdigest()[:8]}"
        if arguments.only
        else "before"
    )
    old = _kept(work / name, key, lambda out: _child("cases", before, out, arguments, fixtures))
    new = work / "after"
    shutil.rmtree(new, ignore_errors=True)
    _child("cases", after, new, arguments, fixtures)
    verdicts = [*judge(old, new)]
    return report(verdicts, arguments.quiet)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _hash(*parts: object) -> str:
    """SHA-256 over Python and JSON files below folders, single files, and text."""
    digest = hashlib.sha256()
    for part in parts:
        files = (
            sorted(f for f in part.rglob("*") if f.suffix in (".py", ".json", ".safetensors"))
            if isinstance(part, Path)
            else []
        )
        for file in [part] if isinstance(part, Path) and part.is_file() else files:
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        if not isinstance(part, Path):
            digest.update(f"{part}\0".encode())
    return digest.hexdigest()


def _kept(folder: Path, key: str, make: Any) -> Path:
    """Make a folder, unless the one that is there was made for the same key."""
    done = folder / "done.txt"
    if not done.exists() or done.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        done.write_text(key)
    return folder


def _child(
    job: str, checkout: Path, out: Path, arguments: argparse.Namespace, fixtures: Path | None = None
) -> str:
    """Run a job with a checkout's code in a process of its own; returns its standard output."""
    threads = str(arguments.threads)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SFUMATO")
    }
    environment |= {
        "SFUMATO_KERNELS": "fixed",
        "PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(HERE)]),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "COLUMNS": "200",
    }
    where = [] if fixtures is None else ["--fixtures", str(fixtures)]
    command = [
        sys.executable,
        "-m",
        "_behaviour",
        job,
        "--source",
        str(checkout / "src"),
        "--out",
        str(out),
        *where,
    ]
    started, cpu = time.perf_counter(), _cpu_seconds()
    print(f"{job} with {checkout} ...", file=sys.stderr, flush=True)
    command += [
        "--only",
        arguments.only,
        "--threads",
        threads,
        *(["--arrays"] if arguments.arrays else []),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{done.stderr[-5000:]}\n{job} with {checkout} ended with exit code {done.returncode}"
        )
    seconds = f"{time.perf_counter() - started:.0f} s, {_cpu_seconds() - cpu:.0f} s of CPU"
    print(f"{job} with {checkout}: {seconds}", file=sys.stderr, flush=True)
    return done.stdout


def _cpu_seconds() -> float:
    """CPU time of the processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def judge(before: Path, after: Path) -> Iterator[Verdict]:
    """The verdict on each case, in the order of the old code's."""
    old, new = (
        {e["name"]: e for e in json.loads((side / "results.json").read_text())}
        for side in (before, after)
    )
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in old or name not in new:
            yield Verdict(name, False, "missing " + ("before" if name not in old else "after"))
            continue
        a, b = old[name], new[name]
        yield Verdict(
            name, *_result(a, b, before, after), (a["seconds"], b["seconds"]), tuple(_notes(a, b))
        )


def _result(a: dict[str, Any], b: dict[str, Any], before: Path, after: Path) -> tuple[bool, str]:
    if "error" in a or "error" in b:
        classes = [entry.get("error", "no error") for entry in (a, b)]
        good = a["raises"] and classes[0] == classes[1]
        if good:
            return True, f"equal ({classes[0]})"
        last = next(
            entry["message"].strip().splitlines()[-1] for entry in (b, a) if "error" in entry
        )
        return False, f"{classes[0]} before, {classes[1]} after ({_short(last, 160)})"
    if a["raises"]:
        return False, "no error, where one is expected"
    if not a["leaves"] and not a["texts"]:
        return False, "nothing to compare"
    wrong = [*_texts(a["texts"], b["texts"]), *_arrays(a, b, before, after)]
    return not wrong, "; ".join(wrong[:3]) + (
        f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
    ) if wrong else "equal"


def _texts(a: dict[str, str], b: dict[str, str]) -> Iterator[str]:
    for path in sorted({*a, *b}):
        if a.get(path) != b.get(path):
            yield (
                f"{path}: {_short(a.get(path, 'absent'))} before, "
                f"{_short(b.get(path, 'absent'))} after"
            )


def _arrays(a: dict[str, Any], b: dict[str, Any], before: Path, after: Path) -> Iterator[str]:
    """Differences between the arrays of two entries, the largest number of each."""
    old, new = a["leaves"], b["leaves"]
    for path in [*old, *(p for p in new if p not in old)]:
        if path not in old or path not in new:
            yield f"{path}: absent {'before' if path not in old else 'after'}"
        elif (old[path]["dtype"], old[path]["shape"]) != (new[path]["dtype"], new[path]["shape"]):
            yield f"{path}: {_kind(old[path])} before, {_kind(new[path])} after"
        elif old[path]["sha256"] != new[path]["sha256"]:
            x, y = (
                _array(side / e["file"], [*e["leaves"]].index(path))
                for side, e in ((before, a), (after, b))
            )
            if x is None or y is None:
                yield f"{path}: other bytes (--arrays: by how much)"
                continue
            apart = np.abs(x - y)
            place = tuple(
                int(k)
                for k in np.unravel_index(np.argmax(np.nan_to_num(apart, nan=np.inf)), apart.shape)
            )
            count = int(np.sum(~((x == y) | (np.isnan(x) & np.isnan(y)))))
            at = (
                f"{x[place]:.9g} before, {y[place]:.9g} after at {list(place)}"
                if apart.size
                else "no numbers"
            )
            yield (
                f"{path or 'result'}: largest difference {apart[place]:.3g} ({at}), {count} of "
                f"{apart.size} numbers"
            )


def _array(file: Path, index: int) -> np.ndarray | None:
    """An array of a case's result in float64, None where it was not kept."""
    with np.load(file) if file.exists() else contextlib.nullcontext({}) as arrays:
        return arrays[str(index)].astype(np.float64) if str(index) in arrays else None


def _kind(leaf: dict[str, Any]) -> str:
    return f"{leaf['dtype']} {leaf['shape']}"


def _notes(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Differences between texts that don't count, key by key."""
    old, new = (dict(_flat(entry.get("notes", {}))) for entry in (a, b))
    for key in sorted({*old, *new}):
        if old.get(key, "absent") != new.get(key, "absent"):
            place = key.split(":")[-1].split("/")
            yield (
                f"{'/'.join(place[-2:])}: {_short(old.get(key, 'absent'))} -> "
                f"{_short(new.get(key, 'absent'))}"
            )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and len(value) > MANY:
        yield (
            path,
            f"{len(value)} entries, SHA-256 "
            f"{hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]}",
        )
    elif isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f"{path}/{key}")
    else:
        yield path, json.dumps(value)


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def report(verdicts: list[Verdict], quiet: bool) -> int:
    """Print the table and return the exit code; with `quiet` only the lines that differ."""
    width = max((len(v.name) for v in verdicts), default=0)
    for v in (v for v in verdicts if not (quiet and v.good)):
        print(
            f"{v.name:<{width}}  {v.seconds[0]:6.2f} {v.seconds[1]:6.2f}  "
            f"{'' if v.good else 'DIFFERS: '}{v.result}"
        )
    notes = Counter(note for v in verdicts if v.good for note in dict.fromkeys(v.notes))
    if notes:
        print(
            "notes: differences between texts of equal cases, which don't count; "
            "how many, and the first"
        )
    for note, count in notes.most_common(NOTES):
        print(f"  {note} ({count}: {next(v.name for v in verdicts if note in v.notes)})")
    if len(notes) > NOTES:
        print(f"  and {len(notes) - NOTES} more")
    bad = [v for v in verdicts if not v.good]
    sums = [sum(v.seconds[k] for v in verdicts) for k in (0, 1)]
    print(
        f"{len(verdicts)} cases, {len(verdicts) - len(bad)} equal, {len(bad)} not; "
        f"{sums[0]:.0f} s before, {sums[1]:.0f} s after"
    )
    if not verdicts:
        print("no case has such a name: see --list")
    return 1 if bad or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
