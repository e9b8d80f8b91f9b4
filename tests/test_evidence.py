"""The tables of docs/ are what the rows of results/ say."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    yield tables
    sys.modules.pop("tables", None)


def test_tables_are_current(tables):
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.written(text) == text, f"{page.name}: run python benchmarks/tables.py"


def test_every_table_stands_somewhere(tables):
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert set(re.findall(r"<!-- table: (\w+) -->", pages)) == set(tables.TABLES)


def test_a_changed_number_is_seen(tables):
    page = "before\n<!-- table: coverage -->\n| 1 |\n<!-- end -->\nafter"
    assert "| 20 | 27 |" in tables.written(page)
    with pytest.raises(SystemExit, match="no table 'x'"):
        tables.written("<!-- table: x -->\n<!-- end -->")


def test_the_peer_is_shown_at_its_better_form_in_each_pass(tables):
    lines = tables.kernels().splitlines()
    text = "\n".join(lines)
    assert "0.456 / 1.585" in text and "0.200 / 0.791" in text  # its chunk form has 0.566 and 0.203
    rows = tables.rows_of(f"{tables.H100}-bf16-retention-kernels")
    assert len(lines) - 2 == 2 * len(
        {(r["heads"], r["dk"], r["dv"], r["time"]) for r in rows if r["pass"] != "step"}
    )


def test_links_to_results_exist(tables):
    for page in [*tables.PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(((?:\.\./)*results/[^)]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).resolve().is_file(), f"{page.name}: {target}"


def test_runs_are_named_by_what_tells_them_apart(tables, monkeypatch):
    import lengths

    names = ["abacus_coverage_shift_0_0", "abacus_coverage_shift_10_0"]
    assert list(lengths.titles(names).values()) == ["shift 0", "shift 10"]
    assert list(lengths.titles(["abacus_rope_0", "abacus_nope_0"]).values()) == ["RoPE", "NoPE"]
    assert lengths.titles(["mine"]) == {"mine": "mine"}
    compared = ["rope_lr0.001_1a2b3c_0", "abacus_rope_lr1e-05_ffffff_0"]
    assert list(lengths.titles(compared).values()) == ["RoPE", "Abacus and RoPE"]
    sys.modules.pop("lengths", None)
    sys.modules.pop("harness", None)
