"""`sfumato train STAGE RECIPE [settings]`: runs a stage of a recipe, with any of its settings
changed on the command line.

A recipe is a Python file that builds objects: frozen settings called `autoencoder` and `denoiser`.
The settings themselves are the command line (`sfumato train denoiser RECIPE --help` lists them,
with their types and the recipe's values).
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sfumato.cli._options import parse, unset
from sfumato.errors import UserError

STAGES = ("autoencoder", "denoiser")


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains a stage of a recipe. After RECIPE, `--help` lists the settings of that stage; each can
    be changed.
    """

    stage: tyro.conf.Positional[Literal["autoencoder", "denoiser"]]
    """Stage to train: the autoencoder first, then the denoiser on its latents."""
    recipe: tyro.conf.Positional[str]
    """A Python file, or the name of one in recipes/."""
    out: Annotated[Path | None, unset("runs/RECIPE")] = None
    """The folder of the run, the same for both stages."""
    resume: bool = True
    """Go on where an earlier run in the same folder stopped, or start anew."""


def train(arguments: Sequence[str]) -> None:
    """Trains the autoencoder or the denoiser of a recipe; resumes where an earlier run stopped."""
    if len(arguments) < 2 or arguments[0] not in STAGES or arguments[1].startswith("-"):
        parse(Train, arguments, "train")  # says what is missing, or shows the help
        raise UserError(
            f"STAGE and RECIPE come first: sfumato train {{{','.join(STAGES)}}} RECIPE [settings]"
        )
    stage, recipe, *rest = arguments

    from sfumato.train import load_recipe

    settings = load_recipe(recipe, stage)
    chosen: Any = parse(
        _options(settings, recipe),
        rest,
        f"train {stage} {recipe}",
        description=type(settings).__doc__,
        none=True,
    )
    logger = logging.getLogger("sfumato")
    logger.addHandler(_Lines())
    logger.setLevel(logging.INFO)
    print(chosen.settings.run(chosen.out, chosen.resume))


class _Lines(logging.Handler):
    """Log lines on whatever stderr is at that moment: a progress bar puts itself there, and lets
    lines pass above it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _options(settings: Any, recipe: str) -> type:
    """A dataclass of what the command line can change: the recipe's settings, without a prefix, and
    the run's own two.
    """
    # the settings of this recipe's network, of the many that there are
    if dataclasses.is_dataclass(getattr(settings, "network", None)):
        narrow = [("network", type(settings.network), dataclasses.field(default=settings.network))]
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        settings = dataclasses.make_dataclass(
            type(settings).__name__, narrow, bases=(type(settings),), frozen=True
        )(**values)
    out = Annotated[Path, tyro.conf.arg(help="The folder of the run, the same for both stages.")]
    resume = Annotated[
        bool, tyro.conf.arg(help="Go on where an earlier run in the folder stopped, or start anew.")
    ]
    return dataclasses.make_dataclass(
        "Run",
        [
            (
                "settings",
                Annotated[type(settings), tyro.conf.arg(name="")],
                dataclasses.field(default=settings),
            ),
            ("out", out, dataclasses.field(default=Path("runs") / Path(recipe).stem)),
            ("resume", resume, dataclasses.field(default=True)),
        ],
        frozen=True,
    )
