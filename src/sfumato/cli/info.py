"""`sfumato info MODEL`: the parts of a model, and what fits into this machine.

`sfumato info --machine` describes this machine. Both print a table or JSON.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sfumato.cli._names import check_names
from sfumato.cli._options import MODELS, ModelOptions, at_least, parse, unset
from sfumato.cli._output import readable_size
from sfumato.errors import UserError
from sfumato.io.paths import expand_user

CHECKS = "images do not depend on the batch"
FEW = 20
"""Names of classes that a table has room for."""


@dataclass(frozen=True, kw_only=True)
class Info(ModelOptions):
    """Describe a model: parts, parameters, latent space, schedule, defaults, classes, memory.

    With --machine: processor, instruction sets, threads, methods of layers, and a check that no
    image depends on its batch, with each kind of layer and the bundled model (a few seconds).
    """

    model: tyro.conf.Positional[str] = "fashion"
    """Bundled name, folder in the diffusers layout, single file or Hub id (no weight is read)."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """Sampler, for a folder whose scheduler class is not known."""
    machine: bool = False
    """Describe this machine instead of a model."""
    json: bool = False
    """JSON instead of a table."""
    hash: bool = False
    """The hash that PNG files record, too: reads all weights, else only headers are read."""


def info(arguments: Sequence[str]) -> None:
    """Describe a model: parts, parameters, latent space, defaults, memory, files."""
    options = parse(Info, arguments, "info")
    at_least(options, 0, "clip_skip")
    check_names(options.sampler, None, None)
    if options.machine:
        if options.model != Info.model:
            raise UserError(
                f"--machine describes this machine, not a model: leave {options.model!r} out, "
                "or --machine"
            )
        facts = _machine()
        _print(facts if options.json else {**facts, CHECKS: _failures(facts[CHECKS])}, options.json)
        return

    from sfumato.checkpoints.checkpoint import LoadOptions
    from sfumato.checkpoints.memory_estimate import report
    from sfumato.loading import load, open_model

    reading = options.reading(options.sampler)
    facts: dict[str, Any] = {"model": options.model}
    with _opened(options, reading) as (source, place, name):
        memory = None if place is None else report(place, options.variant)
        if options.hash:
            limit: dict[str, Any] = {}
            fits = {} if memory is None else memory["ways"].get("in memory, float32", {})
            if memory is not None and not fits.get("fits", True):
                limit["memory"] = memory["machine"]["available"]
            facts["hash"] = load(source, **limit, **reading).hash
        # the weights stay in their files
        model = open_model(source, LoadOptions(stored=True, name=name, **reading))
        facts |= model.describe(hash=False)
        facts.setdefault("class_names", list(model.class_names))
        if memory is not None:
            facts["memory"] = memory if options.json else _in_words(memory)
        facts["files"] = {} if place is None else _files(place)
    _print(facts, options.json)


def _print(facts: Mapping[str, Any], as_json: bool) -> None:
    """Facts as a table, or as JSON."""
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")  # a hash stays whole
    for name, value in _rows(facts):
        table.add_row(f"[bold]{name}[/bold]" if value == "" else name, value)
    Console().print(table)


def _machine() -> dict[str, Any]:
    """`deploy.machine.report`, and whether images of the bundled model depend on their batch."""
    import torch

    from sfumato.deploy.machine import report
    from sfumato.loading import load

    facts = report()
    checks = facts[CHECKS]
    try:
        model = load(Info.model)
    except UserError:  # a checkout without it
        return facts
    for name, ready in (
        ("the bundled model", model),
        ("the bundled model, prepared", model.optimized()),
    ):
        together = ready.generate("bag", n=3, seed=5, steps=3, guidance=2.0, output="tensor")
        alone = ready.generate("bag", n=1, seed=7, steps=3, guidance=2.0, output="tensor")
        checks[name] = torch.equal(together[2:], alone)
    return facts


def _failures(checks: Mapping[str, bool]) -> str | dict[str, bool]:
    """One line if all checks hold, else those that do not."""
    failures = {name: False for name, holds in checks.items() if not holds}
    if not failures:
        return f"yes ({len(checks)} checks: layers and the bundled model; --json lists them)"
    return {**failures, f"the other {len(checks) - len(failures)} checks": True}


def _in_words(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The memory report for people."""
    weights = {
        name: readable_size(part)
        if isinstance(part, int)
        else f"{readable_size(part['stored'])} ({', '.join(part['dtypes'])})"
        for name, part in memory["weights"].items()
    }
    beside = {
        dtype: ", ".join(f"{stage} {readable_size(size)}" for stage, size in sizes.items())
        for dtype, sizes in memory["beside"].items()
    }
    machine = memory["machine"].items()
    ways = {}
    for way, needs in memory["ways"].items():
        places = {"fits": "", "fits_gpu": " into the GPU"}
        fits = [f"{_FITS[needs[key]]}{place}" for key, place in places.items() if key in needs]
        ways[way] = f"{readable_size(needs['needs'])}: {', '.join(fits)}"
    return {
        "weights": weights,
        "beside them, counted": {k: v or "not known" for k, v in beside.items()},
        "machine": {name: "-" if size is None else readable_size(size) for name, size in machine},
        "ways": ways,
    }


