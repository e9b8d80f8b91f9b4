"""`archzoo curves`: a metric over the steps of several runs, their mean and their spread."""

from __future__ import annotations

import csv
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from archzoo.analysis.figures import check_figure, legend, pyplot, save
from archzoo.analysis.tables import show
from archzoo.names import nearest

#: The mean exact match over the lengths that no training example has.
OUT_OF_DISTRIBUTION = "validation/exact_match/ood"
# What is compared where no metric is named: the first of these that every run has.
USUAL = (OUT_OF_DISTRIBUTION, "validation/exact_match", "validation/loss", "train/loss")
LOWER = ("loss", "perplexity", "bits_per_byte")  # ends of the names of what is better when lower


DRAWN = "curves.png"
STYLES = {"train": ":", "validation": "-", "test": "--"}  # of lines, where colours tell runs apart


class Curve(NamedTuple):
    """One metric of one run.

    Attributes:
        run: What it is called, by its directory.
        steps: Optimizer steps.
        values: At each of them.
    """

    run: str
    steps: list[int]
    values: list[float]


def directory_of(run: str) -> Path:
    """A run's directory, or that of a file in it, such as its checkpoint.

    Raises:
        FileNotFoundError: It is a file that lies elsewhere.
    """
    path = Path(run)
    if not path.is_file():
        return path
    if not (_is_run(path.parent) or (path.parent / "metrics.csv").exists()):
        raise FileNotFoundError(f"{run} is no file of a run: give the directory of a run")
    return path.parent


def _is_run(directory: Path) -> bool:
    return (directory / "config.yaml").exists() or any(directory.glob("*.ckpt"))


def read_log(run: Path) -> list[dict[str, str]]:
    """The rows of a run's log.

    Raises:
        FileNotFoundError: There is none.
    """
    log = run / "metrics.csv"
    if not log.is_file():
        if _is_run(run):
            raise FileNotFoundError(
                f"{run} holds no metrics.csv: the run ended before its first row, which comes "
                "after trainer.log_every_n_steps; train it for longer"
            )
        raise FileNotFoundError(f"{run} holds no metrics.csv: give the directory of a run")
    with log.open(newline="") as file:
        return list(csv.DictReader(file))


def usual_metric(runs: list[Path]) -> str:
    """The first of `USUAL` that every run has; the last one where there is none."""
    named = [{name for row in read_log(run) for name, text in row.items() if text} for run in runs]
    return next((metric for metric in USUAL if all(metric in names for names in named)), USUAL[-1])


def read(run: Path, metric: str) -> Curve:
    """A run's metric from its log.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: It has no such metric.
    """
    log, rows = run / "metrics.csv", read_log(run)
    seen = [row for row in rows if row.get(metric)]
    if not seen:
        names = sorted({name for row in rows for name, text in row.items() if "/" in name and text})
        close = f"; {nearest(metric, names)}" if names else ""
        raise ValueError(f"{log} has no {metric}: name another --metric{close}")
    return Curve(run.name, [int(row["step"]) for row in seen], [float(row[metric]) for row in seen])


def curves_command(
    runs: list[str],
    /,
    metric: str | None = None,
    lower: bool = False,
    figure: str | None = None,
) -> None:
    """Compare a metric over the steps of several runs, and draw all that was logged.

    Args:
        runs: Directories of runs, or their checkpoints.
        metric: A column of their metrics.csv, which alone is shown. None: all columns are drawn,
            and the table is of the out-of-distribution exact match, else that of the trained
            lengths, else the validation loss, else the training loss.
        lower: Lower is better, as it is anyway where a metric ends in loss, perplexity
            or bits_per_byte.
        figure: The picture that is drawn, such as curves.png; of a metric every run, and the mean
            of all from their least to their largest value. None: a table alone of a metric, and
            all columns in RUN/curves.png, or, of several runs, above their directories.

    Raises:
        FileNotFoundError: A directory holds no run.
        ValueError: A run has no such metric, or is given twice.
    """
    drawn = None if figure is None else check_figure(figure)
    paths = [directory_of(run) for run in runs]
    _check_distinct(runs, paths)
    shown = metric or usual_metric(paths)
    names = _names(paths)
    curves = [read(path, shown)._replace(run=names[path]) for path in paths]
    show(_table(curves, shown, lower or shown.endswith(LOWER)))
    if metric is not None:
        if drawn is not None:
            _draw(curves, metric, drawn)
            print(f"drew {drawn}")
        return
    place = Path(drawn or Path(os.path.commonpath([path.absolute() for path in paths]), DRAWN))
    if not figure and place.is_relative_to(Path.cwd()):
        place = place.relative_to(Path.cwd())
    try:
        _draw_all(paths, place)
    except ValueError as error:
        if figure is not None:
            raise
        print(error)  # the table is all that was asked for
        return
    print(f"drew {place}")


