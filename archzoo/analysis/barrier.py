"""`archzoo barrier`: the loss between checkpoints, on the line of two and in the plane of three.

Whether two models can be averaged is seen between them: where the loss rises on the way, they lie
in different valleys. The barrier is the highest rise over the straight line between both losses::

    barrier = max over t of  L((1 - t) a + t b) - ((1 - t) L(a) + t L(b))

Source: Frankle et al., arXiv 1912.05671, who measure it from the mean of both losses; so measured
from the line between them Entezari et al., arXiv 2110.06296, definition 2.1. The plane through
three models: Garipov et al., arXiv 1802.10026.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from archzoo.analysis.evidence import write_rows
from archzoo.analysis.figures import check_figure, legend, pyplot, save
from archzoo.analysis.tables import show
from archzoo.decoder import Decoder
from archzoo.inputs import IGNORED
from archzoo.numerics import at_least_float32

if TYPE_CHECKING:
    from archzoo.checkpoint.opened import Opened

MARGIN = 0.2  # around the triangle of three models, of its size
FLAT = 1e-3  # of the longest side: a triangle that is no higher is a line


class Line(NamedTuple):
    """The loss on the straight way from one model to another.

    Attributes:
        first: The one's name.
        second: The other's.
        at: Shares of the way, from 0 to 1.
        losses: At each of them.
    """

    first: str
    second: str
    at: list[float]
    losses: list[float]

    @property
    def rises(self) -> list[float]:
        """How far each loss is above the straight line between both ends."""
        begin, end = self.losses[0], self.losses[-1]
        pairs = zip(self.at, self.losses, strict=True)
        return [loss - ((1 - t) * begin + t * end) for t, loss in pairs]

    @property
    def barrier(self) -> float:
        """The highest rise; 0 where the loss nowhere rises."""
        return max(self.rises)

    @property
    def top(self) -> int:
        """Which point is highest above the line between both ends."""
        return self.rises.index(self.barrier)


class Plane(NamedTuple):
    """The loss in the plane of three models.

    Attributes:
        corners: The models' places, (3, 2), in units of the distance between weights.
        x: Places of the columns.
        y: Places of the rows.
        losses: (rows, columns).
    """

    corners: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    losses: NDArray[np.float64]


class Between:
    """Models of one architecture, and all that lie between and around them.

    Args:
        decoder: Of that architecture; its weights are overwritten.
        weights: Of each model, by name, where the decoder is; tied ones once.
        batches: Of data, each with tokens and labels (batch, time), which give the loss.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Sequence[dict[str, Tensor]],
        batches: Sequence[dict[str, Tensor]],
    ) -> None:
        self.decoder, self.weights, self.batches = decoder.eval(), weights, batches
        self.targets = decoder.state_dict()

    @torch.no_grad()
    def loss(self, coefficients: Sequence[float]) -> float:
        """The mean loss of a labelled token at ``sum_k c_k theta_k``.

        Args:
            coefficients: c, which sum to 1.
        """
        for name in self.weights[0]:
            target = self.targets[name]
            found = torch.zeros_like(target, dtype=at_least_float32(target.dtype))
            for c, model in zip(coefficients, self.weights, strict=True):
                if c:
                    found += c * model[name]
            target.copy_(found)
        return loss_of(self.decoder, self.batches)

    def line(self, first: int, second: int, names: Sequence[str], points: int) -> Line:
        """The loss on the way from one of the models to another.

        Args:
            first: Number of the one.
            second: Of the other.
            names: Of all models.
            points: How many, ends included.
        """
        at = [number / (points - 1) for number in range(points)]
        losses = []
        for t in at:
            c = [0.0] * len(self.weights)
            c[first], c[second] = 1 - t, t
            losses.append(self.loss(c))
        return Line(names[first], names[second], at, losses)

    def corners(self) -> NDArray[np.float64]:
        """The places of three models in their plane: the first at 0, the second on the x axis."""
        to_second, to_third, between = 0.0, 0.0, 0.0
        for name in self.weights[0]:
            a, b, c = (model[name].double() for model in self.weights)
            to_second += float((b - a).square().sum())
            to_third += float((c - a).square().sum())
            between += float(((b - a) * (c - a)).sum())
        length = math.sqrt(to_second)
        x = between / length if length else 0.0
        return np.array([(0, 0), (length, 0), (x, math.sqrt(max(to_third - x * x, 0.0)))])

    def plane(self, points: int) -> Plane:
        """The loss in the plane of three models, at points x points places.

        Raises:
            ValueError: They lie on one line.
        """
        corners = self.corners()
        size = float(np.ptp(corners, axis=0).max())
        if not corners[2, 1] > FLAT * size or not corners[1, 0] > FLAT * size:
            raise ValueError(
                "the three models lie on one line, as a mean of two does: name two of them"
            )
        middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
        reach = (0.5 + MARGIN) * size  # in both directions, so that the picture is a square
        x, y = (np.linspace(m - reach, m + reach, points) for m in middle)
        losses = [[self.loss(at_place(corners, (i, j))) for i in x] for j in y]
        return Plane(corners, x, y, np.array(losses))


