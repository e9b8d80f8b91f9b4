"""A run that is ended anywhere and resumed is the run that was not ended."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning
import pytest
import torch

from archzoo.cli import main
from archzoo.tasks import Addition, Text
from archzoo.training.averaging import AverageWeights
from archzoo.training.callbacks import Checkpoints, SaveAndEndOnSignal
from archzoo.training.ending import Ended, Signals
from archzoo.training.files import CheckpointFiles, MetricsFile
from archzoo.training.module import LanguageModel


class Killed(BaseException):
    pass


class KillAfter(lightning.Callback):
    """Ends the run after this many micro-batches, as if by SIGKILL: nothing is cleaned up."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.batches:
            raise Killed


class DuringValidation(lightning.Callback):
    """Does something when this many validations have begun and one batch of the last is done."""

    def __init__(self, number, act):
        self.left, self.act = number, act

    def on_validation_start(self, trainer, pl_module):
        self.left -= 1

    def on_validation_batch_end(self, *arguments):
        if not self.left:
            self.act()


class DuringStep(lightning.Callback):
    """Does something in the middle of a micro-batch."""

    def __init__(self, number, act):
        self.number, self.act = number, act

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.number:
            self.act()


class Weights(lightning.Callback):
    """Lends the model other weights for a validation, as averages of weights do."""

    def on_validation_epoch_start(self, trainer, pl_module):
        for weight in pl_module.parameters():
            weight.data.mul_(2)

    def on_validation_epoch_end(self, trainer, pl_module):
        for weight in pl_module.parameters():
            weight.data.div_(2)


class Counts(lightning.Callback):
    """Has a state of its own that every validation changes, as early stopping has."""

    count = 0

    def on_validation_end(self, trainer, pl_module):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class FewEpochs(lightning.Callback):
    """Ends what would run for ever: epochs in which nothing is trained."""

    def on_train_epoch_end(self, trainer, pl_module):
        assert trainer.current_epoch < 10


def kill():
    raise Killed


