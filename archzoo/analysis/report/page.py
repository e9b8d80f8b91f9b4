"""A report as plain data, and that as HTML."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from archzoo._version import __version__
from archzoo.analysis.evidence import commit, machine, versions
from archzoo.analysis.report.charts import figure
from archzoo.analysis.report.files import plotly_script
from archzoo.analysis.report.model import Cell, Chart, Table
from archzoo.analysis.report.values import plain, settings_rows, shown, sort_key

HERE = files("archzoo.analysis.report")


def context(
    title: str,
    *,
    command: str,
    settings: Mapping[str, Any],
    sections: Sequence[Table | Chart | str],
    facts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What the page says, as plain data: neither plotly nor jinja2 is needed for it.

    Args:
        title: Of the page.
        command: That made what is shown.
        settings: All that the results depend on.
        sections: Tables, charts and paragraphs.
        facts: What computed. None: this process's.

    Raises:
        ValueError: A chart or a table does not fit together.
    """
    return {
        "title": title,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "facts": [(name, value) for name, value in (facts or _facts()).items() if value],
        "settings": list(settings_rows(settings)),
        "sections": [_section(section, number) for number, section in enumerate(sections)],
    }


def _facts() -> dict[str, str]:
    found = {"machine": machine(), "archzoo": __version__, "python": platform.python_version()}
    return (
        found | {name: value for name, value in versions().items() if value} | {"commit": commit()}
    )


def _section(section: Table | Chart | str, number: int) -> dict[str, Any]:
    if isinstance(section, str):
        return {"kind": "text", "paragraphs": [p for p in section.split("\n\n") if p.strip()]}
    place = {"id": f"section-{number}", "title": section.title}
    if isinstance(section, Table):
        return place | {"kind": "table", "note": section.note, **_table(section)}
    drawn = figure(section)
    return place | {
        "kind": "chart",
        "notes": drawn.pop("notes"),
        "figure": drawn,
        "summary": f"{section.y_label} over {section.x_label}: {len(section.series)} curves",
    }


def _table(table: Table) -> dict[str, Any]:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"a row of the table {table.title!r} has {len(row)} values for "
                f"{len(table.columns)} columns: {row}"
            )
    rows = [[_cell(value) for value in row] for row in table.rows]
    columns = []
    for number, heading in enumerate(table.columns):
        cells = [row[number] for row in rows]
        # Some may say in words why there is no number.
        said = [cell["number"] is not None for cell in cells if not cell["missing"]]
        numeric = sum(said) > len(said) / 2
        columns.append({"heading": str(heading), "numeric": numeric})
    return {"columns": columns, "rows": rows}


def _cell(value: Any) -> dict[str, Any]:
    text = value.text if isinstance(value, Cell) else shown(value)
    value = plain(value.value if isinstance(value, Cell) else value)
    missing = value is None or value == "" or value != value
    number = sort_key(value)
    key = "" if number is None else str(number).replace("inf", "Infinity")  # as JavaScript reads it
    return {"text": text, "number": number, "key": key, "missing": missing}


def script_json(value: Any) -> str:
    """JSON that may stand in a `script` element whatever texts are in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def render(page: dict[str, Any]) -> str:
    """The HTML of a `context`.

    Raises:
        ValueError: The extra `report` is not installed.
    """
    plotly = plotly_script()
    from jinja2 import Environment
    from markupsafe import Markup

    scripts = {"plotly": plotly, "behaviour": (HERE / "report.js").read_text("utf-8")}
    # The page runs these two scripts and no other, whatever a run is called.
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in scripts.values()
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "report.html.jinja").read_text("utf-8"))
    figures = {s["id"]: s["figure"] for s in page["sections"] if s["kind"] == "chart"}
    return template.render(
        **page,
        hashes=hashes,
        style=Markup((HERE / "report.css").read_text("utf-8")),
        figures=Markup(script_json(figures)),
        **{name: Markup(text) for name, text in scripts.items()},
    )
