"""The folder is the registry: `find("diffuse.samplers", "ddim")` is
`diffuse/samplers/ddim.py:ddim`.

A new sampler, guidance, conditioner, metric or command is one new file whose main name equals the
file's name; no list is edited. Unconditional is imported until it is asked for.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

from sfumato.errors import unknown


@cache
def names(package: str) -> tuple[str, ...]:
    """List the names in a registered folder, e.g. `names("diffuse.samplers") == ("ddim", "ddpm")`.

    Only the folder is imported. Files that begin with "_" and `base.py`, the folder's base class,
    have no name.
    """
    module = importlib.import_module(f"sfumato.{package}")
    files = (m.name for m in pkgutil.iter_modules(module.__path__))
    return tuple(sorted(name for name in files if not name.startswith("_") and name != "base"))


def find(package: str, name: str) -> Any:
    """The object called `name` in the file called `name` of a registered folder; an unknown name
    lists the known ones.

    A file name is snake_case; its object is that name itself, or its CamelCase form for a class.
    """
    if name not in names(package):
        raise unknown(package.rsplit(".", 1)[-1].removesuffix("s"), name, names(package))
    module = module_of(package, name)
    camel = "".join(part.capitalize() for part in name.split("_"))
    return getattr(module, name, None) or getattr(module, camel)


def module_of(package: str, name: str) -> ModuleType:
    """A file of a registered folder, imported."""
    return importlib.import_module(f"sfumato.{package}.{name}")
