"""Docstrings in Markdown, made reStructuredText for autodoc, and held against signatures.

Docstrings of sfumato are plain text: code spans in single backticks, formulas such as `a*z + b*eps`
or |x|, indented code blocks, columns aligned by spaces, and Google's sections (Args, Returns,
Raises). reStructuredText reads *, |, a trailing _ and an indented block as markup, and would lose
them or fail. A parameter under Args that the signature does not have is a warning, which fails the
strict build.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

SECTION = re.compile(
    r"(Args|Arguments|Attributes|Example|Examples|Note|Options|Raises|Returns|Warning|Yields):$"
)
VARIABLES = ("attribute", "data", "property")
EXAMPLE = ("Example:", "Examples:")
CODE = re.compile(r"(``.+?``|`[^`]+`)")
ITEM = re.compile(r"[-*] ")
COLUMNS = re.compile(r"\S {2,}\S")
PARAMETER = re.compile(r" {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def convert(lines: Iterable[str]) -> list[str]:
    """Convert a docstring to reStructuredText, outside of and inside Google sections.

    Args:
        lines: A docstring without its common indentation.

    Returns:
        The lines as napoleon and docutils expect them.
    """
    result: list[str] = []
    section = ""
    for blank, group in groupby(lines, key=lambda line: not line.strip()):
        block = [line.rstrip() for line in group]
        if blank:
            result += block
            continue
        while block:
            if SECTION.match(block[0]):
                section = block[0]
                result.append(block.pop(0))
                if section in EXAMPLE:
                    result += ["", "    ::", ""]
                continue
            if block[0][0] != " ":
                section = ""
            ends = (
                k
                for k, line in enumerate(block)
                if k and (SECTION.match(line) or (section and line[0] != " "))
            )
            end = next(ends, len(block))
            result += _block(block[:end], section)
            block = block[end:]
    return result


def _block(block: list[str], section: str) -> Iterator[str]:
    """Convert one paragraph: literal where its layout matters, else a list or text."""
    if section in EXAMPLE:
        yield from ("    " + line for line in block)
    elif section:
        yield from map(inline, block)
    elif all(line.startswith("    ") for line in block) or any(
        COLUMNS.search(line) for line in block if line[0] != " "
    ):
        yield from literal(block)
    elif (head := next((k for k, line in enumerate(block) if ITEM.match(line)), len(block))) < len(
        block
    ):
        yield from [*map(inline, block[:head]), ""]
        yield from (
            inline(line) if ITEM.match(line) else "  " + inline(line.strip())
            for line in block[head:]
        )
    else:
        head = next((k for k, line in enumerate(block) if line.startswith("    ")), len(block))
        yield from map(inline, block[:head])
        if head < len(block):  # a code block right below its sentence
            yield from ["", *literal(block[head:])]


def literal(block: list[str]) -> Iterator[str]:
    """Write a literal block, with colours if it is Python."""
    try:
        ast.parse(textwrap.dedent("\n".join(block)))
        yield ".. code-block:: python"
    except SyntaxError:
        yield "::"
    yield from ["", *("    " + line for line in block)]


def inline(text: str) -> str:
    """Convert a line of text: code spans, formulas without markup, links to papers."""
    parts = CODE.split(text)
    for k, part in enumerate(parts):
        if k % 2 == 0:
            escaped = re.sub(r"([\\*|]|(?<=\w)_(?!\w))", r"\\\1", part)
            escaped = re.sub(r"^(\s*)\\\* ", r"\1* ", escaped)  # an item of a list
            parts[k] = ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", escaped)
        else:
            following = parts[k + 1][:1]
            parts[k] = "``" + part.strip("`") + "``" + ("\\ " if following.isalnum() else "")
    return "".join(parts)


def documented(lines: Iterable[str]) -> list[str]:
    """List the parameters under Args and Options, in order and without stars."""
    names: list[str] = []
    section = ""
    for line in lines:
        if SECTION.match(line):
            section = line.rstrip()
        elif section in ("Args:", "Arguments:", "Options:") and (match := PARAMETER.match(line)):
            names += match.group(1).replace("*", "").split(", ")
    return names


def unknown_parameters(value: Any, lines: Iterable[str]) -> list[str]:
    """List documented parameters that a callable without **keywords does not take."""
    names = documented(lines)
    if not names:
        return []
    parameters = inspect.signature(value).parameters
    if any(p.kind is p.VAR_KEYWORD and p.name not in names for p in parameters.values()):
        return []
    return [name for name in names if name not in parameters]


def process(
    app: "Sphinx", kind: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Check a docstring and make it reStructuredText, in place."""
    from sphinx.ext.napoleon import Config, GoogleDocstring
    from sphinx.util import logging

    if callable(value):
        for parameter in unknown_parameters(value, lines):
            message = "%s documents the parameter %r, which it does not take"
            logging.getLogger(__name__).warning(message, name, parameter)
    config = Config(napoleon_use_ivar=True, napoleon_custom_sections=[("Options", "params_style")])
    role = "object" if kind in VARIABLES else kind  # else "x: y" of a variable is type and text
    lines[:] = GoogleDocstring(convert(lines), config, app, role, name, value, options).lines()


def setup(app: "Sphinx") -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
