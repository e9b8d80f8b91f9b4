"""Three parts of every task's data: training, validation and test never share an example."""

import itertools
import warnings
from pathlib import Path

import lightning
import numpy as np
import pytest

from archzoo import tasks
from archzoo.tasks import Addition, BitwiseOr, Subtraction, Task, Text, build
from archzoo.tasks.stream import IGNORED

# Arguments with which a task is small. A task that is new is tried with its defaults.
FEW = {"validation_examples": 200, "test_examples": 200, "batch_size": 16}
SMALL = {
    **dict.fromkeys(("FuzzyRecall", "Induction", "NoisyRecall", "StateTracking"), FEW),
    "Arithmetic": {"tasks": {"Addition": {}, "Subtraction": {}, "Sorting": {"numbers": 2}}},
    "BitwiseOr": {"digits": 12},
    "Mixed": {"context_length": 32, "lines": 1, "problem_arguments": {"digits": 2}},
    "Recall": {"vocabulary": 64, "sizes": [[4, 32]], "test_examples": 200},
    "Text": {"context_length": 32},
}
PARTS = ("train", "validation", "test")


def names():
    """Of all tasks but one: what is to be learnt by heart is asked as it was trained on."""
    found = {name: getattr(tasks, name) for name in tasks.__all__}
    return [
        name
        for name, task in found.items()
        if isinstance(task, type)
        and issubclass(task, Task)
        and task.metrics
        and name != "KeyValues"
    ]


@pytest.fixture
def make(tmp_path):
    """Makes a task of the zoo, texts of lines that are all different."""

    def made(name, **arguments):
        arguments = SMALL.get(name, {}) | arguments
        if issubclass(getattr(tasks, name), Text):
            path = tmp_path / "text.txt"
            path.write_text("".join(f"{n:05} of {n * 7919 % 10007}\n" for n in range(3000)))
            arguments = {"path": str(path), "cache_dir": str(tmp_path / "cache")} | arguments
        return getattr(tasks, name)(**{"batch_size": 64} | arguments)

    return made


def rows_of(loaders, batches=None):
    """The labelled rows of some loaders, each as what identifies it."""
    found = set()
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        for batch in itertools.islice(loader, batches):
            for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
                if (labels != IGNORED).any():
                    found.add((*tokens.tolist(), None, *labels.tolist()))
    return found


@pytest.mark.parametrize("name", names())
def test_no_row_is_in_two_parts(make, name):
    one = make(name)
    longer = {} if "ood_digits" not in one.arguments else {"ood_digits": [6, 13]}
    seen = {part: set() for part in PARTS}
    for seed in (0, 1):
        task = make(name, seed=seed, **longer) if "seed" in one.arguments else one
        assert task.test_part == "test"
        seen["train"] |= rows_of(task.train_dataloader(), 60)
        seen["validation"] |= rows_of(task.val_dataloader())
        seen["test"] |= rows_of(task.test_dataloader())
    assert all(seen.values())
    for first, second in itertools.combinations(PARTS, 2):
        assert not seen[first] & seen[second], (first, second)
    predicted = rows_of(task.predict_dataloader())
    assert predicted <= seen["test"]


def test_all_tasks_of_the_zoo_are_among_them():
    assert {"Addition", "Sorting", "Arithmetic", "Mixed", "Text", "BitwiseOr"} <= set(names())


# ---------------------------------------------------------------------------- problems


def identities(task, problems):
    """Problems as what makes them the same: hashes, which do not know of writing or seeds."""
    return set(task.hashes(problems).tolist())