def at_place(corners: NDArray[np.float64], place: tuple[float, float]) -> list[float]:
    """The coefficients of three models for a place in their plane; they sum to 1."""
    third = place[1] / corners[2, 1]
    second = (place[0] - third * corners[2, 0]) / corners[1, 0]
    return [float(1 - second - third), float(second), float(third)]


@torch.no_grad()
def loss_of(decoder: Decoder, batches: Sequence[dict[str, Tensor]]) -> float:
    """The mean cross-entropy of the labelled tokens of batches, in nats.

    Args:
        decoder: In evaluation mode.
        batches: Each with tokens and labels (batch, time), and maybe documents, examples and
            positions.
    """
    total, count = 0.0, 0
    for batch in batches:
        beside = {n: batch.get(n) for n in ("documents", "examples", "positions")}
        logits = decoder(batch["tokens"], **beside).logits.flatten(0, 1)
        logits = logits.to(at_least_float32(logits.dtype))
        labels = batch["labels"].flatten()
        found = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        total += float(found.double())
        count += int((labels != IGNORED).sum())
    return total / count


# ---------------------------------------------------------------------------- the command


def barrier_command(
    checkpoints: list[str],
    /,
    figure: str | None = None,
    points: int = 25,
    grid: int = 17,
    batches: int = 8,
    device: str | None = None,
    task: str | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Measure the loss between two checkpoints, or three, and the barriers that lie between them.

    Each is a run's directory, a .ckpt file, or a directory of archzoo.save_pretrained; they are of
    one architecture and vocabulary, and may have begun apart. The barrier is the highest rise of
    the loss over the straight line between both ends' losses, on validation data.

    Args:
        checkpoints: Two models, or three.
        figure: The picture that is drawn, such as barrier.png: the line of two, or the plane of
            three and its sides. Beside it its numbers are written, as .csv. None: a table alone.
        points: On a line, ends included.
        grid: Points of the plane in each direction.
        batches: Of the validation data.
        device: Such as cpu or cuda. None: a GPU where there is one.
        task: Whose validation data is read, with --data its arguments: --task Addition
            --data.digits 2. None: the checkpoints' own; of several tasks of problems all of them.
        data: Arguments of that task that are replaced: --data.path TEXT.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The models do not belong together, or there is no task to take data from.
    """
    if len(checkpoints) not in (2, 3):
        raise ValueError(f"{len(checkpoints)} checkpoints are given: a line has two, a plane three")
    if len(set(checkpoints)) < len(checkpoints):
        raise ValueError("a checkpoint is given twice: there is nothing between it and itself")
    for name, value, least in (("points", points, 3), ("grid", grid, 3), ("batches", batches, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    path = None if figure is None else check_figure(figure)
    between = _read(checkpoints, batches, device, task, data or {})
    pairs = list(combinations(range(len(checkpoints)), 2))
    lines = [between.line(i, j, checkpoints, points) for i, j in pairs]
    plane = between.plane(grid) if len(checkpoints) == 3 and path is not None else None
    show(_table(lines))
    if path is not None:
        _draw(lines, plane, checkpoints, path)
        table = write_rows(path.with_suffix(".csv"), _rows(lines, plane, checkpoints))
        print(f"drew {path}, whose numbers are in {table}")


def _read(
    checkpoints: Sequence[str],
    batches: int,
    device: str | None,
    task: str | None,
    data: dict[str, Any],
) -> Between:
    """The models' weights and the data that they are asked."""
    from archzoo.checkpoint import load
    from archzoo.checkpoint.opened import check_alike, open_model

    found = load(checkpoints[0], device or "auto")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_model(path)) for path in checkpoints]
        check_alike(opened)
        for one, other in combinations(opened, 2):
            if one.digest == other.digest:
                raise ValueError(
                    f"{one.path} and {other.path} hold the same weights: there is nothing between "
                    "them"
                )
        names = list(dict.fromkeys(opened[0].names().values()))
        names = [name for name in names if opened[0].held[name].dtype.is_floating_point]
        weights = [
            {name: model.weights.finite(name).to(found.model.device) for name in names}
            for model in opened
        ]
        loaders = _loaders(opened, task, data)
    first = [
        {name: entry.to(found.model.device) for name, entry in batch.items()}
        for loader in loaders
        for batch, _ in zip(loader, range(batches), strict=False)
    ]
    return Between(found.model, weights, first)


