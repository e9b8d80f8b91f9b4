"""Every example runs, and does what it promises."""

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readme import blocks, missing

import archzoo
from archzoo import contract, registry
from archzoo.cli import main
from archzoo.registry import get_preset

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FASTER = {"compare_mixers": ("--seeds", "0")}
IN_EXTRAS = ["write_a_report"]  # needs an extra that is not in dev: run in tests/extras/


def run(python, script, *arguments):
    # Found from the repository even where the package is not installed.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [python, script, *arguments],
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "script", [p for p in EXAMPLES if p.stem not in IN_EXTRAS], ids=lambda path: path.stem
)
def test_example(script, tmp_path, monkeypatch, programs):
    monkeypatch.chdir(tmp_path)  # nothing may depend on where one stands
    done = run(programs / "python", script, *FASTER.get(script.stem, ()))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    check[script.stem](done.stdout)
    shown = [text for code, text in blocks("bash") if f"python examples/{script.name}\n" in code]
    assert all(missing(text, done.stdout) == [] for text in shown)


def test_the_readme_shows_what_an_example_prints():
    named = [text for code, text in blocks("bash") if "python examples/" in code]
    assert named and all(named)


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


def check_own_task(printed):
    rows = [line.split() for line in printed.splitlines()[:3]]
    assert [row[0] for row in rows] == ["position", "token", "label"]
    letters, digits, labels = rows[1][1::2], rows[1][2::2], rows[2][1:]
    said = dict(zip(letters[:2], digits[:2], strict=True))
    assert labels == [*"....", said[letters[2]], ".", said[letters[3]]]
    assert int(re.search(r"answers (\d+)% of 500 rows", printed)[1]) >= 40, "chance is 1 %"


def check_own_router(printed):
    assert "BROKEN" not in printed
    assert printed.count("holds") == len(contract.CHECKS["router"])
    table = re.findall(r"^(\w+) +(\d\.\d+) +(\d+)%$", printed, re.MULTILINE)
    busiest = {name: int(share) for name, _, share in table}
    assert busiest["CappedRouter"] < busiest["LinearRouter"], "an even load is 12 %"


def check_own_preset(printed):
    table = re.findall(r"^(\w+) +([\d,]+) +([\d,]+) bytes$", printed, re.MULTILINE)
    rows = {name: [float(x.replace(",", "")) for x in numbers] for name, *numbers in table}
    parameters = [count for name, (count, _) in rows.items() if name.endswith("_tiny")]
    assert max(parameters) - min(parameters) <= 0.02 * max(parameters)
    assert rows["retnet_tiny"][1] < rows["hybrid_tiny"][1] < rows["transformer_tiny"][1]


def check_how_far(printed):
    rows = re.findall(r"^ +\d +([\d.]+) +([\d.]+) +(\d+)$", printed, re.MULTILINE)
    assert len(rows) == 8
    for predicted, measured, one_percent in rows:
        assert float(measured) == pytest.approx(float(predicted), rel=0.01)
        assert int(one_percent) == pytest.approx(6.64 * float(predicted), rel=0.01)


def check_side_by_side(printed):
    assert printed.count("three four, knock at the door; five six, pick up sticks;") >= 2
    sizes = re.findall(r"^(\w+_micro): 200 tokens, state ([\d,]+) bytes", printed, re.MULTILINE)
    state = {name: int(size.replace(",", "")) for name, size in sizes}
    assert state["transformer_micro"] > 5 * state["retnet_micro"]
    assert "the same at every token" in printed


def check_compare(printed):
    rows = re.findall(r"^\| (Retention|Attention) \| 1 \| (31,\d+) \|", printed, re.MULTILINE)
    assert [name for name, _ in rows] == ["Retention", "Attention"]
    assert "one seed: an anecdote" in printed and ": matched" in printed


def check_bench(printed):
    assert re.search(r"^ +256 +8,216 +131,096 *$", printed, re.MULTILINE), "bytes of state"
    assert "Attention's cache outgrows" in printed and "bench.csv" in printed
    assert (
        len(re.findall(r"^ +decode +\d+ +retnet_micro:\w+: [\d.]+ ms", printed, re.MULTILINE)) == 6
    )


def check_conversation(printed):
    assert "saved:     25 tokens in 8,216 bytes" in printed
    assert "without a pause: the same tokens" in printed
    assert "asked:     three four, knock at the door" in printed
    assert re.findall("^forked: .*, then (.)$", printed, re.MULTILINE) == ["o", "i"]


def check_reading(printed):
    kept = re.search(r"stopped: ([\d,]+) tokens are kept", printed)[1]
    assert f"resumed: from byte {kept} of 31,092" in printed, "a token is a byte here"
    assert "31,092 tokens; the state has 8,216 bytes" in printed
    assert "as in one go: bit for bit" in printed


def check_beams(printed):
    greedy, searched = re.split(r"^\d beams?, ", printed, flags=re.MULTILINE)[1:]
    best = [
        {
            prompt: max(float(p) for p in re.findall(rf"log p +(-[\d.]+)  {prompt}", said))
            for prompt in ("one two, ", "a big ")
        }
        for said in (greedy, searched)
    ]
    assert best[1]["one two, "] > best[0]["one two, "] and best[1]["a big "] >= best[0]["a big "]
    assert "state 16,432 bytes" in printed and "state 131,456 bytes" in printed


