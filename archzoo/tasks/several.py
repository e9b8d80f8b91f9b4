"""Several synthetic tasks in one stream."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar, cast

import numpy as np

from archzoo.tasks.counter_random import Integers, random_bits
from archzoo.tasks.digit_arrays import below
from archzoo.tasks.problems import Blocks, Lines, SyntheticTask, batch_of, pack_rows
from archzoo.tasks.stream import Batch, Loader, Task, build_task

_PARTS = 7  # the stream of random bits that chooses a task for each example

# What must be the same in all problems that one model reads, and what is the stream's own.
_COMMON = {
    *("reverse", "reverse_answer", "zero_padded", "hints", "coupled", "vocabulary"),
    *("batch_size", "steps_per_epoch", "validation_examples", "test_examples", "seed"),
    *("ood_digits", "ood_examples", "separate_test", "pack"),
}


# How problems are written, which no joint task can have both ways.
_WRITING = ("reverse", "reverse_answer", "zero_padded", "hints")


def joint_task(tasks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One task of the problems of several, or the one that all are; None where there is none.

    Args:
        tasks: As `Task.config` gives them.
    """
    if all(task == tasks[0] for task in tasks):
        return tasks[0]
    try:
        built = [build_task(task) for task in tasks]
        parts = [p for t in built for p in (t.parts if isinstance(t, Arithmetic) else [t])]
        first = parts[0].config()["init_args"]
        found: dict[str, dict[str, Any] | None] = {}
        for part in parts:
            if not isinstance(part, SyntheticTask):
                return None
            config = part.config()
            given = dict(config["init_args"])
            usual = given.get("vocabulary") == "shared" and not given.get("coupled")
            if not usual or any(given.get(n) != first.get(n) for n in _WRITING):
                return None
            own = {n: value for n, value in given.items() if n not in _COMMON}
            name = config["class_path"].removeprefix("archzoo.tasks.")
            if found.setdefault(name, own) != own:
                return None  # of two sizes, say
        stream = built[0].arguments
        known = _COMMON - {"coupled", "vocabulary"}
        return Arithmetic(tasks=found, **{n: stream[n] for n in known if n in stream}).config()
    except (TypeError, ValueError):
        return None


