"""archzoo curves: several runs' logs as a table and a picture."""

import csv
import statistics

import pytest

from archzoo.cli import main

METRIC = "validation/exact_match/ood"
VALUES = {"first": [0.1, 0.9, 0.4], "second": [0.2, 0.5, 0.7]}


@pytest.fixture
def runs(tmp_path):
    for name, values in VALUES.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "train/loss", METRIC])
            writer.writeheader()
            for step, value in zip((10, 20, 30), values, strict=True):
                writer.writerow({"step": step - 5, "train/loss": 1.0})
                writer.writerow({"step": step, METRIC: value})
    return [str(tmp_path / name) for name in VALUES]


def cells(said):
    return {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}


def test_best_last_and_spread(runs, tmp_path, capsys):
    figure = tmp_path / "curves.png"
    assert main(["curves", *runs, "--figure", str(figure)]) == 0
    found = cells(capsys.readouterr().out)
    assert found["first"] == ["0.9000", "20", "0.4000", "30"]
    assert found["second"] == ["0.7000", "30", "0.7000", "30"]
    assert found["mean"] == ["0.8000", "0.5500"]
    deviation = [f"{statistics.stdev(pair):.4f}" for pair in ((0.9, 0.7), (0.4, 0.7))]
    assert found["standard"] == ["deviation", *deviation]
    assert found["least"] == ["0.7000", "0.4000"] and found["largest"] == ["0.9000", "0.7000"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_lower_is_better_where_it_is_said(runs, capsys):
    assert main(["curves", runs[0], "--lower"]) == 0
    assert cells(capsys.readouterr().out)["first"][:2] == ["0.1000", "10"]


def test_what_is_missing_is_named(runs, tmp_path, capsys):
    assert main(["curves", runs[0], "--metric", "validation/nothing"]) == 1
    said = capsys.readouterr().err
    assert "has no validation/nothing" in said and "; nearest: validation/" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["curves", str(empty)]) == 1
    assert f"{empty} holds no metrics.csv: give the directory" in capsys.readouterr().err
    (empty / "notes.txt").touch()
    assert main(["curves", str(empty / "notes.txt")]) == 1
    assert f"{empty / 'notes.txt'} is no file of a run" in capsys.readouterr().err
    (empty / "last.ckpt").touch()
    assert main(["curves", str(empty / "last.ckpt")]) == 1
    assert "the run ended before its first row" in capsys.readouterr().err


def test_without_a_metric_the_first_that_all_have_is_taken(runs, tmp_path, capsys):
    assert main(["curves", *runs]) == 0
    assert METRIC in capsys.readouterr().out
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "metrics.csv").write_text("step,train/loss,validation/loss\n1,2.0,\n5,,1.5\n9,,1.75\n")
    assert main(["curves", str(plain)]) == 0
    said = capsys.readouterr().out
    assert "validation/loss" in said
    assert cells(said)["plain"] == ["1.5000", "5", "1.7500", "9"]  # lower is better of a loss
    assert main(["curves", runs[0], str(plain)]) == 0
    assert "train/loss" in capsys.readouterr().out


def test_a_run_that_diverged_is_shown_as_nan(runs, tmp_path, capsys):
    path = tmp_path / "second" / "metrics.csv"
    path.write_text(path.read_text().replace("0.7", "nan"))
    assert main(["curves", *runs]) == 0
    found = cells(capsys.readouterr().out)
    assert found["second"][2] == "nan" and found["mean"][1] == "nan"
    assert found["standard"][2] == "nan" and found["first"][0] == "0.9000"


def test_every_column_is_drawn_by_default(runs, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "archzoo.analysis.curves.save", lambda figure, path: drawn.update({path: figure})
    )
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "first" / "metrics.csv"
    rows = ["step,train/loss,validation/loss,train/loss/balance/0,train/loss/balance/1,seconds"]
    log.write_text("\n".join([*rows, "1,2.0,,0.1,0.2,5", "2,1.0,1.5,0.1,0.3,9"]) + "\n")
    assert main(["curves", "first"]) == 0
    assert "drew first/curves.png" in capsys.readouterr().out
    (figure,) = drawn.values()
    seen = {
        panel.get_title(): {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        for panel in figure.axes
        if panel.axison
    }
    assert seen == {
        "loss": {"train": [2.0, 1.0], "validation": [1.5]},
        "loss/balance": {"train 0": [0.1, 0.1], "train 1": [0.2, 0.3]},
    }
    drawn.clear()
    assert main(["curves", *runs]) == 0  # beside the runs, not in one of them
    assert [path.name for path in drawn] == ["curves.png"]
    assert tmp_path.joinpath(*drawn).resolve().parent == tmp_path


def test_without_matplotlib_the_table_is_shown(runs, capsys, monkeypatch):
    def missing():
        raise ValueError("a figure needs matplotlib: pip install 'archzoo[plots]'")

    monkeypatch.setattr("archzoo.analysis.curves.pyplot", missing)
    assert main(["curves", runs[0]]) == 0
    said = capsys.readouterr().out
    assert "first" in said and "pip install 'archzoo[plots]'" in said
    assert main(["curves", runs[0], "--figure", "x.png"]) == 1


@pytest.mark.parametrize(
    ("again", "said"),
    [
        ("first", "first is given twice: name each run once"),
        ("first/metrics.csv", "first and first/metrics.csv are one run, given twice"),
        ("other", "first and other are one run, given twice"),
    ],
)
def test_a_run_that_is_given_twice_is_refused(runs, tmp_path, capsys, monkeypatch, again, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "first")
    assert main(["curves", "first", "second", again]) == 1
    assert said in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr("archzoo.analysis.curves.save", lambda figure, path: drawn.append(figure))
    for name in ("first", "second"):
        (tmp_path / name / "run").mkdir()
        (tmp_path / name / "metrics.csv").rename(tmp_path / name / "run" / "metrics.csv")
    assert main(["curves", "first/run", "second/run"]) == 0
    said = capsys.readouterr().out
    assert "first/run" in said and "second/run" in said
    (figure,) = drawn
    labels = {
        text.get_text(): line.get_color()
        for text, line in zip(
            figure.legends[0].get_texts(), figure.legends[0].get_lines(), strict=True
        )
    }
    assert labels["first/run"] != labels["second/run"]
