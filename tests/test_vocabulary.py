"""The vocabulary of problems: shared by all tasks, or each its own, as it was before."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from archzoo.cli import main
from archzoo.tasks import Addition, BitwiseOr, Mixed, Multiplication, Sorting, Subtraction, build
from archzoo.tasks.arithmetic import TwoNumbers
from archzoo.training.module import tokenizer_files

EVERY = [Addition, Subtraction, Multiplication, BitwiseOr, Sorting]
BEFORE = {"vocabulary": "own", "zero": False}  # what a configuration without those keys means
FIT = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text(
        "seed_everything: 0\n"
        "model: {preset: abacus_tiny, dim: 16, depth: 1}\n"
        "data: {class_path: Addition, init_args: {digits: 2, batch_size: 4, "
        "validation_examples: 8, test_examples: 12}}\n"
        "trainer: {max_steps: 2, accelerator: cpu, val_check_interval: 2}\n"
    )
    return tmp_path


def test_all_tasks_write_with_the_same_tokens():
    tokenizers = [task().tokenizer for task in EVERY] + [Addition(hints=True).tokenizer]
    assert len({tokenizer.characters for tokenizer in tokenizers}) == 1
    assert tokenizers[0].vocab_size == 96
    assert tokenizers[0].digit_tokens == list(range(10))
    # What a model has learned stands on these numbers.
    assert tokenizers[0].encode("0+=-x|:,Az") == [0, 20, 28, 22, 87, 91, 25, 21, 32, 89]
    assert (tokenizers[0].stop_token, tokenizers[0].pad_token) == (94, 95)


def test_a_configuration_from_before_keeps_its_tokens_and_its_problems():
    """The ids and sums that commit 714a3c4 made from these configurations."""
    given = {"digits": 3, "batch_size": 6}
    tasks = {
        name: build({"class_path": f"archzoo.tasks.{name}", "init_args": dict(given)})
        for name in ("Addition", "Subtraction", "Multiplication", "Sorting")
    }
    assert [tasks[name].vocab_size for name in tasks] == [14, 14, 14, 66]
    assert [tasks[name].stop_token for name in tasks] == [12, 12, 12, 64]
    row = tasks["Addition"].train_dataloader().batch(0)["tokens"][3].tolist()
    assert row == [3, 10, 2, 3, 6, 11, 5, 3, 6, 12, 13, 13]
    assert tasks["Subtraction"].tokenizer.encode("1-2=") == [1, 10, 2, 11]
    assert tasks["Sorting"].tokenizer.encode("A:3,y") == [13, 10, 3, 11, 62]
    assert tasks["Addition"].pairs("validation", 4) == [(9, 1), (5, 79), (5, 932), (78, 2)]
    hinted = Addition(hints=True, **BEFORE)
    assert hinted.tokenizer.encode("A1z+=") == [12, 1, 62, 10, 11]
    # Problems within a text, whose arguments stand in a place of their own.
    inside = build({"class_path": "archzoo.tasks.Mixed", "init_args": {}}).synthetic
    assert inside.arguments | BEFORE == inside.arguments
    assert Mixed(problem_arguments={"vocabulary": "shared"}).synthetic.vocab_size == 96


def test_numbers_of_one_digit_may_be_nought():
    for task in (Addition(1), Subtraction(1), Multiplication(1), Sorting(2, 1)):
        lines = task.text(task.problems("train", np.arange(4000)))
        digits = "".join(line.partition("=")[0] for line in lines)
        counts = np.array([digits.count(digit) for digit in "0123456789"])
        assert counts.min() > 0.5 * counts.mean()  # 0 like any other, but for what is held out
        for split in ("validation", "test"):
            held_out = task.text(task.problems(split, np.arange(task.rows(split))))
            assert held_out and not set(held_out) & set(lines)
    assert "0" in "".join(Addition(held_out=2).text(Addition(held_out=2).cell(1, 1, 100)))
    assert Addition(1).answer(0, 0) == "0"
    sums = {(a, b) for a, b in Addition(1).pairs("train", 4000)}
    assert (0, 0) in sums  # zeros alone are held out by no number
    without = Addition(2, zero=False)
    pairs = [*without.pairs("train", 4000), *without.pairs("test", without.rows("test"))]
    assert min(map(min, pairs)) == 1
    assert min(int(a) for a, _ in without.pairs("validation", 9)) >= 1


class Modulo(TwoNumbers):
    operators = "÷="

    def answer_size(self, first, second):
        return np.maximum(first, second)

    def solve(self, a, b, lengths):
        return a, None


def test_what_has_no_token_in_common_is_said():
    with pytest.raises(ValueError, match=r"no '÷', only what ASCII shows: take vocabulary own"):
        Modulo()
    assert Modulo(vocabulary="own").vocab_size == 14
    with pytest.raises(ValueError, match="vocabulary 'mine' is not one of shared, own"):
        Addition(vocabulary="mine")


def test_a_run_from_before_resumes(here, capsys):
    """Its files name neither key: with them, and with today's files, it is what it was."""
    old = ["--data.vocabulary", "own", "--data.zero", "false"]
    assert main(["fit", "--config", "old.yaml", *old]) == 0
    run = here / "runs/old"
    config = yaml.safe_load((run / "config.yaml").read_text())
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    for key in BEFORE:
        del config["data"]["init_args"][key], checkpoint["task"]["init_args"][key]
    del checkpoint["Addition"]  # how many examples were used was not said, either
    (here / "again.yaml").write_text(yaml.safe_dump(config))
    torch.save(checkpoint, run / "last.ckpt")
    path = str(run / "last.ckpt")

    assert main(["test", "--ckpt_path", path]) == 0
    assert main(["validate", "--config", "old.yaml", "--ckpt_path", path]) == 0
    assert main(["grid", path, "--digits", "3", "--problems", "4", "--device", "cpu"]) == 0
    for used, steps, *how in (
        (8 + 12, "4", "--config", "old.yaml", "--ckpt_path", "last", "--data.batch_size", "6"),
        (20 + 8, "6", "--config", "again.yaml", "--name", "old", "--ckpt_path", path),
    ):
        assert main(["fit", *how, "--trainer.max_steps", steps]) == 0, capsys.readouterr().err
        found = torch.load(path, weights_only=True)
        task = found["task"]["init_args"]
        assert task | BEFORE == task
        assert found["Addition"]["examples"] == used
    # Its own config.yaml alone makes the same run again.
    settings = ["--config", "again.yaml", "--name", "again"]
    assert main(["fit", *settings, "--trainer.max_steps", "2"]) == 0
    again = torch.load(here / "runs/again/last.ckpt", weights_only=True)
    assert torch.equal(again["state_dict"]["decoder.head.weight"],
                       checkpoint["state_dict"]["decoder.head.weight"])  # fmt: skip


