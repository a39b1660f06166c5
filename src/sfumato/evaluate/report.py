"""A report: every number beside its floor, with all that is needed to get it again.

The floor of a metric is the same metric between two disjoint sets of *real* images of equal size:
what a perfect model would score. A Frechet distance of 3 is poor beside a floor of 0.1 and perfect
beside a floor of 3.
"""

import base64
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.evaluate.figures import Picture
from sfumato.io.atomic import atomic_file

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Metric:
    """A number, its floor (None where there is none), which way is better, and one line that says
    what it is and its unit.
    """

    name: str
    value: float
    floor: float | None
    better: Literal["lower", "higher", "near"]
    about: str


@dataclass(frozen=True)
class Rows:
    """A small table, e.g. one row a class. Cells are text, numbers or None."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    features  name, hash, dim, resize of the feature network
    data      fingerprints of each set of images
    settings  n, seed, k, and what the caller says about the sampler: steps, sampler, guidance ...
    """

    title: str
    metrics: tuple[Metric, ...]
    features: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Rows, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def __getitem__(self, name: str) -> Metric:
        """The metric of that name; `KeyError` lists those that are there."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(
            f"{name!r} was not measured: known are {', '.join(m.name for m in self.metrics)}"
        )

    def join(self, other: "Report") -> "Report":
        """Both reports as one, this one's title and, where keys agree, this one's settings."""
        return replace(
            self,
            metrics=self.metrics + other.metrics,
            features={**other.features, **self.features},
            data={**other.data, **self.data},
            settings={**other.settings, **self.settings},
            tables=self.tables + other.tables,
            pictures=self.pictures + other.pictures,
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, as JSON values; an infinite number is the text "infinite"."""
        metrics = {
            m.name: {"value": m.value, "floor": m.floor, "better": m.better, "about": m.about}
            for m in self.metrics
        }
        tables = [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in self.tables]
        facts = {"features": self.features, "data": self.data, "settings": self.settings}
        return _jsonable({"title": self.title, "metrics": metrics, "tables": tables, **facts})

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON with sorted keys and every digit: equal measurements give equal text. Also written
        to `path`, atomically.
        """
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        if path is not None:
            with atomic_file(path) as temporary:
                temporary.write_text(text)
        return text

    def to_html(self, path: str | Path) -> None:
        """One page that needs no other file: the table, the facts, and the pictures embedded as
        PNG. Written atomically.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(_page(self), encoding="utf-8")

    def table(self) -> "Table":
        """The metrics for the terminal."""
        from rich.table import Table

        table = Table("metric", "value", "floor", "better", "what", title=self.title)
        for m in self.metrics:
            table.add_row(m.name, _text(m.value), _text(m.floor), m.better, m.about)
        return table

    def __rich__(self) -> "Table":
        return self.table()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return "infinite"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _text(value: Any) -> str:
    """Four significant digits for the eye; the JSON has them all."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            "infinite"
            if math.isinf(value)
            else f"{value:#.4g}"
            if abs(value) < 1000
            else f"{value:.1f}"
        )
    return str(value)


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p, figcaption { color: var(--soft); margin: .2rem 0 .6rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; } td.soft { color: var(--soft); }
figure { margin: 0; overflow-x: auto; } img { image-rendering: pixelated; max-width: 100%; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def _html_table(columns: tuple[str, ...], rows: tuple[tuple[Any, ...], ...]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = ""
    for row in rows:
        cells = (
            f"<td{' class=number' if isinstance(c, int | float) else ''}>{html.escape(_text(c))}</td>"
            for c in row
        )
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _facts(title: str, values: Mapping[str, Any]) -> str:
    cells = ((html.escape(str(k)), html.escape(_text(v))) for k, v in values.items())
    rows = "".join(
        f"<tr><td class=soft>{name}</td><td><code>{value}</code></td></tr>\n"
        for name, value in cells
    )
    return f"<h2>{title}</h2>\n<table>\n{rows}</table>\n" if values else ""


def _page(report: Report) -> str:
    title = html.escape(report.title)
    rows = tuple((m.name, m.value, m.floor, m.better, m.about) for m in report.metrics)
    parts = [
        f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<meta name=viewport content='width=device-width'>\n<title>{title}</title>",
        f"<style>{STYLE}</style>\n<h1>{title}</h1>",
        "<p>Floor: the same metric between two disjoint sets of real images, which is what a perfect model would score.</p>",
        _html_table(("metric", "value", "floor", "better", "what"), rows),
    ]
    for picture in report.pictures:
        data = base64.b64encode(picture.png).decode()
        name = html.escape(picture.title)
        image = f"<img alt='{html.escape(picture.title, quote=True)}' src='data:image/png;base64,{data}'>"
        parts.append(
            f"<h2>{name}</h2>\n<figure><figcaption>{html.escape(picture.caption)}</figcaption>{image}</figure>"
        )
    parts += [
        f"<h2>{html.escape(t.title)}</h2>\n{_html_table(t.columns, t.rows)}" for t in report.tables
    ]
    parts += [
        _facts("Feature network", report.features),
        _facts("Images (fingerprints)", report.data),
        _facts("Settings", report.settings),
    ]
    return "\n".join(parts) + "\n</html>\n"