def _loaders(models: Sequence[Opened], task: str | None, data: dict[str, Any]) -> list[Any]:
    """The validation data: of the task that is named, of that of all models, or of each one's."""
    from archzoo.checkpoint import Pretrained, task_of
    from archzoo.tasks.several import joint_task

    tokenizer = next((m.tokenizer for m in models if m.tokenizer is not None), None)
    tasks = [model.task for model in models if model.task is not None]
    if task is not None:
        path = task if "." in task else f"archzoo.tasks.{task}"
        tasks = [{"class_path": path, "init_args": {}}]
    if not tasks:
        raise ValueError(
            "the checkpoints do not say what they were trained on: name a task by --task"
        )
    joint = joint_task(tasks)
    unique = [joint] if joint else [t for i, t in enumerate(tasks) if t not in tasks[:i]]
    loaders = []
    for config in unique:
        try:
            made = task_of(Pretrained(models[0].model, tokenizer, config), **data)
        except TypeError as error:  # an argument that it does not have, or lacks
            name = config["class_path"].rpartition(".")[2]
            raise ValueError(f"{name} cannot be made with --data {data}: {error}") from None
        if tokenizer is not None and made.tokenizer.files() != tokenizer.files():
            raise ValueError(
                f"the task's vocabulary is another than that of {models[0].path}: "
                f"{made.other_vocabulary}"
            )
        loaders.append(made.evaluation_loader("validation"))
    return loaders


def _table(lines: Sequence[Line]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("from", "to"):
        table.add_column(heading)
    for heading in ("loss", "loss there", "highest", "at", "barrier"):
        table.add_column(heading, justify="right")
    for line in lines:
        highest = max(line.losses)
        at = line.at[line.losses.index(highest)]
        values = (line.losses[0], line.losses[-1], highest)
        cells = [f"{value:.4f}" for value in values]
        table.add_row(line.first, line.second, *cells, f"{at:.2f}", f"{line.barrier:.4f}")
    return table


def _rows(lines: Sequence[Line], plane: Plane | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """What was measured: the coefficient of each model and the loss there."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        for t, loss in zip(line.at, line.losses, strict=True):
            c = dict.fromkeys(names, 0.0) | {line.first: 1 - t, line.second: t}
            rows.append({"part": "line", **c, "loss": loss})
    if plane is not None:
        for j, row in zip(plane.y, plane.losses, strict=True):
            for i, loss in zip(plane.x, row, strict=True):
                c = dict(zip(names, at_place(plane.corners, (i, j)), strict=True))
                rows.append({"part": "plane", **c, "loss": float(loss)})
    return rows


def _draw(lines: Sequence[Line], plane: Plane | None, names: Sequence[str], path: Path) -> None:
    plt = pyplot()
    across = 1 if plane is None else 2
    figure, grid = plt.subplots(
        1, across, figsize=(7.4 * across, 5.2), squeeze=False, layout="constrained"
    )
    if plane is not None:
        _draw_plane(figure, grid[0, 0], plane, names)
    panel = grid[0, -1]
    heights = (0.5, 0.4, 0.6)  # of the numbers beside the bars
    for number, line in enumerate(lines):
        colour = f"C{number}"
        title = f"{line.first} to {line.second}: barrier {line.barrier:.3f}"
        panel.plot(line.at, line.losses, ".-", color=colour, linewidth=1, label=title)
        panel.plot((0, 1), (line.losses[0], line.losses[-1]), ":", color=colour, linewidth=1)
        if line.barrier > 0:
            # The barrier itself: from the line between the ends up to the loss. Those of several
            # lines may be at one place.
            shift = 0.012 * (number - 1) if len(lines) > 1 else 0
            at, height = line.at[line.top] + shift, line.losses[line.top]
            panel.plot(
                (at, at), (height - line.barrier, height), color=colour, linewidth=5, alpha=0.4
            )
            panel.annotate(
                f"{line.barrier:.3f}",
                (at, height - heights[number] * line.barrier),
                (8, 0) if number else (-8, 0),
                textcoords="offset points",
                ha="left" if number else "right",
                fontsize=8,
                color=colour,
            )
    panel.set(xlabel="share of the way", ylabel="validation loss", title="between them")
    panel.margins(y=0.12)
    legend(panel)
    save(figure, path)


def _draw_plane(figure: Any, panel: Any, plane: Plane, names: Sequence[str]) -> None:
    """Contours of the loss, and the models."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(plane.losses.min()), float(plane.losses.max())
    log = low > 0 and high > 10 * low
    levels = np.geomspace(low, high, 15) if log else np.linspace(low, high, 15)
    norm = (LogNorm if log else Normalize)(low, high)
    drawn = panel.contourf(plane.x, plane.y, plane.losses, levels=levels, norm=norm, cmap="viridis")
    panel.contour(
        plane.x, plane.y, plane.losses, levels=levels, colors="white", linewidths=0.4, alpha=0.5
    )
    bar = figure.colorbar(drawn, ax=panel, label="validation loss", ticks=levels[::2])
    bar.ax.set_yticklabels([f"{level:.3g}" for level in levels[::2]])
    closed = np.vstack([plane.corners, plane.corners[:1]])
    panel.plot(closed[:, 0], closed[:, 1], ":", color="white", linewidth=1)
    for (x, y), name, letter in zip(plane.corners, names, "ABC", strict=True):
        panel.plot([x], [y], "o", color="white", markeredgecolor="black", label=f"{letter}: {name}")
        panel.annotate(
            letter,
            (x, y),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            fontweight="bold",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
        )
    panel.set(title="the plane of the three", xlabel="distance of weights", aspect="equal")
    legend(panel)
