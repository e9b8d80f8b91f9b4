"""A task of one's own: what it was made with is kept, and makes it again."""

from pathlib import Path

import pytest
import torch

from archzoo.tasks import Addition, Arithmetic, Mixed, Task, Text, draw
from archzoo.tasks.stream import build
from archzoo.tasks.tokenizers import CharacterTokenizer


class Ones(Task):
    """Says nothing of its arguments: they are written down when it is made."""

    metrics = ("token_accuracy",)

    def __init__(self, length: int = 3, batch_size: int = 2, folder: str = ".") -> None:
        super().__init__()
        self.context_length = length
        self.tokenizer = CharacterTokenizer("01")

    def prepare(self):
        pass

    def rows(self, split):
        return 4

    def training_batch(self, number, rows):
        ones = torch.ones(len(rows), self.context_length, dtype=torch.int64)
        return {"tokens": ones, "labels": ones}

    def evaluation_batch(self, split, number, rows):
        return self.training_batch(number, rows)


class Narrow(Addition):
    """Fixes most of what it derives from."""

    def __init__(self, size: int = 2) -> None:
        super().__init__(digits=size, batch_size=4, held_out=3, validation_examples=8)


class Wide(Addition):
    """Hands on what it does not name, and fixes one thing."""

    def __init__(self, twist: int = 1, **arguments) -> None:
        super().__init__(hints=True, **arguments)
        self.twist = twist


class Wider(Wide):
    def __init__(self, turn: int = 0, **arguments) -> None:
        super().__init__(digits=4, **arguments)


def test_a_constructor_repeats_nothing():
    task = Ones(5, folder=Path("here"))
    arguments = {"length": 5, "batch_size": 2, "folder": "here"}
    assert task.arguments == arguments
    assert task.config()["init_args"] == arguments
    assert task.fingerprint() | {"length": 5, "folder": "here"} == task.fingerprint()
    again = build(task.config())
    assert type(again) is Ones and again.config() == task.config()
    assert draw(again).splitlines()[1].split() == ["token", *"11111"]


@pytest.mark.parametrize(
    ("task", "given"),
    [
        (Narrow(), {"size": 2}),
        (Narrow(3), {"size": 3}),
        (Wide(twist=4, digits=5), {"twist": 4, "digits": 5, "zero": True, "vocabulary": "shared"}),
        (Wider(turn=1, seed=7), {"turn": 1, "twist": 1, "seed": 7, "zero": True}),
    ],
)
def test_a_task_that_derives_from_one_of_the_zoo_is_made_again(task, given):
    """What it fixes is its own affair; the rest is written down, so that a default may change."""
    config = task.config()
    arguments = config["init_args"]
    assert arguments == arguments | given
    assert not {"hints", "spans", "self", "arguments"} & arguments.keys()
    assert ("digits" in arguments) == (type(task) is Wide)
    again = build(config)
    assert type(again) is type(task) and again.config() == config
    assert (again.held_out, again.hints, again.digits) == (task.held_out, task.hints, task.digits)
    batch, other = task.train_dataloader().batch(3), again.train_dataloader().batch(3)
    assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_what_it_derives_from_reads_what_that_was_made_with():
    task = Narrow(3)
    assert task.arguments["held_out"] == task.held_out == 3
    assert task.arguments["digits"] == 3 and task.batch_size == 4


def test_configurations_of_the_zoo_say_all_they_did(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 50)
    text = Text(tmp_path / "text.txt", context_length=8).config()["init_args"]
    assert list(text) == [
        *("path", "tokenizer", "vocab_size", "context_length", "batch_size", "carry_state"),
        *("validation_fraction", "cache_dir", "seed", "test_fraction", "split"),
        *("field", "separate_documents"),
    ]
    assert text["path"] == str(tmp_path / "text.txt")
    mixed = Mixed(path=str(tmp_path / "text.txt"), lines=1).config()["init_args"]
    assert "carry_state" not in mixed
    assert mixed.keys() - text == {"problems", "problem_arguments", "lines"}
    several = Arithmetic(tasks={"Addition": {"digits": 2}}).config()["init_args"]
    assert several["tasks"] == {"Addition": {"digits": 2}} and len(several) == 17
    assert len(Addition().config()["init_args"]) == 19


def test_a_task_needs_a_batch_size():
    class Sizeless(Ones):
        def __init__(self) -> None:
            Task.__init__(self)

    with pytest.raises(ValueError, match="Sizeless has no batch_size: let its constructor take"):
        Sizeless()

    class Fixed(Ones):
        def __init__(self) -> None:
            Task.__init__(self, batch_size=3)

    assert Fixed().batch_size == 3 and Fixed().config()["init_args"] == {}


def test_a_wrong_argument_is_answered_as_of_any_class():
    with pytest.raises(TypeError, match="lenght"):
        Ones(lenght=3)
    with pytest.raises(ValueError, match="no argument 'lenght'; nearest: length"):
        build({"class_path": f"{__name__}.Ones", "init_args": {"lenght": 3}})


def test_what_no_checkpoint_could_hold_is_said():
    with pytest.raises(ValueError, match=r"Ones: length=<object .*> is not plain data"):
        Ones(length=object()).config()
