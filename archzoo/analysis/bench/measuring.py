"""The rounds of a benchmark, within a budget of time.

At each size every side runs once a round, in turn, so that all see whatever else the machine does.
A row is the median over the rounds, with the 10th and 90th percentile. A curve goes to longer
sizes until its memory or its time ends, and its last row says which.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from archzoo.analysis.bench.contenders import Contender, Precision
from archzoo.analysis.bench.sides import Side, Stopped
from archzoo.analysis.bench.worker import MOST_REPEATS
from archzoo.analysis.operations import utilisation

QUANTITIES = {
    "training": "tokens/s",
    "prefill": "ms",
    "decode": "ms",
    "batch": "tokens/s",
    "state": "bytes",
}  # and the unit of each
KEY = (
    *("quantity", "contender", "settings", "length", "batch", "dtype"),
    *("machine", "torch", "triton", "cuda"),
)
FEWEST_ROUNDS = 3
TURN = 0.1  # seconds that a turn of short calls lasts
# A GPU at the limit of its power slows down and recovers about once a second, by 10 % on an H200,
# and begins to after the first steps: a turn of training lasts as long as that.
TRAINING_TURN = 1.0
PART = 4  # one size takes at most this part of its quantity's time, for those to come take longer

Row = dict[str, Any]


class Size(NamedTuple):
    """Where a quantity is measured.

    Attributes:
        length: Tokens.
        batch: Rows.
    """

    length: int
    batch: int


class Budget:
    """Seconds that may be spent.

    Args:
        seconds: From now on.
        clock: Seconds; another one in tests.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, 0 or more."""
        return max(self._end - self.clock(), 0.0)

    def share(self, parts: float) -> Budget:
        """One of so many equal parts of what is left, from now on."""
        return Budget(self.left() / parts, self.clock)


@dataclass
class Plan:
    """What is asked.

    Attributes:
        contenders: The sides, whose names differ.
        quantities: Of `QUANTITIES`.
        lengths: Of training, prefill, decoding and state, ascending.
        batches: Of decoding's throughput, ascending.
        contexts: Tokens before it.
        tokens: A training step's, where a length is not more.
        rounds: At most.
        precisions: Of training, and of all else.
        free_memory: Bytes that a side can take.
        tracks_peaks: Whether turns say their peak memory, as a GPU's do; else a process does, and
            each size that is trained gets a fresh one.
        peak: bf16 operations a second at most; None: unknown.
    """

    contenders: list[Contender]
    quantities: list[str]
    lengths: list[int]
    batches: list[int]
    contexts: list[int]
    tokens: int
    rounds: int
    precisions: tuple[Precision, Precision]
    free_memory: int
    tracks_peaks: bool
    peak: float | None = None
    vocab_size: int = 2

    def sizes(self, quantity: str) -> list[Size]:
        """Where a quantity is measured, ascending."""
        if quantity == "batch":
            return [Size(length, batch) for length in self.contexts for batch in self.batches]
        if quantity == "state":  # it costs little, and a cache outgrows a state early
            before = [16 * 2**n for n in range(20) if 16 * 2**n < self.lengths[0]]
            return [Size(length, 1) for length in [*before, *self.lengths]]
        if quantity == "training":
            return [Size(length, max(1, self.tokens // length)) for length in self.lengths]
        return [Size(length, 1) for length in self.lengths]

    def precision(self, quantity: str) -> Precision:
        """Of a quantity's numbers."""
        return self.precisions[0 if quantity == "training" else 1]

    def points(self) -> int:
        """Rows in all."""
        return sum(
            len(self.sizes(quantity))
            for quantity in self.quantities
            for contender in self.contenders
            if quantity not in contender.without
        )

    def identity(self, contender: Contender, quantity: str, size: Size) -> Row:
        """The columns that name a row, all but the machine's.

        Args:
            contender: The side.
            quantity: Of `QUANTITIES`.
            size: Where it is measured.
        """
        return {
            "quantity": quantity,
            "contender": contender.name,
            "settings": contender.settings(),
            "length": size.length,
            "batch": size.batch,
            "dtype": self.precision(quantity),
        }


