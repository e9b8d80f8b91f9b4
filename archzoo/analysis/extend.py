"""`archzoo extend`: how well a model reads texts longer than it was trained on, RoPE scaled or not.

Every length ends at the same tokens: of each long window a length reads the last tokens, so that
what is predicted at the end (the tail) is the same text for all, and lengths differ in what they
see of it alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from archzoo.analysis.figures import drawn, legend, pyplot, save
from archzoo.analysis.tables import show
from archzoo.conversion.rope import scale_rotary
from archzoo.decoder import Decoder
from archzoo.inputs import IGNORED
from archzoo.numerics import at_least_float32
from archzoo.positions.rotary import RopeType

if TYPE_CHECKING:
    from archzoo.checkpoint import Pretrained

AT_ONCE = 2**15  # tokens in a batch
UNSCALED = "none"
#: What is compared where no type is named: (type, factor over the length's own ratio). NTK is
#: shown with twice the ratio too, as it is used in practice: with the ratio itself the middle
#: pairs turn further than in training.
ALL: tuple[tuple[str, float], ...] = (
    ("linear", 1),
    ("ntk", 1),
    ("ntk", 2),
    ("dynamic", 1),
    ("yarn", 1),
    ("llama3", 1),
)


@dataclass(frozen=True)
class Scaling:
    """How queries and keys are rotated past the trained length.

    Args:
        rope_type: linear, ntk, dynamic, yarn or llama3. None: all of them, side by side.
        factor: Of the scaling, the same at every length. None: each length's own ratio to the
            trained length.
    """

    rope_type: str | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        known = get_args(RopeType)[1:]
        if self.rope_type is not None and self.rope_type not in known:
            raise ValueError(f"rope_type={self.rope_type!r} is not one of {', '.join(known)}")
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"factor={self.factor} would shorten the reach: take 1 or more")


class Reading(NamedTuple):
    """One length, read in one way.

    Attributes:
        scaling: Its name.
        factor: Of the scaling; 1 where there is none.
        length: Tokens of a window.
        ratio: Of the length to the trained one.
        window: Perplexity over all tokens of the windows.
        tail: Perplexity over the last tokens of each.
    """

    scaling: str
    factor: float
    length: int
    ratio: float
    window: float
    tail: float


class Windows(NamedTuple):
    """Whole windows of a text that was not trained on.

    Attributes:
        tokens: (windows, length) int64.
        labels: The tokens that follow, (windows, length) int64.
        sizes: Bytes of UTF-8 that each label stands for, (windows, length) int64.
        part: Of the text: "test", or "validation" where there is no test part.
        about: What to say of that, a line or nothing.
    """

    tokens: Tensor
    labels: Tensor
    sizes: Tensor
    part: str
    about: str

    def bits_per_byte(self, reading: Reading, tail: int) -> tuple[float, float]:
        """What a reading's perplexities are in bits per byte, of the windows and of their tails."""
        bits = []
        for value, count in ((reading.window, reading.length), (reading.tail, tail)):
            nats = math.log(value) * len(self.tokens) * count
            bits.append(nats / (math.log(2) * int(self.sizes[:, -count:].sum())))
        return bits[0], bits[1]


# ---------------------------------------------------------------------------- measuring


@torch.no_grad()
def perplexities(
    decoder: Decoder, tokens: Tensor, labels: Tensor, length: int, tail: int
) -> tuple[float, float]:
    """``exp(mean -log p)`` over the last `length` tokens of each row, and over the last `tail`.

    Args:
        decoder: In evaluation mode.
        tokens: (windows, time) int64, time >= length.
        labels: The same tokens one later, (windows, time).
        length: Tokens that are read.
        tail: Tokens at the end, at most length.
    """
    device = decoder.device
    losses = []
    for some, targets in _batches(tokens[:, -length:], labels[:, -length:]):
        logits = decoder(some.to(device)).logits
        logits = logits.to(at_least_float32(logits.dtype)).transpose(1, 2)
        losses.append(F.cross_entropy(logits, targets.to(device), reduction="none").cpu())
    found = torch.cat(losses).double()
    return float(found.mean().exp()), float(found[:, -tail:].mean().exp())


