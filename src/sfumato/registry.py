"""The folder is the registry: `find("diffuse.samplers", "ddim")` is
`diffuse/samplers/ddim.py:ddim`.

A new sampler, guidance, conditioner, metric or command is one new file whose main name equals the
file's name; no list is edited. Nothing is imported until it is asked for.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

from sfumato.errors import UserError, unknown


@cache
def names(package: str) -> tuple[str, ...]:
    """The names in a registered folder, e.g. `names("diffuse.samplers") == ("ddim", "ddpm")`.
    Imports only the folder.
    """
    module = importlib.import_module(f"sfumato.{package}")
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_"))
    )


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


def choice(spec: str) -> tuple[str, dict[str, Any]]:
    """ "name" or "name:option=value,option=value" -> the name and its options; values are numbers,
    true, false or words.
    """
    name, options = split(str(spec))
    return name.replace("-", "_"), {
        key.replace("-", "_"): _value(value) for key, value in options.items()
    }


def split(word: str) -> tuple[str, dict[str, str]]:
    """The name and the options of a word, unread."""
    name, colon, rest = word.partition(":")
    options: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise UserError(
                f"{word!r}: expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, found {item!r}"
            )
        if key in options:
            raise UserError(f"{word!r} gives {key} twice: give it once")
        options[key] = value
    return name.strip(), options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
