"""What `archzoo compare` and `archzoo bench` write with --report, in headless Chromium."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.extras

ROOT = Path(__file__).resolve().parents[2]


def archzoo(directory: Path, command: str) -> str:
    """Run a command in a directory; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "archzoo", *command.split()],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def opened(visit: Any, path: Path) -> Any:
    page = visit(path, offline=True)
    page.wait_for_selector("html[data-drawn]")
    return page


def test_compare(tmp_path: Path, visit: Any) -> None:
    printed = archzoo(
        tmp_path,
        f"compare {ROOT}/configs/addition.yaml --model.preset retnet_micro"
        " --model.mixer Retention,Attention --trainer.max_steps 4 --trainer.val_check_interval 2"
        " --trainer.log_every_n_steps 1 --data.batch_size 4 --data.validation_examples 4"
        " --data.test_examples 4 --output compared --report compared.html",
    )
    assert "wrote compared.html" in printed
    page = opened(visit, tmp_path / "compared.html")
    arms = page.locator("table.sortable").first.inner_text()
    assert "Retention" in arms and "Attention" in arms and "parameters" in arms
    plots = page.locator(".js-plotly-plot")
    assert plots.count() >= 2, "losses of training and validation"
    assert all(plot.locator("g.trace.scatter").count() >= 2 for plot in plots.all())
    assert "configs/addition.yaml" in page.locator("footer pre").inner_text()
    page.locator("summary").click()
    assert "arms.Attention.model.mixer" in page.locator("details table").inner_text()
    visit.photograph(page, "compare")


def test_bench(tmp_path: Path, visit: Any) -> None:
    printed = archzoo(
        tmp_path,
        "bench retnet_micro transformer_micro --decode --state --lengths 16,32,64"
        " --rounds 3 --minutes 0.5 --peers none --device cpu --output out/bench"
        " --report bench.html",
    )
    assert "wrote bench.html" in printed
    page = opened(visit, tmp_path / "bench.html")
    assert page.locator(".js-plotly-plot").count() == 2
    assert page.locator(".js-plotly-plot >> nth=1 >> g.trace.scatter").count() == 4
    state = page.locator("table.sortable >> nth=1")
    for size in ("retnet_micro", "8,216", "32,792"):
        assert size in state.inner_text()
    labels = page.locator(".js-plotly-plot >> nth=1 >> .xtick text").all_text_contents()
    assert labels == ["16", "32", "64"]
    assert page.get_by_text("transformer_micro's cache outgrows").count() == 1
    visit.photograph(page, "bench")
