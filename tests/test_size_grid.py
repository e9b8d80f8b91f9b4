"""archzoo grid of tasks whose problems are sequences: its counts, its files, that it resumes."""

import csv
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import archzoo
from archzoo.analysis.size_grid import ask, axes_of, possible
from archzoo.checkpoint import save_pretrained
from archzoo.cli import main
from archzoo.tasks import Recall, StateTracking

TASK = Recall(vocabulary=32, sizes=[[2, 16]], random_filler=False)


class LastValue(nn.Module):
    """Says the value of the newest pair, whatever it is asked for."""

    device = torch.device("cpu")

    def __init__(self, task):
        super().__init__()
        self.head = nn.Linear(task.vocab_size, task.vocab_size, bias=False)
        self.head.weight.data = torch.eye(task.vocab_size)

    def hidden(self, tokens):
        said = tokens[:, 3:4].expand_as(tokens)
        return nn.functional.one_hot(said, self.head.in_features).float(), None, {}


@pytest.mark.parametrize("at_once", [10**6, 100])
def test_labels_and_problems_are_counted(at_once):
    (labels, right), (rows, exact) = ask(LastValue(TASK), TASK, (2, 16), 50, at_once, nullcontext())
    assert (labels, right, rows, exact) == (100, 50, 50, 0)  # one of two values is the last


def test_the_axes_are_around_the_trained_sizes():
    assert axes_of(TASK, None, None) == ([1, 2, 4, 8], [4, 8, 16, 32, 64])
    assert axes_of(TASK, [3, 1], [24]) == ([1, 3], [24])
    assert axes_of(Recall(), None, None)[0] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert possible(TASK, (4, 16)) and not possible(TASK, (5, 16)) and not possible(TASK, (16, 64))
    with pytest.raises(ValueError, match=r"second \[0\] must hold positive numbers, length"):
        axes_of(TASK, None, [0])


def test_the_command_measures_what_is_missing_and_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    task = StateTracking("parity", [[4, 8]], [[4, 8], [16, 16]], held_out=4)
    model = archzoo.create_model("transformer_micro", vocab_size=task.vocab_size)
    save_pretrained(tmp_path / "model", model, task.tokenizer, task.config())
    command = ["grid", str(tmp_path / "model"), "--problems", "3", "--first", "[4,16]"]
    assert main([*command, "--second", "[8,16]"]) == 0
    said = capsys.readouterr().out
    assert "symbols" in said and "accuracy" in said and "trained" in said
    assert (tmp_path / "model" / "grid.png").stat().st_size > 5000
    with (tmp_path / "model" / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["kind"], int(row["first"]), int(row["second"])): row for row in rows}
    assert len(found) == 6  # 16 symbols do not fit in 8 tokens
    assert found["label", 16, 16]["problems"] == "48" and found["cell", 4, 8]["problems"] == "3"
    assert all(row["split"] == "test" for row in rows)
    assert main([*command, "--second", "[8]"]) == 0
    with (tmp_path / "model" / "grid.csv").open() as file:
        assert list(csv.DictReader(file)) == rows  # nothing was measured again
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command, "--second", "[8]"]) == 0
    assert "no grid.png: a figure needs matplotlib" in capsys.readouterr().out


def test_of_other_tasks_sizes_are_digits(tmp_path, capsys):
    task = archzoo.tasks.Addition(digits=1)
    model = archzoo.create_model("transformer_micro", vocab_size=task.vocab_size)
    save_pretrained(tmp_path / "model", model, task.tokenizer, task.config())
    assert main(["grid", str(tmp_path / "model"), "--first", "[4]"]) == 1
    assert "first and second are of tasks such as Recall" in capsys.readouterr().err
