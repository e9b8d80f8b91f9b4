"""What a benchmark found, shown: tables, figures, and crossovers in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from archzoo.analysis.bench.measuring import Row
from archzoo.analysis.figures import legend, pyplot, save


class Measure(NamedTuple):
    """A number of the rows, against length or batch.

    Attributes:
        name: In a figure's file name.
        quantity: Of the rows.
        title: Over a table and a figure.
        unit: On the axis.
        columns: Of the rows: the value, and its 10th and 90th percentile.
        scale: The unit over the column's.
        more_is_better: Else less.
        verb: What the better side does, such as "trains faster".
        short: The same in a figure.
        against: The column along which it is measured; empty: batch for throughput, else length.
    """

    name: str
    quantity: str
    title: str
    unit: str
    columns: tuple[str, str, str] = ("median", "low", "high")
    scale: float = 1.0
    more_is_better: bool = False
    verb: str = "is faster"
    short: str = "faster"
    against: str = ""

    @property
    def axis(self) -> str:
        """The column along which it is measured."""
        return self.against or ("batch" if self.quantity == "batch" else "length")

    @property
    def axis_title(self) -> str:
        """That column in words."""
        return "rows" if self.axis == "batch" else "tokens"


PEAK = ("memory_bytes", "memory_bytes", "memory_bytes")
MFU = ("mfu", "mfu", "mfu")
MEASURES = (
    Measure("training", "training", "training throughput", "tokens/s", more_is_better=True),
    Measure(
        *("training-mfu", "training", "model FLOPs utilisation (MFU)", "%", MFU, 0.01),
        more_is_better=True,
        verb="uses the GPU better",
        short="uses it better",
    ),
    Measure(
        *("training-memory", "training", "peak memory in training", "GiB", PEAK, 2**30),
        verb="takes less memory",
        short="less memory",
    ),
    Measure("prefill", "prefill", "prefill of one text", "ms"),
    Measure("decode", "decode", "decoding, after so many tokens", "ms a token"),
    Measure(
        *("decode-memory", "decode", "peak memory in decoding", "GiB", PEAK, 2**30),
        verb="takes less memory",
        short="less memory",
    ),
    Measure("batch", "batch", "decoding throughput", "tokens/s", more_is_better=True),
    Measure("state", "state", "state of one text", "bytes", verb="is smaller", short="smaller"),
)


def measures_of(rows: Sequence[Row]) -> list[Measure]:
    """`MEASURES`; throughput of one batch after texts of several lengths is against these."""
    mine = [row for row in rows if row["quantity"] == "batch"]
    batches, lengths = ({str(row[axis]) for row in mine} for axis in ("batch", "length"))
    if len(batches) != 1 or len(lengths) < 2:
        return list(MEASURES)
    title = f"decoding throughput of {batches.pop()} rows, after so many tokens each"
    return [
        measure._replace(title=title, against="length") if measure.quantity == "batch" else measure
        for measure in MEASURES
    ]


class Line(NamedTuple):
    """One contender's values of a measure.

    Attributes:
        name: Of the contender.
        x: Lengths or batches, ascending.
        y, low, high: The values there, and their percentiles.
        stopped: (where, why) it went no further; None: it went to the end.
    """

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    stopped: tuple[float, str] | None


def lines_of(measure: Measure, rows: Sequence[Row]) -> list[Line]:
    """The contenders' lines in the order in which they come; those without any value are none."""
    found: list[Line] = []
    mine = [row for row in rows if row["quantity"] == measure.quantity]
    contexts = {str(row["length"]) for row in mine} if measure.axis == "batch" else set()

    def name_of(row: Row) -> str:
        several = len(contexts) > 1
        return f"{row['contender']}, {int(row['length']):,}" if several else str(row["contender"])

    for name in dict.fromkeys(map(name_of, mine)):
        line = Line(name, [], [], [], [], None)
        for row in sorted(
            (row for row in mine if name_of(row) == name),
            key=lambda row: float(row[measure.axis]),
        ):
            at = float(row[measure.axis])
            if row.get("stopped"):
                line = line._replace(stopped=(at, str(row["stopped"])))
            elif row.get(measure.columns[0]) not in (None, ""):
                line.x.append(at)
                values = (line.y, line.low, line.high)
                for column, entries in zip(measure.columns, values, strict=True):
                    entries.append(float(row[column]) / measure.scale)
        if line.x or (line.stopped and measure.columns[0] == "median"):
            found.append(line)
    return found if any(line.x for line in found) else []


# ---------------------------------------------------------------------------- crossovers


class Crossover(NamedTuple):
    """Where two lines cross, of those sizes at which both were measured.

    Attributes:
        first, second: The names; the better one at the largest size is first.
        at: Where they cross, ascending.
        sizes: The smallest and the largest.
        values: Of the first and of the second, at the smallest size and at the largest.
        times: How many times better the first one is, at the least and at the most.
        unclear: Sizes at which the spreads of the two overlap.
        clear: Whether there is a size at which they do not, beyond the last crossing if any.
    """

    first: str
    second: str
    at: list[float]
    sizes: tuple[float, float]
    values: tuple[tuple[float, float], tuple[float, float]]
    times: tuple[float, float]
    unclear: list[float]
    clear: bool