@pytest.mark.parametrize("held_out", [2, 3, 20, 64])
@pytest.mark.parametrize(
    "name", ["Addition", "Subtraction", "Multiplication", "BitwiseOr", "Sorting"]
)
def test_problems_of_every_kind_belong_to_one_part(make, name, held_out):
    """Whatever asks them: splits, lengths that were not trained, cells of the grid, chains."""
    sizes = {"numbers": 3, "digits": 3} if name == "Sorting" else {"digits": 12}
    few = {"validation_examples": 400, "test_examples": 400, "ood_digits": [7, 13]}
    task = make(name, held_out=held_out, vocabulary="own", **sizes, **few)
    shared = make(name, held_out=held_out, seed=5, hints=True, **sizes, **few)
    found = {part: set() for part in PARTS}
    for one in (task, shared):
        found["train"] |= identities(one, one.problems("train", np.arange(4000)))
        for part in PARTS[1:]:
            asked = [one.problems(part, np.arange(one.rows(part)))]
            asked += [one.cell(n, n, 50, part) for n in (2, 7, 13)]
            if part == "test" and one.carries:
                asked += [one.chained(12, chain, 20) for chain in (0, 4, 12)]
            for problems in asked:
                if name == "BitwiseOr" and not problems.examples:
                    continue  # there are few of a size
                found[part] |= identities(one, problems)
                assert one.belongs_to(problems, part).all()
                assert not any(
                    one.belongs_to(problems, other).any() for other in PARTS if other != part
                )
    for first, second in itertools.combinations(PARTS, 2):
        assert not found[first] & found[second]


def test_two_halves_are_halves_and_training_is_as_it_was():
    task, before = Addition(digits=5), Addition(digits=5, separate_test=False)
    rows = np.arange(20_000)
    train, old = task.problems("train", rows), before.problems("train", rows)
    assert all((new == one).all() for new, one in zip(train, old, strict=True))
    held_out = before.problems("test", np.arange(5000))
    assert task.is_for_test(held_out).mean() == pytest.approx(0.5, abs=0.03)
    # Another rule for what is held out does not move a problem from test to validation.
    other = Addition(digits=5, held_out=7)
    assert (other.is_for_test(held_out) == task.is_for_test(held_out)).all()


def test_without_a_part_of_its_own_test_asks_what_it_asked_before():
    """As checkpoints do that were made before there was a choice; the pairs are theirs."""
    config = {"class_path": "Addition", "init_args": {"digits": 3}}
    task = build(config)
    assert not task.separate_test and task.test_part == "validation"
    assert task.pairs("validation", 4) == [(9, 1), (5, 79), (5, 932), (78, 2)]
    assert task.is_held_out(task.cell(9, 9, 50)).all()
    halves = task.is_for_test(task.cell(9, 9, 50))
    assert halves.any() and not halves.all()
    assert "separate_test False" in task.shared_test()
    assert build(task.config()).test_part == "validation"
    assert build(Addition().config()).test_part == "test"


@pytest.mark.parametrize("given", [{}, {"zero": False}, {"held_out": 5}, {"held_out": 10}])
@pytest.mark.parametrize("task", [Addition, Subtraction, tasks.Multiplication])
def test_problems_of_one_digit_have_both_parts(task, given):
    small = task(digits=1, **given)
    small.prepare()
    assert small.rows("validation") and small.rows("test")


def test_where_one_part_would_be_empty_it_is_said_before_training():
    with pytest.raises(
        ValueError, match="held out for test: take a smaller held_out than 4"
    ) as error:
        BitwiseOr(digits=2).prepare()
    assert "or separate_test: false" in str(error.value)
    shared = BitwiseOr(digits=2, separate_test=False)
    shared.prepare()
    assert shared.rows("test") == shared.rows("validation") == 2


class Louder(Addition):
    """Says itself what is held out, and hands nothing on."""

    def __init__(self, size=3):
        super().__init__(digits=size, batch_size=4, held_out=4)

    def is_held_out(self, problems):
        return super().is_held_out(problems) & (problems.operands[0, 0] > 2)


def test_a_task_of_ones_own_has_the_parts_without_a_line_of_code():
    task = Louder()
    found = {part: set(task.pairs(part, 500)) for part in PARTS}
    for first, second in itertools.combinations(PARTS, 2):
        assert not found[first] & found[second]
    assert build(task.config()).test_part == "test"  # it names no separate_test
    assert task.split_settings() == {"separate_test": True}


