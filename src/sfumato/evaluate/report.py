"""A report: every number beside its floor, with all that is needed to measure it again.

The floor of a metric is the same metric between two disjoint sets of *real* images of equal size,
the score of a perfect model. A Frechet distance of 3 is poor beside a floor of 0.1 and perfect
beside a floor of 3.
"""

import base64
import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.evaluate.figures import Figure
from sfumato.io.atomic import atomic_file

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Metric:
    """A number beside its floor.

    Attributes:
        name: Of the metric, unique in a report.
        value: The measured number.
        floor: The number of real images; None where there is none.
        better: Direction of better values; "near": nearer to the floor.
        about: One line that defines the number and its unit.
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
    """All metrics of a measurement, with the inputs that determine them.

    Attributes:
        title: Of the page.
        metrics: In the order of the page.
        features: name, hash, dim and resize of the feature network.
        data: Fingerprint of each set of images.
        settings: n, seed, k, and the caller's own: steps, sampler, guidance ...
        tables: Small tables, such as one row a class.
        figures: Figures of the page.
    """

    title: str
    metrics: tuple[Metric, ...]
    features: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Rows, ...] = ()
    figures: tuple[Figure, ...] = ()

    def __getitem__(self, name: str) -> Metric:
        """Return the metric of a name; `KeyError` lists the names."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        names = ", ".join(m.name for m in self.metrics)
        raise KeyError(f"{name!r} was not measured: expected one of {names}")

    def join(self, other: "Report") -> "Report":
        """Both reports as one; the title and, where keys agree, the settings are of this one."""
        return replace(
            self,
            metrics=self.metrics + other.metrics,
            features={**other.features, **self.features},
            data={**other.data, **self.data},
            settings={**other.settings, **self.settings},
            tables=self.tables + other.tables,
            figures=self.figures + other.figures,
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the figures, as JSON values; an infinite number is the text "infinite"."""
        metrics = {m.name: asdict(m) for m in self.metrics}
        for metric in metrics.values():
            del metric["name"]
        tables = [asdict(table) for table in self.tables]
        facts = {"features": self.features, "data": self.data, "settings": self.settings}
        return _jsonable({"title": self.title, "metrics": metrics, "tables": tables, **facts})

    def to_json(self, path: str | Path | None = None) -> str:
        """Return JSON with sorted keys and every digit; also write it to `path`, atomically.

        Equal measurements give equal text.
        """
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        if path is not None:
            with atomic_file(path) as temporary:
                temporary.write_text(text)
        return text

    def to_html(self, path: str | Path) -> None:
        """Write one page with the table, the facts and the figures, embedded as PNG, atomically."""
        with atomic_file(path) as temporary:
            temporary.write_text(_page(self), encoding="utf-8")

    def table(self) -> "Table":
        """Return the metrics as a table for the terminal."""
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
        if math.isinf(value):
            return "infinite"
        return f"{value:#.4g}" if abs(value) < 1000 else f"{value:.1f}"
    return str(value)


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p, figcaption { color: var(--soft); margin: .2rem 0 .6rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; } \
td.soft { color: var(--soft); }
figure { margin: 0; overflow-x: auto; } img { image-rendering: pixelated; max-width: 100%; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def _html_table(columns: tuple[str, ...], rows: tuple[tuple[Any, ...], ...]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = ""
    for row in rows:
        kinds = (" class=number" if isinstance(c, int | float) else "" for c in row)
        cells = (f"<td{k}>{html.escape(_text(c))}</td>" for k, c in zip(kinds, row, strict=True))
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _facts(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td class=soft>{html.escape(str(name))}</td>"
        f"<td><code>{html.escape(_text(value))}</code></td></tr>\n"
        for name, value in values.items()
    )
    return f"<h2>{title}</h2>\n<table>\n{rows}</table>\n" if values else ""


def _page(report: Report) -> str:
    title = html.escape(report.title)
    rows = tuple((m.name, m.value, m.floor, m.better, m.about) for m in report.metrics)
    parts = [
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        f"<meta name=viewport content='width=device-width'>\n<title>{title}</title>",
        f"<style>{STYLE}</style>\n<h1>{title}</h1>",
        "<p>Floor: the same metric between two disjoint sets of real images, "
        "which is what a perfect model would score.</p>",
        _html_table(("metric", "value", "floor", "better", "what"), rows),
    ]
    for figure in report.figures:
        data, name = base64.b64encode(figure.png).decode(), html.escape(figure.title)
        alt, caption = html.escape(figure.title, quote=True), html.escape(figure.caption)
        image = f"<img alt='{alt}' src='data:image/png;base64,{data}'>"
        parts.append(f"<h2>{name}</h2>\n<figure><figcaption>{caption}</figcaption>{image}</figure>")
    for table in report.tables:
        parts.append(
            f"<h2>{html.escape(table.title)}</h2>\n{_html_table(table.columns, table.rows)}"
        )
    parts += [
        _facts("Feature network", report.features),
        _facts("Images (fingerprints)", report.data),
        _facts("Settings", report.settings),
    ]
    return "\n".join(parts) + "\n</html>\n"
