"""The demo in a terminal: a panel a model, drawn anew while the tokens come; else plain text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from archzoo.analysis.tables import Screen
from archzoo.demo.decoding import Event, History, Side, condensed, summary

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
NARROW = 72  # columns below which panels stand one below the other
LABELS = ("ms a token", "state bytes")
COLOURS = ("cyan", "magenta")
FRAMES = 12  # a second
FIGURE = 9  # columns of a number
FRAME = 4  # columns of a panel's border and padding


def show(
    sides: Sequence[Side], prompt: str, events: Iterator[Event], console: Console | None = None
) -> list[History]:
    """Draw the events as they come, and everything at their end.

    Where there is no terminal, the end alone is written. An interruption shows what there is.

    Args:
        sides: The models.
        prompt: The text that they continue.
        events: As `decode` gives them.
        console: Where it goes. None: standard output.
    """
    console = console or Screen(highlight=False)
    histories = [History() for _ in sides]
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            # Drawn between two tokens, never by a thread during one: steps are timed.
            with Live(console=console, auto_refresh=False, transient=True) as live:
                drawn = 0.0
                for event in events:
                    histories[event.side].add(event)
                    if time.monotonic() - drawn >= 1 / FRAMES:
                        drawing = _side_by_side(sides, prompt, histories, console, whole=False)
                        live.update(drawing, refresh=True)
                        drawn = time.monotonic()
        else:
            for event in events:
                histories[event.side].add(event)
    finally:
        if any(history.tokens for history in histories):
            _show_end(sides, prompt, histories, console)
    return histories


def _show_end(
    sides: Sequence[Side], prompt: str, histories: Sequence[History], console: Console
) -> None:
    if console.is_terminal and not console.is_dumb_terminal:
        console.print(_side_by_side(sides, prompt, histories, console, whole=True))
    else:
        for number, (side, history) in enumerate(zip(sides, histories, strict=True)):
            console.print(f"{side.name}: {side.about}", markup=False, soft_wrap=True)
            console.out(printable(prompt + history.text, console.encoding), highlight=False)
            console.print()
            for label, figure, line in _measurements(number, histories, 40, not _draws(console)):
                console.print(f"{label:<12}{figure:>16}  {line}", markup=False, soft_wrap=True)
            console.print()
    for line in summary(sides, histories):
        console.print(line, markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------- panels


def _side_by_side(
    sides: Sequence[Side],
    prompt: str,
    histories: Sequence[History],
    console: Console,
    whole: bool,
) -> RenderableType:
    """The panels: beside each other where the terminal is wide enough, else below.

    Args:
        sides: The models.
        prompt: The text that they continue.
        histories: Of each.
        console: Which it must fit.
        whole: All of the text; else the end of it, as much as the terminal is high.
    """
    columns = len(sides) if console.width >= NARROW else 1
    width = console.width // columns
    texts = [_lines(prompt, history.text, max(width - FRAME, 1), console) for history in histories]
    height = max(map(len, texts))
    if not whole:
        rows = -(-len(sides) // columns)
        height = max((console.height - 1) // rows - 5, 1)
        texts = [lines[-height:] for lines in texts]
    if columns > 1 or not whole:  # all of one height
        texts = [lines + [Text("")] * (height - len(lines)) for lines in texts]
    panels = [
        _panel(number, side, texts[number], histories, width, console)
        for number, side in enumerate(sides)
    ]
    if columns == 1:
        return Group(*panels)
    grid = Table.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def _lines(prompt: str, text: str, width: int, console: Console) -> list[Text]:
    whole = Text(printable(prompt, console.encoding), style="dim")
    whole.append(printable(text, console.encoding), style="bold")
    return list(whole.wrap(console, width))


def _panel(
    number: int,
    side: Side,
    lines: list[Text],
    histories: Sequence[History],
    width: int,
    console: Console,
) -> Panel:
    colour = COLOURS[number % len(COLOURS)]
    plain = not _draws(console)
    figures = Table.grid(padding=(0, 1))
    figures.add_column(style="dim", no_wrap=True)
    figures.add_column(justify="right", no_wrap=True, min_width=FIGURE)
    figures.add_column(style=colour, no_wrap=True)
    space = max(width - FRAME - len(LABELS[1]) - FIGURE - 2, 1)
    for row in _measurements(number, histories, space, plain):
        figures.add_row(*row)
    return Panel(
        Group(*lines, figures),
        title=Text(f"{side.name}: {side.mixers}"),
        subtitle=Text(f"{side.model.parameter_count():,} parameters"),
        border_style=colour,
    )


def _measurements(
    number: int, histories: Sequence[History], width: int, plain: bool
) -> list[tuple[str, str, str]]:
    """(label, figure, growing line) of one model, on the scale that all models share."""
    mine = histories[number]
    times = [condensed(history.medians, width) for history in histories]
    sizes = [condensed(history.state_bytes, width) for history in histories]
    figures = (
        f"{mine.medians[-1]:.2f}" if mine.medians else "",
        f"{mine.state_bytes[-1]:,}" if mine.state_bytes else "",
    )
    return [
        (label, figure, sparkline(rows[number], _top(rows), plain))
        for label, figure, rows in zip(LABELS, figures, (times, sizes), strict=True)
    ]


def printable(text: str, encoding: str = "utf-8") -> str:
    """A text without what a terminal would obey or cannot show: a model may write any character."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return text.encode(encoding, "replace").decode(encoding)


def sparkline(values: Sequence[float], top: float, plain: bool = False) -> str:
    """Values from 0 to `top` as bars in one line of text.

    Args:
        values: A bar each.
        top: What the highest bar stands for; more is drawn as high.
        plain: In ASCII, where a terminal knows no more.
    """
    bars = PLAIN_BARS if plain else BARS
    if top <= 0:
        return bars[0] * len(values)
    last = len(bars) - 1
    return "".join(bars[min(int(value / top * last + 0.5), last)] for value in values)


def _top(rows: Sequence[Sequence[float]]) -> float:
    return max((max(row) for row in rows if row), default=0)


def _draws(console: Console) -> bool:
    """Whether more than ASCII can be written."""
    return not console.options.ascii_only