def crossover(one: Line, other: Line, more_is_better: bool) -> Crossover | None:
    """Compare two lines, straight in the logarithms between sizes; None without common sizes.

    Args:
        one: A contender's.
        other: Another's.
        more_is_better: Else less.
    """
    common = [x for x in one.x if x in other.x]
    if not common:
        return None
    mine, theirs = ([line.x.index(x) for x in common] for line in (one, other))
    sign = 1 if more_is_better else -1
    pairs = [(one.y[i], other.y[j]) for i, j in zip(mine, theirs, strict=True)]
    # Above 0: one is better.
    gains = [(x, sign * math.log(a / b)) for x, (a, b) in zip(common, pairs, strict=True)]
    unclear = [
        x
        for x, i, j in zip(common, mine, theirs, strict=True)
        if one.low[i] <= other.high[j]
        and other.low[j] <= one.high[i]
        and (one.low[i] < one.high[i] or other.low[j] < other.high[j])  # a size has no spread
    ]
    found: list[float] = []
    for (x, gain), (after, later) in itertools.pairwise(gains):
        if gain * later < 0:
            part = gain / (gain - later)
            found.append(math.exp(math.log(x) + part * (math.log(after) - math.log(x))))
        elif not later and gain:  # equal there; a crossing if the other side follows
            beyond = next((g for y, g in gains if y > after and g), 0.0)
            if gain * beyond < 0:
                found.append(after)
    final = next((gain for _, gain in reversed(gains) if gain), 0.0)
    better = final >= 0
    times = [math.exp(gain if better else -gain) for _, gain in gains]
    ends = [pair if better else pair[::-1] for pair in (pairs[0], pairs[-1])]
    return Crossover(
        *((one.name, other.name) if better else (other.name, one.name)),
        at=found,
        sizes=(common[0], common[-1]),
        values=(ends[0], ends[1]),
        times=(min(times), max(times)),
        unclear=unclear,
        clear=any(x not in unclear for x in common if not found or x >= found[-1]),
    )


def rounded(number: float) -> str:
    """Two digits of it: a crossover lies between measured sizes."""
    digits = max(0, math.floor(math.log10(max(number, 1))) - 1)
    return f"{round(number, -digits):,.0f}"


def in_words(measure: Measure, lines: Sequence[Line]) -> list[str]:
    """A sentence for the first line with each of the others."""
    found = []
    first = lines[0]
    unit = measure.axis_title
    for other in lines[1:]:
        seen = crossover(first, other, measure.more_is_better)
        pair = f"{first.name} and {other.name}"
        if seen is None:
            found.append(f"{pair}: not measured at the same sizes")
            continue
        low, high = (f"{size:,.0f}" for size in seen.sizes)
        span = f"{low} to {high} {unit}" if low != high else f"{low} {unit}"
        said = f"{seen.first} {measure.verb} than {seen.second}"
        equal = seen.times == (1, 1)
        if not (seen.clear or equal):
            where = f"from {rounded(seen.at[-1])} {unit} on" if seen.at else "at every size"
            said = f"{pair}: their spreads overlap {where}, of {span}"
            if seen.at and seen.sizes[0] not in seen.unclear and len(seen.at) == 1:
                said += f"; {seen.second} {measure.verb} before"
            found.append(said)
            continue
        if seen.at:
            often = "" if len(seen.at) == 1 else f", the last of {len(seen.at)} crossings"
            ends = ", ".join(
                f"at {size} {shown(mine)} against {shown(theirs)}"
                for size, (mine, theirs) in zip((low, high), seen.values, strict=True)
            )
            said += f" from {rounded(seen.at[-1])} {unit} on{often} ({ends} {measure.unit})"
        elif equal:
            found.append(f"{pair} are equal at all of {span}")
            continue
        else:
            least, most = (shown(times, 2) for times in seen.times)
            by = f"{least} to {most} times" if least != most else f"{least} times"
            said += f" at every size measured, {span}, by {by}: no crossover in this range"
        if seen.unclear:
            sizes = ", ".join(f"{size:,.0f}" for size in seen.unclear)
            said += f"; their spreads overlap at {sizes}"
        found.append(said)
    return found


def stops(lines: Sequence[Line], measure: Measure) -> list[str]:
    """A sentence for each line that went no further."""
    return [
        f"{line.name} stops before {line.stopped[0]:,.0f} {measure.axis_title}: {line.stopped[1]}"
        for line in lines
        if line.stopped
    ]


# ---------------------------------------------------------------------------- tables


def shown(value: float, digits: int = 3) -> str:
    """So many digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{digits}g}"


def cell(line: Line, at: float) -> str:
    """A line's value and spread at a size, or why there is none."""
    if at in line.x:
        index = line.x.index(at)
        low, high = shown(line.low[index]), shown(line.high[index])
        spread = f" ({low} to {high})" if low != high else ""
        return shown(line.y[index]) + spread
    if line.stopped and at == line.stopped[0]:
        return line.stopped[1].partition(":")[0]
    return ""