# ---------------------------------------------------------------------------- ranks, resuming


def test_ranks_share_a_part_and_show_nothing_else(make):
    for name in ("Addition", "Text"):
        task = make(name, batch_size=6)
        loaders = {part: task.evaluation_loader(part) for part in PARTS[1:]}
        for part, loader in loaders.items():
            whole = rows_of(loader)
            parts = set()
            for rank in range(4):
                for number in range(len(loader)):
                    batch = loader.batch(number, rank, 4)
                    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
                        if (labels != IGNORED).any():
                            parts.add((*tokens.tolist(), None, *labels.tolist()))
            assert parts == whole, part


def state_of(task, **changes):
    state = {"batches": 0, "examples": 0, "batch_size": task.batch_size}
    state |= {"fingerprint": task.fingerprint(), "split": task.split_settings()}
    return state | changes


def heard(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


def test_a_run_keeps_the_parts_it_began_with(make):
    """Else the validation of a resumed run would ask what it was trained on."""
    began = make("Text", validation_fraction=0.1, test_fraction=0.2)
    began.prepare()
    task = make("Text", validation_fraction=0.4)
    task.prepare()
    before = rows_of(task.val_dataloader())
    (said,) = heard(lambda: task.load_state_dict(state_of(began)))
    assert (
        said == "the run keeps the parts it began with: validation_fraction 0.1, test_fraction 0.2"
    )
    assert task.config()["init_args"] == began.config()["init_args"]
    after = rows_of(task.val_dataloader())
    assert after == rows_of(began.val_dataloader()) != before
    assert not after & rows_of(began.train_dataloader())
    assert heard(lambda: task.load_state_dict(state_of(began))) == []


def test_a_run_from_before_goes_on_as_it_was_and_says_what_test_reads(make):
    old = make("Text", validation_fraction=0.1, test_fraction=0.0, split="place")
    old.prepare()
    fingerprint = {
        n: v for n, v in old.fingerprint().items() if n not in ("test_fraction", "split")
    }
    state = state_of(old, fingerprint=fingerprint)
    del state["split"]
    task = make("Text")
    task.prepare()
    said = heard(lambda: task.load_state_dict(state))
    assert said[0].startswith("the run keeps the parts it began with: validation_fraction 0.1, ")
    assert said[1] == (
        "test reads the validation part, which also chose the checkpoint: there is no test part of "
        "its own (validation_fraction 0.1, test_fraction 0.0, split place)"
    )
    assert len(said) == 2
    assert rows_of(task.test_dataloader()) == rows_of(old.val_dataloader())
    assert not rows_of(task.test_dataloader()) & rows_of(old.train_dataloader())

    for made in (Addition, Louder):
        task = made()
        state = state_of(task)
        del state["split"]
        said = heard(lambda task=task, state=state: task.load_state_dict(state))
        assert said[0] == "the run keeps the parts it began with: separate_test False"
        assert "test reads the validation part" in said[1] and task.test_part == "validation"


def test_an_evaluation_with_other_parts_than_the_run_says_so(make):
    began = make("Text", validation_fraction=0.1, test_fraction=0.0)
    began.prepare()
    task = make("Text", test_fraction=0.3)
    task.trainer = lightning.Trainer(logger=False, barebones=True, accelerator="cpu")
    task.trainer.state.fn = "test"
    task.prepare()
    (said,) = heard(lambda: task.load_state_dict(state_of(began)))
    assert "test_fraction is 0.3 and was 0.0" in said and "may have been trained on" in said
    assert task.arguments["test_fraction"] == 0.3  # it is what was asked for
    other = make("Text")
    path = Path(other.arguments["path"])
    path.write_text(path.read_text().replace("of", "by"))
    other.trainer = task.trainer
    other.prepare()
    assert heard(lambda: other.load_state_dict(state_of(began))) == []  # another text altogether
