"""Tables in a terminal: as wide as they are, or some columns below the others."""

from __future__ import annotations

import copy

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def show(table: Table, console: Console | None = None) -> None:
    """Print a table whose lines never wrap.

    Where it is wider than the terminal, the columns that do not fit stand below the others, each
    part with the first column again. Into a file or a pipe it goes in one piece.

    Args:
        table: Without a box.
        console: Where it goes. None: standard output.
    """
    console = console or Console()
    # More than any table: rich would fold the cells of one that is wider than the console.
    wide = 10_000
    room = console.width if console.is_terminal else wide
    options = console.options.update(width=wide)
    for column in table.columns:
        column.no_wrap = True

    def width(numbers: list[int]) -> int:
        return Measurement.get(console, options, _part(table, numbers)).maximum

    parts: list[list[int]] = [[0]]
    for number in range(1, len(table.columns)):
        if width([*parts[-1], number]) > room and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(number)
    for place, numbers in enumerate(parts):
        part = _part(table, numbers)
        if place:
            part.title = None
            console.print()
        if not console.is_terminal:
            console.width = max(console.width, width(numbers))
        console.print(part)


def _part(table: Table, numbers: list[int]) -> Table:
    """Some of a table's columns."""
    part = copy.copy(table)
    part.columns = [table.columns[number] for number in numbers]
    return part
