"""`sfumato train STAGE RECIPE [settings]`: run a stage of a recipe; also export and copy.

A recipe is a Python file that builds objects: frozen settings called `autoencoder` and `denoiser`.
Each setting is a flag of the command line (`sfumato train denoiser RECIPE --help` lists them, with
their types and the recipe's values).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sfumato.cli._options import parse, unset
from sfumato.cli._output import log_to_stderr
from sfumato.errors import UserError

STAGES = ("autoencoder", "denoiser")


OUT = "Folder of the run, the same for both stages."
RESUME = (
    "Resume an earlier run in the folder, bit for bit with the same number of threads; "
    "--no-resume starts anew and keeps the earlier run in a numbered folder beside it."
)
CHANGE = (
    "Resume with other settings (steps, learning rate, loss, data) and record it; warm-up and "
    "decay begin again where the learning rate's settings differ."
)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a stage of a recipe.

    Flags change its settings, which `sfumato train STAGE RECIPE --help` lists. Ctrl-C writes a
    checkpoint, and the same command resumes. Beside the stages:

    `sfumato train export RUN` makes a model of an unfinished run;
    `sfumato train copy RECIPE` writes a recipe of the package into recipes/, to edit.
    """

    stage: tyro.conf.Positional[Literal["autoencoder", "denoiser"]]
    """Stage to train: the autoencoder first, then the denoiser on its latents."""
    recipe: tyro.conf.Positional[str]
    """Python file, or the name of one in recipes/ or in the package."""
    out: Annotated[Path | None, unset("runs/RECIPE", help=OUT)] = None
    resume: Annotated[bool, tyro.conf.arg(help=RESUME)] = True
    change: Annotated[bool, tyro.conf.arg(help=CHANGE)] = False


@dataclasses.dataclass(frozen=True)
class Export:
    """Make a model of an unfinished run: the averaged weights of its newest checkpoint."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/mine."""
    out: Annotated[Path | None, unset("model-STEP in the run's folder")] = None
    """Folder of the model."""
    overwrite: bool = False
    """Replace a model that is there."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """Write a recipe of the package into a file of your own."""

    recipe: tyro.conf.Positional[str]
    """Name of the recipe."""
    out: Annotated[Path | None, unset("recipes/RECIPE.py")] = None
    """File to write; one that exists is left as it is."""


def train(arguments: Sequence[str]) -> None:
    """Train the autoencoder or the denoiser of a recipe, or resume an earlier run."""
    if arguments and arguments[0] in ("export", "copy"):
        {"export": _export, "copy": _copy}[arguments[0]](arguments[1:])
        return
    if len(arguments) < 2 or arguments[0] not in STAGES or arguments[1].startswith("-"):
        parse(Train, arguments, "train")  # says what is missing, or shows the help
        raise UserError(
            f"STAGE and RECIPE come first: sfumato train {{{','.join(STAGES)}}} RECIPE [settings]"
        )
    stage, recipe, *rest = arguments

    from sfumato.train import load_recipe

    log_to_stderr()
    settings = load_recipe(recipe, stage)
    run: Any = parse(
        _options(settings, recipe),
        rest,
        f"train {stage} {recipe}",
        description=type(settings).__doc__,
        none=True,
    )
    _check_folder(run.out)
    print(run.settings.run(run.out, run.resume, **({"change": True} if run.change else {})))


def _check_folder(out: Path) -> None:
    """Raise `UserError` where the folder of a run cannot be made, before anything is read."""
    place = out.absolute()
    parent = next((p for p in (place, *place.parents) if p.exists()), Path("/"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"--out {out} cannot be written: {parent} is not a folder that you may write to; "
            "choose another place"
        )


def _export(arguments: Sequence[str]) -> None:
    options = parse(Export, arguments, "train export")

    from sfumato.saving import check_target
    from sfumato.train import export_model

    if options.out is not None:
        check_target(options.out)
    print(export_model(options.run, options.out, options.overwrite))


def _copy(arguments: Sequence[str]) -> None:
    options = parse(Copy, arguments, "train copy")

    from sfumato.io.atomic import atomic_file
    from sfumato.train.recipe_file import recipe_file

    source = recipe_file(options.recipe)
    out = options.out or Path("recipes") / source.name
    out = out / source.name if out.is_dir() else out
    if out.exists():
        raise UserError(f"{out} exists: it is left as it is; give another name with --out")
    if out.suffix != ".py":
        raise UserError(f"--out {out}: expected a name that ends in .py")
    with atomic_file(out) as temporary:
        temporary.write_bytes(source.read_bytes())
    print(out)


def _guidance_text() -> Any:
    """The type of guidance as one text, as `sfumato generate --guidance` has it."""
    from sfumato.predict.guidance.settings import Guidance

    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="GUIDANCE",
        instance_from_str=lambda words: Guidance.parse(words[0]).to_json(),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(Guidance.parse(value))],
    )
    return Annotated[Any, spec]


def _with_kinds(settings: Any, kinds: Mapping[str, Any], **changes: Any) -> Any:
    """A copy of a dataclass whose fields have other types, for the parser, and other values."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)} | changes
    narrow = [
        (k, kind, dataclasses.field(default_factory=partial(values.get, k)))
        for k, kind in kinds.items()
    ]
    cls = type(settings)
    return dataclasses.make_dataclass(cls.__name__, narrow, bases=(cls,), frozen=True)(**values)


def _options(settings: Any, recipe: str) -> type:
    """A dataclass of the recipe's settings, without a prefix, and the run's own three."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    narrow: dict[str, Any] = {}
    # the settings of this recipe's network, of the many that there are
    if dataclasses.is_dataclass(values.get("network")):
        narrow["network"] = values["network"]
    if "defaults" in values:
        kinds = {"guidance": _guidance_text()}
        narrow["defaults"] = values["defaults"] = _with_kinds(values["defaults"], kinds)
    if narrow:
        settings = _with_kinds(settings, {k: type(v) for k, v in narrow.items()}, **narrow)
    rows = (
        ("settings", type(settings), tyro.conf.arg(name=""), settings),
        ("out", Path, tyro.conf.arg(help=OUT), Path("runs") / Path(recipe).stem),
        ("resume", bool, tyro.conf.arg(help=RESUME), True),
        ("change", bool, tyro.conf.arg(help=CHANGE), False),
    )
    fields = [
        (name, Annotated[kind, argument], dataclasses.field(default=default))
        for name, kind, argument, default in rows
    ]
    return dataclasses.make_dataclass("Run", fields, frozen=True)
