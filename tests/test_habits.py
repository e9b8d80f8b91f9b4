"""Flags of `fit` that people expect: samples, averages, early stopping, a finder, a tracker."""

import csv
import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from test_freezing import assert_equal, same

from archzoo.checkpoint import read_safely
from archzoo.cli import main

RUN = """
model: {preset: retnet_micro, learning_rate: 5.0e-3, warmup_steps: 2, dropout: 0.2}
data: {class_path: Addition, init_args: {digits: 2, batch_size: 4, validation_examples: 8}}
trainer: {accelerator: cpu, max_steps: 6, log_every_n_steps: 1, limit_val_batches: 0}
"""
VALIDATED = ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=2"]


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """`archzoo fit` in an empty directory: a function of the run's name, its last checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)

    def run(name, *arguments):
        assert main(["fit", "--config", "run.yaml", "--name", name, *arguments]) == 0
        return read_safely(f"runs/{name}/last.ckpt")

    return run


@pytest.fixture
def own(monkeypatch):
    """A callback of one's own that notes the weights of every step, and keeps half of the run."""
    seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = pl_module.net.state_dict()
        seen.append({name: weight.clone() for name, weight in state.items()})
        if trainer.global_step == 4:
            shutil.copy(Path(trainer.default_root_dir, "last.ckpt"), "half.ckpt")

    module = types.ModuleType("own")
    keeps = {"__module__": "own", "on_train_batch_end": on_train_batch_end}
    module.Keep = type("Keep", (lightning.Callback,), keeps)
    monkeypatch.setitem(sys.modules, "own", module)
    return seen


KEEP = ["--trainer.callbacks=own.Keep", "--import=own", "--checkpoint.every_n_steps=3"]


def samples(name):
    return [json.loads(line) for line in Path(f"runs/{name}/samples.jsonl").open()]


def test_samples_are_written_and_change_nothing(fit, capsys):
    plain = fit("plain")
    capsys.readouterr()
    sampled = fit("sampled", "--sample_every=2", "--tracker=tensorboard")
    assert_equal(plain, sampled)
    assert same(plain["training"]["random"], sampled["training"]["random"])
    rows = samples("sampled")
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    for row in rows:
        first, _, second = row["prompt"].rstrip("=").partition("+")
        assert int(first) + int(second) == int(row["wanted"])
    assert "step      2  sample: " in capsys.readouterr().out
    # A run that is resumed writes again what came after its checkpoint, and nothing twice.
    shutil.copytree("runs/sampled", "runs/again")
    Path("runs/again/samples.jsonl").write_text(
        "".join(json.dumps(row | {"step": row["step"] + 2}) + "\n" for row in rows) + "{cut"
    )
    fit("again", "--sample_every=2", "--ckpt_path=runs/again/last.ckpt", "--trainer.max_steps=8")
    assert [row["step"] for row in samples("again")] == [4, 4, 4, 6, 6, 6, 8, 8, 8]


def test_samples_of_a_text_continue_it(fit):
    Path("corpus.txt").write_text("To be, or not to be, that is the question: " * 60)
    text = ["--data=Text", "--data.path=corpus.txt", "--data.tokenizer=characters"]
    text += ["--data.context_length=64", "--data.cache_dir=cache", "--data.batch_size=4"]
    given = ["fit", "--model.preset=retnet_micro", *text, "--trainer.max_steps=2"]
    given += ["--trainer.accelerator=cpu", "--sample_every=2", "--name=text"]
    assert main(given) == 0
    rows = samples("text")
    assert rows and all(len(row["prompt"]) == 32 and "wanted" not in row for row in rows)
    assert all(row["text"] for row in rows)
    assert main([*given, "--sample_prompts=[To be, not]", "--name=own"]) == 0
    assert [row["prompt"] for row in samples("own")] == ["To be", "not"]