class Arithmetic(Task):
    """Problems of several synthetic tasks in one stream, each of them as often as the others.

    A batch of sums and differences of up to 3 digits, least significant digit first, holds lines
    such as `2+236=436` and `4-9=-5`, each as its own task trains it. All have the shared
    vocabulary.

    Training example n is a function of (seed, n) alone, and so is the task it comes from. Problems
    are held out by each task's own rule, so that a problem which one of them holds out is held out
    here, too. Validation and test take those of all tasks in turn, and give the exact match of
    each (`validation/exact_match/Addition`, `test/exact_match/Addition`).

    Args:
        tasks: By the name of each task, those of its arguments that differ from the ones below,
            such as `{Addition: {digits: 5}, Multiplication: {}}`.
        digits: Of the longest number, of every task.
        reverse: Write numbers least significant digit first.
        reverse_answer: The same for the answer alone; null: as the operands.
        zero_padded: As for Addition; Sorting pads nothing.
        hints: As for Addition.
        held_out: One problem in this many is held out of training; null: as each task does.
        batch_size: Examples in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: Held-out problems to validate on, of all tasks together.
        test_examples: Held-out problems to test on, of all tasks together.
        ood_digits: Out-of-distribution lengths that every validation runs as well, of all tasks;
            see Addition.
        ood_examples: Problems of each of those lengths, of all tasks together.
        seed: Chooses the training examples.
        zero: Whether a number of one digit may be 0.
        separate_test: As for Addition.
        pack: As for Addition.

    Raises:
        ValueError: an argument is out of range, or a task cannot be one of several.
    """

    metrics = ("token_accuracy", "exact_match")
    added: ClassVar[dict[str, Any]] = {"separate_test": False, "pack": 1}

    def __init__(
        self,
        tasks: dict[str, dict[str, Any] | None],
        digits: int = 3,
        reverse: bool = True,
        reverse_answer: bool | None = None,
        zero_padded: bool = False,
        hints: bool = False,
        held_out: int | None = None,
        batch_size: int = 256,
        steps_per_epoch: int = 1000,
        validation_examples: int = 1000,
        test_examples: int = 5000,
        ood_digits: list[int] | None = None,
        ood_examples: int = 200,
        seed: int = 0,
        zero: bool = True,
        separate_test: bool = True,
        pack: int = 1,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks is empty: name at least one, such as {Addition: {}}")
        self.steps_per_epoch, self.seed = steps_per_epoch, seed
        self.synthetic_tasks = {
            name.rpartition(".")[2]: self._part(name, given or {}) for name, given in tasks.items()
        }
        parts = list(self.synthetic_tasks.values())
        self.parts = parts
        self.tokenizer = parts[0].tokenizer
        self.context_length = max(part.context_length for part in parts)
        self.longest_run = max(part.longest_run for part in parts)
        self.longest_tested = max(part.longest_tested for part in parts)
        signs = dict.fromkeys("".join(part.operators[:-1] for part in parts))
        self.operators = "".join(signs) + "="
        self.extra_validation = (*self.synthetic_tasks, *(ood_digits or ()))
        self._blocks = Blocks(self._training_lines, batch_size)
        self._turns: dict[str, tuple[Integers, Integers]] = {}

    def _part(self, name: str, given: dict[str, Any]) -> SyntheticTask:
        """One of the tasks, written as all are."""
        wrong = sorted(_COMMON & given.keys())
        if wrong:
            raise ValueError(
                f"tasks.{name}: {wrong[0]} is the same for all of them: set it beside tasks"
            )
        full = name if "." in name else f"archzoo.tasks.{name}"
        settings = {key: value for key, value in self.arguments.items() if key != "tasks"}
        count = len(self.arguments["tasks"])
        for key in ("validation_examples", "test_examples", "ood_examples"):
            if settings[key] < count:
                raise ValueError(f"{key} {settings[key]} is not enough for {count} tasks")
            settings[key] = -(-settings[key] // count)
        settings |= {"vocabulary": "shared"} | given
        if settings["held_out"] is None:
            del settings["held_out"]
        known = _parameters(full)
        if known is not None:  # Sorting has no reverse_answer, nor zero_padded
            settings = {k: v for k, v in settings.items() if k in known or k in given}
        try:
            synthetic = build_task({"class_path": full, "init_args": settings})
        except (TypeError, ValueError) as error:
            raise ValueError(f"tasks.{name}: {error}") from None
        if not isinstance(synthetic, SyntheticTask):
            raise ValueError(f"tasks.{name} is not a task of problems, such as Addition")
        synthetic.ask_separately(self.arguments["separate_test"])  # it may not take it by name
        return synthetic

    def config(self) -> dict[str, Any]:
        written = dict.fromkeys("".join(part.written for part in self.parts))
        return super().config() | {"characters": "".join(written)}

    @property
    def test_part(self) -> str:
        return self.parts[0].test_part

    def split_settings(self) -> dict[str, Any]:
        return self.parts[0].split_settings()

    def take_up_split(self, settings: dict[str, Any]) -> None:
        super().take_up_split(settings)
        self._turns.clear()
        for part in self.parts:
            part.take_up_split(settings)

    # Batches.

    def prepare(self) -> None:
        for part in self.parts:
            part.prepare()

    def rows(self, split: str) -> int:
        if split == "train":
            return self.steps_per_epoch * self.batch_size
        return len(self._in_turn(split)[0])

    def training_batch(self, number: int, rows: Integers) -> Batch:
        batch = batch_of(self._blocks(number, rows), number * self.batch_size + rows)
        problems = self.arguments["pack"]
        return batch if problems == 1 else pack_rows(batch, problems, self.parts[0].pad)

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        numbers = number * self.batch_size + rows
        owners, turns = self._in_turn(split)
        return batch_of(self._lines(split, owners[numbers], turns[numbers]), numbers)

    def extra_evaluations(self, split: str) -> tuple[int | str, ...]:
        return self.extra_validation if split == "validation" else tuple(self.synthetic_tasks)

    def extra_validation_loader(self, length: Any) -> Loader:
        return self.extra_evaluation_loader("validation", length)

    def extra_evaluation_loader(self, split: str, name: Any) -> Loader:
        if name not in self.synthetic_tasks:
            return self._longer_loader(name)
        owner = list(self.synthetic_tasks).index(name)
        rows = self.parts[owner].rows(split)
        owners, turns = np.full(rows, owner), np.arange(rows)

        def make(number: int, rows: Integers) -> Batch:
            numbers = number * self.batch_size + rows
            return batch_of(self._lines(split, owners[numbers], turns[numbers]), numbers)

        return Loader(make, self.batch_size, rows, self, training=False)

    def _longer_loader(self, length: int) -> Loader:
        """Held-out problems of a length that was not trained, of one task after the other."""
        found = [
            part.cell(length, length, part.arguments["ood_examples"], "validation")
            for part in self.parts
        ]
        counts = [problems.examples for problems in found]
        if not all(counts):
            raise ValueError(
                f"ood_digits {length}: one of the tasks holds out none of its few problems of that "
                "size for validation; take a smaller held_out, or another length"
            )
        alone = [part.lines(some) for part, some in zip(self.parts, found, strict=True)]
        width = max(int(lines.lengths.max()) for lines in alone) - 1
        whole = [part.lines(some, width) for part, some in zip(self.parts, found, strict=True)]
        joined = Lines(
            np.concatenate([lines.tokens for lines in whole]),
            np.concatenate([lines.lengths for lines in whole]),
            np.concatenate([lines.labelled for lines in whole]),
            None,
        )

        def make(number: int, rows: Integers) -> Batch:
            numbers = number * self.batch_size + rows
            return batch_of(joined.take(numbers), numbers)

        return Loader(make, self.batch_size, sum(counts), self, training=False)

    # Inside.

    def _training_lines(self, numbers: Integers) -> Lines:
        bits = random_bits(self.seed, _PARTS, numbers, 1)
        owners = below(bits, len(self.parts))[0].astype(np.int64)
        return self._lines("train", owners, numbers)

    def _lines(self, split: str, owners: Integers, numbers: Integers) -> Lines:
        """Lines of the given example numbers, each of the task that it belongs to."""
        count, width = len(numbers), self.context_length + 1
        lines = Lines(
            np.zeros((count, width), np.uint8),
            np.zeros(count, np.int64),
            np.zeros((count, width), np.bool_),
            None,
        )
        for owner in np.unique(owners).tolist():
            rows, part = np.flatnonzero(owners == owner), self.parts[owner]
            found = part.lines(part.problems(split, numbers[rows]), self.context_length)
            lines.tokens[rows], lines.lengths[rows] = found.tokens, found.lengths
            lines.labelled[rows] = found.labelled
        return lines

    def _in_turn(self, split: str) -> tuple[Integers, Integers]:
        """Which task each problem of "validation" or "test" is of, and its number there."""
        if split not in self._turns:
            counts = np.array([part.rows(split) for part in self.parts])
            turns, owners = np.nonzero(np.arange(counts.max())[:, None] < counts)
            self._turns[split] = owners, turns
        return self._turns[split]


def _parameters(name: str) -> set[str] | None:
    """The arguments of a task that is known and says all of them, else None."""
    from archzoo.tasks.stream import known_tasks

    task = known_tasks().get(name)
    while task is not None:
        parameters = signature(task).parameters
        if "arguments" not in parameters:
            return set(parameters)
        task = cast("type[Task] | None", task.__base__)  # it passes on what it does not name
    return None
