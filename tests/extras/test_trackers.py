"""`fit --tracker`: a run without a network, and the same one when it is resumed."""

import json
import sqlite3
from pathlib import Path

import pytest

from archzoo.cli import main

pytestmark = pytest.mark.extras

RUN = """
model: {preset: retnet_micro, warmup_steps: 2}
data: {class_path: Addition, init_args: {digits: 2, batch_size: 4, validation_examples: 8}}
trainer: {accelerator: cpu, max_steps: 3, log_every_n_steps: 1, limit_val_batches: 0}
"""


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """Trains three steps with a tracker, and two more; the content of trackers.json."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no one has logged in
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    Path("run.yaml").write_text(RUN)

    def run(tracker):
        given = ["fit", "--config", "run.yaml", f"--tracker={tracker}", "--sample_every=3"]
        assert main([*given, "--name=first"]) == 0
        note = json.loads(Path("runs/first/trackers.json").read_text())
        more = ["--resume=auto", "--trainer.max_steps=5"]
        assert main([*given, "--name=first", *more]) == 0
        assert json.loads(Path("runs/first/trackers.json").read_text()) == note
        return note[tracker]

    return run


def test_wandb_is_kept_on_this_machine(twice):
    name = twice("wandb")
    found = sorted(Path("runs/first/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(found) == 2  # `wandb sync` makes one run of those of one name
    first = found[0].read_bytes()
    assert b"train/loss" in first and b"retnet_micro" in first and b"samples" in first


def test_mlflow_continues_the_run(twice):
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    name = twice("mlflow")
    run = client.get_run(name)
    assert [m.step for m in client.get_metric_history(name, "train/loss")] == [1, 2, 3, 4, 5]
    assert run.data.params["model.preset"] == "retnet_micro" and run.info.run_name == "first"
    assert [a.path for a in client.list_artifacts(name, "samples")] == ["samples/00000003.txt"]


def test_trackio_continues_the_run(twice):
    assert twice("trackio") == "first"
    (database,) = Path("trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    losses = [step for name, step, text in rows if name == "first" and "train/loss" in str(text)]
    assert sorted(losses) == [1, 2, 3, 4, 5]