def _check_distinct(given: list[str], paths: list[Path]) -> None:
    """Refuse a run that is given twice: mean and deviation would count it as two."""
    seen: dict[Path, str] = {}
    for run, path in zip(given, paths, strict=True):
        before, seen[path.resolve()] = seen.get(path.resolve()), run
        if before is not None:
            both = f"{run} is" if before == run else f"{before} and {run} are one run,"
            raise ValueError(f"{both} given twice: name each run once")


def _names(paths: list[Path]) -> dict[Path, str]:
    """What each run is called: its directory's name, or its path where others share that."""
    names = [path.absolute().name for path in paths]
    return {
        path: name if names.count(name) == 1 else str(path)
        for path, name in zip(paths, names, strict=True)
    }


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
        deviations = [f"{_deviation(values):.4f}" for values in (bests, lasts)]
        table.add_row("standard deviation", deviations[0], "", deviations[1])
        for name, pick in (("least", min), ("largest", max)):
            table.add_row(name, f"{pick(bests):.4f}", "", f"{pick(lasts):.4f}")
    return table


def _deviation(values: list[float]) -> float:
    """Standard deviation; NaN where a run diverged, which `statistics` cannot take."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _draw(curves: list[Curve], metric: str, path: Path) -> None:
    plt = pyplot()

    figure, panel = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
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
    legend(panel, beside=True)
    save(figure, path)


def _draw_all(runs: list[Path], path: Path) -> None:
    """Every column of some runs, small: one panel for what differs in its part or number alone."""
    plt = pyplot()
    panels: dict[str, list[tuple[str, Curve]]] = {}
    called = _names(runs)
    for run in runs:
        rows = read_log(run)
        names = dict.fromkeys(name for row in rows for name, text in row.items() if text)
        for name in names:
            split, slash, rest = name.partition("/")
            if slash:
                title = re.sub(r"/\d+$", "", rest)
                line = f"{split}{rest.removeprefix(title).replace('/', ' ')}"
                curve = read(run, name)._replace(run=called[run])
                panels.setdefault(title, []).append((line, curve))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    size = (4.4 * across, 2.7 * down)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    colours = {called[run]: f"C{number % 10}" for number, run in enumerate(runs)}
    for panel, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for line, curve in lines:
            options: dict[str, Any] = {"label": line}
            if len(runs) > 1:
                options = {"color": colours[curve.run], "linestyle": STYLES.get(line.split()[0])}
            marker = "." if len(curve.steps) == 1 else None
            panel.plot(curve.steps, curve.values, linewidth=1, marker=marker, **options)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=7)
        if len(runs) == 1:
            panel.legend(fontsize=6)
    for panel in grid.flat[len(panels) :]:
        panel.set_axis_off()
    if len(runs) > 1:
        drawn = [plt.Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
        drawn += [
            plt.Line2D([], [], color="black", linestyle=style, label=split)
            for split, style in STYLES.items()
            if any(line.split()[0] == split for lines in panels.values() for line, _ in lines)
        ]
        figure.legend(handles=drawn, loc="outside upper center", ncols=6, fontsize=8)
    figure.supxlabel("step", fontsize=9)
    save(figure, path)
