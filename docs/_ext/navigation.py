"""The menu of the site: hidden toctrees from the links of index.md, one for each section.

index.md stays a plain list of links, which repository browsers show as it is, and no page is listed
twice.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LINK = re.compile(r"^- \[[^]]+\]\(([\w/.-]+)\.md\)", re.MULTILINE)


def toctrees(text: str) -> str:
    """Build the hidden toctrees of an index page.

    Args:
        text: Markdown with `## Section` headings and list items that begin with a link to a page.

    Returns:
        MyST toctree directives, one a section that links to pages; the headings are their captions.
    """
    blocks = []
    for section in text.split("\n## ")[1:]:
        caption, _, body = section.partition("\n")
        if pages := LINK.findall(body):
            blocks.append(
                "\n".join(
                    ["```{toctree}", ":hidden:", f":caption: {caption.strip()}", "", *pages, "```"]
                )
            )
    return "\n\n".join(blocks)


def extend_index(app: "Sphinx", page: str, source: list[str]) -> None:
    """Append the toctrees to index.md when it is read."""
    if page == app.config.root_doc:
        source[0] += "\n\n" + toctrees(source[0]) + "\n"


def setup(app: "Sphinx") -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", extend_index)
    return {"parallel_read_safe": True}
