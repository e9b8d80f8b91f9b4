"""Arguments that tasks got later: what a file from before means by them, and resuming with it."""

from inspect import signature

import pytest
import yaml

from archzoo.cli import main
from archzoo.tasks import Addition, Arithmetic
from archzoo.tasks.stream import known_tasks, since

# The arguments of version 0.1.0. One that is not among them is named in `Task.added`, with its
# meaning for a run that has none.
NUMBERS = {
    *("batch_size", "coupled", "digits", "held_out", "hints", "min_digits", "ood_digits"),
    *("ood_examples", "reverse", "reverse_answer", "seed", "steps_per_epoch", "test_examples"),
    *("validation_examples", "zero_padded"),
}
TEXT = {
    *("batch_size", "cache_dir", "context_length", "path", "seed", "tokenizer"),
    *("validation_fraction", "vocab_size"),
}
BEFORE = {
    "Addition": NUMBERS,
    "Subtraction": NUMBERS,
    "Multiplication": NUMBERS,
    "Sorting": (NUMBERS - {"coupled", "min_digits", "reverse_answer", "zero_padded"}) | {"numbers"},
    "Arithmetic": (NUMBERS - {"coupled", "min_digits"}) | {"tasks", "zero"},
    "Text": TEXT | {"carry_state"},
    "Mixed": TEXT | {"lines", "problem_arguments", "problems"},
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_came_later_says_what_it_means_in_an_older_file(name):
    task = known_tasks()[f"archzoo.tasks.{name}"]
    assert signature(task).parameters.keys() - task.added.keys() == BEFORE[name]


@pytest.mark.parametrize("task", [Addition(digits=2), Arithmetic(tasks={"Addition": {}})])
def test_a_file_from_before_means_what_it_did(task):
    config = task.config()
    for lacks, means in (
        ({"pack"}, {"pack": 1}),
        ({"pack", "separate_test"}, {"pack": 1, "separate_test": False}),
        ({"pack", "digits"}, {}),  # written by hand
    ):
        given = {name: v for name, v in config["init_args"].items() if name not in lacks}
        assert since(config | {"init_args": given}) == means


@pytest.mark.parametrize("name", ["Addition", "Sorting", "Mixed", "Text", "Arithmetic"])
def test_a_run_is_resumed_by_its_own_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 400)
    text = {"path": "text.txt", "context_length": 64, "batch_size": 2}
    problems = {"digits": 1, "batch_size": 2, "validation_examples": 2, "test_examples": 2}
    arguments = text if name in ("Mixed", "Text") else problems
    if name == "Arithmetic":
        arguments = arguments | {"tasks": {"Addition": {}}}
    trainer = {"max_steps": 1, "limit_val_batches": 1, "accelerator": "cpu"}
    settings = {
        "name": "run",
        "model": {"preset": "retnet_micro"},
        "data": {"class_path": name, "init_args": arguments},
        "trainer": trainer | {"enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run = ["fit", "--config", "run.yaml"]
    assert main(run) == 0
    assert main([*run, "--ckpt_path", "last", "--trainer.max_steps", "2"]) == 0
