"""Process of one version: `python -m _behaviour fixtures|list|cases ...`.

The code to run is the first entry of PYTHONPATH.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path


def main() -> None:
    """Make the fixtures, or run the cases and write their results."""
    parser = argparse.ArgumentParser(prog="_behaviour")
    parser.add_argument("job", choices=("fixtures", "list", "cases"))
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="the folder from which sfumato has to be imported",
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--fixtures", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arrays", action="store_true")
    arguments = parser.parse_args()

    import torch

    import sfumato

    if Path(str(sfumato.__file__)).resolve().parents[1] != arguments.source.resolve():
        sys.exit(f"sfumato was imported from {sfumato.__file__}, expected {arguments.source}")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.job == "fixtures":
        from _behaviour.fixtures import make

        make(arguments.out)
        return
    from _behaviour.cases import cases
    from _behaviour.context import Context

    words = [word.strip() for word in arguments.only.split(",")]
    scratch = arguments.out / "scratch"
    chosen = [
        c
        for c in cases(Context(arguments.fixtures, scratch, arguments.source.parent))
        if any(word in c.name for word in words)
    ]
    if arguments.job == "list":
        print("\n".join(case.name for case in chosen))
        return
    scratch.mkdir(parents=True)
    os.chdir(scratch)
    results = [
        run(case, arguments.out, index, arguments.arrays) for index, case in enumerate(chosen)
    ]
    (arguments.out / "results.json").write_text(json.dumps(results))
    os.chdir(arguments.out)
    if not arguments.arrays:
        shutil.rmtree(scratch)


def run(case, out: Path, index: int, arrays: bool) -> dict[str, object]:
    """Run a case and return its entry in the results, with its leaves or its exception."""
    import torch

    from _behaviour.outcome import write

    torch.manual_seed(0)
    started, error, entry = time.process_time(), None, {}
    try:
        entry = write(out, index, case.run(), arrays)
    except Exception as raised:
        error = raised
    entry |= {
        "name": case.name,
        "raises": case.raises,
        "seconds": round(time.process_time() - started, 3),
        "file": f"{index}.npz",
    }
    if error is not None:
        entry |= {
            "error": type(error).__name__,
            "message": "".join(traceback.format_exception(error)),
        }
    return entry


if __name__ == "__main__":
    main()