_FITS = {None: "not known whether it fits", True: "fits", False: "does not fit"}


def _rows(facts: Mapping[str, Any], depth: int = 0) -> list[tuple[str, str]]:
    """(name, value) in reading order; a table inside becomes a heading with indented rows."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        # files and variables keep their names
        label = "  " * depth + (name if "." in name or name.isupper() else name.replace("_", " "))
        if isinstance(value, Mapping):
            rows += [(label, ""), *_rows(value, depth + 1)] if value else []
        else:
            rows.append((label, _names(value) if name == "class_names" else _text(value)))
    return rows


def _names(names: Sequence[str]) -> str:
    """All names of a short list, else their number, the first and the last."""
    if len(names) <= FEW:
        return _text(names)
    some = f"{', '.join(names[:3])}, ..., {names[-1]}"
    return f"{len(names):,} classes: {some} (all of them with --json)"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value)) or "none"
    return str(value)


@contextmanager
def _opened(
    options: Info, reading: dict[str, Any]
) -> Iterator[tuple[str | Path, Path | None, str | None]]:
    """The model, its path on this disk where it has one, and its name where that differs.

    Of a model of the Hub the weights are not downloaded, but for their hash.

    Args:
        options: The command's.
        reading: The arguments of `load`; a revision is taken out where it is done with.
    """
    from sfumato.checkpoints import hub
    from sfumato.checkpoints.formats.folder import replaced_parts

    place = _place(options.model)
    hub_id = None if place is not None else hub.parse_id(options.model, options.revision)
    if hub_id is None or options.hash:
        yield options.model, place, None
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        replaced = replaced_parts(options.transformer, options.vae)
        copy = hub.download_headers(hub_id, Path(temporary), options.variant, replaced)
        reading["revision"] = None
        try:
            yield copy, copy, hub_id.name
        except UserError as error:  # name the model instead of the temporary folder
            raise UserError(str(error).replace(str(copy), str(hub_id))) from error


def _place(model: str) -> Path | None:
    """Path of a model on this disk; None for one of the Hub."""
    import sfumato

    bundled = Path(sfumato.__file__).parent / "bundled" / model
    return next((p for p in (expand_user(model), bundled) if p.exists()), None)


def _files(place: Path) -> dict[str, str]:
    """The files of a model and their sizes."""
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
    sizes = {str(f.relative_to(place)) if f != place else f.name: f.stat().st_size for f in files}
    sizes["all"] = sum(sizes.values())
    return {name: readable_size(size) for name, size in sizes.items()}
