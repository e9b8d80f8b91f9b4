"""The changelog has a section for what comes next, and the version is after the last one cut."""

import re
from pathlib import Path

import archzoo

CHANGELOG = (Path(__file__).parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = (Path(__file__).parent.parent / "CITATION.cff").read_text(encoding="utf-8")
VERSIONS = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_versions_are_cut_with_a_date_below_what_is_unreleased():
    assert VERSIONS[0] == "[Unreleased]" and len(VERSIONS) > 1
    for version in VERSIONS[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version), version


def test_the_version_is_after_the_last_one_cut():
    """Or, in the commit that is tagged as a release, that one."""
    cut = VERSIONS[1].partition("]")[0].lstrip("[")
    if archzoo.__version__ == cut:
        return
    last = tuple(int(part) for part in cut.split("."))
    ours = tuple(int(part) for part in archzoo.__version__.split(".")[:3])
    assert ours > last and archzoo.__version__.endswith(".dev0")


def test_the_citation_is_of_the_last_version_cut():
    """With its date: it is what people cite who install the package."""
    found = dict(re.findall(r"^(version|date-released): (.*)$", CITATION, re.MULTILINE))
    assert f"[{found['version']}] - {found['date-released']}" == VERSIONS[1]


def test_each_version_names_a_kind_of_change_once():
    for section in re.split(r"^## \[", CHANGELOG, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert set(kinds) <= set(KINDS) and len(kinds) == len(set(kinds)), section[:20]
