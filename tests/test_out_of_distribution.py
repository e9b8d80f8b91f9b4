"""Out-of-distribution exact match during training: evaluated, logged, kept, and said."""

import csv
import warnings

import lightning
import numpy as np
import pytest
import torch
import yaml
from torch import nn

import archzoo
from archzoo.cli import main
from archzoo.tasks import Addition
from archzoo.training.module import LanguageModel

CONFIG = {
    "seed_everything": 0,
    "model": {"preset": "abacus_micro", "learning_rate": 3e-3, "warmup_steps": 5},
    "data": {
        "class_path": "Addition",
        "init_args": {
            "digits": 2,
            "held_out": 10,
            "ood_digits": [1, 3],
            "ood_examples": 20,
            "batch_size": 16,
            "validation_examples": 20,
        },
    },
    "trainer": {"max_steps": 8, "val_check_interval": 4, "accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    (place / "ood.yaml").write_text(yaml.safe_dump(CONFIG))
    return place


@pytest.fixture(scope="module")
def said(run):
    """The run once, and what it printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = ["fit", "--config", str(run / "ood.yaml")]
        assert main([*arguments, "--trainer.default_root_dir", str(run)]) == 0
    return out.getvalue()


def test_every_validation_logs_each_length_and_the_mean(run, said):
    with open(run / "ood" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("validation/exact_match/ood")]
    assert [int(row["step"]) for row in rows] == [4, 8]
    for row in rows:
        one, three = (float(row[f"validation/exact_match/{n}"]) for n in (1, 3))
        assert float(row["validation/exact_match/ood"]) == pytest.approx((one + three) / 2)
    # The lengths beyond count for themselves alone, not for the loss of the trained lengths.
    assert all(row["validation/exact_match"] and row["validation/loss"] for row in rows)


def test_best_and_last_are_both_said(run, said):
    lines = [line for line in said.splitlines() if line.startswith(("best", "last"))]
    assert [line.split()[0] for line in lines] == ["best", "last"]
    assert "step      8" in lines[1] and "1: " in lines[1] and "ood: " in lines[1]
    state = torch.load(run / "ood" / "last.ckpt", weights_only=True)["callbacks"]["Checkpoints"]
    assert state["best"] == state["reached"]["best"]["validation/exact_match/ood"]
    assert state["reached"]["last"]["step"] == 8
    best = torch.load(run / "ood" / "best.ckpt", weights_only=True)
    assert best["global_step"] == state["reached"]["best"]["step"]


class KnowsSome(LanguageModel):
    """Says every label, but errs at the first one where the first digit of the row is even."""

    def _hidden(self, batch, split):
        labels = batch["labels"].clamp(min=0)
        first = (batch["labels"] >= 0).int().argmax(dim=1)
        rows = torch.arange(len(labels))
        labels[rows, first] += batch["tokens"][:, 0] % 2 == 0
        return nn.functional.one_hot(labels, self.net.dim).float(), {}


def test_of_checkpoints_that_are_equally_good_the_one_of_lower_loss_is_best(tmp_path):
    """In some steps nothing is learned of 6 digits: all are at 0 there."""
    (tmp_path / "equal.yaml").write_text(yaml.safe_dump(CONFIG))
    arguments = ["fit", "--config", str(tmp_path / "equal.yaml"), "--data.ood_digits", "[6]"]
    assert main([*arguments, "--trainer.default_root_dir", str(tmp_path)]) == 0
    with open(tmp_path / "equal" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("validation/loss")]
    assert [float(row["validation/exact_match/ood"]) for row in rows] == [0, 0]
    want = min(rows, key=lambda row: float(row["validation/loss"]))["step"]
    assert want == "8", "an untrained model would prove nothing"
    best = torch.load(tmp_path / "equal" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 8


def test_the_logged_match_is_counted_length_by_length():
    task = Addition(digits=2, ood_digits=[3, 6], ood_examples=70, batch_size=32, vocabulary="own")
    model = KnowsSome("abacus_micro")
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    model.decoder = archzoo.create_model("abacus_micro", vocab_size=task.vocab_size)
    model.decoder.head.weight.data = torch.eye(model.net.vocab_size, model.net.dim)
    trainer.validate(model, task, verbose=False)
    found = trainer.callback_metrics
    expected = []
    for length in (3, 6):
        odd = (
            task.cell(length, length, 70, "validation").operands[0, 0] % 2
        )  # the lowest digit stands first
        assert 0 < odd.mean() < 1
        assert found[f"validation/exact_match/{length}"] == pytest.approx(float(odd.mean()))
        expected.append(odd.mean())
    assert found["validation/exact_match/ood"] == pytest.approx(sum(expected) / 2)


def test_problems_beyond_have_their_length_and_are_held_out():
    task = Addition(digits=3, ood_digits=[2, 12], ood_examples=50)
    for digits in (2, 12):
        problems = task.cell(digits, digits, 50)
        assert (problems.lengths == digits).all()
        assert (problems.operands[:, digits - 1] > 0).all()
        assert task.is_held_out(problems).all()
        assert len(np.unique(problems.operands, axis=2).T) == 50
    first, second = task.cell(12, 12, 20), task.cell(12, 12, 50)
    assert (first.operands == second.operands[..., :20]).all()  # a function of size and number


@pytest.mark.parametrize(("longest", "beyond"), [(5, False), (6, True)])
def test_lengths_that_training_cannot_cover_are_named_before_it_begins(longest, beyond):
    """Shifts of at most 3 and answers of 3 digits: numbers of up to 6 are covered."""
    init_args = {"max_shift": 3, "rows": 32}
    embedding = {"class_path": "AbacusEmbedding", "init_args": init_args}
    model = LanguageModel("abacus_micro", embedding=embedding)
    trainer = lightning.Trainer(max_steps=0, logger=False, accelerator="cpu", barebones=True)
    task = Addition(digits=2, ood_digits=[3, longest])
    assert (task.longest_run, task.longest_tested) == (3, longest + 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, task)
    said = [str(entry.message) for entry in caught if "covered" in str(entry.message)]
    assert len(said) == beyond
    if beyond:
        assert "number of 7 digits is longer than the 6" in said[0]


def test_lengths_must_be_positive():
    with pytest.raises(ValueError, match=r"ood_digits \[0\] holds a length that is not positive"):
        Addition(ood_digits=[0])
