"""The folder is the registry: `find("diffuse.samplers", "ddim")` is `diffuse/samplers/ddim.py:ddim`.

A new sampler, guidance, conditioner, metric or command is one new file whose main name equals the file's name; no list is
edited. Nothing is imported until it is asked for.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any

from sfumato.errors import UserError, unknown


@cache
def names(package: str) -> tuple[str, ...]:
    """The names in a registered folder, e.g. `names("diffuse.samplers") == ("ddim", "ddpm")`. Imports only the folder."""
    module = importlib.import_module(f"sfumato.{package}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_")))


def find(package: str, name: str) -> Any:
    """The object called `name` in the file called `name` of a registered folder; an unknown name lists the known ones.

    A file name is snake_case; its object is that name itself, or its CamelCase form for a class.
    """
    if name not in names(package):
        raise unknown(package.rsplit(".", 1)[-1].removesuffix("s"), name, names(package))
    module = importlib.import_module(f"sfumato.{package}.{name}")
    camel = "".join(part.capitalize() for part in name.split("_"))
    return getattr(module, name, None) or getattr(module, camel)


def choice(spec: str) -> tuple[str, dict[str, Any]]:
    """ "name" or "name:option=value,option=value" -> the name and its options; values are numbers, true, false or words."""
    name, _, rest = str(spec).partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not (key and equals and value):
            raise UserError(f"{spec!r}: expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, and {part!r} is no OPTION=VALUE")
        if key.replace("-", "_") in options:
            raise UserError(f"{spec!r} gives {key} twice: give it once")
        options[key.replace("-", "_")] = _value(value)
    return name.strip().replace("-", "_"), options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