def test_tensorboard_is_a_flag(fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit("run", "--tracker=tensorboard", "--sample_every=3")
    fit("run", "--tracker=tensorboard", "--ckpt_path=runs/run/last.ckpt", "--trainer.max_steps=8")
    events = EventAccumulator("runs/run/tensorboard").Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert "samples/text_summary" in events.Tags()["tensors"]
    assert json.loads(Path("runs/run/trackers.json").read_text()) == {"tensorboard": "tensorboard"}
    assert "model.preset: retnet_micro" in Path("runs/run/tensorboard/hparams.yaml").read_text()


def test_the_average_is_what_is_kept_and_resumed(fit, own, capsys):
    whole = fit("whole", "--ema=0.5", *KEEP, *VALIDATED)
    average = own[0]
    for weights in own[1:]:
        average = {n: 0.5 * average[n] + 0.5 * weights[n] for n in weights}
    kept = whole["state_dict"]
    for name, weight in average.items():
        torch.testing.assert_close(kept[f"decoder.{name}"], weight, rtol=1e-6, atol=1e-7)
        assert torch.equal(whole["current_model_state"][f"decoder.{name}"], own[-1][name])
    again = fit("again", "--ema=0.5", *VALIDATED, "--ckpt_path=half.ckpt")
    assert_equal(whole, again)
    assert same(whole["current_model_state"], again["current_model_state"])
    with warnings.catch_warnings(record=True) as said:  # an evaluation needs no average of its own
        warnings.simplefilter("always")
        given = ["test", "--ckpt_path=runs/again/last.ckpt", "--trainer.accelerator=cpu"]
        assert main(given) == 0
    assert not any("callbacks used to create" in str(warning.message) for warning in said)
    capsys.readouterr()
    given = ["fit", "--config", "run.yaml", "--name=other", "--ckpt_path=half.ckpt"]
    assert main(given) == 1
    assert "averages its weights: resume with the same --ema" in capsys.readouterr().err


def test_what_a_tracker_refuses_is_one_line(fit, monkeypatch, capsys):
    refused = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})

    def make(*_):
        raise refused("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr("archzoo.training.flags.make_trackers", make)
    assert main(["fit", "--config", "run.yaml", "--tracker=tensorboard"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --tracker wandb: No API key configured. Use `wandb login` (")
    assert error.count("\n") == 1 and "--tracker null" in error


STILL = ["--model.learning_rate=1e-30", "--trainer.max_steps=20", "--model.weight_decay=0"]


def test_a_run_that_does_not_get_better_ends(fit, capfd):
    last = fit("run", "--early_stopping=3", *STILL, *VALIDATED)
    assert last["global_step"] == 8  # the first validation, and three that are no better
    assert "ended early: validation/loss was best at" in capfd.readouterr().err
    more = ["--ckpt_path=runs/run/last.ckpt", *STILL, *VALIDATED]
    assert fit("run", "--early_stopping=3", *more)["global_step"] == 8
    said = capfd.readouterr()
    assert "had ended early" in said.err and "larger one trains on" not in said.out
    assert fit("run", "--early_stopping=5", *more)["global_step"] == 12


def validations(name):
    """What each validation of a run has given, with its step."""
    found = []
    for row in csv.DictReader(Path(f"runs/{name}/metrics.csv").read_text().splitlines()):
        given = {n: float(v) for n, v in row.items() if n.startswith("validation/") and v}
        if given:
            found.append(given | {"step": int(row["step"])})
    return found


MATCH = ["--checkpoint.monitor=validation/exact_match", "--checkpoint.mode=max"]


def test_a_run_that_is_good_enough_ends(fit, capfd):
    plain = fit("plain", "--trainer.max_steps=12", *VALIDATED)
    steps = [(row["step"], row["validation/loss"]) for row in validations("plain")]
    assert steps[2][1] < min(loss for _, loss in steps[:2])
    to = f"--stopping_threshold={steps[2][1]}"  # which is reached by what equals it
    capfd.readouterr()
    last = fit("run", "--trainer.max_steps=12", *VALIDATED, to)
    said = capfd.readouterr().err
    assert last["global_step"] == steps[2][0] == 6 and plain["global_step"] == 12
    assert said.count("ended after 6 steps: validation/loss is ") == 1
    # It says that it is done, and trains on where it is told to.
    more = ["--ckpt_path=runs/run/last.ckpt", "--trainer.max_steps=12", *VALIDATED]
    assert fit("run", *more, to)["global_step"] == 6
    said = capfd.readouterr()
    assert said.err.count("the run had ended: validation/loss was ") == 1
    assert "another, or none (null), trains on" in said.err and "nothing was left" not in said.out
    assert_equal(plain, fit("run", *more))
    assert validations("run") == validations("plain")


def test_what_has_reached_a_threshold_is_the_best(fit):
    """From which early stopping counts, where the run is resumed without the threshold."""
    given = ["--trainer.max_steps=12", "--early_stopping=9", *VALIDATED]
    fit("plain", *given)
    losses = [row["validation/loss"] for row in validations("plain")]
    assert losses[2] < min(losses[:2])
    last = fit("run", *given, f"--stopping_threshold={losses[2]}")
    kept = last["callbacks"]["StopEarly"]
    assert last["global_step"] == 6 and kept["wait_count"] == 0
    assert float(kept["best_score"]) == pytest.approx(losses[2], rel=1e-6)


def test_a_run_that_was_cut_before_it_was_good_enough_ends_where_the_whole_one_does(fit, own):
    given = ["--trainer.max_steps=12", "--early_stopping=9", *VALIDATED]
    fit("plain", *given, "--ema=0.5")
    to = f"--stopping_threshold={validations('plain')[3]['validation/loss']}"
    whole = fit("whole", *given, to, "--ema=0.5", *KEEP)
    again = fit("again", *given, to, "--ema=0.5", "--ckpt_path=half.ckpt")
    assert whole["global_step"] == 8
    assert_equal(whole, again)
    assert same(whole["callbacks"]["StopEarly"], again["callbacks"]["StopEarly"])


def test_a_threshold_of_shares_is_reached_from_below(fit):
    tokens = ["--checkpoint.monitor=validation/token_accuracy", "--checkpoint.mode=max"]
    last = fit("run", *VALIDATED, *tokens, "--stopping_threshold=0.25", "--trainer.max_steps=40")
    reached = [row["validation/token_accuracy"] for row in validations("run")]
    assert reached[-1] >= 0.25 and all(share < 0.25 for share in reached[:-1])
    assert 1 < len(reached) < 20 and last["global_step"] == 2 * len(reached)


def test_a_threshold_is_not_looked_at_where_nothing_is_validated(fit):
    assert fit("none", "--stopping_threshold=100")["global_step"] == 6
    late = ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=100"]
    assert fit("late", "--stopping_threshold=100", *late)["global_step"] == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--early_stopping=1"], "counts validations, and there are none"),
        (["--early_stopping=1", "--trainer.limit_val_batches=1.0"], "after 1000 batches of 6"),
        (
            ["--early_stopping=1", "--checkpoint.monitor=validation/los", *VALIDATED],
            "there is no metric validation/los; validation gives validation/exact_match",
        ),
        (["--stopping_threshold=.nan", *VALIDATED], "stopping_threshold nan must be a number"),
        (["--stopping_threshold=99", *MATCH, *VALIDATED], "is a share, from 0 to 1: 99 % is 0.99"),
        (["--stopping_threshold=0.9", MATCH[0], *VALIDATED], "the higher: --checkpoint.mode max"),
        (
            ["--stopping_threshold=1", "--checkpoint.monitor=validation/los", *VALIDATED],
            "there is no metric validation/los; validation gives validation/exact_match",
        ),
        (["--ema=1"], "ema=1.0 must be from 0 to below 1"),
        (["--sample_every=0"], "sample_every=0 must be at least 1"),
        (["--sample_prompts=x"], "needs --sample_every"),
        (["--tracker=wand"], "'wand' is not one of 'wandb', 'tensorboard'"),
    ],
)
def test_what_is_wrong_is_one_line(fit, capsys, arguments, said):
    assert main(["fit", "--config", "run.yaml", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error


def test_a_tracker_that_is_not_installed(fit, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["fit", "--config", "run.yaml", "--tracker=[trackio, mlflow]"]) == 1
    assert "trackio is not installed: pip install 'archzoo[trackio]'" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_learning_rate_is_found_and_nothing_written(fit, capfd):
    given = ["fit", "--config", "run.yaml", "--find_learning_rate", "--tracker=tensorboard"]
    assert main(given) == 0
    said = capfd.readouterr().err
    assert "the loss fell fastest at a learning rate of " in said
    assert "fit --config run.yaml --tracker=tensorboard --model.learning_rate " in said
    assert not Path("runs").exists() and len(list(Path().iterdir())) == 1
