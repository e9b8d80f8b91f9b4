"""A chart as plotly's figure: plain data, which its script draws."""

from __future__ import annotations

import colorsys
import html
import math
from collections.abc import Sequence
from typing import Any

from archzoo.analysis.report.model import Chart, Series
from archzoo.analysis.report.values import plain, shown

# Told apart by people who see few colours, on white and on black (after Okabe and Ito, 2008).
COLOURS = (
    "#1a80c4",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#8c6bb1",
    "#999933",
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
TICKS = 12  # places on a logarithmic axis up to which each is labelled
LEGEND = 40  # characters of a name in the legend, which takes its width from the plot
ONE_BOX = 12  # curves up to which pointing at a place shows the values of all


def escaped(text: str) -> str:
    """For plotly, which reads tags and entities in every text, and `%{...}` in what it shows."""
    return html.escape(str(text)).replace("%{", "%&#123;")


def figure(chart: Chart) -> dict[str, Any]:
    """Traces, layout and notes of a chart.

    Returns:
        "data" and "layout" are plotly's; "notes" are sentences on what could not be drawn.

    Raises:
        ValueError: A series' parts differ in their lengths.
    """
    traces: list[dict[str, Any]] = []
    notes = [chart.note] if chart.note else []
    left_out = 0
    for index, series in enumerate(chart.series):
        drawn, missing = _traces(chart, series, index, len(chart.series))
        traces += drawn
        left_out += missing
    if left_out:
        why = "not finite or, on a logarithmic axis, not positive"
        notes.append(
            f"{left_out} {'value is' if left_out == 1 else 'values are'} not drawn: {why}."
        )
    if not any(value is not None for trace in traces for value in trace["y"]):
        notes.append("There is nothing to draw.")
    return {"data": traces, "layout": _layout(chart, traces), "notes": notes}


def _layout(chart: Chart, traces: list[dict[str, Any]]) -> dict[str, Any]:
    def axis(label: str, side: str, log: bool) -> dict[str, Any]:
        found = {"title": {"text": escaped(label)}, "automargin": True, "zeroline": False}
        drawn = [value for trace in traces for value in trace[side] if value is not None]
        if log:
            found["type"] = "log"
            if drawn and max(drawn) > 10 * min(drawn):  # powers of ten, and between them 2 and 5
                found |= {"dtick": "D2", "exponentformat": "power"}
        return found

    across = axis(chart.x_label, "x", chart.log_x)
    if chart.log_x:
        places = {_drawable(value, True) for series in chart.series for value in series.x} - {None}
        if 0 < len(places) <= TICKS:  # such as the lengths that were measured: 256, 512, 1,024
            ticks = sorted(value for value in places if value is not None)
            words = [shown(int(at) if at == int(at) else at) for at in ticks]
            across |= {"tickvals": ticks, "ticktext": words}
    up = axis(chart.y_label, "y", chart.log_y)
    layout = {"xaxis": across, "yaxis": up, "showlegend": True}
    if len(chart.series) <= ONE_BOX:  # from anywhere in the plot, what was measured nearest to it
        return layout | {"hovermode": "x unified", "hoverdistance": -1}
    return layout | {"hovermode": "closest"}


def _traces(
    chart: Chart, series: Series, index: int, count: int
) -> tuple[list[dict[str, Any]], int]:
    """A curve, its band before it, and how many of its values cannot be drawn."""
    sides = {"y": series.y, "low": series.low, "high": series.high}
    for side, values in sides.items():
        if values is not None and len(values) != len(series.x):
            raise ValueError(
                f"the series {series.name!r} of {chart.title!r} has {len(series.x)} x and "
                f"{len(values)} {side}"
            )
    if (series.low is None) != (series.high is None):
        raise ValueError(f"the series {series.name!r} of {chart.title!r} has one end of its band")
    x = [_drawable(value, chart.log_x) for value in series.x]
    y = [_drawable(value, chart.log_y) for value in series.y]
    gone = [a is None or b is None for a, b in zip(x, y, strict=True)]
    y = [None if lost else value for value, lost in zip(y, gone, strict=True)]
    colour = colour_of(index, count)
    short = series.name if len(series.name) <= LEGEND else f"{series.name[: LEGEND - 1]}…"
    group = {"legendgroup": str(index), "name": escaped(short)}
    # What pointing at a value says: where, if the box is not of that place, how much, and whose.
    at = f"{escaped(chart.x_label)} %{{x}}<br>" if count > ONE_BOX else ""
    spread = "" if series.low is None else " (%{customdata[0]} to %{customdata[1]})"
    curve: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 60 else "lines",
        "x": x,
        "y": y,
        "line": {"color": colour, "width": 2, "dash": DASHES[index // len(COLOURS) % len(DASHES)]},
        "marker": {"color": colour, "size": 6},
        "connectgaps": False,
        "hovertemplate": f"{at}%{{y:.4~g}}{spread}<extra>{escaped(series.name)}</extra>",
        **group,
    }
    if series.low is None or series.high is None:
        return [curve], sum(gone)
    low = [_drawable(value, chart.log_y) for value in series.low]
    high = [_drawable(value, chart.log_y) for value in series.high]
    if chart.log_y:  # a band may reach below zero: it is drawn to the bottom of what is seen
        floor = min((value for value in [*y, *high] if value is not None), default=1.0) / 10
        for n, value in enumerate(plain(v) for v in series.low):
            if low[n] is None and value is not None and value <= 0:
                low[n] = floor
    ends = zip(series.low, series.high, strict=True)
    curve["customdata"] = [[shown(lower), shown(upper)] for lower, upper in ends]
    outline = _outline(x, low, high)
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": outline[0],
        "y": outline[1],
        "fill": "toself",
        "fillcolor": _translucent(colour, 0.18),
        "line": {"color": _translucent(colour, 0.3), "width": 1},
        "hoverinfo": "skip",
        "showlegend": False,
        **group,
    }
    return [band, curve], sum(gone)


def _outline(
    x: Sequence[float | None], low: Sequence[float | None], high: Sequence[float | None]
) -> tuple[list[float | None], list[float | None]]:
    """Around each run of values between gaps: along the upper ends and back along the lower."""
    across: list[float | None] = []
    up: list[float | None] = []
    run: list[tuple[float, float, float]] = []
    for point in [*zip(x, low, high, strict=True), (None, None, None)]:
        at, lower, upper = point
        if at is not None and lower is not None and upper is not None:
            run.append((at, lower, upper))
            continue
        if run:
            gap = [None] if across else []
            across += [*gap, *(p[0] for p in run), *(p[0] for p in reversed(run)), run[0][0]]
            up += [*gap, *(p[2] for p in run), *(p[1] for p in reversed(run)), run[0][2]]
            run = []
    return across, up


def _drawable(value: Any, log: bool) -> float | None:
    value = plain(value)
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return None
    return float(value) if isinstance(value, float) else int(value)


def colour_of(index: int, count: int) -> str:
    """Of a curve: a few that are told apart easily, or evenly around the circle for many."""
    if count <= len(COLOURS) * 2:
        return COLOURS[index % len(COLOURS)]
    channels = colorsys.hls_to_rgb(index / count, 0.5, 0.6)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def _translucent(colour: str, alpha: float) -> str:
    channels = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
    return f"rgba({channels[0]},{channels[1]},{channels[2]},{alpha})"
