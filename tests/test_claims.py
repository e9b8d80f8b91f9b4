"""The runner of the papers' claims: what it runs, and what it makes of a run's log."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

from archzoo.cli import main

ROOT = Path(__file__).parent.parent
CONFIG = """
seed_everything: 0
arms:
  loss: {}
  none: {model.feed_forward.balance: none}
model: {preset: skywork_micro, width: 8, feed_forward: MixtureOfExperts}
data: {class_path: Addition, init_args: {digits: 1, batch_size: 8}}
trainer: {accelerator: cpu, max_steps: 6, limit_val_batches: 1, log_every_n_steps: 1}
"""


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import claims

    yield claims
    for name in ("claims", "harness"):
        sys.modules.pop(name, None)


def test_runs_of_a_seed_come_together(claims, tmp_path):
    (tmp_path / "a.yaml").write_text(CONFIG)
    (tmp_path / "b.yaml").write_text("seed_everything: 0")
    runs = claims.plan([tmp_path / "a.yaml", tmp_path / "b.yaml"], None, [0, 7])
    assert [run.name for run in runs] == [
        "a_loss_0",
        "a_none_0",
        "b_0",
        "a_loss_7",
        "a_none_7",
        "b_7",
    ]
    assert [run.name for run in claims.plan([tmp_path / "a.yaml"], ["none"], [1])] == ["a_none_1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["none.yaml"], "no configuration none.yaml"), (["a.yaml", "--at_once", "0"], "at_once=0")],
)
def test_user_errors_are_one_line(claims, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", ["claims.py", *arguments])
    with pytest.raises(SystemExit, match=words):
        claims.main()


def test_a_row_says_what_the_log_says(claims, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(CONFIG)
    fit = ["fit", "--config", "a.yaml", "--arm", "loss", "--trainer.max_time", "00:00:10:00"]
    assert main([*fit, "--trainer.val_check_interval", "2"]) == 0
    row = claims.measure(Path("runs/a_loss"))
    with open("runs/a_loss/metrics.csv") as file:
        log = list(csv.DictReader(file))
    losses = {float(e["validation/loss"]): int(e["step"]) for e in log if e["validation/loss"]}
    assert len(losses) == 3 and row["steps"] == 6
    assert row["validation/loss/best"] == pytest.approx(min(losses), abs=1e-5)
    best = torch.load("runs/a_loss/best.ckpt", weights_only=True)
    assert row["best_step"] == best["global_step"] in losses.values()
    assert row["cut_short"] == ""
    settings = yaml.safe_load(Path("runs/a_loss/config.yaml").read_text())
    for changed in (
        {"max_steps": 7},
        {"max_steps": -1, "max_epochs": 1, "max_time": "00:00:00:00"},
    ):
        with open("runs/a_loss/config.yaml", "w") as file:
            yaml.safe_dump(settings | {"trainer": settings["trainer"] | changed}, file)
        assert claims.measure(Path("runs/a_loss"))["cut_short"] == "yes"
    matches = [float(e["validation/exact_match"]) for e in log if e["validation/exact_match"]]
    assert row["validation/exact_match/best"] == pytest.approx(max(matches), abs=1e-5)
    # One row a step is a tenth of the log or less: first and last are single steps.
    rates = [
        (float(e["train/metric/drop_rate/0"]) + float(e["train/metric/drop_rate/1"])) / 2
        for e in log
        if e["train/loss"]
    ]
    assert len(rates) == 6
    for when, value in (("first", rates[0]), ("highest", max(rates)), ("last", rates[-1])):
        assert row[f"train/metric/drop_rate/{when}"] == pytest.approx(value, rel=1e-4)
    assert 0 < row["active"] < row["parameters"]


def test_rows_of_other_variants_and_seeds_stay(claims, tmp_path, monkeypatch):
    import harness

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setenv("ARCHZOO_COMMIT", "abc")
    runs = [claims.Run(Path("a.yaml"), arm, seed) for arm, seed in (("x", 0), ("x", 1), ("y", 0))]
    monkeypatch.setattr(claims.torch.cuda, "is_available", lambda: False)
    claims.write(Path("a.yaml"), {runs[0]: {"arm": "x", "seed": 0, "old": 1}})
    rows = {
        runs[0]: {"arm": "x", "seed": 0, "new": 2},
        runs[1]: {"arm": "x", "seed": 1, "new": 3},
    }
    claims.write(Path("a.yaml"), rows)
    claims.write(Path("a.yaml"), {runs[2]: {"arm": "y", "seed": 0, "new": 4}})
    (path,) = (tmp_path / "results").iterdir()
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], row["new"]) for row in found] == [
        ("x", "0", "2"),
        ("x", "1", "3"),
        ("y", "0", "4"),
    ]
    assert all(row["machine"] and row["commit"] and row["command"] for row in found)
