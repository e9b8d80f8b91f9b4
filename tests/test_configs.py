"""Every file in configs/ trains for some steps, and says why each of its keys is as it is."""

from pathlib import Path

import pytest
import yaml

from archzoo.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TINY = {
    "model": "--model.dim 16 --model.depth 2 --model.heads 2 --model.width 32",
    "Addition": "--data.batch_size 4 --data.validation_examples 8 --data.test_examples 8",
    "Text": "--data.batch_size 2 --data.context_length 32",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    task = content["data"]["class_path"]
    arguments = [
        *f"fit --config {path.relative_to(ROOT)} --trainer.max_steps 3".split(),
        *f"--trainer.default_root_dir {tmp_path} --trainer.val_check_interval 2".split(),
        *f"--trainer.limit_val_batches 2 --trainer.accelerator cpu {TINY['model']}".split(),
        *TINY[task].split(),
    ]
    if task == "Text":
        arguments += ["--data.cache_dir", str(tmp_path / "cache")]
    assert main(arguments) == 0
    run = tmp_path / path.stem
    assert {file.name for file in run.iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "metrics.csv",
        "config.yaml",
    }
    # What was saved is the same experiment: it parses, and trains again.
    again = ["fit", "--config", str(run / "config.yaml"), "--name", "again"]
    assert main(again) == 0
    assert (run / "metrics.csv").read_text().count("\n") == (
        tmp_path / "again" / "metrics.csv"
    ).read_text().count("\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_reads_like_prose(path):
    text = path.read_text()
    assert text.startswith("# "), "it opens by saying what it is"
    assert "seed_everything" in yaml.safe_load(text)
    assert all(len(line) <= 100 for line in text.splitlines())
