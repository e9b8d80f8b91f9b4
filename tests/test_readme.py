"""The README is true: its table is generated, its commands run, its Python prints what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readme import README, blocks, missing, parts, unspaced

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    return [line for code, _ in blocks("bash") for line in code.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands need, so that they leave nothing in the real one."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("archzoo", "configs", "data", "examples"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    demo = place / "configs" / "demo.yaml"
    text, shortened = re.subn(r"max_steps: \d+", "max_steps: 3", demo.read_text(encoding="utf-8"))
    assert shortened == 1
    demo.write_text(re.sub(r"val_check_interval: \d+", "val_check_interval: 3", text))
    for name in ("train.py", "Makefile", "constraints.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place / name)
    # `make train` sets up no extra: what needs one must say so where it stands.
    (place / "tensorboard.py").write_text("raise ImportError('no extra is here')\n")
    return place


def run(command: list[str], place: Path, *first: Path) -> str:
    """What a command prints; programs are found in these directories before all others."""
    path = [*map(str, first), str(BIN), os.environ["PATH"]]
    environment = dict(os.environ, PATH=os.pathsep.join(path))
    environment["PYTHONPATH"] = str(place)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_zoo_table_is_current() -> None:
    # In a process of its own: other tests may have registered models in this one.
    command = [sys.executable, "-m", "archzoo", "list", "--markdown"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = re.search(r"<!-- archzoo list --markdown -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert table is not None
    assert table.group(1).strip() == printed.strip()


def test_its_python_prints_what_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it writes a model
    found = blocks("python")
    assert found
    for code, expected in found:
        exec(compile(code, "README.md", "exec"), {})
        assert capsys.readouterr().out == expected


def test_every_command_is_run_by_a_test() -> None:
    known = {"make train", "make test"} | set(SHELL)
    assert set(commands()) == known


SHELL = [line for line in commands() if not line.startswith("make ")]


# Less of what takes minutes; the last of two values counts.
SHORTER = {
    "bench": ["--lengths", "16,32", "--decode", "--state", "--minutes", "0.5"],
    "compare": [
        *("--model.preset", "retnet_micro", "--seeds", "0", "--learning_rates", "1e-3"),
        *("--trainer.max_steps", "3", "--trainer.val_check_interval", "3"),
        *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
    ],
    "demo": ["--max_tokens", "3"],
}


def test_its_shell_commands_run_in_order(checkout: Path, programs: Path) -> None:
    for code, shown in blocks("bash"):
        printed = ""
        for line in code.splitlines():
            words = shlex.split(line)
            if words[0] == "make" or words[1].startswith("examples/"):
                continue  # which other tests run
            assert words[0] in ("python", "archzoo")
            if "fit" in words:  # the whole of it is `make train`
                steps = "6" if "--ckpt_path" in words else "3"  # resumed, it has to train further
                words += ["--trainer.max_steps", steps, "--trainer.val_check_interval", "3"]
                words += ["--trainer.limit_val_batches", "1"]
            if "test" in words:
                words += ["--trainer.limit_test_batches", "2"]
            words += SHORTER.get(words[1], [])
            added = run(words, checkout, programs)
            assert added.strip()
            printed += added
        if printed:
            assert missing(shown, printed) == []


def test_a_line_that_is_left_out_needs_dots() -> None:
    printed = unspaced("a\n\nb \nc\nd\n")
    assert all(f"\n{part}\n" in printed for part in parts("...\na\nb\n...\nd\n"))
    assert parts("a\nc\n") == ["a\nc"] and "\na\nc\n" not in printed


def test_make_train_in_few_steps(checkout: Path, programs: Path) -> None:
    output = run(["make", "train", "-o", "setup", f"BIN={programs}", "STEPS=4"], checkout)
    assert "runs/addition" in output
    assert "Training a small RetNet to add" in output  # before the imports, which take seconds


@pytest.mark.slow
def test_make_train_in_full_learns_to_add(checkout: Path) -> None:
    output = run(["make", "train", "-o", "setup", f"BIN={BIN}"], checkout)
    exact = re.findall(r"test exact match +([\d.]+) %", output)
    assert exact, output
    assert float(exact[-1]) >= 98
