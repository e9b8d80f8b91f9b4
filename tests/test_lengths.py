"""Exact match against length: what is one arm, how far a run reaches, the table and the figure."""

import csv
import sys
from pathlib import Path

import pytest

from archzoo.cli import main

ROOT = Path(__file__).parent.parent
CONFIG = """
seed_everything: 0
arms:
  shift_1: {model.embedding.init_args.max_shift: 1}
  shift_2: {model.embedding.init_args.max_shift: 2}
  shift_4: {model.embedding.init_args.max_shift: 4}
model:
  preset: abacus_micro
  embedding: {class_path: AbacusEmbedding, init_args: {coupled: true, rows: 32}}
data: {class_path: Addition, init_args: {digits: 2, batch_size: 8}}
trainer: {accelerator: cpu, max_steps: 1, limit_val_batches: 1}
"""


@pytest.fixture
def lengths(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import harness
    import lengths

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    yield lengths
    for name in ("lengths", "harness"):
        sys.modules.pop(name, None)


def row(run, right, coverage=9, parameters=100):
    """A run that gets sums of up to that many digits right, of 1 to 12."""
    entries = {f"digits_{n}": 1.0 if n <= right else 0.0 for n in range(1, 13)}
    facts = {"run": run, "trained_digits": 4, "coverage": coverage, "parameters": parameters}
    return facts | {"inside": 1.0, "beyond": 0.5} | entries


def test_runs_of_one_variant_are_those_that_differ_in_their_seed(lengths):
    rows = [row("claim_b_0", 5), row("claim_a_0", 6, ""), row("claim_b_1", 7)]
    rows += [row("shift_1", 4, 5), row("shift_2", 5, 6), row("alone", 3, parameters=7)]
    variants = lengths.variants_of(rows)
    assert {name: [run["run"] for run in runs] for name, runs in variants.items()} == {
        "claim_a_0": ["claim_a_0"],
        "shift_1": ["shift_1"],  # other coverages: no seeds
        "shift_2": ["shift_2"],
        "claim_b": ["claim_b_0", "claim_b_1"],
        "alone": ["alone"],
    }
    assert list(variants)[:3] == ["claim_a_0", "shift_1", "shift_2"]


def test_how_far_a_run_reaches(lengths):
    span = list(range(1, 13))
    assert lengths.reach(row("run", 7), span) == 7
    assert lengths.reach(row("run", 0), span) == 0
    assert lengths.reach(row("run", 2) | {"digits_5": 0.1, "digits_6": 0.09}, span) == 5


def test_the_law_has_a_panel_where_variants_reach_differently(lengths, tmp_path, monkeypatch):
    drawn = []

    def keep(figure, path):
        drawn.append(figure)

    monkeypatch.setattr(lengths, "save", keep)
    span = list(range(1, 13))
    law = [row(f"arm_{n}_{seed}", n + 4, n + 5) for n in range(4) for seed in range(2)]
    lengths.draw(law, span, tmp_path / "law.png")
    lines, points = drawn[0].axes
    labels = [line.get_label() for line in lines.lines if "seeds" in line.get_label()]
    assert labels == [f"arm {n}, 2 seeds" for n in range(4)]
    at = sorted(line.get_xdata()[0] for line in lines.lines if line.get_linestyle() == ":")
    assert at == [4.5, 5.5, 6.5, 7.5]  # between the last that can be right and the next
    marks = [line for line in points.lines if line.get_marker() == "o"]
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in marks] == [(n, n) for n in range(4, 8)]
    lengths.draw([row("one", 5), row("two", 6)], span, tmp_path / "same.png")
    assert len(drawn[1].axes) == 1


def test_trained_runs_give_a_table_and_a_figure(lengths, tmp_path, monkeypatch, capsys):
    config = tmp_path / "law.yaml"
    config.write_text(CONFIG)
    runs = []
    for shift in (1, 2, 4):
        runs.append(tmp_path / "runs" / f"law_shift_{shift}_0")
        arguments = ["fit", "--config", str(config), "--arm", f"shift_{shift}"]
        place = ["--name", runs[-1].name, "--trainer.default_root_dir", str(tmp_path / "runs")]
        assert main([*arguments, *place]) == 0
    arguments = ["--longest", "9", "--problems", "5", "--checkpoint", "last", "--name", "law"]
    monkeypatch.setattr(sys, "argv", ["lengths.py", *map(str, runs), *arguments])
    lengths.main()
    assert "law_shift_4_0" in capsys.readouterr().out
    [table] = (tmp_path / "results").glob("*-law.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["coverage"]) for row in rows] == [4, 5, 7]
    assert all(0 <= float(row["digits_9"]) <= 1 for row in rows)
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
