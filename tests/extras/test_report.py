"""The report in headless Chromium: it loads without an error, draws, sorts and needs no network."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from archzoo.analysis.report import Cell, Chart, Series, Table, charts, write_report

pytestmark = pytest.mark.extras

ROOT = Path(__file__).resolve().parents[2]

HOSTILE = "</script><script>window.alerted = 1</script><img src=x onerror='window.alerted = 1'>"
LENGTHS = [256 * 2**n for n in range(8)]


def latency(name: str, first: float, gap: int | None = None) -> Series:
    values = [first * length**1.2 for length in LENGTHS]
    if gap is not None:
        values[gap] = math.nan
    return Series(name, LENGTHS, values, [0.8 * v for v in values], [1.3 * v for v in values])


RESULTS = Table(
    "Results",
    ["arm", "parameters", "loss", "difference", "state at 16k"],
    [
        ["Retention", 812160, 1.5234, "−0.03 ± 0.01", Cell(16384, "16 KiB")],
        [HOSTILE, 90, math.nan, "0.2 ± 0.1", Cell(2**21, "2 MiB")],
        ["Attention", 1_000_000, 0.9, "0.10 ± 0.02", Cell(900, "900 B")],
        ["arm 10", 1, math.inf, None, None],
        ["arm 9", 2, -1.0, 4, Cell(3, "3 B")],
    ],
    note="± is the standard deviation of three seeds.",
)
STEPS = list(range(1, 200))
LOSS = Chart(
    "Training loss",
    "step",
    "loss",
    [
        Series(
            "Retention",
            STEPS,
            *([scale / (1 + n / 40) for n in STEPS] for scale in (4.0, 3.7, 4.3)),
        ),
        Series(HOSTILE, [1, 50, 199], [4, 2, None]),
    ],
)
LATENCY = Chart(
    "Decode latency",
    "context length, tokens",
    "ms a token",
    [latency("retnet_tiny", 0.001), latency("transformer_tiny", 0.0005, gap=3)],
    log_x=True,
    log_y=True,
    note="The band is the range of five runs.",
)
MANY = Chart(
    "Fifty curves",
    "step",
    "loss",
    [
        Series(f"run {n} at learning rate {n}e-3", STEPS, [n / 9 + math.sin(x / 9) for x in STEPS])
        for n in range(50)
    ],
)
EMPTY = Chart("Nothing", "x", "y", [Series("a", [], []), Series("b", [1], [math.inf])])
SECTIONS = ["In a sentence.", RESULTS, Table("Empty", ["a"], []), LOSS, LATENCY, EMPTY]
SETTINGS = {"model": {"preset": "retnet_micro"}, "seeds": [0, 1, 2], HOSTILE: HOSTILE}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = "archzoo compare configs/claims/retnet.yaml --report report.html"
    path = tmp_path_factory.mktemp("report") / "report.html"
    settings = {"command": command, "settings": SETTINGS}
    return write_report(path, "Retention or attention?", **settings, sections=SECTIONS)


def drawn(page: Any) -> Any:
    """The page once its plots are there."""
    page.wait_for_selector("html[data-drawn]")
    return page


def column(page: Any, number: int) -> list[str]:
    return page.locator(
        f"table.sortable >> nth=0 >> tbody td:nth-child({number})"
    ).all_inner_texts()


@pytest.mark.parametrize("chart", [LOSS, LATENCY, MANY, EMPTY], ids=lambda chart: chart.title)
def test_figures_are_plotly_s(chart: Chart) -> None:
    """Its Python half knows every property and checks it."""
    import plotly.graph_objects as plotly

    figure = charts.figure(chart)
    plotly.Figure(data=figure["data"], layout=figure["layout"])


def test_it_loads_draws_and_needs_no_network(report: Path, visit: Any) -> None:
    page = drawn(visit(report, offline=True))
    assert visit.loaded == [report.resolve().as_uri()]
    plots = page.locator(".js-plotly-plot")
    assert plots.count() == 3
    traces = [plot.locator("g.trace.scatter").count() for plot in plots.all()]
    assert traces[:2] == [3, 4], "curves and their bands"
    assert plots.nth(0).locator("path.js-line").count() >= 3
    assert plots.nth(0).locator("path.js-fill").count() == 1
    labels = page.locator(".js-plotly-plot >> nth=1 >> .xtick text").all_text_contents()
    assert labels[0] == "256" and labels[-1] == "32,768", "what was measured, on a logarithmic axis"
    buttons = page.locator(".js-plotly-plot >> nth=0 >> .modebar-btn")
    assert buttons.count() == 4, "none that uploads"
    assert page.get_by_text("There is nothing to draw.").count() == 1
    assert page.evaluate("window.alerted") is None
    assert page.locator("img").count() == 0
    assert page.title() == "Retention or attention?"
    visit.photograph(page, "report")


def test_its_policy_holds_without_escaping(report: Path, visit: Any) -> None:
    """Were a name let through as HTML, its script would still not run."""
    text = report.read_text(encoding="utf-8")
    bad = report.with_name("bad.html")
    bad.write_text(text.replace("<main>", f"<main>{HOSTILE}"), encoding="utf-8")
    page = drawn(visit(bad))
    page.locator("img").wait_for(state="attached")
    assert page.evaluate("window.alerted") is None
    assert any("Content Security Policy" in error for error in visit.errors)
    visit.errors.clear()
    visit.loaded.clear()


def test_tables_sort(report: Path, visit: Any) -> None:
    page = drawn(visit(report))
    heading = page.locator("table.sortable >> nth=0 >> th")

    def sort(number: int) -> list[str]:
        heading.nth(number - 1).get_by_role("button").click()
        return column(page, number)

    assert sort(2) == ["1", "2", "90", "812,160", "1,000,000"]
    assert sort(2) == ["1,000,000", "812,160", "90", "2", "1"]
    assert sort(3) == ["-1.000", "0.9000", "1.523", "∞", "NaN"]
    assert sort(3) == ["∞", "1.523", "0.9000", "-1.000", "NaN"], "what is missing stays last"
    assert sort(4) == ["−0.03 ± 0.01", "0.10 ± 0.02", "0.2 ± 0.1", "4", "–"]
    assert sort(5) == ["3 B", "900 B", "16 KiB", "2 MiB", "–"]
    assert [text[:6] for text in sort(1)] == ["</scri", "arm 9", "arm 10", "Attent", "Retent"]
    assert heading.nth(0).get_attribute("aria-sort") == "ascending"
    assert heading.nth(1).get_attribute("aria-sort") is None
    align = "e => getComputedStyle(e).textAlign + getComputedStyle(e).fontVariantNumeric"
    cell = page.locator("table.sortable >> nth=0 >> tbody td:nth-child(2) >> nth=0")
    assert cell.evaluate(align) == "righttabular-nums"


def test_pointing_at_a_curve_shows_its_values(report: Path, visit: Any) -> None:
    page = drawn(visit(report))
    plot = page.locator(".js-plotly-plot").nth(1)
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = plot.locator(".hoverlayer .legend")
    hover.wait_for()
    text = hover.text_content()
    assert "retnet_tiny" in text and re.search(r"\d to \d", text), text


def test_light_and_dark(report: Path, visit: Any) -> None:
    page = drawn(visit(report, dark=True))

    def colours() -> list[str]:
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        text = page.locator(".js-plotly-plot .xtick text").first
        return [back, text.evaluate("e => getComputedStyle(e).fill")]

    assert colours() == ["rgb(21, 23, 26)", "rgb(230, 232, 235)"]
    visit.photograph(page, "report-dark")
    page.get_by_role("button", name="light", exact=True).click()
    assert colours() == ["rgb(255, 255, 255)", "rgb(28, 30, 33)"]
    page.get_by_role("button", name="dark", exact=True).click()
    assert colours()[0] == "rgb(21, 23, 26)"


def test_on_a_phone_nothing_is_wider_than_the_screen(report: Path, visit: Any) -> None:
    page = drawn(visit(report, width=390, height=844))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for plot in page.locator(".js-plotly-plot").all():
        width = plot.locator(".nsewdrag").bounding_box()["width"]
        assert width > 230, "the legend takes no width from the plot"
    visit.photograph(page, "report-phone")


def test_a_window_made_narrow_is_drawn_anew(report: Path, visit: Any) -> None:
    page = drawn(visit(report, width=1200))
    page.set_viewport_size({"width": 420, "height": 800})
    for _ in range(100):  # the page's policy allows no wait_for_function, which is an eval
        if page.locator(".main-svg").first.evaluate("e => e.clientWidth") <= 420:
            break
        page.wait_for_timeout(50)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


@pytest.mark.parametrize("width", [1100, 390])
def test_fifty_curves(tmp_path: Path, visit: Any, width: int) -> None:
    path = tmp_path / "report.html"
    write_report(path, "Many", command="archzoo compare", settings={}, sections=[MANY])
    page = drawn(visit(path, width=width))
    assert page.locator("g.trace.scatter").count() == 50
    area = page.locator(".nsewdrag").bounding_box()
    assert area["height"] > 200 and area["width"] > 0.5 * width, "the legend leaves it its place"
    visit.photograph(page, f"report-many-{width}")


def test_the_example(tmp_path: Path, visit: Any) -> None:
    path = tmp_path / "report.html"
    subprocess.run(
        [sys.executable, ROOT / "examples" / "write_a_report.py", path],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    page = drawn(visit(path, offline=True))
    assert page.locator("g.trace.scatter").count() == 6
    assert "retnet_tiny" in page.locator("table.sortable").inner_text()
    visit.photograph(page, "report-example")


def test_every_setting_is_there(report: Path, visit: Any) -> None:
    page = drawn(visit(report))
    settings = page.locator("details table")
    assert not settings.is_visible()
    page.get_by_text("All 3 settings").click()
    assert settings.is_visible()
    assert "model.preset" in settings.inner_text() and "[0, 1, 2]" in settings.inner_text()
    made = page.locator("footer").inner_text()
    for fact in (
        "archzoo compare configs/claims/retnet.yaml",
        "machine",
        "torch",
        "commit",
        "date",
    ):
        assert fact in made
