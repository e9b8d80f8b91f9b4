"""What ends a run, what it leaves behind, and what another run may do with its directory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy

from archzoo.cli import main
from archzoo.tasks import Addition
from archzoo.training.callbacks import Checkpoints
from archzoo.training.directory import Lock
from archzoo.training.files import CheckpointFiles, MetricsFile
from archzoo.training.module import LanguageModel

ROOT = Path(__file__).parent.parent
SETTINGS = """
--config configs/addition.yaml --data.batch_size 4 --data.digits 2 --data.validation_examples 8
--data.test_examples 8 --model.preset retnet_micro --trainer.accelerator cpu --trainer.max_steps 6
--trainer.val_check_interval 3 --trainer.log_every_n_steps 1
"""


@pytest.fixture
def fit(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def run(*arguments, command="fit", settings=SETTINGS):
        where = ["--trainer.default_root_dir", str(tmp_path)]
        return main([command, *settings.split(), *where, *arguments])

    return run


def content(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------- signals

STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """A process that outlives its test would take time from all that follow."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def popen(command, **options):
    """A process in a group of its own, which hears Ctrl-C though these tests may not.

    A shell's background job ignores it, and hands that on.
    """
    process = subprocess.Popen(
        command,
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    STARTED.append(process)
    return process


def start(tmp_path, *arguments, rows=3, command=None, **options):
    """A process that trains, and has written this many rows of its log."""
    settings = [*SETTINGS.split(), "--trainer.max_steps", "100000"]
    where = ["--trainer.default_root_dir", str(tmp_path), "--name", "run"]
    command = command or [sys.executable, "train.py", "fit", *settings, *where, *arguments]
    process = popen(command, **options, stderr=subprocess.STDOUT, text=True)
    log = next(iter(tmp_path.glob("**/metrics.csv")), tmp_path / "run/metrics.csv")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = next(iter(tmp_path.glob("**/metrics.csv")), log)
        if log.exists() and log.read_text().count("\n") > rows:
            break
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, number):
    process = start(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    step = torch.load(tmp_path / "run/last.ckpt")["global_step"]
    assert f"ended by {number.name}\n{tmp_path}/run/last.ckpt holds all up to step {step}" in output
    command = output.splitlines()[-1].split()
    assert command[1:3] == ["train.py", "fit"] and command[-2:] == ["--resume", "auto"]
    found = set(os.listdir(tmp_path / "run"))
    assert found - {"best.ckpt"} == {"last.ckpt", "metrics.csv", "config.yaml"}


def test_a_signal_while_data_is_prepared_ends_at_once(tmp_path):
    code = f"""
import sys, time
from archzoo.tasks import Addition
def prepare(self):
    print("preparing", flush=True)
    time.sleep(60)
Addition.prepare = prepare
from archzoo.cli import main
sys.exit(main(["fit", *{SETTINGS.split()}, "--trainer.default_root_dir", {str(tmp_path)!r}]))
"""
    process = popen([sys.executable, "-c", code], text=True)
    assert process.stdout.readline() == "preparing\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert errors == "ended by SIGTERM before a step was done: nothing was written\n"
    assert not os.listdir(tmp_path)


WAITING = """
import sys, time
from archzoo.training.ending import Signals
with Signals() as signals:
    signals.gentle = True
    print("ready", flush=True)
    while True:
        time.sleep(60)
"""


def test_a_second_signal_ends_at_once():
    process = popen([sys.executable, "-c", WAITING])
    process.stdout.readline()
    for _ in range(2):  # as a child of make gets it when its whole group is ended
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_what_was_ignored_stays_ignored():
    """As under nohup."""
    process = popen(["nohup", sys.executable, "-c", WAITING])
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    _, errors = process.communicate()
    assert b"SIGHUP" not in errors


def test_make_train_ends_too(tmp_path):
    """What make passes on is saved and said, and the commands that follow do not run."""
    for name in ("Makefile", "train.py", "configs", "archzoo", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "train", "-o", "setup", f"BIN={Path(sys.executable).parent}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = start(tmp_path, command=command, cwd=tmp_path, env=environment, rows=1)
    process.send_signal(signal.SIGTERM)  # to make alone
    output, _ = process.communicate(timeout=120)
    assert process.returncode
    assert "ended by SIGTERM\nruns/addition/last.ckpt holds all up to step" in output, output
    assert "never seen" not in output
    assert (tmp_path / "runs/addition/last.ckpt").is_file()


# ---------------------------------------------------------------------------- the directory


def test_only_one_process_trains_into_a_directory(tmp_path, fit, capsys):
    assert fit("--name", "run") == 0
    before = content(tmp_path / "run")
    lock = Lock(tmp_path / "run")
    capsys.readouterr()
    assert fit("--name", "run") == 1
    found = capsys.readouterr().err
    assert f"{tmp_path}/run is in use by process {os.getpid()} on " in found
    assert content(tmp_path / "run").items() >= before.items()
    lock.release()
    assert content(tmp_path / "run") == before and os.listdir(tmp_path) == ["run"]


def test_a_lock_leaves_no_directory_that_was_made_for_nothing(tmp_path):
    Lock(tmp_path / "a/b").release()
    assert not os.listdir(tmp_path)
    lock = Lock(tmp_path / "a/b")
    (tmp_path / "a/b/file").touch()
    lock.release()
    assert os.listdir(tmp_path / "a/b") == ["file"]


@pytest.mark.parametrize(
    "mistake",
    [
        ["--model.betas", "[1.5, 2]"],  # noticed by the optimizer
        ["--data.digits", "0"],
        ["--data", "Text", "--data.path", "nope.txt"],
        ["--data", "Text", "--data.carry_state", "true", "--model.preset", "transformer_micro"],
    ],
)
def test_a_fit_that_fails_moves_nothing(tmp_path, fit, mistake):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last.ckpt", "best.ckpt", "metrics.csv", "config.yaml"):
        (run / name).write_text("of a good run")
    before = content(tmp_path)
    assert fit("--name", "run", *mistake) == 1
    assert content(tmp_path) == before


def test_another_run_is_moved_aside_with_all_it_left(tmp_path, fit, capsys):
    run = tmp_path / "run"
    for name in ("last.ckpt", "metrics.csv", "tensorboard/events.1", "notes/mine.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("theirs")
    before = content(run)
    assert fit("--name", "run", "--trainer.logger", "TensorBoardLogger") == 0
    assert f"{run} held another run, which is now {run}-1" in capsys.readouterr().out
    assert content(tmp_path / "run-1") == before
    assert not [name for name, held in content(run).items() if held == b"theirs"]
    assert list((run / "tensorboard").iterdir())


def test_fast_dev_run_writes_nothing(tmp_path, fit, capsys):
    assert fit("--name", "run") == 0
    before = content(tmp_path)
    assert fit("--name", "run", "--trainer.fast_dev_run", "true") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert content(tmp_path) == before
    given = ["--ckpt_path", str(tmp_path / "run/last.ckpt"), "--trainer.fast_dev_run", "true"]
    assert main(["predict", *given, "--trainer.accelerator", "cpu"]) == 0
    assert content(tmp_path) == before


# ---------------------------------------------------------------------------- resuming


def test_the_same_command_resumes_what_it_adds_to(tmp_path, fit):
    """A list that settings add to is not added to twice."""
    given = ["--data", "Addition", "--data.digits", "1", "--data.batch_size", "4"]
    given += ["--model.preset", "retnet_micro", "--trainer.accelerator", "cpu", "--name", "run"]
    given += ["--trainer.callbacks+", "EMAWeightAveraging", "--resume", "auto"]
    for steps in ("1", "2"):
        assert fit(*given, "--trainer.max_steps", steps, settings="") == 0
    assert torch.load(tmp_path / "run/last.ckpt")["global_step"] == 2


def test_resume(tmp_path, fit, capsys):
    auto = ["--name", "run", "--resume", "auto"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.csv").write_text("step,seconds\n1,1.0\n")  # killed before it saved
    assert fit(*auto, "--trainer.max_steps", "4") == 0  # there is nothing to resume: it begins
    (tmp_path / "run/last.ckpt.123.partial").write_text("half of one")
    capsys.readouterr()
    assert fit(*auto) == 0
    assert "step      6" in capsys.readouterr().out
    before = content(tmp_path)
    assert {str(name) for name in before} == {
        f"run/{name}" for name in ("last.ckpt", "best.ckpt", "metrics.csv", "config.yaml")
    }
    assert fit(*auto) == 0
    assert "had reached trainer.max_steps=6: nothing was left to train" in capsys.readouterr().out
    assert content(tmp_path) == before
    # The name alone says which run, whose settings lie beside the checkpoint.
    named = ["--name", "run", "--ckpt_path", "last", "--trainer.max_steps", "9"]
    assert fit(*named, settings="") == 0
    assert torch.load(tmp_path / "run/last.ckpt")["global_step"] == 9
    assert fit("--name", "run", "--ckpt_path", "last", command="test", settings="") == 0
    assert fit("--name", "no", "--ckpt_path", "last", settings="") == 1
    assert f"there is no checkpoint {tmp_path}/no/last.ckpt" in capsys.readouterr().err
    assert not list(tmp_path.glob("run-*")) and not list(tmp_path.glob("no*"))


# ---------------------------------------------------------------------------- checkpoints


def average(directory, steps, resume=False):
    lightning.seed_everything(0)
    model = LanguageModel("retnet_micro", warmup_steps=2, dropout=0.1, schedule="constant")
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        max_steps=steps,
        log_every_n_steps=1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=MetricsFile(directory / "metrics.csv"),
        plugins=[CheckpointFiles()],
        callbacks=[EMAWeightAveraging(decay=0.5), Checkpoints()],
    )
    task = Addition(digits=2, batch_size=4, validation_examples=8, test_examples=8)
    trainer.fit(model, task, ckpt_path=directory / "last.ckpt" if resume else None)
    return trainer


def test_averages_of_weights_are_kept(tmp_path):
    """Callbacks that copy the parameters when they are set up find all of them."""
    whole, segments = tmp_path / "whole", tmp_path / "segments"
    average(whole, 8)
    average(segments, 5)
    average(segments, 8, resume=True)
    states = [torch.load(directory / "last.ckpt") for directory in (whole, segments)]
    assert any("blocks" in name for name in states[0]["state_dict"])
    for kind in ("state_dict", "current_model_state"):
        assert states[0][kind].keys() == states[1][kind].keys()
        for name, weight in states[0][kind].items():
            assert torch.equal(weight, states[1][kind][name]), (kind, name)
    apart = [
        (weight - states[0]["state_dict"][name]).abs().max()
        for name, weight in states[0]["current_model_state"].items()
        if name.startswith("decoder.blocks") and weight.is_floating_point()
    ]
    assert max(apart) > 0


def test_checkpoints_that_nothing_reads_are_refused():
    strategy = FSDPStrategy(state_dict_type="sharded")
    with pytest.raises(ValueError, match="directories of shards, which cannot be read"):
        Checkpoints().setup(SimpleNamespace(strategy=strategy), None, "fit")


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_nan_is_never_the_best(tmp_path, mode):
    checkpoints, saved = Checkpoints(monitor="m", mode=mode), []
    nan = float("nan")
    values = [nan, 3.0, nan, 2.0, 4.0, 2.0, 2.0]
    losses = [nan, nan, 0.1, nan, nan, 1.0, 2.0]
    for step, (value, loss) in enumerate(zip(values, losses, strict=True), 1):
        trainer = SimpleNamespace(
            state=SimpleNamespace(fn="fit"),
            sanity_checking=False,
            fast_dev_run=False,
            global_step=step,
            callback_metrics={"m": torch.tensor(value), "validation/loss": torch.tensor(loss)},
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: True)),
            save_checkpoint=lambda path, step=step: saved.append(step),
        )
        checkpoints.on_validation_end(trainer, None)
    assert saved == ([2, 4, 6] if mode == "min" else [2, 5])
    # A checkpoint of an earlier version may say that nan was the best.
    checkpoints.load_state_dict({"best": nan, "reached": {"best": {"m": nan, "step": 1}}})
    trainer.callback_metrics["m"] = torch.tensor(9.0)
    checkpoints.on_validation_end(trainer, None)
    assert checkpoints.best == 9 and checkpoints.reached["best"]["step"] == len(values)
