"""Every example runs, and does what it promises."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from archzoo import contract
from archzoo.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script):
    # Found from the repository even where the package is not installed.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing may depend on where one stands
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    if script.stem == "write_your_own_mixer":
        check_own_mixer(done.stdout)


def check_own_mixer(printed):
    assert "BROKEN" not in printed
    assert printed.count("holds") == len(contract.CHECKS["mixer"])
    table = re.findall(r"^(\w+) +([\d,]+) +([\d,]+) bytes +> (\d+) %$", printed, re.MULTILINE)
    rows = {name: [float(x.replace(",", "")) for x in numbers] for name, *numbers in table}
    assert set(rows) == {"FadingMemory", "Retention", "Attention"}
    parameters, states, right = zip(*rows.values(), strict=True)
    assert max(parameters) - min(parameters) <= 0.02 * max(parameters)
    assert rows["FadingMemory"][1] == min(states) == 2 * 32 * 4  # layers, channels, float32
    assert min(right) >= 90, "chance is 2 %"


@pytest.mark.parametrize(
    "script",
    [
        path
        for folder in ("benchmarks", "examples", "data")
        for path in sorted((ROOT / folder).glob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8")
    ],
    ids=lambda path: path.stem,
)
def test_help_is_read_before_anything_runs(script, monkeypatch, capsys):
    class Asked(Exception):
        """Arguments are read."""

    def parse(self, *arguments, **more):
        raise Asked

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    try:
        with pytest.raises(Asked):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        for name in ("harness", "peers"):
            sys.modules.pop(name, None)
    assert not capsys.readouterr().out


def test_there_are_examples():
    assert "write_your_own_mixer" in [path.stem for path in EXAMPLES]


def test_own_mixer_passes_by_its_path(monkeypatch, capsys):
    """As `archzoo check write_your_own_mixer.FadingMemory`, run in examples/."""
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    arguments = ["check", "write_your_own_mixer.FadingMemory", "--init_args.memory", "20"]
    assert main(arguments) == 0
    assert "FadingMemory(memory=20" in capsys.readouterr().out
    assert main(["check", "write_your_own_mixer.FadingMemroy"]) != 0
    assert "nearest: FadingMemory" in capsys.readouterr().err
