"""Rows of measurements: what they hold, and what happens to those that are there."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from archzoo.analysis import evidence
from archzoo.analysis.evidence import FACTS, read_rows, write_rows


def test_rows_of_the_same_key_are_replaced_and_all_others_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHZOO_COMMIT", "first")
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, [{"arm": "a", "seed": 0, "loss": 3}, {"arm": "a", "seed": 1, "loss": 4}])
    monkeypatch.setenv("ARCHZOO_COMMIT", "second")
    again = [{"arm": "a", "seed": 1, "loss": 5, "bits": 2}, {"arm": "b", "seed": 1, "loss": 6}]
    assert write_rows(path, again, ("arm", "seed")) == path
    found = read_rows(path)
    told = [(row["arm"], row["seed"], row["loss"], row["bits"], row["commit"]) for row in found]
    assert told == [
        ("a", "0", "3", "", "first"),
        ("a", "1", "5", "2", "second"),
        ("b", "1", "6", "", "second"),
    ]
    assert list(found[0])[-len(FACTS) :] == list(FACTS)
    assert found[0]["torch"] == torch.__version__ and "threads" in found[0]["machine"]
    write_rows(path, [{"other": 1}])  # no key: anew
    assert [row["other"] for row in read_rows(path)] == ["1"]
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.csv"]


def test_a_row_keeps_facts_of_its_own(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [{"machine": "another", "value": None}])
    [row] = read_rows(path)
    assert row["machine"] == "another" and row["value"] == ""


def test_a_row_without_its_name_is_refused_before_anything_is_written(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [{"arm": "a"}])
    with pytest.raises(ValueError, match="lacks seed"):
        write_rows(path, [{"arm": "b"}], ("arm", "seed"))
    assert [row["arm"] for row in read_rows(path)] == ["a"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.csv", [{"arm": "a"}])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    with pytest.raises(OSError, match=r"rows.csv could not be written: No space left on device"):
        write_rows(path, [{"arm": "b"}], ("arm",))
    assert [row["arm"] for row in read_rows(path)] == ["a"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.csv"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written: "):
        write_rows(tmp_path / "file" / "rows.csv", [{"arm": "b"}])


def test_the_commit_is_of_this_repository_and_of_no_other_around_it(tmp_path, monkeypatch):
    monkeypatch.delenv("ARCHZOO_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(evidence, "ROOT", tmp_path / "lib" / "site-packages")
    assert evidence.commit().startswith("archzoo ")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    commit = ["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(commit, check=True)
    clean = evidence.commit()
    (tmp_path / "train.py").write_text("")
    assert evidence.commit() == f"{clean}+"


def test_the_command_is_as_it_is_typed(monkeypatch):
    for program in ("/usr/bin/archzoo", "/somewhere/archzoo/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, "bench", "a b"])
        assert evidence.command_line() == "archzoo bench 'a b'"
    monkeypatch.setattr(sys, "argv", ["benchmarks/moe.py", "--rounds", "3"])
    assert evidence.command_line() == "python benchmarks/moe.py --rounds 3"


def test_what_came_of_tests_on_a_gpu_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from gpu_tests import outcome

    counts = {"passed": 707, "failed": 24, "skipped": 7, "seconds": 156.7}
    assert outcome("24 failed, 707 passed, 7 skipped, 87 warnings in 156.70s (0:02:36)") == counts
    assert outcome("1 passed in 0.10s") == {"passed": 1, "failed": 0, "skipped": 0, "seconds": 0.1}
    with pytest.raises(ValueError, match="counts no tests"):
        outcome("KeyboardInterrupt")
