"""The first command's recipe works whatever the seed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_command_learns_to_add_whatever_the_seed(tmp_path, seed):
    def run(*arguments: str) -> None:
        command = [sys.executable, ROOT / "train.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    config = str(ROOT / "configs" / "addition.yaml")
    run("fit", "--config", config, "--seed_everything", str(seed))
    run("test", "--ckpt_path", "runs/addition/last.ckpt")
    columns, row = (tmp_path / "runs/addition/test.csv").read_text().splitlines()
    found = dict(zip(columns.split(","), row.split(","), strict=True))
    assert float(found["test/exact_match"]) >= 0.99