def _batches(tokens: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(AT_ONCE // tokens.shape[1], 1)
    yield from zip(tokens.split(rows), labels.split(rows), strict=True)


def compare(
    decoder: Decoder,
    tokens: Tensor,
    labels: Tensor,
    lengths: list[int],
    tail: int,
    rotary: Scaling = Scaling(),
) -> list[Reading]:
    """A model's perplexity at several lengths, as it was trained and under scalings of its RoPE.

    Args:
        decoder: With a `context_length`; it is left with the last scaling.
        tokens: (windows, longest length) int64.
        labels: The same tokens one later.
        lengths: Tokens to read.
        tail: Tokens at the end of a window that are looked at alone.
        rotary: Which scalings.

    Raises:
        ValueError: The decoder does not rotate by `RotaryEmbedding`, or its trained length is
            unknown.
    """
    trained = decoder.context_length
    if trained is None:
        raise ValueError("the model's context_length is unknown, so there is nothing to extend")
    readings = []
    for length in lengths:
        found = perplexities(decoder, tokens, labels, length, tail)
        readings.append(Reading(UNSCALED, 1.0, length, length / trained, *found))
    scalings = ALL if rotary.rope_type is None else ((rotary.rope_type, 1.0),)
    for rope_type, multiple in scalings:
        for length in lengths:
            ratio = length / trained
            factor = rotary.factor or max(ratio * multiple, 1.0)
            scale_rotary(decoder, rope_type=rope_type, factor=factor)
            found = perplexities(decoder, tokens, labels, length, tail)
            name = rope_type if multiple == 1 else f"{rope_type} x{multiple:g}"
            readings.append(Reading(name, factor, length, ratio, *found))
    return readings


# ---------------------------------------------------------------------------- the command


def extend_command(
    checkpoint: str,
    /,
    rotary: Scaling = Scaling(),
    lengths: list[int] | None = None,
    windows: int = 64,
    tail: int | None = None,
    directory: str | None = None,
    device: str | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Read texts longer than a checkpoint was trained on, with its RoPE scaled and without.

    Prints the perplexity against the length, and the bits per byte, of the test part of the text;
    writes them to extend.csv and draws extend.png.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
        rotary: Which scaling.
        lengths: Tokens to read, such as [256, 1024]. None: 1, 2, 4 and 8 times the trained length.
        windows: Of the test part of the text, each as long as the longest length; all lengths end
            where they end.
        tail: Tokens at the end of a window whose perplexity is given beside the whole window's.
            None: half the trained length.
        directory: Where the table and the figure go. None: beside the checkpoint.
        device: Such as cpu or cuda. None: a GPU where there is one.
        data: Arguments of the task that replace the checkpoint's: --data.path TEXT.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It does not rotate by RotaryEmbedding, has no text to read, or a number does
            not fit.
    """
    from archzoo.checkpoint import load, locate

    path = locate(checkpoint)
    found = load(path, device or "auto")
    trained = found.model.context_length
    if trained is None:
        raise ValueError(f"{checkpoint} does not say how long the texts of its training were")
    lengths = sorted(lengths or [trained * times for times in (1, 2, 4, 8)])
    tail = trained // 2 if tail is None else tail
    if windows < 1:
        raise ValueError(f"windows={windows} must be at least 1")
    if lengths[0] < 1:
        raise ValueError(f"lengths={lengths} must be at least 1 token each")
    if not 1 <= tail <= lengths[0]:
        raise ValueError(f"tail={tail} must lie in 1 .. {lengths[0]}, the shortest length")
    text = windows_of(found, lengths[-1], windows, data or {})
    count = len(text.tokens)
    readings = compare(found.model, text.tokens, text.labels, lengths, tail, rotary)
    print(
        f"{count} windows; trained on {trained} tokens; tail: the last {tail}; "
        f"of the {text.part} part"
    )
    if text.about:
        print(text.about)
    show(table(readings))
    bits = [text.bits_per_byte(reading, tail) for reading in readings]
    converted = [r._replace(window=b[0], tail=b[1]) for r, b in zip(readings, bits, strict=True)]
    show(table(converted, "bits per byte"))
    folder = Path(directory) if directory else (path if path.is_dir() else path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "extend.csv", "w", newline="") as file:
        writer = csv.writer(file)
        facts: dict[str, Any] = {"windows": count, "tail_tokens": tail, "trained_length": trained}
        facts["part"] = text.part
        names = ("window_bits_per_byte", "tail_bits_per_byte")
        writer.writerow([*Reading._fields, *names, *facts])
        writer.writerows(
            [*reading, *both, *facts.values()] for reading, both in zip(readings, bits, strict=True)
        )
    pictured = drawn(partial(plot, readings, trained, tail), folder / "extend.png")
    print(f"{folder} holds extend.csv" + ", extend.png" * pictured)


def windows_of(
    found: Pretrained, length: int, windows: int, data: dict[str, Any] | None = None
) -> Windows:
    """Whole windows of the test part of a model's text.

    Args:
        found: A checkpoint's content.
        length: Tokens of a window.
        windows: How many at most.
        data: Arguments of its task that shall differ, such as `path`.
    """
    from archzoo.checkpoint import task_of

    if found.task is None or "context_length" not in found.task["init_args"]:
        raise ValueError("there is no text to read: the checkpoint was not trained on one")
    wanted = {"context_length": length, "batch_size": 1, "carry_state": False}
    wanted["separate_documents"] = False  # which would leave few tokens that have all before them
    known = found.task["init_args"]
    changes = {name: wanted[name] for name in wanted if name in known}
    task = task_of(found, **(data or {}) | changes)
    rows: list[tuple[Tensor, ...]] = []
    for batch in task.evaluation_loader("test"):
        if len(rows) == windows or (batch["labels"] == IGNORED).any():
            break
        rows.append(tuple(batch[name][0] for name in ("tokens", "labels", "bytes")))
    if not rows:
        raise ValueError(
            f"the {task.test_part} part of the text is shorter than one window of {length} tokens: "
            "name shorter lengths"
        )
    about = task.shared_test() if task.test_part != "test" else ""
    tokens, labels, sizes = (torch.stack(entries) for entries in zip(*rows, strict=True))
    return Windows(tokens, labels, sizes, task.test_part, about)


def table(readings: list[Reading], unit: str = "perplexity") -> Table:
    """A row for each scaling, a column for each length: window (tail)."""
    made = Table(box=None, header_style="bold")
    made.add_column(f"{unit} of window (tail)")
    lengths = list(dict.fromkeys(reading.length for reading in readings))
    ratios = {reading.length: reading.ratio for reading in readings}
    for length in lengths:
        made.add_column(f"{length} = {ratios[length]:g} x", justify="right")
    for name in dict.fromkeys(reading.scaling for reading in readings):
        cells = [f"{r.window:.4g} ({r.tail:.4g})" for r in readings if r.scaling == name]
        made.add_row(name, *cells)
    return made


def plot(readings: list[Reading], trained: int, tail: int, path: Path) -> None:
    """Perplexity against length, of the window and of its tail.

    Args:
        readings: Of every scaling and length.
        trained: The length that the model was trained on, in tokens.
        tail: How many tokens at the end of a window are shown by themselves.
        path: Of the figure.
    """
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, field, title in (
        (panels[0], "window", "all tokens of a window"),
        (panels[1], "tail", f"the last {tail} tokens of a window"),
    ):
        for name in dict.fromkeys(reading.scaling for reading in readings):
            line = [(r.length, getattr(r, field)) for r in readings if r.scaling == name]
            style = "k--" if name == UNSCALED else "o-"
            panel.plot(*zip(*line, strict=True), style, label=name, markersize=4)
        panel.axvline(trained, color="grey", linewidth=0.8)
        panel.set(title=title, xlabel="tokens (grey: trained length)", xscale="log", yscale="log")
        lengths = sorted({reading.length for reading in readings})
        panel.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity")
    values = [value for r in readings for value in (r.window, r.tail)]
    low, high = min(values) / 1.2, max(values) * 1.2
    ticks: list[float] = [2.0**k for k in range(24) if low <= 2**k <= high]
    if len(ticks) < 4:
        ticks = [tick for tick in MaxNLocator(8).tick_values(low, high) if low <= tick <= high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_yticks([], minor=True)
    panels[0].set_ylim(low, high)
    legend(panels[1], beside=True)
    save(figure, path)
