"""Data as a function of (seed, number): what every task is built on.

Nothing here is drawn from a generator that moves on. Example n of a stream is computed from the
seed and from n alone, so that batch size, number of ranks and the point where a run was resumed
cannot change it. What must be remembered of a training run is one integer: how many batches it
has used.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, ClassVar

import lightning
import numpy as np
import torch
from torch import Tensor

from archzoo.inputs import IGNORED as IGNORED
from archzoo.public import names_of
from archzoo.tasks.counter_random import Integers
from archzoo.tasks.tokenizers import Tokenizer
from archzoo.trust import (
    check_arguments,
    check_path,
    find_class,
    load_installed,
    name_of,
    shown,
    strings,
)

Batch = dict[str, Tensor]

AHEAD = 2  # batches that wait for a GPU

# ---------------------------------------------------------------------------- loaders


class Loader:
    """Batches by number, cut into rows for the ranks of a distributed run.

    A pass gives the batches 0, 1, ... of an evaluation, or the next `len(loader)` batches of
    training, whose numbers run on from pass to pass.

    A training pass begins where the running `lightning.Trainer` says, whose checkpoints hold the
    number of completed batches. So a resumed run continues with the batch after the last one that
    it was trained on: in the middle of an epoch, of gradient accumulation, or of a batch.
    Outside a trainer, `state_dict` and `load_state_dict` keep the position.

    Lightning does not touch a loader of this kind: there is no sampler to replace, and because the
    length is known it prefetches nothing. Batches that were prepared ahead for a GPU are prepared
    again after a resume.

    Args:
        make: (batch number, rows) -> batch, a pure function; rows is (rows,) int64.
        batch_size: Rows of a batch, all ranks together.
        rows: Rows of one pass. Training stops at whole batches, an evaluation's last batch may be
            smaller.
        task: The task whose trainer knows the ranks and the progress.
        training: Whether the numbers run on from pass to pass.
    """

    def __init__(
        self,
        make: Callable[[int, Integers], Batch],
        batch_size: int,
        rows: int,
        task: Task,
        *,
        training: bool,
    ) -> None:
        self.make = make
        self.batch_size = batch_size
        self.rows = rows
        self.task = task
        self.training = training
        self.batches = 0

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: this runs at the first batch, when Lightning has restored its progress.
        trainer = self.task.trainer
        rank, ranks = _rank(trainer)
        if self.training and self.batch_size % ranks:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {ranks} ranks: it counts the "
                f"rows of all ranks together, so take a multiple of {ranks}"
            )
        if not self.training:
            self.batches = 0
        elif trainer is not None and trainer.training:
            self.batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        numbers: Iterable[int] = range(self.batches, self.batches + len(self))
        if self.training and getattr(trainer, "overfit_batches", False):
            assert trainer is not None
            numbers = [number % int(trainer.num_training_batches) for number in numbers]
        for batch in self._made(numbers, rank, ranks):
            self.batches += 1
            yield batch

    def _made(self, numbers: Iterable[int], rank: int, ranks: int) -> Iterator[Batch]:
        """Batches by number; for a GPU a thread makes the next ones while it works on this one."""
        if not _on_gpu(self.task.trainer):
            yield from (self.batch(number, rank, ranks) for number in numbers)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Future[Batch]] = deque()
            for number in numbers:
                waiting.append(pool.submit(self.batch, number, rank, ranks))
                if len(waiting) > AHEAD:
                    yield _pinned(waiting.popleft().result())
            while waiting:
                yield _pinned(waiting.popleft().result())

    def batch(self, number: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The rows of one rank in batch `number`.

        Every rank gets the same number of rows. Where an evaluation's last batch does not divide
        evenly, rows without any label fill the gap.

        Args:
            number: Of the batch, from 0.
            rank: Of the process.
            ranks: How many processes share the batch.
        """
        rows = self.batch_size
        if not self.training:
            rows = min(rows, self.rows - number * self.batch_size)
        rows_per_rank = -(-rows // ranks)
        mine = np.arange(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        mine_here = np.minimum(mine, rows - 1)
        if self.training:
            number, first = self.task.start_of(number)
            mine_here = mine_here + first
        batch = self.make(number, mine_here)
        if mine[-1] >= rows:
            batch["labels"][torch.from_numpy(mine >= rows)] = IGNORED
        return batch

    def state_dict(self) -> dict[str, int]:
        """How many batches training has used."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the batches that `state` counts."""
        self.batches = state["batches"]


def _rank(trainer: lightning.Trainer | None) -> tuple[int, int]:
    sampler = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (sampler["rank"], sampler["num_replicas"]) if sampler else (0, 1)


def _on_gpu(trainer: lightning.Trainer | None) -> bool:
    strategy = getattr(trainer, "strategy", None)
    return strategy is not None and strategy.root_device.type == "cuda"


def _pinned(batch: Batch) -> Batch:
    """In pinned memory, from which a GPU copies asynchronously."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


# ---------------------------------------------------------------------------- tasks

# Arguments that do not decide which examples training sees, or not by their names.
_NO_EXAMPLES = {
    *("batch_size", "steps_per_epoch", "validation_examples", "test_examples", "separate_test"),
    *("ood_digits", "ood_examples", "path", "field", "cache_dir", "tokenizer", "vocab_size"),
    "test_sizes",
}


def _noted(value: Any) -> Any:
    """An argument as plain data, where its kind is known; a checkpoint holds its tokenizer."""
    if isinstance(value, Tokenizer):
        return "given"
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _noting_arguments(construct: Callable[..., None]) -> Callable[..., None]:
    """A task's constructor that writes down what it is given, before it runs.

    Of the class that is made, that is what `Task.config` says: all that its constructor takes, the
    defaults of the class it derives from among them where it hands ``**arguments`` on to that one.
    """
    takes = signature(construct)
    left_out = {n for n, p in takes.parameters.items() if p.kind is p.POSITIONAL_ONLY} | {"self"}
    others = [n for n, p in takes.parameters.items() if p.kind is Parameter.VAR_KEYWORD]

    @functools.wraps(construct)
    def noting(self: Task, *given: Any, **named: Any) -> None:
        called = takes.bind(self, *given, **named)
        passed = {*called.arguments, *named}
        called.apply_defaults()
        values = dict(called.arguments)
        for name in others:
            values |= values.pop(name)
        values = {n: _noted(value) for n, value in values.items() if n not in left_out}
        if not hasattr(self, "_config"):
            self._config, self._hands_on = values, bool(others)
        elif self._hands_on:  # what it left to this class's defaults; what it fixed is its own
            self._config |= {name: values[name] for name in values.keys() - passed}
            self._hands_on = bool(others)
        self.arguments = getattr(self, "arguments", {}) | values
        construct(self, *given, **named)

    return noting


class Task(lightning.LightningDataModule):
    """A data set with its tokenizer and the metrics that fit it.

    What the constructor of a class of your own takes is written down when it is called, for
    checkpoints: it should be plain data.

    A batch is a dict of tensors, all (batch, time) unless said otherwise:

    - `tokens`: int64.
    - `labels`: int64, already shifted: `labels[:, t]` is what the logits at t should say, -100
      where the position is unlabelled.
    - `documents`: int64, which document a token belongs to; -1 is padding, at the ends of a row.
      Absent: a row is one document.
    - `examples`: int64, the number of the example that the token belongs to.
    - `positions`: int64, only where the task couples positions: digits of equal significance have
      the same one, from 2 for units; operators have 1, all others 0.
    - `bytes`: int64, only in evaluations of text: how many bytes of UTF-8 each label stands for.
    - `continues`: bool (batch,), only where state is carried: this row continues where the same
      row of the previous batch ended.

    `batch_size` counts the rows of all ranks together, so one configuration trains on the same
    batches whatever the number of devices.

    Attributes:
        metrics: Which of "perplexity", "bits_per_byte", "token_accuracy", "exact_match" say
            something here.
        extra_metrics: Which of "token_accuracy", "exact_match" are reported of each further set.
        tokenizer: Set once `prepare` has run.
        context_length: Tokens of the longest row.
        extra_validation: Further sets that every validation runs, each with a loader
            (`extra_validation_loader`) and an exact match of its own: out-of-distribution
            lengths, which no training example has, or names.
        arguments: What the task was made with, plain data; of the classes that it derives from,
            what those were made with.
        other_vocabulary: What to do where weights were trained with another vocabulary.
        added: Arguments that came later, and what each is for a checkpoint that does not name it.
    """

    metrics: tuple[str, ...] = ()
    extra_metrics: tuple[str, ...] = ("exact_match",)
    tokenizer: Tokenizer
    context_length: int
    extra_validation: tuple[int | str, ...] = ()
    other_vocabulary = "give the task their tokenizer, which lies beside them"
    added: ClassVar[dict[str, Any]] = {}

    arguments: dict[str, Any]
    _config: dict[str, Any]  # of them, what rebuilds the task
    _hands_on: bool  # whether the constructor that was noted last hands **arguments on

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in vars(cls):
            cls.__init__ = _noting_arguments(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = getattr(self, "arguments", {}) | arguments
        if not hasattr(self, "_config"):  # of a class without a constructor of its own
            self._config = arguments
        if "batch_size" not in self.arguments:
            raise ValueError(
                f"{type(self).__name__} has no batch_size: let its constructor take one, or give "
                "super().__init__(batch_size=...) a number"
            )
        if self.arguments["batch_size"] < 1:
            raise ValueError(f"batch_size {self.arguments['batch_size']} is not positive")
        self.batch_size: int = self.arguments["batch_size"]
        # How many batches, and examples in them, had been used when a run took this batch size up.
        self._used = (0, 0)

    # What a task writes.

    def prepare(self) -> None:
        """Makes the tokenizer and what batches are read from; does nothing when called again."""
        raise NotImplementedError

    def training_batch(self, number: int, rows: Integers) -> Batch:
        """The given rows of training batch `number`, a pure function of both."""
        raise NotImplementedError

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        """The given rows of batch `number` of the split "validation" or "test".

        Args:
            split: "validation" or "test".
            number: Of the batch, from 0.
            rows: Which of its rows.
        """
        raise NotImplementedError

    def rows(self, split: str) -> int:
        """Rows of one pass over the split "train", "validation" or "test"."""
        raise NotImplementedError

    def extra_validation_loader(self, length: Any) -> Loader:
        """One pass over the held-out problems of one entry of `extra_validation`."""
        raise NotImplementedError

    def extra_evaluations(self, split: str) -> tuple[int | str, ...]:
        """Further sets that "validation" or "test" runs, each with an exact match of its own."""
        return self.extra_validation if split == "validation" else ()

    def extra_evaluation_loader(self, split: str, name: Any) -> Loader:
        """One pass over the held-out problems of one entry of `extra_evaluations`."""
        return self.extra_validation_loader(name)

    def batch_rows(self, split: str) -> int:
        """Rows of a whole batch."""
        return self.batch_size

    # The parts. Nothing that training shows is validated or tested on, and nothing that
    # validation reads, by which checkpoints and settings are chosen, is tested on.

    @property
    def test_part(self) -> str:
        """What "test" reads: "test", or "validation" where it has no part of its own."""
        return "test"

    def is_right(self, wanted: Sequence[int], written: Sequence[int]) -> bool:
        """Whether an answer is right; here: the very tokens that are wanted.

        Args:
            wanted: The right answer's tokens, without the stop token.
            written: Those of the answer.
        """
        return list(written) == list(wanted)

    def split_settings(self) -> dict[str, Any]:
        """The arguments that say which data each part holds; a run keeps those it began with."""
        return {}

    def take_up_split(self, settings: dict[str, Any]) -> None:
        """Part the data as a run did that is resumed: by its `split_settings`."""
        for arguments in (self.arguments, self._config):
            arguments |= {n: value for n, value in settings.items() if n in arguments}

    # What every task has.

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        self.prepare()
        return self.tokenizer.vocab_size

    @property
    def stop_token(self) -> int | None:
        """The token that ends an answer, None where text has no end."""
        self.prepare()
        return self.tokenizer.stop_token

    def config(self) -> dict[str, Any]:
        """The class and its arguments, plain data from which `build_task` makes the task again.

        Raises:
            ValueError: An argument is something else.
        """
        for name, value in self._config.items():
            if not _is_plain(value):
                raise ValueError(
                    f"{type(self).__name__}: {name}={shown(value)} is not plain data, so no "
                    "checkpoint could hold it: take numbers, texts, lists and mappings of them"
                )
        return {"class_path": _name(type(self)), "init_args": dict(self._config)}

    def fingerprint(self) -> dict[str, Any]:
        """What decides which examples training sees and in which order, plain data by name.

        A run that resumes with the same entries continues the same stream. The batch size, the
        number of validation examples and where files lie are not part of it.
        """
        self.prepare()
        given = {name: self._config[name] for name in self._config.keys() - _NO_EXAMPLES}
        tokenizer = getattr(self, "tokenizer", None)
        return given | ({"tokenizer": tokenizer.fingerprint()} if tokenizer else {})

    # Resuming.

    def start_of(self, number: int) -> tuple[int, int]:
        """The training batch and the row of it where batch `number` of a run begins.

        They are `number` and 0, unless the run began with another batch size: it continues with
        the first example that it has not used.
        """
        batches, examples = self._used
        if number < batches:  # as batches that a run overfits are, which are always the same
            return number, 0
        return divmod(examples + (number - batches) * self.batch_size, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """How much of the stream a run has used, and which stream that is; for its checkpoints."""
        batches, examples = self._used
        if self.trainer is not None:
            # A checkpoint is written when a batch is done, which Lightning counts a little later.
            done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            batches, examples = done, examples + (done - batches) * self.batch_size
        return {
            "batches": batches,
            "examples": examples,
            "batch_size": self.batch_size,
            "fingerprint": self.fingerprint(),
            "split": self.split_settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after what was used, and warns where the stream is a different one."""
        fitting = self.trainer is None or self.trainer.state.fn == "fit"
        self._keep_split(state_dict, fitting)
        if not fitting:
            return
        self._used = state_dict["batches"], state_dict["examples"]
        ours, theirs = self.fingerprint(), state_dict.get("fingerprint", {})
        differ = [
            f"the {name} is another one"
            if name in ("text", "tokenizer")
            else f"{name} is {ours[name]!r} and was {theirs[name]!r}"
            for name in sorted(ours.keys() & theirs.keys())
            if ours[name] != theirs[name]
        ]
        if differ:
            warnings.warn(
                "the run continues with other examples than it began with: " + "; ".join(differ),
                stacklevel=2,
            )

    def _keep_split(self, state_dict: dict[str, Any], fitting: bool) -> None:
        """A run keeps the parts it began with: else it would validate on what it was shown.

        Says where an evaluation has other parts than the run, and where test has none of its own.
        """
        ours, known = self.split_settings(), state_dict.get("fingerprint", {})
        if not ours:
            return
        theirs = state_dict.get("split")
        if theirs is None:  # it is older than all that `added` names
            theirs = {n: (self.added | known).get(n, ours[n]) for n in ours}
        differ = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
        same_data = self.fingerprint().get("text") == known.get("text")
        if differ and fitting:
            self.take_up_split(ours | theirs)
            kept = ", ".join(f"{name} {theirs[name]}" for name in differ)
            warnings.warn(f"the run keeps the parts it began with: {kept}", stacklevel=3)
        elif differ and same_data:
            changes = ", ".join(f"{name} is {ours[name]} and was {theirs[name]}" for name in differ)
            warnings.warn(
                f"validation and test read other parts than in the run ({changes}): some of them "
                "may have been trained on, or have chosen the checkpoint",
                stacklevel=3,
            )
        if self.test_part != "test":
            warnings.warn(self.shared_test(), stacklevel=3)

    def shared_test(self) -> str:
        """What to say of a measurement where test has no part of its own."""
        settings = ", ".join(f"{name} {value}" for name, value in self.split_settings().items())
        return (
            f"test reads the {self.test_part} part, which also chose the checkpoint: there is no "
            f"test part of its own ({settings})"
        )

    def prepare_data(self) -> None:  # Lightning: on one process of each machine
        self.prepare()

    def setup(self, stage: str | None = None) -> None:  # Lightning: on every process
        self.prepare()
        trainer = self.trainer if stage == "fit" else None
        # What an earlier run had used, which was resumed, this one has not. A run that is resumed
        # says so after this, and one that continues has used some already.
        if trainer is not None and not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            self._used = (0, 0)
        # Now the vocabulary is known: a model that is made for it is made before callbacks look.
        model = getattr(self.trainer, "lightning_module", None)
        if model is not None and hasattr(model, "set_up_with_task"):
            model.set_up_with_task(stage)

    def train_dataloader(self) -> Loader:
        self.prepare()
        return Loader(self.training_batch, self.batch_size, self.rows("train"), self, training=True)

    def val_dataloader(self) -> Loader | list[Loader]:
        return self._loaders("validation")

    def test_dataloader(self) -> Loader | list[Loader]:
        return self._loaders("test")

    def _loaders(self, split: str) -> Loader | list[Loader]:
        loader = self.evaluation_loader(split)
        extra = [
            self.extra_evaluation_loader(split, name) for name in self.extra_evaluations(split)
        ]
        return [loader, *extra] if extra else loader

    def predict_dataloader(self) -> Loader:
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: str) -> Loader:
        """One pass over "validation" or "test"."""
        self.prepare()

        def make(number: int, rows: Integers) -> Batch:
            return self.evaluation_batch(split, number, rows)

        return Loader(make, self.batch_rows(split), self.rows(split), self, training=False)


def import_all() -> None:
    """Import every task of archzoo, so that their names alone are enough to find them."""
    for module in dict.fromkeys(names_of("archzoo.tasks").values()):
        import_module(module)


def build_task(config: dict[str, Any], **given: Any) -> Task:
    """Rebuilds a task from its `Task.config`, which may come from a stranger's checkpoint.

    Only classes of archzoo and classes that are already imported are made, for importing what a
    configuration names would run the stranger's code. What the task reads lies under the current
    directory, where the configuration says so, and `cache_dir` is not taken from it.

    Args:
        config: The class and its arguments.
        **given: Arguments that replace the configuration's, whatever they are.

    Raises:
        ValueError: `class_path` names no task that is known, or `init_args` do not suit it.
    """
    task, arguments = named(config)
    return task(**readable(task, arguments, given) | given)


build = build_task  # its name in 0.1


def named(config: Any) -> tuple[type[Task], dict[str, Any]]:
    """The class that a `Task.config` names, and its arguments, whose names and types are checked.

    Raises:
        ValueError: As `build_task`.
    """
    if not isinstance(config, dict) or not isinstance(config.get("class_path"), str):
        raise ValueError(f"task {config!r} must hold class_path, a name, and init_args, a mapping")
    name, arguments = config["class_path"], config.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"task {name}: its init_args are {arguments!r}, not a mapping")
    known = known_tasks()
    load_installed()
    task = known.get(name) or known.get(f"archzoo.tasks.{name}")
    if task is None:
        try:
            task = find_class(name, Task)
        except ValueError as error:
            raise ValueError(f"unknown task: {error}") from None
    check_arguments(task, arguments, f"task {name}")
    takes = signature(task).parameters  # a constructor of one's own may not take what came later
    return task, {n: value for n, value in task.added.items() if n in takes} | arguments


