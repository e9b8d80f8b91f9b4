"""The site builds without a warning, every link in it leads somewhere, and nothing is left out.

Runs by `make test-extras`, in an environment that has mkdocs. Nothing of archzoo is imported.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.extras

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "archzoo"


class Page(HTMLParser):
    """The links, the anchors and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def broken_links(site: Path) -> list[str]:
    """`page: link` for each link that leads to no file or no anchor of the site."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of the address it is shown for
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if there.is_dir():
                there /= "index.html"
            anchor = unquote(parts.fragment)
            missing = not there.is_file() or not there.is_relative_to(site)
            if missing or (anchor and there in pages and anchor not in pages[there].anchors):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    environment = dict(os.environ, NO_MKDOCS_2_WARNING="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def public(path: Path) -> Iterable[str]:
    """The public classes and functions with a docstring that a module defines."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        documented = isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        if documented and not node.name.startswith("_"):
            yield node.name


def test_every_link_leads_somewhere(site: Path) -> None:
    assert broken_links(site) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a id="here" href="b.html"></a><a href="#here"></a>')
    (tmp_path / "b.html").write_text('<a href="a.html#gone"></a><img src="c.png"><a href="..">')
    assert sorted(broken_links(tmp_path.resolve())) == [
        "b.html: ..",
        "b.html: a.html#gone",
        "b.html: c.png",
    ]


def test_every_family_has_a_page_with_all_its_sizes(site: Path) -> None:
    index = Page(site / "zoo" / "index.html").text
    for path in (PACKAGE / "models").glob("[!_]*.py"):
        page = Page(site / "zoo" / f"{path.stem}.html").text
        for line in (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").splitlines()[1:]:
            words = line.strip(" *:").split("``")[0].split("`")[0]
            assert words.strip() in page, f"{path.stem}: {line}"
        for size in ("micro", "tiny", "small", "base"):
            assert f"{path.stem}_{size}" in page and f"{path.stem}_{size}" in index


def test_every_public_docstring_is_in_the_reference(site: Path) -> None:
    anchors = set()
    for path in (site / "api").glob("*.html"):
        anchors |= Page(path).anchors
    missing = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(part.startswith("_") or part == "models" for part in module.split(".")):
            missing += [f"{module}.{n}" for n in public(path) if f"{module}.{n}" not in anchors]
    assert missing == []


def test_what_is_generated_is_not_kept(site: Path) -> None:
    assert not (ROOT / "docs" / "zoo").exists() and not (ROOT / "docs" / "api").exists()
