"""`archzoo grid` of tasks whose problems are sequences of a size: accuracy by both parts of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table

from archzoo.analysis.figures import legend, pyplot, save
from archzoo.decoder import Decoder
from archzoo.inputs import IGNORED

if TYPE_CHECKING:
    from archzoo.tasks.sequences import SequenceTask

Rate = Callable[[str, int, int], float]  # of "label" or "cell", at a size


def axes_of(
    task: SequenceTask, first: list[int] | None, second: list[int] | None
) -> tuple[list[int], list[int]]:
    """The sizes of a grid: those wanted, or from a quarter of the trained ones to four times.

    Args:
        task: Whose sizes.
        first: Those wanted.
        second: The same.

    Raises:
        ValueError: One is not positive.
    """
    axes = []
    for axis, wanted in enumerate((first, second)):
        if wanted is not None and min(wanted, default=0) < 1:
            name = ("first", "second")[axis]
            raise ValueError(f"{name} {wanted} must hold positive numbers, {task.axes[axis]}")
        trained = [size[axis] for size in task.sizes]
        tested = [size[axis] for size in task.test_sizes]
        doubled = {int(4 * max(trained)) >> power for power in range(40)}
        around = {n for n in doubled if 4 * n >= min(trained) and n > 0}
        axes.append(sorted(set(wanted) if wanted else around | {*trained, *tested}))
    return axes[0], axes[1]


def possible(task: SequenceTask, size: tuple[int, int]) -> bool:
    """Whether there are problems of a size."""
    try:
        task.check_size(*size)
    except ValueError:
        return False
    return True


@torch.no_grad()
def ask(
    decoder: Decoder,
    task: SequenceTask,
    size: tuple[int, int],
    count: int,
    at_once: int,
    casting: AbstractContextManager[Any],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Labels and how many were predicted, and problems and how many without a mistake.

    Args:
        decoder: In evaluation mode.
        task: Whose test part is asked.
        size: Of the problems.
        count: How many.
        at_once: Tokens in a pass.
        casting: In which precision.
    """
    rows = max(at_once // task.length(*size), 1)
    sums = np.zeros(4, np.int64)
    for start in range(0, count, rows):
        numbers = np.arange(start, min(start + rows, count))
        try:
            found = task.sequences("test", numbers, *size)
        except ValueError:  # none of the few problems of that size is in the test part
            return (0, 0), (0, 0)
        tokens, labels = (torch.from_numpy(entry).to(decoder.device) for entry in found)
        with casting:
            x, _, _ = decoder.hidden(tokens)
            right = decoder.head(x).argmax(-1) == labels
        labelled = labels != IGNORED
        exact = (right | ~labelled).all(dim=1)
        sums += [int(labelled.sum()), int(right.sum()), len(numbers), int(exact.sum())]
    labels_, right_, rows_, exact_ = sums.tolist()
    return (labels_, right_), (rows_, exact_)


def table_of(task: SequenceTask, cells: list[tuple[int, int]], rate: Rate) -> Table:
    """Both rates of the trained sizes and of those of the test.

    Args:
        task: Whose sizes.
        cells: That were measured.
        rate: Of them.
    """
    table = Table(box=None, header_style="bold")
    for heading in (*task.axes, "accuracy", "exact match", ""):
        table.add_column(heading, justify="right")
    for size in sorted({*task.sizes, *task.test_sizes} & set(cells)):
        rates = (f"{rate(kind, *size):.2%}" for kind in ("label", "cell"))
        trained = "trained" if size in task.sizes else ""
        table.add_row(f"{size[0]:,}", f"{size[1]:,}", *rates, trained)
    return table


def draw_sizes(
    task: SequenceTask, axes: tuple[list[int], list[int]], rate: Rate, path: Path
) -> None:
    """A picture of both rates by size, white where there are no problems.

    Args:
        task: Whose sizes.
        axes: Of the grid.
        rate: Of what was measured.
        path: Where it goes.
    """
    plt = pyplot()
    from matplotlib.patches import Rectangle

    first, second = axes
    figure, panels = plt.subplots(
        1, 2, figsize=(5 + 1.2 * len(second), 2.2 + 0.6 * len(first)), layout="constrained"
    )
    titles = {"label": "accuracy", "cell": "exact match"}
    for panel, (kind, title) in zip(panels, titles.items(), strict=True):
        rates = 100 * np.array([[rate(kind, i, j) for j in second] for i in first])
        shown = panel.imshow(rates, origin="lower", vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for row, column in zip(*np.nonzero(~np.isnan(rates)), strict=True):
            value = rates[row, column]
            text = f"{value:.0f}" if value in (0, 100) else f"{value:.1f}"
            color = "white" if value < 60 else "black"
            panel.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
        name = "trained"
        for i, j in sorted(set(task.sizes)):
            if i in first and j in second:
                corner = (second.index(j) - 0.5, first.index(i) - 0.5)
                panel.add_patch(
                    Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2, label=name)
                )
                name = ""
        panel.set_xticks(range(len(second)), list(map(str, second)))
        panel.set_yticks(range(len(first)), list(map(str, first)))
        panel.set(title=f"{title}, per cent", xlabel=task.axes[1], ylabel=task.axes[0])
        legend(panel)
    figure.colorbar(shown, ax=panels)
    save(figure, path)