def check_adapted(printed):
    assert "trained : one two, buckle my shoe" in printed
    assert "adapted : one two, the sky is blue; three four" in printed
    assert "off     : what it wrote before" in printed
    assert "merged  : what it wrote adapted" in printed


def check_started(printed):
    assert "shoes, 2,048 numbers: one two, buckle my shoe; three four, knock" in printed
    assert "skies, 2,048 numbers: one two, the sky is blue; three four, sea" in printed
    assert printed.count("its state: 8,192 bytes, as without") == 2
    assert float(re.search(r"against reading it: (\S+)$", printed, re.MULTILINE)[1]) < 1e-4


check = {
    "adapt_a_trained_model": check_adapted,
    "beam_search": check_beams,
    "bench_mixers": check_bench,
    "compare_mixers": check_compare,
    "decode_side_by_side": check_side_by_side,
    "how_far_a_head_reads": check_how_far,
    "keep_a_conversation": check_conversation,
    "learn_where_to_start": check_started,
    "read_a_long_document": check_reading,
    "write_your_own_mixer": check_own_mixer,
    "write_your_own_preset": check_own_preset,
    "write_your_own_router": check_own_router,
    "write_your_own_task": check_own_task,
}


TRAINS = [
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--data.batch_size", "4"),
]
PROBLEMS = ["--data", "Addition", "--data.validation_examples", "4", "--data.test_examples", "4"]


def commands(script):
    """The commands that an example's docstring says, in order, as lists of words."""
    source = (ROOT / f"examples/{script}.py").read_text(encoding="utf-8")
    joined = ast.get_docstring(ast.parse(source)).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in joined.splitlines() if line[4:12] == "archzoo "]


@pytest.fixture(autouse=True)
def unregistered(monkeypatch):
    """A model that an example registers is known to its test alone."""
    monkeypatch.setattr(registry, "_presets", {n: get_preset(n) for n in archzoo.list_models()})


@pytest.fixture
def in_examples(tmp_path, monkeypatch):
    """The examples lie beside the user, in a directory that is otherwise empty."""
    for path in EXAMPLES:
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for path in EXAMPLES:
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("script", ["write_your_own_task", "write_your_own_router"])
def test_an_example_s_commands(in_examples, capsys, script):
    """What the docstring says to type, with fewer steps."""
    said = commands(script)
    assert len(said) == 2
    for words in said:
        few = TRAINS if words[0] == "fit" else []
        few = [*few, *PROBLEMS[2:]] if "Addition" in words else few
        assert main([*words, *few]) == 0, capsys.readouterr().err


def test_an_own_family_from_the_command_line(in_examples, capsys):
    listing, showing, fitting = commands("write_your_own_preset")
    assert main(listing) == 0
    assert re.search("hybrid_micro +FadingMemory .*hybrid_tiny", capsys.readouterr().out, re.DOTALL)
    assert main(showing) == 0
    assert "write_your_own_mixer" in capsys.readouterr().out
    assert main([*fitting, *PROBLEMS[2:], *TRAINS]) == 0
    mine = ["--import", "write_your_own_preset"]
    last = "runs/hybrid_micro/last.ckpt"
    assert main(["fit", *mine, "--ckpt_path", last, "--trainer.max_steps", "3"]) == 0
    assert main(["generate", *mine, last, "1+2="]) == 0
    assert capsys.readouterr().out.count("1+2=") == 1
    assert main(["grid", *mine, last, "--problems", "2", "--digits", "1"]) == 0


def test_an_own_task_goes_through_every_command(in_examples, capsys):
    fit = commands("write_your_own_task")[0]
    mine = ["--import", "write_your_own_task"]
    last = ["--ckpt_path", "runs/retnet_micro/last.ckpt"]
    assert main([*fit, *TRAINS]) == 0
    assert main(["fit", *mine, *last, "--trainer.max_steps", "4"]) == 0
    for command in ("validate", "test", "predict"):
        assert main([command, *mine, *last]) == 0
    printed = capsys.readouterr().out
    assert re.search(r'"text": "\w\d\w\d\w", "asked": "\d\d", "predicted": "\w\w"', printed)
    # It asks no problems of two sizes, so there is no grid of it; and without its module nothing.
    assert main(["grid", *mine, last[1]]) == 1
    assert "was not trained on" in capsys.readouterr().err
    commands_without = [["test", *last], ["fit", *last], ["predict", *last], ["grid", last[1]]]
    code = f"from archzoo.cli import main; print([main(words) for words in {commands_without}])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "[1, 1, 1, 1]"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 4 and all("--import write_your_own_task" in line for line in lines)


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
        sys.modules.pop("harness", None)
    assert not capsys.readouterr().out


def test_there_are_examples():
    assert [path.stem for path in EXAMPLES] == sorted([*check, *IN_EXTRAS])


def test_own_mixer_passes_by_its_path(monkeypatch, capsys):
    """As `archzoo check write_your_own_mixer.FadingMemory`, run in examples/."""
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    arguments = ["check", "write_your_own_mixer.FadingMemory", "--init_args.memory", "20"]
    assert main(arguments) == 0
    assert "FadingMemory(memory=20" in capsys.readouterr().out
    assert main(["check", "write_your_own_mixer.FadingMemroy"]) != 0
    assert "nearest: FadingMemory" in capsys.readouterr().err