def losses(directory):
    """{(step, split): loss} of a run's log, as text: equal means bit for bit."""
    with open(directory / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        for split in ("train", "validation"):
            if row.get(f"{split}/loss"):
                key = (int(row["step"]), split)
                assert key not in found, f"{key} is in the log twice"
                found[key] = row[f"{split}/loss"]
    return found


def addition(steps_per_epoch=10):
    return Addition(
        digits=2,
        batch_size=4,
        steps_per_epoch=steps_per_epoch,
        validation_examples=8,
        test_examples=8,
    )


def stream(tmp_path):
    path = tmp_path / "text.txt"
    if not path.exists():
        path.write_text("".join(f"{n} green bottles, hanging on the wall; " for n in range(60)))
    return Text(
        str(path), context_length=16, batch_size=2, carry_state=True, cache_dir=str(tmp_path / "c")
    )


def fit(directory, task, *callbacks, accumulate=1, every=4, kill=None, resume=False, **options):
    lightning.seed_everything(0)
    model = LanguageModel("retnet_micro", dropout=0.2, warmup_steps=4, learning_rate=1e-2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        max_steps=options.get("steps", 15),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        precision=options.get("precision", "32-true"),
        val_check_interval=7,  # in the middle of accumulations, too
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=MetricsFile(directory / "metrics.csv"),
        plugins=[CheckpointFiles()],
        callbacks=[
            *callbacks,
            Checkpoints(every_n_steps=every),
            *([KillAfter(kill)] if kill else []),
            *([SaveAndEndOnSignal(options["signals"])] if "signals" in options else []),
        ],
    )
    path = directory / "last.ckpt"
    try:
        trainer.fit(model, task, ckpt_path=path if resume and path.exists() else None)
    except Killed:
        assert kill or callbacks
    except Ended:
        assert options["signals"].received
    return model


def assert_same(whole, segments, expected, resumed):
    assert losses(segments) == losses(whole)
    for name, weight in expected.net.state_dict().items():
        assert torch.equal(weight, resumed.net.state_dict()[name]), name
    best = [torch.load(directory / "best.ckpt") for directory in (whole, segments)]
    assert best[0]["global_step"] == best[1]["global_step"]
    for name, weight in best[0]["state_dict"].items():
        assert torch.equal(weight, best[1]["state_dict"][name]), name
    assert not list(segments.glob("*.partial"))


@pytest.mark.parametrize(
    ("kind", "accumulate", "every", "kills"),
    [
        ("addition", 1, 1, [3, 9]),
        ("addition", 1, 4, [11]),  # just after an epoch began
        ("addition", 3, 2, [7, 20]),  # in the middle of an accumulation, and of an epoch
        ("addition", 1, 5, [10]),  # at an epoch's end
        ("addition", 1, 7, [7, 14]),  # where validation is due
        ("stream", 1, 3, [5, 10]),
        ("stream", 2, 3, [9, 17]),
    ],
)
def test_resumed_is_the_same_run(tmp_path, kind, accumulate, every, kills):
    def task():
        return addition() if kind == "addition" else stream(tmp_path)

    whole, segments = tmp_path / "whole", tmp_path / "segments"
    options = {"accumulate": accumulate, "every": every}
    expected = fit(whole, task(), **options)
    for kill in kills:
        fit(segments, task(), **options, kill=kill, resume=True)
    resumed = fit(segments, task(), **options, resume=True)
    assert losses(segments) == losses(whole)
    assert len(losses(whole)) >= 7
    for name, weight in expected.net.state_dict().items():
        assert torch.equal(weight, resumed.net.state_dict()[name]), name


def test_resumed_is_the_same_run_in_float64(tmp_path):
    """Whose weights no file's reader rounds to float32; to validate them, too."""
    options = {"precision": "64-true", "every": 3}
    expected = fit(tmp_path / "whole", addition(), **options)
    fit(tmp_path / "segments", addition(), **options, kill=6)
    resumed = fit(tmp_path / "segments", addition(), **options, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "segments", expected, resumed)
    trainer = lightning.Trainer(
        accelerator="cpu", precision="64-true", logger=False, plugins=[CheckpointFiles()]
    )
    read = LanguageModel("retnet_micro", dropout=0.2)
    trainer.validate(read, addition(), ckpt_path=tmp_path / "whole" / "last.ckpt")
    for name, weight in expected.net.state_dict().items():
        assert torch.equal(weight, read.net.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_averages_are_resumed_in_float32_at_least(tmp_path, precision):
    """In bfloat16 an average of many steps would stand still."""
    for directory, kills in (("whole", [None]), ("segments", [6, None])):
        for number, kill in enumerate(kills):
            averages = AverageWeights(0.99)
            fit(
                tmp_path / directory, addition(), averages,
                precision=precision, every=3, kill=kill, resume=number > 0,
            )  # fmt: skip
    whole, segments = (
        torch.load(tmp_path / directory / "last.ckpt", weights_only=True)
        for directory in ("whole", "segments")
    )
    for held in ("state_dict", "current_model_state"):
        for name, weight in whole[held].items():
            assert torch.equal(weight, segments[held][name]), name
    assert all(weight.dtype.itemsize >= 4 for weight in whole["state_dict"].values())


# The validations of 14 steps are at 7 and 14, the last one after all that is to be trained.
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("epoch", [10, 7])  # with 7, validations are at the ends of epochs
def test_ended_in_a_validation(tmp_path, number, every, asked, epoch):
    """The validation is done anew, be it all that is left, and is all there is of its step."""
    whole, segments = tmp_path / "whole", tmp_path / "segments"

    def go(directory, *callbacks, **options):
        options |= {"every": every, "steps": 14}
        return fit(directory, addition(epoch), Weights(), FewEpochs(), *callbacks, **options)

    expected = go(whole, Counts())
    signals = Signals()
    end = DuringValidation(number, lambda: setattr(signals, "received", 15)) if asked else None
    end = end or DuringValidation(number, kill)
    go(segments, Counts(), end, signals=signals)
    state = torch.load(segments / "last.ckpt")
    if asked or every == 1:
        assert state["global_step"] == 7 * number  # though its validation had not ended
    assert state["callbacks"].get("Counts", {"count": 0})["count"] == number - 1
    counts = Counts()
    resumed = go(segments, counts, resume=True)
    assert_same(whole, segments, expected, resumed)
    assert counts.count == 2 and len(losses(whole)) == 7 + 2


@pytest.mark.parametrize(("accumulate", "batch"), [(1, 0), (1, 6), (1, 10), (3, 20), (3, 22)])
def test_ended_by_a_signal(tmp_path, accumulate, batch):
    """Asked in the middle of a step: the step is finished, saved, and gone on from."""
    whole, segments = tmp_path / "whole", tmp_path / "segments"
    options = {"accumulate": accumulate, "every": 100}
    expected = fit(whole, addition(), **options)
    signals = Signals()
    end = DuringStep(batch, lambda: setattr(signals, "received", 15))
    fit(segments, addition(), end, **options, signals=signals)
    state = torch.load(segments / "last.ckpt")
    # An epoch of 10 batches ends an accumulation, too.
    steps = {1: batch + 1, 3: 4 * (batch // 10) + batch % 10 // 3 + 1}[accumulate]
    assert state["global_step"] == steps
    resumed = fit(segments, addition(), **options, resume=True)
    assert_same(whole, segments, expected, resumed)


class Seen(lightning.Callback):
    def __init__(self):
        self.examples = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.examples += batch["examples"][:, 0].tolist()


@pytest.mark.parametrize("stopped", ["in a step", "in a validation", "by a signal"])
def test_another_batch_size_continues_in_the_stream(tmp_path, stopped):
    """No example comes twice and none is left out, wherever the checkpoint was written."""

    def task(batch_size):
        path = tmp_path / "text.txt"
        path.write_text("".join(f"{n} green bottles, hanging on the wall; " for n in range(60)))
        sizes = {"context_length": 16, "batch_size": batch_size}
        return Text(str(path), cache_dir=str(tmp_path / "c"), **sizes)

    signals = Signals()
    ends = {
        "in a step": KillAfter(6),
        "in a validation": DuringValidation(1, kill),
        "by a signal": DuringStep(6, lambda: setattr(signals, "received", 15)),
    }
    options = {"every": 1, "signals": signals}
    fit(tmp_path / "run", task(2), ends[stopped], **options)
    done = torch.load(tmp_path / "run/last.ckpt")["global_step"]
    signals.received, seen = None, Seen()
    fit(tmp_path / "run", task(3), seen, **options, resume=True)
    assert seen.examples == list(range(2 * done, 2 * done + 3 * (15 - done)))


COMMAND = """
--config configs/addition.yaml --data.batch_size 4 --data.digits 2 --data.validation_examples 8
--model.preset retnet_micro --model.dropout 0.1 --trainer.accelerator cpu --trainer.max_steps 100
--trainer.accumulate_grad_batches 3 --trainer.val_check_interval 50 --trainer.log_every_n_steps 1
--checkpoint.every_n_steps 7 --trainer.enable_progress_bar false
"""


def test_killed_by_the_system(tmp_path, monkeypatch):
    """SIGKILL at a moment that nothing chose, then `fit --ckpt_path last`."""
    root = Path(__file__).parent.parent
    runs = str(tmp_path / "runs")
    command = [sys.executable, "train.py", "fit", *COMMAND.split()]
    command += ["--trainer.default_root_dir", runs, "--name"]
    run = subprocess.Popen([*command, "killed"], cwd=root)
    log = tmp_path / "runs" / "killed" / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        if log.exists() and log.read_text().count("\n") > 20:
            break
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it ended before it was killed"

    monkeypatch.chdir(root)
    fit = [*command[2:], "killed", "--ckpt_path", "last"]
    assert main(fit) == 0
    fit[-3:] = ["whole"]
    assert main(fit) == 0
    assert losses(tmp_path / "runs" / "killed") == losses(tmp_path / "runs" / "whole")
    assert len(losses(tmp_path / "runs" / "whole")) >= 100
