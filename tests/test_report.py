"""The report: what it says, as plain data and as HTML, without plotly and without a browser."""

import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from archzoo.analysis import report
from archzoo.analysis.report import Cell, Chart, Series, Table, charts, files, page, values

NOTHING = {"command": "archzoo compare", "settings": {}, "facts": {"machine": "a processor"}}
HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture
def script(monkeypatch):
    """A stand-in for plotly's JavaScript: plotly itself is in tests/extras/."""
    text = "/* plotly */ '<&'"
    monkeypatch.setattr(files, "plotly_script", lambda: text)
    monkeypatch.setattr(page, "plotly_script", lambda: text)
    return text


def curves(chart):
    """The traces of a figure without the bands."""
    return [trace for trace in charts.figure(chart)["data"] if "fill" not in trace]


def test_without_the_extra_it_says_how_to_get_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    path = tmp_path / "new" / "report.html"
    for call in (
        lambda: report.check_report_path(path),
        lambda: report.write_report(path, "a title", **NOTHING, sections=[]),
    ):
        with pytest.raises(ValueError, match=r"^a report needs plotly and jinja2: pip install 'ar"):
            call()
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("value", "text", "number"),
    [
        (None, "–", None),
        ("", "–", None),
        (math.nan, "NaN", None),
        (math.inf, "∞", math.inf),
        (-math.inf, "−∞", -math.inf),
        (True, "yes", 1.0),
        (812160, "812,160", 812160.0),
        (0.0, "0.0000", 0.0),
        (1.52341, "1.523", 1.52341),
        (0.00123456, "0.001235", 0.00123456),
        (1.2e-9, "1.200e-09", 1.2e-9),
        (123456.7, "123,457", 123456.7),
        ("1,024.5 ± 0.3", "1,024.5 ± 0.3", 1024.5),
        ("−0.02 [−0.05, 0.01]", "−0.02 [−0.05, 0.01]", -0.02),
        ("98.1 %", "98.1 %", 98.1),
        ("1e-3", "1e-3", 1e-3),
        ("2 layers", "2 layers", 2.0),
        ("2026-11-28", "2026-11-28", None),
        ("3x", "3x", None),
        ("retnet_tiny", "retnet_tiny", None),
    ],
)
def test_values_are_shown_and_sorted(value, text, number):
    assert (values.shown(value), values.sort_key(value)) == (text, number)


def test_numbers_of_numpy_and_torch_are_numbers():
    import numpy as np
    import torch

    assert values.shown(np.float32(1.5)) == values.shown(torch.tensor(1.5)) == "1.500"
    assert values.sort_key(np.int64(3)) == 3.0


def test_settings_are_flat_and_whole():
    arms = [{"mixer": "Retention"}, {"mixer": None}]
    nested = {"model": {"preset": "retnet_micro", "arms": arms}, "seeds": (0, 1), "empty": {}}
    assert list(values.settings_rows(nested)) == [
        ("model.preset", "retnet_micro"),
        ("model.arms.0.mixer", "Retention"),
        ("model.arms.1.mixer", "null"),
        ("seeds", "[0, 1]"),
        ("empty", "{}"),
    ]


def test_a_table_knows_its_columns_of_numbers():
    rows = [["a", 1, "1.5 ± 0.1", Cell(2048, "2 KiB")], ["7", None, "2 ± 0", Cell(None, "–")]]
    (section,) = page.context(
        "t", **NOTHING, sections=[Table("T", ["name", "n", "mean", "size"], rows)]
    )["sections"]
    assert [c["numeric"] for c in section["columns"]] == [False, True, True, True]
    cell = section["rows"][0][3]
    assert cell == {"text": "2 KiB", "number": 2048.0, "key": "2048.0", "missing": False}
    assert section["rows"][1][3]["missing"]


def test_words_among_numbers_leave_the_column_one_of_numbers():
    rows = [["4,469 (4,176 to 4,651)", "a"], ["time", 2], ["9", "b"], [None, None]]
    (section,) = page.context("t", **NOTHING, sections=[Table("T", ["speed", "x"], rows)])[
        "sections"
    ]
    assert [c["numeric"] for c in section["columns"]] == [True, False]


def test_logarithmic_axes_are_labelled_where_they_span_little():
    lengths = [64.0, 128.0, 0.5]
    near = Chart("C", "x", "y", [Series("s", lengths, [0.016, 0.017, 0.018])], True, True)
    layout = charts.figure(near)["layout"]
    assert layout["xaxis"]["ticktext"] == ["0.5000", "64", "128"]
    assert "dtick" not in layout["yaxis"], "plotly chooses: neither 1, 2 nor 5 is in the range"
    far = Chart("C", "x", "y", [Series("s", [1], [1]), Series("t", [1], [20])], log_y=True)
    assert charts.figure(far)["layout"]["yaxis"]["dtick"] == "D2"


def test_what_does_not_fit_together_is_one_line():
    with pytest.raises(ValueError, match="the table 'T' has 1 values for 2 columns"):
        page.context("t", **NOTHING, sections=[Table("T", ["a", "b"], [[1]])])
    for series, said in [
        (Series("s", [1, 2], [1]), "'s' of 'C' has 2 x and 1 y"),
        (Series("s", [1], [1], [1, 2], [1]), "'s' of 'C' has 1 x and 2 low"),
        (Series("s", [1], [1], low=[1]), "one end of its band"),
    ]:
        with pytest.raises(ValueError, match=said):
            page.context("t", **NOTHING, sections=[Chart("C", "x", "y", [series])])


