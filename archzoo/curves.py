"""`archzoo curves`: a metric over the steps of several runs, their mean and their spread."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from archzoo.figures import pyplot, save
from archzoo.parts import nearest

OUT_OF_DISTRIBUTION = "validation/exact_match/ood"


class Curve(NamedTuple):
    """One metric of one run.

    Attributes:
        run: Its directory's name.
        steps: Optimizer steps.
        values: At each of them.
    """

    run: str
    steps: list[int]
    values: list[float]


def read(run: Path, metric: str) -> Curve:
    """A run's metric from its log.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: It has no such metric.
    """
    log = run / "metrics.csv"
    if not log.is_file():
        raise FileNotFoundError(f"{run} holds no metrics.csv: give the directory of a run")
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    seen = [row for row in rows if row.get(metric)]
    if not seen:
        names = sorted({name for row in rows for name, text in row.items() if "/" in name and text})
        close = f"; nearest: {nearest(metric, names)}" if names else ""
        raise ValueError(f"{log} has no {metric}: name another --metric{close}")
    return Curve(run.name, [int(row["step"]) for row in seen], [float(row[metric]) for row in seen])


def curves_command(
    runs: list[str],
    /,
    metric: str = OUT_OF_DISTRIBUTION,
    lower: bool = False,
    figure: str | None = None,
) -> None:
    """Compare a metric over the steps of several runs, such as seeds of one experiment.

    Args:
        runs: Directories of runs.
        metric: A column of their metrics.csv.
        lower: Lower is better, as for a loss.
        figure: The picture that is drawn, such as curves.png: every run, and the mean of all from
            their least to their largest value. None: a table alone.

    Raises:
        FileNotFoundError: A directory holds no run.
        ValueError: A run has no such metric.
    """
    curves = [read(Path(run), metric) for run in runs]
    Console(width=100).print(_table(curves, metric, lower))
    if figure is not None:
        _draw(curves, metric, Path(figure))
        print(f"drew {figure}")


def _table(curves: list[Curve], metric: str, lower: bool) -> Table:
    table = Table(box=None, header_style="bold", title=metric, title_justify="left")
    table.add_column("run")
    for heading in ("best", "at step", "last", "at step"):
        table.add_column(heading, justify="right")
    bests, lasts = [], []
    for curve in curves:
        best = (min if lower else max)(curve.values)
        at = curve.steps[curve.values.index(best)]
        bests.append(best)
        lasts.append(curve.values[-1])
        cells = (f"{best:.4f}", f"{at:,}", f"{lasts[-1]:.4f}", f"{curve.steps[-1]:,}")
        table.add_row(curve.run, *cells)
    if len(curves) > 1:
        table.add_row(
            "mean", f"{statistics.fmean(bests):.4f}", "", f"{statistics.fmean(lasts):.4f}"
        )
        deviations = [f"{statistics.stdev(values):.4f}" for values in (bests, lasts)]
        table.add_row("standard deviation", deviations[0], "", deviations[1])
        for name, pick in (("least", min), ("largest", max)):
            table.add_row(name, f"{pick(bests):.4f}", "", f"{pick(lasts):.4f}")
    return table


def _draw(curves: list[Curve], metric: str, path: Path) -> None:
    plt = pyplot()

    figure, panel = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for curve in curves:
        panel.plot(curve.steps, curve.values, linewidth=1, alpha=0.7, label=curve.run)
    shared = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    if len(curves) > 1 and shared:
        found = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
        columns = [[values[step] for values in found] for step in shared]
        least, largest = [min(column) for column in columns], [max(column) for column in columns]
        panel.fill_between(shared, least, largest, alpha=0.15)
        panel.plot(
            shared, [statistics.fmean(column) for column in columns], color="black", label="mean"
        )
    panel.set(xlabel="step", ylabel=metric)
    panel.legend(fontsize=8)
    save(figure, path)