def test_a_model_of_one_task_continues_with_another(here, capsys):
    coupled = ["--model.embedding", "AbacusEmbedding", "--model.embedding.coupled", "true"]
    assert main(["fit", "--config", "old.yaml", *coupled]) == 0
    before = torch.load("runs/old/last.ckpt", weights_only=True)
    two = ["--data", "Subtraction", "--data.digits", "2", "--data.batch_size", "4"]
    adapt = ["fit", "--model.weights", "runs/old/last.ckpt", *two, *FIT]
    assert main([*adapt, "--trainer.max_steps", "1", "--name", "adapted"]) == 0
    after = torch.load("runs/adapted/last.ckpt", weights_only=True)
    assert tokenizer_files(after) == tokenizer_files(before)
    signs = after["hyper_parameters"]["embedding"]["init_args"]["operator_tokens"]
    assert signs == [20, 22, 28]  # the new sign stands where signs stand, = last
    own = ["--data.vocabulary", "own"]
    assert main(["fit", "--config", "old.yaml", "--name", "own", *own]) == 0
    capsys.readouterr()
    wrong = ["fit", "--model.weights", "runs/own/last.ckpt", *two, *own, *FIT]
    assert main(wrong) == 1
    assert "both must be trained with --data.vocabulary shared" in capsys.readouterr().err


def test_every_configuration_says_which_vocabulary_it_has():
    root = Path(__file__).parent.parent
    found = {}
    for path in sorted((root / "configs").rglob("*.yaml")):
        data = yaml.safe_load(path.read_text())["data"]
        given = json.dumps(data)
        # Those have no digits, or the shared vocabulary alone.
        if data["class_path"] not in ("Text", "Recall", "Arithmetic", "KeyValues"):
            found[path.relative_to(root / "configs").as_posix()] = (
                "own" if '"vocabulary": "own"' in given else '"vocabulary": "shared"' in given
            )
    assert found == {
        "abacus_cpu.yaml": True,
        "addition.yaml": True,
        "arithmetic.yaml": True,
        "mixed.yaml": True,
        "onebit.yaml": True,
        "preferences/dpo.yaml": True,
        "preferences/policy.yaml": True,
        "preferences/reward.yaml": True,
        "preferences/sft.yaml": True,
        "claims/addition_learning_rates.yaml": True,
        "claims/merging/drop.yaml": True,
        "claims/merging/experts.yaml": True,
        "claims/onebit.yaml": True,
        "claims/preferences.yaml": True,
        "claims/preferences_score.yaml": True,
        "claims/adaptation/adder.yaml": True,
        "claims/adaptation/adder_retention.yaml": True,
        "claims/adaptation/prefix.yaml": True,
        "claims/adaptation/styles.yaml": True,
        "claims/adaptation/subtraction.yaml": True,
        "claims/abacus.yaml": "own",  # its rows were made with it
        "claims/abacus_coverage.yaml": "own",
    }