def readable(
    task: type[Task], arguments: dict[str, Any], given: Iterable[str] = ()
) -> dict[str, Any]:
    """A checkpoint's arguments of a task, which lead to nothing outside the current directory.

    Args:
        task: The class.
        arguments: Without `cache_dir`, which is the user's own to choose, they are returned.
        given: Names of arguments that are not checked: the user gives another value.

    Raises:
        ValueError: One leads elsewhere; the message says what allows it.
    """
    given = set(given)
    kept = {name: value for name, value in arguments.items() if name != "cache_dir"}
    default = signature(task).parameters.get("path")
    implied = {} if default is None else {"path": default.default}
    for key_path, text in strings(implied | kept):
        if key_path[0] not in given:
            name = ".".join(key_path)
            try:
                check_path(text, always=key_path[-1] == "path")
            except ValueError as error:
                raise ValueError(
                    f"its task's {name}={error}: if you mean that, give --data.{name} {text}"
                ) from None
    return kept


def known_tasks() -> dict[str, type[Task]]:
    """All tasks that are imported, by the names that configurations give them."""
    import_all()
    return {_name(task): task for task in _tasks(Task)}


def since(config: Any) -> dict[str, Any]:
    """What a configuration that a run wrote means by the arguments that came after it.

    A run writes down every argument, so one that lacks only some of `Task.added` is older than
    those; one that lacks others too was written by hand, and they stay at their defaults.

    Args:
        config: `data` of a configuration file, anything at all.
    """
    if not isinstance(config, dict) or not isinstance(given := config.get("init_args"), dict):
        return {}
    known = known_tasks()
    name = str(config.get("class_path"))
    task = known.get(name) or known.get(f"archzoo.tasks.{name}")
    if task is None:
        return {}
    missing = signature(task).parameters.keys() - given.keys() - {"arguments"}
    return {name: task.added[name] for name in missing} if missing <= task.added.keys() else {}


def _name(task: type[Task]) -> str:
    # Our own go by the name that is imported and configured, not by the file they are in.
    ours = task.__module__.startswith("archzoo.tasks.")
    return f"archzoo.tasks.{task.__qualname__}" if ours else name_of(task)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _tasks(base: type[Task]) -> Iterator[type[Task]]:
    for task in base.__subclasses__():
        yield task
        yield from _tasks(task)


def draw(task: Task, row: int = 0, columns: int = 16) -> str:
    """Draws one row of the first training batch as a table of inputs and labels.

    Args:
        task: Any task.
        row: Which row of the batch.
        columns: Positions to draw at most.

    Returns:
        Three lines; `.` is an unlabelled position.
    """
    batch = task.train_dataloader().batch(0)
    tokens = batch["tokens"][row, :columns].tolist()
    labels = batch["labels"][row, :columns].tolist()
    lines = {
        "position": [str(position) for position in range(len(tokens))],
        "token": [task.tokenizer.show(token) for token in tokens],
        "label": ["." if label == IGNORED else task.tokenizer.show(label) for label in labels],
    }
    width = max(len(cell) for cells in lines.values() for cell in cells) + 1
    return "\n".join(
        f"{name:8}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in lines.items()
    )