@dataclass
class Curve:
    """One side's rows of a quantity so far.

    Attributes:
        contender: The side.
        start: Starts its process.
        side: That process, while there is one.
        seconds, memory: (size, what a call took), ascending.
        ended: Whether it is measured no further.
        parameters: Of the model.
    """

    contender: Contender
    start: Callable[[], Side]
    side: Side | None = None
    seconds: list[tuple[float, float]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    ended: bool = False
    parameters: int = 0

    def note(self, at: float, row: Row) -> None:
        """Remember what a row took."""
        if row.get("seconds"):
            self.seconds.append((at, float(row["seconds"])))
        if row.get("memory_bytes"):
            self.memory.append((at, float(row["memory_bytes"])))

    def close(self) -> None:
        """End its process."""
        if self.side is not None:
            self.side.close()
            self.side = None


def foreseen(measured: list[tuple[float, float]], at: float) -> float | None:
    """What a curve will be at a larger size, by its last slope; None: nothing is known.

    Its slope in the logarithms is taken to be between 0 and 2, and 1 after a single size.
    """
    if not measured:
        return None
    size, value = measured[-1]
    slope = 1.0
    if len(measured) > 1 and measured[-2][0] < size:
        before, lower = measured[-2]
        slope = math.log(value / lower) / math.log(size / before)
        slope = min(max(slope, 0.0), 2.0)
    return value * float((at / size) ** slope)


def measure(
    plan: Plan,
    start: Callable[[Contender], Side],
    budget: Budget,
    known: Callable[[Row], Row | None] = lambda identity: None,
    tell: Callable[[str], None] = lambda words: None,
) -> Iterator[tuple[Row, bool]]:
    """Measure what a plan asks, row by row.

    Args:
        plan: What is asked.
        start: Starts a side's process.
        budget: Time for all of it; every quantity gets an equal part of what is left for it.
        known: The row of an identity where it is measured already, else None.
        tell: Called with what is measured now.

    Yields:
        A row, and whether it was known.
    """
    for number, quantity in enumerate(plan.quantities):
        share = budget.share(len(plan.quantities) - number)
        curves = [
            Curve(contender, functools.partial(start, contender))
            for contender in plan.contenders
            if quantity not in contender.without
        ]
        try:
            yield from _quantity(plan, quantity, curves, share, known, tell)
        finally:
            for curve in curves:
                curve.close()


def _quantity(
    plan: Plan,
    quantity: str,
    curves: list[Curve],
    share: Budget,
    known: Callable[[Row], Row | None],
    tell: Callable[[str], None],
) -> Iterator[tuple[Row, bool]]:
    sizes = plan.sizes(quantity)
    for number, size in enumerate(sizes):
        at = float(size.batch if quantity == "batch" else size.length)
        going: list[Curve] = []
        for curve in curves:
            if curve.ended:
                continue
            row = known(plan.identity(curve.contender, quantity, size))
            if row is None:
                going.append(curve)
                continue
            curve.note(at, row)
            curve.ended = bool(row.get("stopped"))
            yield row, True
        if not going:
            continue
        tell(f"{quantity}, {at:,.0f} {'rows' if quantity == 'batch' else 'tokens'}")
        last = number == len(sizes) - 1
        for row in _point(plan, quantity, size, at, going, share, last):
            yield row, False


def _point(
    plan: Plan,
    quantity: str,
    size: Size,
    at: float,
    curves: list[Curve],
    share: Budget,
    last: bool,
) -> Iterator[Row]:
    """One size: the rows of all curves that reach it."""
    training = quantity == "training"
    turns: dict[int, list[float]] = {}
    repeats: dict[int, int] = {}
    facts: dict[int, Row] = {}
    stopped: dict[int, Stopped] = {}
    gone: set[int] = set()
    allowed = share if last else share.share(PART)

    for index, curve in enumerate(curves):
        waiting = len(curves) - index
        try:
            _check(plan, curve, at, share.left() / waiting)
            if _is_fresh(plan, training, curve):
                curve.close()
            built = curve.side is not None
            side = curve.side = curve.side or curve.start()
            if not built:
                precision = plan.precision(quantity)
                wait = share.left() + 60
                made = side.ask("build", wait, precision=precision, training=training)
                curve.parameters = made["parameters"]
            facts[index] = {"parameters": curve.parameters}
            sizes = {"length": size.length, "batch": size.batch, "vocab_size": plan.vocab_size}
            ready = side.ask("prepare", share.left(), quantity=quantity, **sizes)
            told = ("state_bytes", "operations", "bytes", "memory_bytes", "kernels")
            facts[index] |= {name: ready[name] for name in told if ready.get(name)}
            turns[index] = ready.get("turns", [])
            if plan.tracks_peaks:
                turns[index] = in_turns(turns[index], TRAINING_TURN)
            if turns[index]:  # all of them at once
                gone.add(index)
                curve.close()
                continue
            seconds = ready["seconds"]
            most = MOST_REPEATS["cuda" if plan.tracks_peaks else "cpu"]
            lasts = TRAINING_TURN if training and plan.tracks_peaks else TURN
            repeats[index] = min(max(math.ceil(lasts / max(seconds, 1e-9)), 1), most)
        except Stopped as stop:
            stopped[index] = stop

    for number in range(plan.rounds if quantity != "state" else 0):
        enough = number >= FEWEST_ROUNDS and not allowed.left()
        if enough:
            break
        for index in list(turns):
            if index in stopped or index in gone:
                continue
            side_now = curves[index].side
            assert side_now is not None
            try:
                turn = side_now.ask("run", share.left() + 1, repeat=repeats[index])
            except Stopped as stop:
                if len(turns[index]) < FEWEST_ROUNDS:
                    stopped[index] = stop
                else:  # what there is will do; the next size says why it is the end
                    gone.add(index)
                curves[index].close()
                continue
            turns[index].append(turn["seconds"])
            if "memory_bytes" in turn:
                most = max(facts[index].get("memory_bytes", 0), turn["memory_bytes"])
                facts[index]["memory_bytes"] = most

    for index, curve in enumerate(curves):
        row = plan.identity(curve.contender, quantity, size) | {"unit": QUANTITIES[quantity]}
        fresh = _is_fresh(plan, training, curve)
        if index not in stopped and fresh and curve.side is not None:
            try:
                facts[index] |= curve.side.ask("peak", 60)
            except Stopped as stop:
                stopped[index] = stop
        row |= facts.get(index, {})
        if index in stopped:
            row["stopped"] = str(stopped[index])
            curve.ended = True
        else:
            row |= _figures(quantity, size, turns[index], row.get("state_bytes"))
            if training and plan.peak and row.get("operations"):
                row["mfu"] = round(utilisation(row["operations"], row["median"], plan.peak), 4)
        curve.note(at, row)
        if fresh or curve.ended:
            curve.close()
        yield row


def in_turns(steps: list[float], seconds: float) -> list[float]:
    """The means of as many steps in a row as take so long; the last, incomplete turn is left out.

    Args:
        steps: Seconds of each.
        seconds: That a turn lasts.
    """
    if not steps:
        return []
    count = min(max(math.ceil(seconds / statistics.fmean(steps)), 1), len(steps))
    whole = range(0, len(steps) - count + 1, count)
    return [statistics.fmean(steps[begin : begin + count]) for begin in whole]


def _is_fresh(plan: Plan, training: bool, curve: Curve) -> bool:
    """Whether each size gets a process of its own."""
    return training and (not plan.tracks_peaks or curve.contender.trains)


def _check(plan: Plan, curve: Curve, at: float, left: float) -> None:
    """Raise `Stopped` where a size will not fit."""
    memory = foreseen(curve.memory, at)
    if memory is not None and memory > plan.free_memory:
        raise Stopped(
            "memory",
            f"about {memory / 2**30:,.1f} GiB are needed, and {plan.free_memory / 2**30:,.1f} "
            "GiB are free",
        )
    seconds = foreseen(curve.seconds, at)
    needed = 0.0 if seconds is None else (FEWEST_ROUNDS + 2) * seconds
    if needed > left or not left:
        about = f"about {needed:,.0f} s are needed, and " if needed else ""
        raise Stopped("time", f"{about}{left:,.0f} s are left")


def _figures(quantity: str, size: Size, seconds: list[float], state_bytes: Any) -> Row:
    """The median of a quantity in its unit, with the 10th and 90th percentile."""
    if quantity == "state":
        return {"median": state_bytes, "low": state_bytes, "high": state_bytes, "rounds": 1}
    middle = statistics.median(seconds)
    quick, slow = (float(value) for value in np.quantile(seconds, (0.1, 0.9)))
    if QUANTITIES[quantity] == "ms":
        values = [1e3 * value for value in (middle, quick, slow)]
    else:
        tokens = size.batch * (size.length if quantity == "training" else 1)
        values = [tokens / value for value in (middle, slow, quick)]
    named = zip(("median", "low", "high"), values, strict=True)
    found: Row = {name: float(f"{value:.5g}") for name, value in named}
    if quantity == "training":  # with what comes between steps now and then, such as a log's row
        found["mean"] = float(f"{tokens / statistics.fmean(seconds):.5g}")
    return found | {"rounds": len(seconds), "seconds": float(f"{middle:.5g}")}
