"""`sfumato train STAGE RECIPE [settings]`: run a stage of a recipe.

A recipe is a Python file that builds objects: frozen settings called `autoencoder` and `denoiser`.
Each setting is a flag of the command line (`sfumato train denoiser RECIPE --help` lists them, with
their types and the recipe's values).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sfumato.cli._options import parse, unset
from sfumato.cli._output import log_to_stderr
from sfumato.errors import UserError

STAGES = ("autoencoder", "denoiser")


OUT = "Folder of the run, the same for both stages."
RESUME = "Resume an earlier run in the folder, or start anew."


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a stage of a recipe.

    Flags change its settings, which `sfumato train STAGE RECIPE --help` lists.
    """

    stage: tyro.conf.Positional[Literal["autoencoder", "denoiser"]]
    """Stage to train: the autoencoder first, then the denoiser on its latents."""
    recipe: tyro.conf.Positional[str]
    """Python file, or the name of one in recipes/."""
    out: Annotated[Path | None, unset("runs/RECIPE", help=OUT)] = None
    resume: Annotated[bool, tyro.conf.arg(help=RESUME)] = True


def train(arguments: Sequence[str]) -> None:
    """Train the autoencoder or the denoiser of a recipe, or resume an earlier run."""
    if len(arguments) < 2 or arguments[0] not in STAGES or arguments[1].startswith("-"):
        parse(Train, arguments, "train")  # says what is missing, or shows the help
        raise UserError(
            f"STAGE and RECIPE come first: sfumato train {{{','.join(STAGES)}}} RECIPE [settings]"
        )
    stage, recipe, *rest = arguments

    from sfumato.train import load_recipe

    settings = load_recipe(recipe, stage)
    run: Any = parse(
        _options(settings, recipe),
        rest,
        f"train {stage} {recipe}",
        description=type(settings).__doc__,
        none=True,
    )
    log_to_stderr()
    print(run.settings.run(run.out, run.resume))


def _options(settings: Any, recipe: str) -> type:
    """A dataclass of the recipe's settings, without a prefix, and the run's own two."""
    # the settings of this recipe's network, of the many that there are
    if dataclasses.is_dataclass(getattr(settings, "network", None)):
        narrow = [("network", type(settings.network), dataclasses.field(default=settings.network))]
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        settings = dataclasses.make_dataclass(
            type(settings).__name__, narrow, bases=(type(settings),), frozen=True
        )(**values)
    rows = (
        ("settings", type(settings), tyro.conf.arg(name=""), settings),
        ("out", Path, tyro.conf.arg(help=OUT), Path("runs") / Path(recipe).stem),
        ("resume", bool, tyro.conf.arg(help=RESUME), True),
    )
    fields = [
        (name, Annotated[kind, argument], dataclasses.field(default=default))
        for name, kind, argument, default in rows
    ]
    return dataclasses.make_dataclass("Run", fields, frozen=True)
