"""What a report is made of: tables, charts and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A value of a table that is shown as another text: `Cell(2048, "2 KiB")`.

    Attributes:
        value: What the table sorts by.
        text: What is shown.
    """

    value: float | str | None
    text: str


@dataclass
class Series:
    """One curve of a chart. What is None, NaN or infinite is a gap in it.

    Args:
        name: In the legend.
        x: Where it was measured.
        y: What was measured, as many as x.
        low: The lower end of the spread at each x, drawn as a band. None: no band.
        high: Its upper end.
    """

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass
class Chart:
    """Curves over one axis.

    Args:
        title: Of the section.
        x_label: Says the unit too.
        y_label: Says the unit too.
        series: The curves.
        log_x: A logarithmic axis.
        log_y: A logarithmic axis.
        note: Below the plot, such as what the band is or which curve ended early and why.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclass
class Table:
    """Rows of values, which a click on a heading sorts.

    Args:
        title: Of the section.
        columns: Their headings.
        rows: As many values a row as there are columns: texts, numbers, booleans, None, `Cell`.
            Columns of numbers are aligned to the right and sorted as numbers; a text that begins
            with one, such as "1.52 ± 0.03", is one, and other texts among them sort last.
        note: Below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
