"""What the page shows, as HTML: texts, figures, growing lines, and each head's memory.

Everything that a prompt or a model wrote is escaped here, and nothing is loaded from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from archzoo.analysis.window import HeadWindow
from archzoo.demo.decoding import AtContext, FormsCompared, History, Side, condensed
from archzoo.demo.memory import weights

COLOURS = ("#0891b2", "#c026d3")  # of the first and the second model, readable on black and white
COLUMNS = 160  # of a growing line
SHOWN = 600  # tokens at the end of a text over which memory is drawn
SHADES = 24  # steps between nothing and all

# A text scrolls with its end, and stands at the top while it is short: it is laid out from below.
BELOW = '<div class="az-below"></div>'
CSS = """
.az-text {white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  font-size: 13px; line-height: 1.45}
.az-written, .az-held {font-size: 13px; overflow-y: auto; display: flex;
  flex-direction: column-reverse}
.az-written {height: 14.5em}
.az-held {max-height: 11.6em}
.az-written > *, .az-held > * {flex: none}
.az-written > .az-below, .az-held > .az-below {flex: 1}
.az-card {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px}
.az-card h3 {margin: 0; overflow-wrap: anywhere}
.az-about {opacity: .7; font-size: 13px; margin-bottom: 8px}
.az-prompt {opacity: .6}
.az-figures {display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 10px}
.az-label {opacity: .7; font-size: 12px}
.az-number {font-size: 22px; font-variant-numeric: tabular-nums}
.az-head {display: grid; grid-template-columns: 9em 1fr; gap: 10px; padding: 6px 0;
  border-top: 1px solid var(--border-color-primary)}
.az-chart {width: 100%; height: auto; display: block}
.az-chart text {fill: currentColor; font-size: 11px}
.az-table {width: 100%; border-collapse: collapse; margin: 6px 0 14px}
.az-table, .az-table tr {border: none !important}
.az-table td, .az-table th {text-align: left; vertical-align: top; padding: 5px 10px 5px 0;
  border: none !important; border-top: 1px solid var(--border-color-primary) !important}
