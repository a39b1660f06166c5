"""API pages: one page for each public package, written before Sphinx reads the sources.

A package with `__all__` is documented by the names in it, one without by its modules whose names do
not begin with an underscore. Packages inside a package get pages by the same rule, so that a
registered folder (samplers, networks, guidance rules) lists its files without being named here.
"""

import importlib
import inspect
import pkgutil
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = "api"
INDEX = "reference/api"


def page(package: ModuleType, indexed: dict[int, str]) -> str:
    """Write the page of a package.

    Args:
        package: An imported package.
        indexed: Classes and functions that an earlier page has, by identity; extended.

    Returns:
        reStructuredText: the package's docstring, a table of its names, then each name.
    """
    name = package.__name__
    names = [n for n in getattr(package, "__all__", ()) if not n.startswith("__")]
    values = {n: getattr(package, n) for n in names}
    members = {n: value for n, value in values.items() if not inspect.ismodule(value)}
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:", ""]
    if members:
        lines += [f".. currentmodule:: {name}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [*(f"   {n}" for n in members), ""]
        for n, value in members.items():
            again = indexed.setdefault(id(value), name) != name
            lines += directive(n, value, again)
    elif not hasattr(package, "__all__"):
        for module in modules(package):
            title = module.removeprefix(f"{name}.")
            lines += [title, "-" * len(title), "", f".. automodule:: {module}", "   :members:", ""]
    if inner := packages(package):
        lines += [
            ".. toctree::",
            "   :maxdepth: 1",
            "",
            *(f"   {n.rpartition('.')[2]} <{n}>" for n in inner),
            "",
        ]
    return "\n".join(lines)


def directive(name: str, value: object, again: bool = False) -> list[str]:
    """Choose the autodoc directive for one name of a package.

    Args:
        name: The name.
        value: Its value.
        again: Leave it out of the index, as another page has it.
    """
    index = ["   :no-index:"] if again else []
    if inspect.isclass(value):
        bases = [] if value.__bases__ == (object,) else ["   :show-inheritance:"]
        return [f".. autoclass:: {name}", "   :members:", *bases, *index, ""]
    if callable(value) and inspect.isroutine(inspect.unwrap(value)):  # a cached function too
        return [f".. autofunction:: {name}", *index, ""]
    return [f".. autodata:: {name}", "   :no-value:", ""]


def modules(package: ModuleType) -> list[str]:
    """List the full names of a package's public modules."""
    infos = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    return [m.name for m in infos if not m.ispkg and not m.name.rpartition(".")[2].startswith("_")]


def packages(package: ModuleType) -> list[str]:
    """List the public packages inside a package; those of the root are a setting."""
    if "." not in package.__name__:
        return []
    inside = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    return [m.name for m in inside if m.ispkg and not m.name.rpartition(".")[2].startswith("_")]


def write_pages(app: "Sphinx") -> None:
    """Write the pages of all packages into docs/api, and remove others there."""
    folder = Path(app.srcdir) / FOLDER
    texts: dict[str, str] = {}
    indexed: dict[int, str] = {}
    waiting = list(app.config.api_packages)
    while waiting:
        package = importlib.import_module(waiting.pop(0))
        texts[package.__name__] = page(package, indexed)
        waiting += packages(package)
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.stem not in texts:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name, text in texts.items():
        file = folder / f"{name}.rst"
        if not file.exists() or file.read_text() != text:  # unchanged pages are not built again
            file.write_text(text)


def extend_index(app: "Sphinx", name: str, source: list[str]) -> None:
    """Append the list of packages to the page that introduces them."""
    if name == INDEX:
        entries = [f"/{FOLDER}/{package}" for package in app.config.api_packages]
        source[0] += "\n".join(["", "```{toctree}", ":maxdepth: 2", "", *entries, "```", ""])


def setup(app: "Sphinx") -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_config_value("api_packages", [], "env")
    app.connect("builder-inited", write_pages)
    app.connect("source-read", extend_index)
    return {"parallel_read_safe": True}
