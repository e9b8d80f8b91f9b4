"""Tables in a terminal: as wide as they are, or some columns below the others."""

from __future__ import annotations

import copy
import os
import sys
from contextlib import suppress

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


class Screen(Console):
    """A console whose program continues when no one reads it any more (`| head`).

    Rich would end the program there, a training run included.
    """

    def on_broken_pipe(self) -> None:
        """What is still to be said goes nowhere."""
        self.quiet = True
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def show(table: Table, console: Console | None = None) -> None:
    """Print a table whose lines never wrap.

    Where it is wider than the terminal, columns that do not fit are printed below the others, each
    part with the first column again. Into a file or a pipe it is written whole.

    Args:
        table: Without a box.
        console: Where it goes. None: standard output.
    """
    console = console or Screen()
    # More than any table: rich would fold the cells of one that is wider than the console.
    wide = 10_000
    available = console.width if console.is_terminal else wide
    options = console.options.update(width=wide)
    for column in table.columns:
        column.no_wrap = True

    def width(numbers: list[int]) -> int:
        return Measurement.get(console, options, _part(table, numbers)).maximum

    parts: list[list[int]] = [[0]]
    for number in range(1, len(table.columns)):
        if width([*parts[-1], number]) > available and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(number)
    for index, numbers in enumerate(parts):
        part = _part(table, numbers)
        if index:
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
