"""Several tasks of problems in one stream."""

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from archzoo.cli import main
from archzoo.tasks import Addition, Arithmetic, Sorting, Subtraction, build
from archzoo.tasks.stream import IGNORED

TASKS = {"Addition": {}, "Subtraction": {"digits": 2}, "Sorting": {"numbers": 2}}
SIGNS = {"Addition": r"[0-9]+\+", "Subtraction": r"[0-9]+-", "Sorting": "[A-Za-z]:"}


def make(batch_size=24, **arguments):
    return Arithmetic(**{"tasks": TASKS, "batch_size": batch_size} | arguments)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def lines(task, batch):
    """Every row as text, the answer included."""
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        row = [*tokens, labels[-1] if labels[-1] != IGNORED else task.tokenizer.pad_token]
        yield task.tokenizer.decode(row[: row.index(task.stop_token)])


def owner(line):
    return next(name for name, sign in SIGNS.items() if re.match(sign, line))


def test_a_row_is_what_its_own_task_trains():
    task = make(600)
    batch = task.train_dataloader().batch(2)
    numbers = 1200 + np.arange(600)
    own = {
        name: part.text(part.problems("train", numbers))
        for name, part in task.synthetic_tasks.items()
    }
    assert isinstance(task.synthetic_tasks["Subtraction"], Subtraction)
    found = list(lines(task, batch))
    assert all(line == own[owner(line)][row] for row, line in enumerate(found))
    counts = np.unique([owner(line) for line in found], return_counts=True)[1]
    assert len(counts) == 3 and counts.min() > 150  # each as often as the others: 200 of 600
    alone = Addition(batch_size=600, steps_per_epoch=1).train_dataloader().batch(2)
    rows = [row for row, line in enumerate(found) if owner(line) == "Addition"]
    width = alone["tokens"].shape[1]
    assert torch.equal(batch["labels"][rows][:, :width], alone["labels"][rows])
    assert (batch["labels"][rows][:, width:] == IGNORED).all()
    assert (batch["documents"] == -1).sum() > 0


def test_an_example_depends_on_seed_and_number_alone():
    whole = make(48).train_dataloader().batch(0)
    for batch_size, ranks in itertools.product((4, 24), (1, 2)):
        loader = make(batch_size).train_dataloader()
        parts = [
            loader.batch(number, rank, ranks)
            for number in range(48 // batch_size)
            for rank in range(ranks)
        ]
        assert same({key: torch.cat([part[key] for part in parts]) for key in whole}, whole)
    assert not torch.equal(make(48, seed=1).train_dataloader().batch(0)["tokens"], whole["tokens"])
    again = build(make(48).config())
    assert again.config() == make(48).config()
    assert same(again.train_dataloader().batch(0), whole)


def test_what_is_held_out_is_never_trained_on():
    task = make(500, validation_examples=300, test_examples=900, held_out=5)
    shown = {
        line.partition("=")[0]
        for number in range(40)
        for line in lines(task, task.training_batch(number, np.arange(500)))
    }
    for split in ("validation", "test"):
        loaders = task.val_dataloader() if split == "validation" else task.test_dataloader()
        assert len(loaders) == 4 and task.extra_evaluations(split) == tuple(TASKS)
        asked = [[line for batch in loader for line in lines(task, batch)] for loader in loaders]
        assert sorted(asked[0]) == sorted(itertools.chain(*asked[1:]))
        for name, own in zip(TASKS, asked[1:], strict=True):
            assert {owner(line) for line in own} == {name}
        problems = {line.partition("=")[0] for line in asked[0] if ":" not in line}
        assert problems and not problems & shown
        # Of every task, from the first batch on.
        assert {owner(line) for line in asked[0][:3]} == set(TASKS)
    sums = Addition(held_out=5)
    for part, other in ((task.synthetic_tasks["Addition"], sums),):
        problems = part.problems("validation", np.arange(part.rows("validation")))
        assert other.is_held_out(problems).all()


def test_longer_problems_of_all_tasks_are_asked():
    task = make(ood_digits=[6], ood_examples=30)
    assert task.extra_validation == ("Addition", "Subtraction", "Sorting", 6)
    asked = [line for batch in task.extra_validation_loader(6) for line in lines(task, batch)]
    assert len(asked) == 30 and {owner(line) for line in asked} == set(TASKS)
    assert max(map(len, re.findall("[0-9]+", "".join(asked[:10])))) >= 6
    assert task.longest_tested == 7 and task.longest_run == 4
    assert task.operators == "+-:,="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"Text": {}}}, "tasks.Text"),
        ({"tasks": {"Adition": {}}}, "tasks.Adition: unknown task"),
        ({"tasks": {"Addition": {"digts": 3}}}, "tasks.Addition: .*digts"),
        ({"tasks": {"Addition": {"digits": 0}}}, "tasks.Addition: min_digits 1 is not between"),
        ({"tasks": {"Addition": {"reverse": False}}}, "reverse is the same for all of them"),
        ({"tasks": {"Addition": {"seed": 3}}}, "seed is the same for all of them"),
        ({"validation_examples": 2}, "validation_examples 2 is not enough for 3 tasks"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(**arguments)
    assert "\n" not in str(caught.value)


def test_a_run_logs_each_task_and_is_asked_as_people_write(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"preset": "abacus_tiny", "dim": 16, "depth": 1},
        "data": {
            "class_path": "Arithmetic",
            "init_args": {
                "tasks": {"Addition": None, "Multiplication": {"digits": 1}, "Sorting": {}},
                "digits": 2,
                "batch_size": 6,
                "validation_examples": 12,
                "test_examples": 15,
                "ood_digits": [3],
                "ood_examples": 6,
            },
        },
        "trainer": {"max_steps": 4, "accelerator": "cpu", "val_check_interval": 2},
    }
    Path("several.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "several.yaml"]) == 0, capsys.readouterr().err
    names = ["Addition", "Multiplication", "Sorting"]
    with open("runs/several/metrics.csv") as file:
        row = [row for row in csv.DictReader(file) if row["validation/loss"]][-1]
    assert all(row[f"validation/exact_match/{name}"] for name in [*names, "3", "ood"])
    assert row["validation/exact_match/ood"] == row["validation/exact_match/3"]
    path = "runs/several/last.ckpt"
    assert main(["test", "--ckpt_path", path]) == 0
    with open("runs/several/test.csv") as file:
        row = next(csv.DictReader(file))
    assert all(row[f"test/exact_match/{name}"] for name in names) and row["test/exact_match"]
    assert main(["fit", "--ckpt_path", path, "--trainer.max_steps", "5"]) == 0
    assert main(["predict", "--ckpt_path", path]) == 0
    assert main(["generate", path, "12+3=", "4x5=", "--max_tokens", "2"]) == 0
    capsys.readouterr()
    grid = ["grid", path, "--digits", "4", "--problems", "2", "--device", "cpu"]
    assert main([*grid, "--task", "Multiplication"]) == 0
    assert Path("runs/several/grid_last_Multiplication.csv").exists()
    assert main([*grid, "--task", "Division"]) == 1
    assert "was trained on Addition, Multiplication, Sorting" in capsys.readouterr().err
    stored = torch.load(path, weights_only=True)
    signs = stored["hyper_parameters"]["embedding"]["init_args"]["operator_tokens"]
    assert signs == Sorting().tokenizer.encode("+x:,=")