def sizes_of(lines: Sequence[Line]) -> list[float]:
    """Every size at which something was measured, or stopped."""
    ends = {line.stopped[0] for line in lines if line.stopped}
    return sorted({x for line in lines for x in line.x} | ends)


def table_of(measure: Measure, lines: Sequence[Line]) -> Table:
    """Sizes down, contenders across."""
    table = Table(box=None, header_style="bold", title=f"{measure.title}, {measure.unit}")
    table.title_justify = "left"
    table.add_column(measure.axis_title, justify="right")
    for line in lines:
        table.add_column(line.name, justify="right")
    for at in sizes_of(lines):
        table.add_row(f"{at:,.0f}", *(cell(line, at) for line in lines))
    return table


# ---------------------------------------------------------------------------- figures


def draw(measure: Measure, lines: Sequence[Line], path: Path, note: str) -> None:
    """A figure of a measure: axes in logarithms, spread, crossovers, and where curves stop.

    Args:
        measure: What is drawn.
        lines: Of it.
        path: A .png file.
        note: Below the title: on what it was measured.
    """
    plt = pyplot()
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    figure, panel = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    colours = {}
    for number, line in enumerate(lines):
        colours[line.name] = colour = f"C{number % 10}"
        label = line.name
        if line.stopped:
            label += f" (× {line.stopped[1].partition(':')[0]})"
        if not line.x:
            continue
        panel.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        panel.plot(line.x, line.y, color=colour, marker="o", markersize=4, label=label)
        if line.stopped:  # where it would have gone on
            panel.plot(line.x[-1:], line.y[-1:], color=colour, marker="x", markersize=12, mew=2)
    sizes = sizes_of(lines)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    values = [value for line in lines for value in line.y]
    if max(values) < 1.3 * min(values):  # room around lines that are flat
        panel.set_ylim(min(values) / 1.6, max(values) * 1.6)
    spread = max(values) / min(values)
    if spread < 2_000:  # a decade has too few marks of its own
        low, high = panel.get_ylim()
        marks = (1, 1.5, 2, 3, 4, 5, 7) if spread < 20 else (1, 2, 5)
        steps = [mark * 10.0**exponent for exponent in range(-9, 16) for mark in marks]
        panel.yaxis.set_major_locator(FixedLocator([s for s in steps if low <= s <= high]))
        panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda value, _: tick(value))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: tick(value, 1024))
    for number, (other, seen) in enumerate(crossings(measure, lines)):
        at, better = seen.at[-1], seen.first
        panel.axvline(at, color=colours[better], linestyle=":", linewidth=1.2)
        left = at <= sizes[0] ** 0.4 * sizes[-1] ** 0.6  # in the picture, so there is room beside
        panel.annotate(
            f"{better} {measure.short}\nthan {other} from {rounded(at)} on",
            (at, 0.98 - 0.1 * number),
            xycoords=("data", "axes fraction"),
            xytext=(4 if left else -4, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="top",
            fontsize=8,
            color=colours[better],
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
        )
    panel.set(xlabel=measure.axis_title, ylabel=measure.unit)
    panel.set_title(f"{measure.title}\n", fontsize=11)
    panel.text(0.5, 1.02, note, transform=panel.transAxes, ha="center", fontsize=7.5)
    panel.grid(which="major", alpha=0.3)
    legend(panel)
    save(figure, path)


def crossings(measure: Measure, lines: Sequence[Line]) -> list[tuple[str, Crossover]]:
    """The crossovers of the first line with the others, and the name of the worse side then."""
    found = []
    for other in lines[1:]:
        seen = crossover(lines[0], other, measure.more_is_better)
        if seen is not None and seen.at and seen.clear:
            found.append((seen.second, seen))
    return found


def tick(value: float, thousand: int = 1000) -> str:
    """A number on an axis: 16k."""
    for unit, size in (("G", thousand**3), ("M", thousand**2), ("k", thousand)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


# ---------------------------------------------------------------------------- the report


def report_sections(rows: Sequence[Row], sentences: Mapping[str, list[str]]) -> list[Any]:
    """Plots with sentences below them, and tables, for `archzoo.analysis.report.write_report`."""
    from archzoo.analysis import report

    sections: list[Any] = []
    for measure in measures_of(rows):
        lines = lines_of(measure, rows)
        if not lines:
            continue
        words = "".join(f"{sentence}. " for sentence in sentences.get(measure.name, []))
        series = [
            report.Series(line.name, line.x, line.y, low=line.low, high=line.high)
            for line in lines
            if line.x
        ]
        where = {"x_label": measure.axis_title, "y_label": measure.unit}
        note = f"{words}Median, and the 10th to 90th percentile over the rounds."
        sections.append(
            report.Chart(measure.title, **where, series=series, log_x=True, log_y=True, note=note)
        )
        table = [[f"{at:,.0f}", *(cell(line, at) for line in lines)] for at in sizes_of(lines)]
        columns = [measure.axis_title, *(line.name for line in lines)]
        sections.append(report.Table(f"{measure.title}, {measure.unit}", columns, table))
    return sections
