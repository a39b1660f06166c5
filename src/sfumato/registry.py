"""The folder is the registry: a name is a file, and its object has the file's name.

`find("diffuse.samplers", "ddim")` is `diffuse/samplers/ddim.py:ddim`. A new sampler, guidance,
conditioner, metric or command is one new file; no list is edited. A file is imported when it is
used first.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sfumato.errors import unknown


@cache
def names(package: str) -> tuple[str, ...]:
    """List the names in a registered folder, such as "diffuse.samplers".

    Nothing is imported, so that a wrong name is refused before torch is loaded. Files that begin
    with "_" and `base.py`, the folder's base class, have no name.
    """
    folder = Path(__file__).parent.joinpath(*package.split("."))
    files = (m.name for m in pkgutil.iter_modules([str(folder)]))
    return tuple(sorted(name for name in files if not name.startswith("_") and name != "base"))


def find(package: str, name: str) -> Any:
    """Return the object of a name in a registered folder.

    A file name is snake_case. Its object has that name, or its CamelCase form for a class.

    Raises:
        UserError: For an unknown name, with the known ones.
    """
    if name not in names(package):
        raise unknown(package.rsplit(".", 1)[-1].removesuffix("s"), name, names(package))
    module = module_of(package, name)
    camel = "".join(part.capitalize() for part in name.split("_"))
    return getattr(module, name, None) or getattr(module, camel)


def module_of(package: str, name: str) -> ModuleType:
    """Import a file of a registered folder."""
    return importlib.import_module(f"sfumato.{package}.{name}")


def lazy_exports(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that imports its exports at first use.

    No export may have the name of a file of the package: importing the file would hide it.

    Args:
        package: Full name of the package.
        homes: Names of the exports, by the module below the package that defines them.
    """
    modules = {name: module for module, exports in homes.items() for name in exports}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, listing
