"""`archzoo grid`: exact match at every size of problem, as a table on disk and as a picture.

Every problem is answered in one teacher-forced pass: all of its answer's tokens are the most likely
ones if and only if greedy generation gives the answer, stop token included, and one pass costs as
little as the prefill of a prompt.
"""

from __future__ import annotations

import csv
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from archzoo.analysis.figures import drawn, legend, pyplot, save
from archzoo.analysis.size_grid import ask, axes_of, draw_sizes, possible, table_of
from archzoo.analysis.tables import show
from archzoo.block import Router
from archzoo.decoder import Decoder

if TYPE_CHECKING:
    from archzoo.tasks.problems import Problems, SyntheticTask
    from archzoo.tasks.sequences import SequenceTask

COLUMNS = ("kind", "first", "second", "part", "problems", "right", "split", "run")
AT_ONCE = {"cpu": 2**14, "cuda": 2**17}  # tokens in a pass
NOWHERE = -2  # what is neither a digit of an answer nor the stop token
AHEAD = 8  # passes whose problems are made while the device works, each by a thread


class Key(NamedTuple):
    """What a row of the table counts.

    Attributes:
        kind: "cell": problems of one size, answered rightly. "place": a digit of the answer of
            these, the units' part 0, given the right ones before it; -1 is the stop token.
            "chain": problems of one size in which something is carried through `part` columns.
            "label": tokens that problems of one size ask for, counted one by one.
        first, second: The size.
        part: Index of the digit, or length of the chain; 0 for a cell.
    """

    kind: str
    first: int
    second: int
    part: int = 0


Counts = dict[Key, tuple[int, int]]  # problems, and how many of them were answered correctly


# ---------------------------------------------------------------------------- answering


class Examiner:
    """Evaluates a model on problems, many at once.

    Args:
        decoder: In evaluation mode.
        synthetic: The task that generates the problems and writes them down.
        tokens: Which token of the model's stands for each of the task's own.
        precision: "float32", or "bfloat16" for its matrix products.
    """

    def __init__(
        self,
        decoder: Decoder,
        synthetic: SyntheticTask,
        tokens: NDArray[np.int64],
        precision: str = "float32",
    ) -> None:
        self.decoder, self.synthetic, self.tokens = decoder.eval(), synthetic, tokens
        self.device = decoder.device
        self.precision = precision
        # A line's padding comes last, where no token sees it; only routers, which count tokens,
        # must know of it. Without it no mask is needed, nor a bias for each row.
        self.marks_padding = any(isinstance(part, Router) for part in decoder.modules())

    def write(self, problems: Problems) -> dict[str, Tensor]:
        """A batch in the model's tokens, and `places`: the digit of the answer that a label is."""
        lines = self.synthetic.lines(problems, positions=True)
        assert lines.positions is not None
        tokens, labelled = self.tokens[lines.tokens], lines.labelled[:, 1:]
        positions = lines.positions[:, 1:]
        places = np.where(labelled & (positions > 1), positions - 2, NOWHERE)
        places[np.arange(labelled.shape[1]) == lines.lengths[:, None] - 2] = -1
        batch = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "labelled": labelled,
            "places": places,
        }
        if self.marks_padding:
            padding = np.arange(labelled.shape[1]) >= lines.lengths[:, None]
            batch["documents"] = -padding.astype(np.int64)
        if self.synthetic.coupling is not None:
            batch["positions"] = lines.positions[:, :-1]
        return {
            name: torch.from_numpy(np.ascontiguousarray(entry)) for name, entry in batch.items()
        }

    @torch.no_grad()
    def answer(self, batch: dict[str, Tensor]) -> Tensor:
        """Which of the labels are the most likely tokens, (batch, time) bool, on the device."""
        names = [name for name in batch if name not in ("labelled", "places")]  # for the counts
        given = {name: batch[name].to(self.device, non_blocking=True) for name in names}
        with self._casting():
            x, _, _ = self.decoder.hidden(
                given["tokens"],
                documents=given.get("documents"),
                positions=given.get("positions"),
            )
            predicted: Tensor = self.decoder.head(x).argmax(-1)
        return predicted == given["labels"]

    def _casting(self) -> AbstractContextManager[Any]:
        return _casting(self.precision, self.device)