.az-error {border-left: 4px solid #dc2626; padding: 4px 10px}
.az-status {min-height: 1.6em}
"""


# ---------------------------------------------------------------------------- decoding


def card(number: int, side: Side, prompt: str, histories: Sequence[History]) -> str:
    """One model: its text, its figures, and their growing lines on the scale all models share.

    Args:
        number: Which of the models.
        side: The model.
        prompt: The text that it continues.
        histories: Of all models.
    """
    mine = histories[number]
    colour = COLOURS[number % len(COLOURS)]
    time = mine.medians[-1] if mine.medians else None
    size = mine.state_bytes[-1] if mine.state_bytes else None
    times = [condensed(history.medians, COLUMNS) for history in histories]
    sizes = [condensed(history.state_bytes, COLUMNS) for history in histories]
    figures = [
        _figure("ms a token", "–" if time is None else f"{time:.2f}", number, times, colour),
        _figure("state bytes", "–" if size is None else f"{size:,}", number, sizes, colour),
    ]
    text = f'<span class="az-prompt">{escape(prompt)}</span><b>{escape(mine.text)}</b>'
    return (
        f'<div class="az-card" style="border-top: 4px solid {colour}">'
        f"<h3>{escape(side.name)}</h3>"
        f'<div class="az-about">{escape(side.about)} · {mine.tokens:,} tokens written</div>'
        f'<div class="az-written">{BELOW}<div class="az-text">{text}</div></div>'
        f'<div class="az-figures">{"".join(figures)}</div></div>'
    )


def _figure(
    label: str, figure: str, number: int, rows: Sequence[Sequence[float]], colour: str
) -> str:
    top = max((max(row) for row in rows if row), default=0)
    return (
        f'<div><div class="az-label">{label}</div>'
        f'<div class="az-number" data-figure="{label}">{figure}</div>'
        f"{growing_line(rows[number], top, colour, label)}</div>"
    )


def growing_line(values: Sequence[float], top: float, colour: str, label: str) -> str:
    """Values from 0 to `top` as a line that grows to the right.

    Args:
        values: At most `COLUMNS`.
        top: What the upper edge stands for.
        colour: Of the line.
        label: For those who cannot see it.
    """
    width, height = 2 * COLUMNS, 44
    points = " ".join(
        f"{2 * index:g},{height - 2 - (height - 4) * value / (top or 1):.1f}"
        for index, value in enumerate(values)
    )
    return (
        f'<svg class="az-chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)} over the tokens" preserveAspectRatio="none">'
        f'<line x1="0" x2="{width}" y1="{height - 1}" y2="{height - 1}" stroke="currentColor" '
        'stroke-opacity=".25"/>'
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/></svg>'
    )


# ---------------------------------------------------------------------------- memory


def memory(side: Side, chunks: Sequence[str], heads: Sequence[HeadWindow]) -> str:
    """The end of a text, once for each head, each token as dark as the head still holds it.

    Args:
        side: The model.
        chunks: The text, token by token, the last one read.
        heads: Of one layer.
    """
    end = list(chunks)[-SHOWN:]
    before = len(chunks) - len(end)
    parts = [f"<h3>{escape(side.name)}</h3>"]
    for head in heads:
        if head.gamma is None:  # and so it is with all of the layer's
            about = "<b>every head</b><br>keeps every token:<br>its cache grows with each"
            parts.append(_head(about, _shaded(end, [1.0] * len(end), before)))
            break
        about = f"half-life {head.half_life:,.0f} tokens<br>1 % after {head.one_percent:,.0f}"
        if head.gamma == 1:
            about = "never forgets"
        about = f"<b>head {head.head}</b><br>{about}"
        parts.append(_head(about, _shaded(end, weights(head.gamma, len(end)), before)))
    return "".join(parts)


def _head(about: str, text: str) -> str:
    return (
        f'<div class="az-head"><div class="az-label">{about}</div>'
        f'<div class="az-held">{BELOW}<div class="az-text">{text}</div></div></div>'
    )


def _shaded(chunks: Sequence[str], held: Sequence[float], before: int) -> str:
    """Text with a background as dark as its weight; neighbours of one shade are one element."""
    shades = [round(weight * SHADES) for weight in held]
    parts = [f"<i>… {before:,} tokens before …</i> "] if before else []
    pairs = zip(shades, chunks, strict=True)
    for shade, group in groupby(pairs, key=lambda pair: pair[0]):
        text = escape("".join(chunk for _, chunk in group))
        opacity = 0.55 * shade / SHADES
        parts.append(
            f'<span style="background: rgba(8, 145, 178, {opacity:.3f})">{text}</span>'
            if shade
            else f'<span style="opacity: .45">{text}</span>'
        )
    return "".join(parts)


# ---------------------------------------------------------------------------- contexts


class Line(NamedTuple):
    """Points of a chart, in the order of x.

    Attributes:
        name: For the legend.
        points: (x, y) pairs.
        colour: Of the line.
    """

    name: str
    points: list[tuple[float, float]]
    colour: str


def contexts(
    sides: Sequence[Side],
    context: int,
    sizes: Sequence[int],
    measured: Sequence[dict[int, AtContext]],
    curves: Sequence[list[tuple[float, float]]],
) -> str:
    """State and time of a token at one length of text, in a table, and at others, in charts.

    Args:
        sides: The models.
        context: The length in tokens.
        sizes: Bytes of each model's state there.
        measured: Of each model, what was measured, by the length.
        curves: Of each model, (tokens, bytes of the state) at several lengths.
    """
    rows = []
    for side, size, known in zip(sides, sizes, measured, strict=True):
        here = known.get(context)
        time = "not measured yet" if here is None else f"{here.milliseconds:.2f} ms"
        rows.append([escape(side.name), f"{size:,} bytes", time])
    heads = ["model", f"state after {context:,} tokens", f"a token after {context:,} tokens"]
    names = [side.name for side in sides]
    bytes_lines = [
        Line(name, points, COLOURS[number % len(COLOURS)])
        for number, (name, points) in enumerate(zip(names, curves, strict=True))
    ]
    time_lines = [
        Line(
            name,
            [(float(n), known[n].milliseconds) for n in sorted(known)],
            COLOURS[number % len(COLOURS)],
        )
        for number, (name, known) in enumerate(zip(names, measured, strict=True))
    ]
    charts = [
        chart("state bytes", bytes_lines, context, lambda value: f"{value:,.0f}"),
        chart("ms a token", time_lines, context, lambda value: f"{value:.2f}"),
    ]
    return f'{table(heads, rows)}<div class="az-figures">{"".join(charts)}</div>'


def chart(title: str, lines: Sequence[Line], marker: float, written: Callable[[float], str]) -> str:
    """Lines over the length of text, which is drawn in its logarithm, and a mark at one length.

    Args:
        title: Above.
        lines: Over tokens.
        marker: The length that is marked.
        written: How a value of the upright axis is put down.
    """
    width, height, left, right, below = 460, 220, 70, 30, 36
    tokens = [x for line in lines for x, _ in line.points] + [marker]
    low, high = math.log2(min(tokens)), math.log2(max(tokens))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    top = max((y for line in lines for _, y in line.points), default=0) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low)
        return left + across * (width - left - right), (height - below) - y / top * (
            height - below - 16
        )

    parts = [
        f'<svg class="az-chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)} over the length of text">'
    ]
    for share in (0, 0.5, 1):
        _, y = place(2**low, top * share)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity=".2"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{written(top * share)}</text>'
        )
    for power in range(math.ceil(low), math.floor(high) + 1, 2):
        x, _ = place(2**power, 0)
        parts.append(
            f'<text x="{x:.1f}" y="{height - 18}" text-anchor="middle">{2**power:,}</text>'
        )
    middle = (left + width - right) // 2
    parts.append(f'<text x="{middle}" y="{height - 3}" text-anchor="middle">tokens</text>')
    x, _ = place(marker, 0)
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{height - below}" stroke="currentColor" '
        'stroke-dasharray="4 3" stroke-opacity=".6"/>'
    )
    for line in lines:
        points = [place(x, y) for x, y in line.points]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{line.colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in points
        ]
    parts.append("</svg>")
    legend = " ".join(
        f'<span style="color: {line.colour}">●</span> {escape(line.name)}' for line in lines
    )
    drawing = "".join(parts)
    return f'<div><div class="az-label"><b>{escape(title)}</b> {legend}</div>{drawing}</div>'


# ---------------------------------------------------------------------------- forms, messages


def forms(side: Side, prompt: str, found: FormsCompared) -> str:
    """The text of each form, whether they are the same, and how far their logits differ.

    Args:
        side: The model.
        prompt: What was continued.
        found: Of the comparison.
    """
    text = '<div class="az-text"><span class="az-prompt">{}</span><b>{}</b></div>'
    rows = [
        [form, text.format(escape(prompt), escape(written))]
        for form, written in found.texts.items()
    ]
    verdict = (
        f"same: <b>{'yes' if found.same else 'no'}</b> · largest difference of a logit "
        f"{found.largest:.1e}, relative root mean square {found.relative:.1e} "
        f"(rounding explains {found.allowed:.0e})"
    )
    return (
        f"<h3>{escape(side.name)}</h3>{table(['form', 'what it writes'], rows)}"
        f'<div class="az-verdict">{verdict}</div>'
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already, under headings that are text."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="az-table"><tr>{head}</tr>{body}</table>'


def message(text: str) -> str:
    """One line of what is being done."""
    return f'<div class="az-status">{escape(text)}</div>'


def error(text: str) -> str:
    """One line of what was wrong."""
    return f'<div class="az-status az-error" role="alert">{escape(" ".join(text.split()))}</div>'