def test_gaps_and_logarithmic_axes():
    series = Series("s", [0, 1, 2, 4, 8], [1.0, math.nan, None, -1.0, math.inf])
    linear, log = (Chart("C", "x", "y", [series], log_x=log, log_y=log) for log in (False, True))
    assert curves(linear)[0]["y"] == [1.0, None, None, -1.0, None]
    assert curves(log)[0]["y"] == [None] * 5
    found = charts.figure(log)
    assert found["layout"]["xaxis"]["type"] == found["layout"]["yaxis"]["type"] == "log"
    assert found["notes"][-2:] == [
        "5 values are not drawn: not finite or, on a logarithmic axis, not positive.",
        "There is nothing to draw.",
    ]
    assert found["layout"]["xaxis"]["ticktext"] == ["1", "2", "4", "8"], "what was measured"
    assert "type" not in charts.figure(linear)["layout"]["xaxis"]


def test_a_band_is_drawn_around_each_part_between_gaps():
    low, high = [1, 2, math.nan, 4], [3, 4, 5, 6]
    chart = Chart("C", "x", "y", [Series("s", [1, 2, 3, 4], [2, 3, 4, 5], low, high)])
    band, curve = charts.figure(chart)["data"]
    assert band["x"] == [1, 2, 2, 1, 1, None, 4, 4, 4]
    assert band["y"] == [3, 4, 2, 1, 3, None, 6, 4, 6]
    assert band["legendgroup"] == curve["legendgroup"] and not band["showlegend"]
    assert curve["customdata"][2] == ["NaN", "5"]


def test_a_band_that_reaches_zero_stays_on_a_logarithmic_axis():
    chart = Chart("C", "x", "y", [Series("s", [1, 2], [5, 10], [-1, 2], [10, 20])], log_y=True)
    band = charts.figure(chart)["data"][0]
    assert None not in band["y"] and min(band["y"]) == 0.5


def test_fifty_curves_are_told_apart():
    chart = Chart("C", "x", "y", [Series(f"run {n}", [1], [n]) for n in range(50)])
    looks = {(t["line"]["color"], t["line"]["dash"]) for t in curves(chart)}
    assert len(looks) == 50
    assert charts.figure(chart)["layout"]["hovermode"] == "closest"


class Elements(HTMLParser):
    """The elements, the attributes and the JSON of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self.json = [], [], ""
        self.inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes))

    def handle_data(self, data):
        if self.inside and self.inside[1].get("type") == "application/json":
            self.json += data
        self.texts.append(data)

    def handle_endtag(self, tag):
        self.inside = None

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_whole_and_harmless(tmp_path, script, capsys):
    path = tmp_path / "deep" / "er" / "report.html"
    sections = [
        f"One {HOSTILE}.\n\nTwo.",
        Table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, 1], ['" onclick="alert(1)', 2]], note=HOSTILE),
        Table("nothing", [], []),
        Chart(HOSTILE, HOSTILE, HOSTILE, [Series(HOSTILE, [1, 2], [1, None])], note=HOSTILE),
    ]
    given = {"command": f"archzoo {HOSTILE}", "settings": {HOSTILE: [HOSTILE]}}
    report.write_report(path, HOSTILE, **given, sections=sections, facts={HOSTILE: HOSTILE})
    text = path.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"wrote {path} (0.0 MB; it opens without a network)\n"
    assert os.listdir(path.parent) == ["report.html"]

    found = Elements(text)
    assert len(found.all("script")) == 3, "the figures, plotly and the page's own"
    assert not [a for _, a in found.found if any(name.startswith("on") for name in a)]
    assert "".join(found.texts).count("alert(1)") > 10  # shown, as text
    assert len(found.all("section")) == 3 and len(found.all("p")) == 6
    figures = json.loads(found.json)
    assert list(figures) == ["section-3"]
    assert script in text  # as it is, not escaped


def test_the_page_loads_nothing_and_runs_its_own_scripts_alone(tmp_path, script):
    path = tmp_path / "report.html"
    report.write_report(path, "t", **NOTHING, sections=[Chart("C", "x", "y", [])])
    text = path.read_text(encoding="utf-8")
    found = Elements(text)
    assert not [a for _, a in found.found if {"src", "href", "srcset", "data"} & a.keys()]
    assert not re.search(r"https?:|@import|url\(", text.replace(script, ""))
    policy = next(
        a["content"] for a in found.all("meta") if "content" in a and "src" in a["content"]
    )
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_half_a_character_does_not_lose_a_report(tmp_path, script):
    path = tmp_path / "report.html"
    report.write_report(path, "half \udcff", **NOTHING, sections=["\udcff"])
    assert "<h1>half ?</h1>" in path.read_text(encoding="utf-8")


def test_a_long_name_is_short_in_the_legend_alone():
    name = "Retention, " + "x" * 60
    (curve,) = curves(Chart("C", "x", "y", [Series(name, [1], [1])]))
    assert len(curve["name"]) == 40 and curve["name"].endswith("…")
    assert name in curve["hovertemplate"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, script, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a directory: name the report's file"):
        report.check_report_path(tmp_path)
    with pytest.raises(OSError, match=r"file/report.html cannot be written: (Not a|File exists)"):
        report.check_report_path(tmp_path / "file" / "report.html")

    path = tmp_path / "report.html"
    path.write_text("the one before")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="could not be written: No space left on device"):
        report.write_report(path, "t", **NOTHING, sections=[])
    assert path.read_text() == "the one before"
    assert sorted(os.listdir(tmp_path)) == ["file", "report.html"]
