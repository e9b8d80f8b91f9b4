"""The tables of docs/ are what the rows of results/ say."""

import csv
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from archzoo.analysis import evidence
from archzoo.evaluation import results

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


def test_tables_of_speed_take_peers_from_a_file_of_their_own(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.speed_training() == tables.speed_decoding() == tables.speed_parts()
    columns = [
        "machine",
        "commit",
        "quantity",
        "contender",
        "length",
        "batch",
        "dtype",
        "median",
        "mfu",
        "memory_bytes",
        "stopped",
    ]
    train, decode, batch = ("training", "decode", "batch")
    rows = [
        (train, "retnet_base:fit", 2048, 16, "bf16-mixed", 500_000, 0.36, 2**34, ""),
        (train, "retnet_base:fit", 8192, 4, "bf16-mixed", "", "", "", "memory: full"),
        (train, "nanogpt:compiled", 2048, 16, "bf16-mixed", 400_000, 0.3, 2**33, ""),
        (decode, "retnet_base", 1024, 1, "bfloat16", 0.2, "", "", ""),
        (batch, "retnet_base", 8192, 64, "bfloat16", 60_000, "", "", ""),
    ]
    files = {"": rows, "-peers": [(decode, "fla", 1024, 1, "bfloat16", 7.25, "", "", "")]}
    files["-peers"].append((decode, "retnet_base", 1024, 1, "bfloat16", 0.3, "", "", ""))
    for name, some in files.items():
        some = [("a GPU", f"c{number}", *row) for number, row in enumerate(some)]
        with (tmp_path / f"{tables.BENCH}{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *some])
    lines = tables.speed_training().splitlines()
    assert lines[2] == "| `retnet_base:fit` | 500 (1.25), 36.0% | 16.0 | memory |  |  |  |"
    assert lines[3] == "| `nanogpt:compiled` | 400 (1.00), 30.0% | 8.0 |  |  |  |  |"
    lines = tables.speed_decoding().splitlines()
    assert lines[2] == "| `retnet_base` | 0.300 |  |  |  | 60,000 |"  # the later file's
    assert lines[3] == "| `fla` | 7.25 |  |  |  |  |"
    assert lines[4:] == ["", f"[The rows](../results/{tables.BENCH}.csv): a GPU, commit c1, c0, c4"]
    (tmp_path / f"{tables.BENCH}-decode.png").write_bytes(b"")
    assert tables.speed_decoding().endswith(f"![decode](../results/{tables.BENCH}-decode.png)")


def test_a_mixture_has_a_row_of_training_and_decoding(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [
        ("quantity", "contender", "parameters", "median", "memory_bytes"),
        ("training", "yuan_base:fit", 747_000_000, 250_000, 2**34),
        ("training", "skywork_base:fit", 700_000_000, "", ""),
        ("decode", "yuan_base", 747_000_000, 0.5, ""),
    ]
    with (tmp_path / f"{tables.BENCH}-mixtures.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert tables.speed_mixtures().splitlines()[2:] == [
        "| `yuan_base` | 747 M | 250,000 | 16.0 | 0.500 |",
        "| `skywork_base` |  |  |  |  |",
    ]


def test_a_profile_is_summed_by_what_kernels_are_for(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [
        ("contender", "length", "part", "ms", "step_ms"),
        ("a:fit", 2048, "norms", 1.25, 60),
        ("a:fit", 2048, "matrix products", 30, 60),
        ("a:fit", 2048, "norms", 2, 60),
        ("b:fit", 2048, "matrix products", 33, 64),
        ("b:fit", 8192, "matrix products", 99, 99),
    ]
    with (tmp_path / f"{tables.BENCH}-profile.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert tables.speed_parts().splitlines()[2:] == [
        "| matrix products | 30.0 | 33.0 |",
        "| norms | 3.2 |  |",
        "| all kernels | 33.2 | 33.0 |",
        "| a step | 60.0 | 64.0 |",
    ]


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


def test_verdicts_of_adapters_follow_the_rows(tables, monkeypatch, tmp_path):
    """Of the rows that count: at the chosen rate, paired by seed, by the rule of the file."""
    found = [
        {"arm": arm, "seed": seed, "chosen": "yes", "learning_rate": 0.01, "trainable": 4448}
        | {"test/loss": 1.0, "test/token_accuracy": value + seed / 100, "test/exact_match/base": 0}
        for arm, value in (("lora", 0.30), ("mora", 0.62))
        for seed in range(3)
    ]
    found.append(found[0] | {"chosen": "", "test/token_accuracy": 0.9})
    with (tmp_path / "x-claims-adaptation-memorisation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    line = next(li for li in tables.adaptation().splitlines() if "`mora` against" in li)
    assert "higher, by 46.0 points | +32.0 points | +32.0 to +32.0 (n = 3) | **holds** |" in line
    assert tables.adaptation().count(tables.NOT_RUN) > 10
    assert (
        "| memorisation | `mora` | 3 | 4,448 | 0.01 |  | 63.0 ± 1.0 | 1.000 ± 0.000 | 0.0 ± 0.0"
        in (tables.adaptation_arms())
    )


@pytest.mark.skipif(os.name != "posix", reason="there are no locks")
@pytest.mark.parametrize("kind", ["rows", "evaluations"])
def test_who_writes_at_the_same_moment_waits(kind, tmp_path, monkeypatch):
    """A second one begins while the first has read the file, and not written it yet."""
    module, read = (evidence, "read_rows") if kind == "rows" else (results, "read_results")
    original, others = getattr(module, read), []

    def write(name):
        if kind == "rows":
            evidence.write_rows(tmp_path / "table.csv", [{"name": name}], key=("name",))
        else:
            record = {"task": name, "checkpoint": "last.ckpt", "metrics": {}}
            results.write_results(tmp_path, [record])

    def reading(path):
        found = original(path)
        if not others:
            others.append(threading.Thread(target=write, args=("second",)))
            others[0].start()
            others[0].join(0.5)
        return found

    monkeypatch.setattr(module, read, reading)
    write("first")
    others[0].join()
    path = tmp_path / "table.csv" if kind == "rows" else tmp_path
    assert len(original(path)) == 2
    assert {file.name for file in tmp_path.iterdir()} <= {"table.csv", "eval.json", "eval.csv"}
