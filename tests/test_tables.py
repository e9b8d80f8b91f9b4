"""Tables fit the terminal and are whole in a pipe; legends cover nothing."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from archzoo.analysis import listing, tables
from archzoo.analysis.figures import legend, pyplot


def made() -> Table:
    table = Table(box=None, title="a title", title_justify="left")
    for number in range(9):
        table.add_column(f"column {number}", justify="right")
    for row in range(3):
        table.add_row(*(f"{row} " + "x" * (5 * number % 17) for number in range(9)))
    return table


def printed(width: int | None, table: Table) -> list[str]:
    file = io.StringIO()
    terminal = {} if width is None else {"force_terminal": True, "color_system": None}
    tables.show(table, Console(file=file, width=width or 40, **terminal))
    return re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()).splitlines()


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_a_terminal_is_never_overrun_and_nothing_is_left_out(width):
    lines = printed(width, made())
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text and text.count("a title") == 1
    assert all(text.count(f"column {number}") == 1 for number in range(1, 9))
    parts = text.split("\n\n")
    assert all("column 0" in part for part in parts)  # so that each part says whose rows it has
    assert len(parts) == text.count("column 0") > 1 or width == 120


def test_a_pipe_gets_it_in_one_piece():
    lines = printed(None, made())
    assert len(lines) == 5 and all(f"column {number}" in lines[1] for number in range(9))


def test_the_zoo_fits_a_terminal_of_80_columns(monkeypatch):
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(listing, "show", lambda table, *_: tables.show(table, console))
    listing.list_command()
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert "arXiv 1706.03762" in file.getvalue() and "state at 16k" in file.getvalue()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_legend_covers_nothing(beside, count):
    figure, panels = pyplot().subplots(1, 2, layout="constrained")
    for number in range(count):
        panels[0].plot([0, 1], [0, number], label=f"line number {number}")
    legend(panels[0], beside)
    legend(panels[1])  # without names
    assert panels[1].get_legend() is None
    figure.draw_without_rendering()
    box = panels[0].get_legend().get_window_extent()
    assert not any(box.overlaps(panel.get_window_extent()) for panel in panels)
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    pyplot().close(figure)
