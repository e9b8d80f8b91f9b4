"""The lower ends of the bounds in pyproject.toml work: the oldest torch, Lightning and others."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def lowest(dependency: str) -> str:
    """name>=1.2,<3 as name==1.2, the extras of the name kept."""
    found = re.fullmatch(r"([\w.-]+(?:\[\w+\])?)>=([\d.]+)(?:,.*)?", dependency.replace(" ", ""))
    assert found, f"{dependency}: give it a lower bound"
    return f"{found[1]}=={found[2]}"


def test_every_dependency_has_a_lower_bound() -> None:
    assert lowest("jsonargparse[signatures]>=4.53,<5") == "jsonargparse[signatures]==4.53"
    assert [lowest(dependency) for dependency in DEPENDENCIES]


@pytest.mark.slow
def test_the_oldest_dependencies_train_test_and_decode(tmp_path: Path) -> None:
    """Ten minutes, most of them to install: the index may have no CPU build of an old torch."""
    subprocess.run([sys.executable, "-m", "venv", "oldest"], check=True, cwd=tmp_path)
    bin = tmp_path / "oldest" / "bin"
    pip = [str(bin / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted = [lowest(dependency) for dependency in DEPENDENCIES]
    torch = next(entry for entry in wanted if entry.startswith("torch=="))
    if index := os.environ.get("TORCH_INDEX"):  # as of the Makefile
        subprocess.run([*pip, "--no-deps", "--index-url", index, torch], check=True)
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    steps = "--model.preset retnet_micro --trainer.max_steps 4 --trainer.val_check_interval 2"
    for line in (
        f"fit addition {steps} --trainer.limit_val_batches 1",
        "fit --name addition --ckpt_path last --trainer.max_steps 6",
        "test --ckpt_path runs/addition/last.ckpt --trainer.limit_test_batches 1",
        "generate runs/addition 1+2= --check",
        "fit mixed --trainer.max_steps 2 --trainer.limit_val_batches 1 --data.cache_dir cache",
        "list",
        "show retnet_tiny",
    ):
        command = [str(bin / "archzoo"), *line.split()]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, line + done.stdout + done.stderr