def _casting(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in a precision."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


# ---------------------------------------------------------------------------- the table


def evaluate_problems(
    examiner: Examiner,
    keys: list[Key],
    count: int,
    at_once: int,
    progress: Callable[[int], None] = lambda problems: None,
) -> Iterator[Counts]:
    """Ask `count` problems of every key, or as many as there are; what is finished, pass by pass.

    Cells of two equal lengths bring their places with them. Problems are made by other threads
    while the device works.

    Args:
        examiner: Evaluates them.
        keys: Of cells and chains.
        count: Problems of each.
        at_once: Tokens in a pass.
        progress: Told how many keys are done with each pass.
    """
    from archzoo.tasks.problems import together

    synthetic = examiner.synthetic

    def make(some: list[Key]) -> tuple[dict[str, Tensor], list[int]]:
        parts = [
            synthetic.chained(key.first, key.part, count)
            if key.kind == "chain"
            else synthetic.cell(key.first, key.second, count)
            for key in some
        ]
        return examiner.write(together(parts)), [part.examples for part in parts]

    with ThreadPoolExecutor(AHEAD) as pool:
        passes = iter(_passes(synthetic, keys, count, at_once))
        waiting = deque((some, pool.submit(make, some)) for some in islice(passes, AHEAD))
        while waiting:
            some, made = waiting.popleft()
            batch, counts = made.result()
            right = examiner.answer(batch) if sum(counts) else torch.empty(0, 1)
            if (following := next(passes, None)) is not None:
                waiting.append((following, pool.submit(make, following)))
            yield _count(some, counts, batch, right.cpu())
            progress(len(some))


def _passes(
    synthetic: SyntheticTask, keys: list[Key], count: int, at_once: int
) -> Iterator[list[Key]]:
    """Keys in the order of their lines' lengths, as many in a pass as `at_once` tokens hold."""
    some: list[Key] = []
    for width, key in sorted((synthetic.width(key.first, key.second), key) for key in keys):
        if some and (len(some) + 1) * count * width > at_once:
            yield some
            some = []
        some.append(key)
    if some:
        yield some


def _count(keys: list[Key], counts: list[int], batch: dict[str, Tensor], right: Tensor) -> Counts:
    """What a pass found; see `Key`."""
    found: Counts = {}
    labelled, places = batch["labelled"].numpy(), batch["places"].numpy()
    hits = right.numpy()
    begin = 0
    for key, count in zip(keys, counts, strict=True):
        rows = slice(begin, begin + count)
        begin += count
        found[key] = count, int((hits[rows] | ~labelled[rows]).all(axis=1).sum())
        if key.kind == "cell" and key.first == key.second and count:
            where = places[rows] > NOWHERE
            all_of = np.bincount(places[rows][where] + 1)
            right_of = np.bincount(places[rows][where & hits[rows]] + 1, minlength=len(all_of))
            for digit, pair in enumerate(zip(all_of.tolist(), right_of.tolist(), strict=True), -1):
                found[Key("place", key.first, key.second, digit)] = pair
    return found


class Journal:
    """The table on disk: finished rows of one evaluation, kept when it is interrupted.

    Args:
        path: A CSV file; rows of another evaluation are dropped from it.
        run: Names the evaluation: what weights, how many problems, in which precision.
        split: Whose problems they are, "test" or "validation", for a column.
    """

    def __init__(self, path: Path, run: str, split: str = "test") -> None:
        self.path, self.run, self.split = path, run, split
        self.counts: Counts = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("run") == run:  # a row that was cut short has none
                        key = Key(row["kind"], *(int(row[n]) for n in COLUMNS[1:4]))
                        self.counts[key] = int(row["problems"]), int(row["right"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
        kept, self.counts = self.counts, {}
        self.add(kept)

    def add(self, counts: Counts) -> None:
        """Write rows down at once."""
        with self.path.open("a", newline="") as file:
            rows = ((*key, *counts[key], self.split, self.run) for key in counts)
            csv.writer(file).writerows(rows)
        self.counts |= counts

    def rate(self, *key: Any) -> float:
        """The fraction answered correctly, nan where there were no problems."""
        problems, right = self.counts.get(Key(*key), (0, 0))
        return right / problems if problems else math.nan


# ---------------------------------------------------------------------------- the command


def grid_command(
    checkpoint: str,
    /,
    digits: int | None = None,
    problems: int = 100,
    diagonal: int | None = None,
    directory: str | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    at_once: int | None = None,
    device: str | None = None,
    task: str | None = None,
    data: dict[str, Any] | None = None,
    first: list[int] | None = None,
    second: list[int] | None = None,
) -> None:
    """Measure exact match at every pair of lengths, and draw it.

    The model answers problems of its own task that are test's: neither training nor a validation
    has asked them. It writes a table, grid_NAME.csv, whose
    finished rows are kept when the command is interrupted and called again, and a picture of it,
    grid_NAME.png: exact match by size, with the trained sizes outlined and the longest numbers
    that training can have covered as a line; along the diagonal; by digit of the answer; and by
    how many columns a carry runs through.

    Of a task such as Recall, whose sizes are pairs and length, it measures and draws accuracy and
    exact match by both.

    Args:
        checkpoint: A run's directory, which stands for its last.ckpt, a .ckpt file, or a directory
            of archzoo.save_pretrained.
        digits: Sizes from 1 to this, in both directions. None: twice the trained ones.
        problems: Of each size.
        diagonal: Sizes of two equal lengths longer than `digits`, up to this. None: none.
        directory: Where the files go. None: beside the checkpoint.
        precision: Of matrix products. auto: bfloat16 on a GPU that has it, else float32.
        at_once: Tokens in a pass. None: 16,384 on a CPU, 131,072 on a GPU.
        device: Such as cpu or cuda. None: a GPU where there is one.
        task: Which task's problems, of a checkpoint that was trained on several (Arithmetic).
            None: the first.
        data: Arguments of the task that replace the checkpoint's: --data.path TEXT.
        first: Of a task such as Recall, the first parts of sizes: --first [4,16,64] pairs. None:
            from a quarter of the trained ones to four times, doubled.
        second: The same of the second ones, such as lengths.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It was not trained on problems, or a number is out of its range.
    """
    from archzoo.checkpoint import load, locate, weights_digest
    from archzoo.tasks.stream import build_task

    for name, value in (("digits", digits), ("problems", problems), ("at_once", at_once)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    path = locate(checkpoint)
    found = load(path, device or "auto")
    kind = found.model.device.type
    if precision == "auto":
        half = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if half else "float32"
    built = build_task(found.task, **(data or {})) if found.task else None
    folder = Path(directory) if directory else path.parent if path.is_file() else path
    name = f"grid_{path.stem}" if path.is_file() else "grid"
    run = f"{weights_digest(found.model.state_dict())[:12]}-{problems}-{precision}"
    if hasattr(built, "test_sizes"):
        sequences = cast("SequenceTask", built)
        journal = Journal(folder / f"{name}.csv", f"{run}-test", "test")
        _measure_sizes(
            found.model,
            sequences,
            axes_of(sequences, first, second),
            problems,
            at_once or AT_ONCE.get(kind, AT_ONCE["cpu"]),
            precision,
            journal,
        )
        return
    for given in (first, second):
        if given is not None:
            raise ValueError(f"{path}: first and second are of tasks such as Recall; take digits")
    synthetic_tasks = getattr(built, "synthetic_tasks", {})
    if not synthetic_tasks or found.tokenizer is None:
        raise ValueError(f"{path} was not trained on problems, such as those of Addition")
    task = task or next(iter(synthetic_tasks))
    if task not in synthetic_tasks:
        raise ValueError(f"task {task}: {path} was trained on {', '.join(synthetic_tasks)}")
    synthetic: SyntheticTask = synthetic_tasks[task]
    examiner = Examiner(found.model, synthetic, synthetic.tokens_of(found.tokenizer), precision)
    digits = digits or 2 * max(synthetic.extent)
    name += f"_{task}" if len(synthetic_tasks) > 1 else ""
    if (part := synthetic.test_part) == "test":
        run += "-test"  # without it, rows are of a table that was begun before there was this part
    journal = Journal(folder / f"{name}.csv", run, part)
    print(f"problems of the {part} part")
    if part != "test":
        print(synthetic.shared_test())

    keys = _keys(synthetic, digits, diagonal or 0)
    missing = [key for key in keys if key not in journal.counts]
    with warnings.catch_warnings(), _bar(len(keys), len(keys) - len(missing)) as advance:
        warnings.simplefilter("ignore")  # of lengths that are not covered: the figure says so
        tokens = at_once or AT_ONCE.get(kind, AT_ONCE["cpu"])
        for counts in evaluate_problems(examiner, missing, problems, tokens, advance):
            journal.add(counts)
    show(_table(journal, synthetic, digits, diagonal or 0))
    if (coverage := found.model.embedding.coverage) is not None:
        print(f"training can have covered numbers of up to {coverage} digits")
    print(f"wrote {journal.path}")
    figure = journal.path.with_suffix(".png")
    if drawn(partial(_draw, journal, synthetic, digits, diagonal or 0, found.model), figure):
        print(f"drew {figure}")


def _measure_sizes(
    decoder: Decoder,
    task: SequenceTask,
    axes: tuple[list[int], list[int]],
    problems: int,
    at_once: int,
    precision: str,
    journal: Journal,
) -> None:
    """The grid of a task whose problems are sequences, measured and drawn."""
    cells = [(i, j) for i in axes[0] for j in axes[1] if possible(task, (i, j))]
    missing = [size for size in cells if Key("cell", *size) not in journal.counts]
    decoder.eval()
    with warnings.catch_warnings(), _bar(len(cells), len(cells) - len(missing)) as advance:
        warnings.simplefilter("ignore")  # of lengths beyond those of training
        for size in missing:
            casting = _casting(precision, decoder.device)
            labels, rows = ask(decoder, task, size, problems, at_once, casting)
            journal.add({Key("label", *size): labels, Key("cell", *size): rows})
            advance(1)
    show(table_of(task, cells, journal.rate))
    print(f"wrote {journal.path}")
    figure = journal.path.with_suffix(".png")
    if drawn(partial(draw_sizes, task, axes, journal.rate), figure):
        print(f"drew {figure}")


def _keys(synthetic: SyntheticTask, digits: int, diagonal: int) -> list[Key]:
    """Every cell up to a size, the diagonal after it, and chains at the longest sizes."""
    span = range(1, digits + 1)
    keys = [Key("cell", first, second) for first in span for second in span]
    keys += [Key("cell", size, size) for size in range(digits + 1, diagonal + 1)]
    if synthetic.carries:
        trained = min(max(synthetic.extent), digits)
        for size in {trained, (trained + digits) // 2, digits} - {1, 2}:
            keys += [Key("chain", size, size, chain) for chain in range(size + 1)]
    return keys


def _lines(total: int, done: int) -> Callable[[int], None]:
    """Says on stderr how far it is: soon at first, and seldom later on."""
    began = said = time.monotonic()

    def advance(problems: int) -> None:
        nonlocal done, said
        done, now = done + problems, time.monotonic()
        if now - said > min(max(10.0, (now - began) / 10), 300.0):
            said = now
            print(f"{done:,} of {total:,} sizes", file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, elsewhere a line now and then; gives what advances it."""
    console = Console()
    if not console.is_terminal:
        yield _lines(total, done)
        return
    columns = (TextColumn("sizes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda problems: progress.advance(task, problems)


def _mean(journal: Journal, sizes: list[tuple[int, int]]) -> float:
    """The mean of the cells that were evaluated: every size weighs the same."""
    rates = [journal.rate("cell", *size) for size in sizes]
    rates = [rate for rate in rates if not math.isnan(rate)]
    return sum(rates) / len(rates) if rates else math.nan


def _table(journal: Journal, synthetic: SyntheticTask, digits: int, diagonal: int) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("sizes")
    for heading in ("cells", "exact match"):
        table.add_column(heading, justify="right")

    def add(title: str, sizes: list[tuple[int, int]]) -> None:
        counted = [size for size in sizes if journal.counts.get(Key("cell", *size), (0, 0))[0]]
        if counted:
            table.add_row(title, f"{len(counted):,}", f"{_mean(journal, counted):.2%}")

    span = range(1, digits + 1)
    every = [(i, j) for i in span for j in span]
    trained = [size for size in every if _is_trained(synthetic, size)]
    (low, high), (lowest, highest) = synthetic.spans
    add(f"trained: {low} to {high} by {lowest} to {highest}", trained)
    others = [size for size in every if not _is_trained(synthetic, size)]
    add(f"out of distribution, up to {digits}", others)
    first = max(synthetic.extent)
    for size in sorted({first, *range(first + 1, digits + 1), *range(digits + 1, diagonal + 1)}):
        if size <= first + 5 or size % 5 == 0:
            add(f"{size} by {size}", [(size, size)])
    return table


def _is_trained(synthetic: SyntheticTask, size: tuple[int, int]) -> bool:
    return all(low <= part <= high for part, (low, high) in zip(size, synthetic.spans, strict=True))


# ---------------------------------------------------------------------------- the picture


def _draw(
    journal: Journal,
    synthetic: SyntheticTask,
    digits: int,
    diagonal: int,
    decoder: Decoder,
    path: Path,
) -> None:
    plt = pyplot()
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    size = np.arange(1, digits + 1)
    # Hinted numbers have letters between their digits, so that every run of digits is one.
    coverage = None if synthetic.hints else decoder.embedding.coverage
    part, first_part = synthetic.answer_parts
    figure, panels = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")
    (cells, line), (places, chains) = panels

    rates = np.array([[journal.rate("cell", i, j) for j in size] for i in size])
    shown = cells.imshow(
        rates, origin="lower", vmin=0, vmax=1, cmap="viridis", extent=(0.5, digits + 0.5) * 2
    )
    (low, high), (lowest, highest) = synthetic.spans
    cells.add_patch(
        Rectangle(
            (lowest - 0.5, low - 0.5),
            highest - lowest + 1,
            high - low + 1,
            fill=False,
            edgecolor="red",
            linewidth=2,
            label="trained",
        )
    )
    note = ""
    if coverage is not None:
        covered = np.array([[synthetic.answer_size(i, j) <= coverage for j in size] for i in size])
        if not covered.all() and covered.any():
            # Steps between the cells, not lines through their middles.
            fine = np.repeat(np.repeat(covered, 8, axis=0), 8, axis=1)
            edges = 0.5 + (np.arange(8 * digits) + 0.5) / 8
            cells.contour(edges, edges, fine, levels=[0.5], colors="orange", linewidths=2)
            words = f"covered: answers of at most {coverage} digits"
            cells.plot([], [], color="orange", linewidth=2, label=words)
        else:
            reach = "all" if covered.all() else "nothing"
            note = f"\n(covered: {reach} of this map, answers of at most {coverage} digits)"
    cells.set(title="exact match", ylabel=synthetic.axes[0], xlabel=synthetic.axes[1] + note)
    legend(cells)
    figure.colorbar(shown, ax=cells)

    longest = max(digits, diagonal)
    lengths = np.arange(1, longest + 1)
    counts = [journal.counts.get(Key("cell", n, n), (0, 0)) for n in lengths.tolist()]
    counted = np.array([count > 0 for count, _ in counts])
    middle, low_end, high_end = np.array([_interval(*pair) for pair in counts]).T
    ends = low_end[counted], high_end[counted]
    line.fill_between(lengths[counted], *ends, alpha=0.25, linewidth=0)
    line.plot(lengths[counted], middle[counted], ".-")
    line.axvline(max(synthetic.extent) + 0.5, color="red", label="trained")
    if coverage is not None:
        reached = [n for n in lengths.tolist() if synthetic.answer_size(n, n) <= coverage]
        if len(reached) < longest:
            line.axvline(len(reached) + 0.5, color="orange", label="covered")
    line.set(title="both of one size (95 % intervals)", ylim=(-0.03, 1.03), xlabel="size")
    legend(line)

    indices = sorted({key.part for key in journal.counts if key.kind == "place"} - {-1})
    image = np.full((longest, len(indices) + 1), np.nan)
    for n in lengths.tolist():
        for column, index in enumerate([*indices, -1]):
            image[n - 1, column] = journal.rate("place", n, n, index)
    shown = places.imshow(
        image,
        origin="lower",
        vmin=0,
        vmax=1,
        cmap="viridis",
        aspect="auto",
        extent=(-0.5, len(indices) + 0.5, 0.5, longest + 0.5),
    )
    places.axhline(max(synthetic.extent) + 0.5, color="red")
    if coverage is not None and coverage < len(indices) and part == "digit":
        places.axvline(coverage - 0.5, color="orange")
    places.set(
        title=f"{part} by {part}, the right ones before it given",
        xlabel=f"{part} of the answer, {first_part} 0",
        ylabel="both of this size",
    )
    steps = MaxNLocator(8, integer=True).tick_values(0, len(indices))
    # The last column is the stop token's, and its label needs space.
    ticks = [int(tick) for tick in steps if 0 <= tick <= 0.93 * len(indices)]
    places.set_xticks([*ticks, len(indices)], [*map(str, ticks), "stop"])
    figure.colorbar(shown, ax=places)

    if synthetic.carries:
        for n in sorted({key.first for key in journal.counts if key.kind == "chain"}):
            values = [journal.rate("chain", n, n, chain) for chain in range(n + 1)]
            chains.plot(range(n + 1), values, ".-", label=f"{n} digits")
        chains.set(
            title="by the longest carry", xlabel="columns carried through", ylim=(-0.03, 1.03)
        )
        legend(chains)
    else:
        chains.set_axis_off()
    save(figure, path)


def _interval(problems: int, right: int) -> tuple[float, float, float]:
    """The fraction of correct answers and its 95 % interval (Wilson 1927)."""
    if not problems:
        return math.nan, math.nan, math.nan
    z = 1.96
    rate, spread = right / problems, z * z / problems
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / problems + spread / (4 * problems))
    return rate, middle - half, middle + half
