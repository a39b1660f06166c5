"""Recipe files: Python that builds settings, by path or by name.

    a path            ends in .py or has a folder: this file and no other
    a name            recipes/NAME.py in the current folder, else the package's train/recipes

A mistake in a recipe is a `UserError` with the file and the line.
"""

import logging
import re
import sys
import traceback
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

from sfumato.errors import UserError, unknown
from sfumato.train.recipe import AutoencoderRecipe, DenoiserRecipe

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent / "recipes"
_KINDS = {"autoencoder": AutoencoderRecipe, "denoiser": DenoiserRecipe}
_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def recipe_names() -> dict[str, Path]:
    """The files of all recipes by name: those of ./recipes hide the package's."""
    folders = (PACKAGE, Path("recipes"))
    files = (file for folder in folders for file in sorted(folder.glob("[!_]*.py")))
    return {file.stem: file for file in files}


def recipe_file(recipe: str | Path) -> Path:
    """The file of a recipe.

    Args:
        recipe: A path (with a folder, or the ending .py), or a name; hyphens in a name may stand
            for underscores.

    Raises:
        UserError: For a file that is missing or is not Python, and an unknown name.
    """
    path = Path(recipe).expanduser()
    if path.suffix == ".py" and path.is_file():
        return path
    names = recipe_names()
    listed = f"or the name of a recipe ({', '.join(sorted(names))})"
    if not path.name or any(sign in str(recipe) for sign in "/\\") or path.suffix == ".py":
        beside = Path(f"{path}.py")
        hint = f"did you mean {beside}? " if path.suffix != ".py" and beside.is_file() else ""
        state = "is not a Python file" if path.is_file() else "was not found"
        raise UserError(f"recipe {str(recipe)!r} {state}: {hint}expected a file NAME.py, {listed}")
    for name in (path.name, path.name.replace("-", "_")):
        if name in names:
            return names[name]
    if path.is_file() or path.suffix:
        raise UserError(f"recipe {str(recipe)!r} was not found: expected a file NAME.py, {listed}")
    raise unknown("recipe", path.name, names)


def load_recipe(recipe: str | Path, stage: str) -> AutoencoderRecipe | DenoiserRecipe:
    """Load the settings of a stage from a recipe.

    Args:
        recipe: A Python file, or the name of one, see `recipe_file`.
        stage: "autoencoder" or "denoiser".

    Raises:
        UserError: For a missing file, a mistake in it, and a file without these settings.
    """
    path = recipe_file(recipe)
    module = _run(path)
    settings, kind = getattr(module, stage, None), _KINDS[stage]
    article = "an" if stage == "autoencoder" else "a"
    expected = f"{article} {kind.__name__}"
    if settings is None:
        others = [name for name in _KINDS if isinstance(getattr(module, name, None), _KINDS[name])]
        hint = f"; it has the stage {' and '.join(others)} alone" if others else ""
        raise UserError(
            f"recipe {path} defines no {stage!r}: expected {expected} of that name{hint}"
        )
    if not isinstance(settings, kind):
        line = _line_of_name(path, stage)
        place = f"recipe {path}, line {line}" if line else f"recipe {path}"
        state = f"the class {settings.__name__}" if isinstance(settings, type) else repr(settings)
        raise UserError(f"{place}: {stage} is {state[:80]}: expected {expected}")
    if path != Path(recipe):  # found by its name
        logger.info("recipe %s", path)
    return settings


def run_recipe(recipe: str | Path, stage: str, out: Path, resume: bool = True) -> Path:
    """Run one stage of a recipe with its own settings, see `load_recipe`."""
    return load_recipe(recipe, stage).run(out, resume)


def _run(path: Path) -> ModuleType:
    """The module of a recipe; nothing is written beside the file."""
    module = ModuleType(f"sfumato_recipe_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look there
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(_explanation(error, path, module)) from error
    return module


def _explanation(error: BaseException, path: Path, module: ModuleType) -> str:
    """File, line and reason of a mistake in a recipe, as one sentence."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    lines = [frame.lineno for frame in frames]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    place = f"recipe {path}, line {lines[-1]}" if lines and lines[-1] else f"recipe {path}"
    if isinstance(error, UserError):
        return f"{place}: {error}"
    if isinstance(error, SystemExit):
        return f"{place}: it ends the program: expected a file that builds settings"
    reason = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    if match := _UNEXPECTED.search(reason):
        source = frames[-1].line if frames else ""
        called = re.findall(r"(\w+)(?:\.__init__)?\(", f"{reason} {source}")
        for cls in (module.__dict__.get(name) for name in called):
            if isinstance(cls, type) and is_dataclass(cls):
                names = [f.name for f in fields(cls) if f.init]
                return f"{place}: {unknown(f'setting of {cls.__name__}', match[1], names)}"
    return f"{place}: {type(error).__name__}: {reason or 'no message'}; correct the recipe"


def _line_of_name(path: Path, name: str) -> int | None:
    """The last line that assigns a name at the left margin."""
    lines = path.read_text(errors="replace").splitlines()
    pattern = re.compile(rf"{name}\b\s*(:.*)?=")
    return next((n for n, line in reversed([*enumerate(lines, 1)]) if pattern.match(line)), None)
