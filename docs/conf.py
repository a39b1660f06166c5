"""Settings of the documentation site: `make docs` builds it with Sphinx, strictly and offline."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs" / "_ext")]

project = "sfumato"
author = "the sfumato authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "myst_parser",  # pages are Markdown, so that they read as well in a repository browser
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "api_pages",  # one page a public package, from its __all__
    "docstrings",  # Markdown, and Google's sections, in docstrings
    "navigation",  # the site's menu, from the links of index.md
]
exclude_patterns = ["_ext", "_static"]
highlight_language = "none"  # commands and outputs; Python says so
smartquotes_action = "D"  # dashes; quotes stay, formulas have primes

myst_heading_anchors = 4  # links to headings, as repository browsers make them

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch documents forward in reStructuredText of its own
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

api_packages = [
    "sfumato",
    "sfumato.compress",
    "sfumato.diffuse",
    "sfumato.predict",
    "sfumato.decode",
    "sfumato.tasks",
    "sfumato.train",
    "sfumato.evaluate",
]

html_theme = "furo"
html_title = f"sfumato {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
