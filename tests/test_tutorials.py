"""The tutorials and the first page run from first block to last, and print what they show.

A block with a title is a file, or its next part; blocks of bash and python are run in order, in one
directory; a block of text is what the block before it prints. What is shown counts in its form:
numbers may differ, and lines may be left out. Below <!-- sampled --> the words of the model that
follow the prompt may differ as well.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("index", "adaptation", "one_bit", "merging")]
TUTORIALS = [*PAGES, *sorted((DOCS / "tutorials").glob("*.md"))]
BIN = Path(sys.executable).parent
SAMPLED = "<!-- sampled -->\n"
FEWER = 5


class Fence(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    code: str
    sampled: bool


def fences(page: str) -> list[Fence]:
    pattern = rf'^({SAMPLED})?```(\w+)(?: title="([^"]+)")?\n(.*?)^```$'
    found = re.findall(pattern, page, re.MULTILINE | re.DOTALL)
    return [Fence(language, title, code, bool(mark)) for mark, language, title, code in found]


def form(line: str) -> str:
    """A line without what differs from machine to machine: its numbers and its spaces."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "0", line)).strip()


def first_missing(shown: str, printed: str, *, sampled: bool = False) -> str | None:
    """The first shown line whose form was not printed, in order; None: there is none.

    Of what is sampled the prompt and the lines with numbers: processors round differently, and the
    model's words are others on another one.
    """
    lines = iter(printed.splitlines())
    for number, line in enumerate(shown.splitlines()):
        wanted = form(line)
        if sampled and not re.search(r"\d", line):
            # Python quotes a text by what is in it.
            if number == 0 and " ".join(line.strip("'\"").split()[:2]) not in printed:
                return line
        elif wanted and not any(form(other) == wanted for other in lines):
            return line
    return None


def shorter(code: str) -> str:
    """A block with a fifth of its steps where they are hundreds: as many lines, other numbers."""

    def fewer(found: re.Match[str]) -> str:
        steps = int(found[2])
        return f"{found[1]}{steps // FEWER if steps >= 20 * FEWER else steps}"

    return re.sub(r"((?:max_steps|val_check_interval)(?:: | ))(\d+)", fewer, code)


def run(fence: Fence, place: Path, programs: Path) -> str:
    """What a block prints, run in a directory."""
    path = [str(programs), str(BIN), os.environ["PATH"]]
    environment = dict(os.environ, PATH=os.pathsep.join(path))
    environment |= {"PYTHONPATH": str(place), "XDG_CACHE_HOME": str(place / "cache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    shell = ["bash", "-euo", "pipefail", "-c"]
    python = [str(programs / "python"), "-c"]
    command = [*(shell if fence.language == "bash" else python), fence.code]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, fence.code + done.stdout + done.stderr
    return done.stdout


def checkout(place: Path) -> Path:
    for name in ("archzoo", "configs", "data", "examples"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", place)
    return place


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_tutorial_runs_and_prints_what_it_shows(
    path: Path, tmp_path: Path, programs: Path
) -> None:
    place, printed = checkout(tmp_path), ""
    for fence in fences(path.read_text(encoding="utf-8")):
        fence = fence._replace(code=shorter(fence.code))
        if fence.title:
            with (place / fence.title).open("a", encoding="utf-8") as file:
                file.write(fence.code)
        elif fence.language == "text":
            missing = first_missing(fence.code, printed, sampled=fence.sampled)
            assert missing is None, f"not printed: {missing}\n{printed}"
        else:
            assert fence.language in ("bash", "python"), fence.language
            printed = run(fence, place, programs)


def test_what_is_shown_counts_in_its_form() -> None:
    printed = "step 100 2 s  loss 2.5\nstep 200  4 s loss 1.25\nruns/a holds it\n"
    assert first_missing("step   1  1 s loss 9\n\nruns/a holds it\n", printed) is None
    assert first_missing("runs/a holds it\nstep 1 1 s loss 9\n", printed) is not None
    assert first_missing("runs/b holds it\n", printed) == "runs/b holds it"
    assert (
        first_missing("My lord, I am\n\n3 tokens\n", "My lord, you\n\n9 tokens\n", sampled=True)
        is None
    )
    assert first_missing("'My lord, I am'", '"My lord, it\'s"', sampled=True) is None
    assert first_missing("My king, I am\n", "My lord, you\n", sampled=True) == "My king, I am"


def test_steps_are_fewer_where_they_are_many() -> None:
    assert shorter("max_steps: 300\n  val_check_interval: 150") == (
        "max_steps: 60\n  val_check_interval: 30"
    )
    assert shorter("fit --trainer.max_steps 20 --trainer.val_check_interval 500") == (
        "fit --trainer.max_steps 20 --trainer.val_check_interval 100"
    )


def test_no_block_of_a_tutorial_is_overlooked() -> None:
    assert {path.stem for path in TUTORIALS} >= {
        "own_text",
        "own_parts",
        "retention_or_attention",
        "adaptation",
    }
    for path in TUTORIALS:
        page = path.read_text(encoding="utf-8")
        found = fences(page)
        assert 2 * len(found) == len(re.findall(r"^\s*```", page, re.MULTILINE)), path.stem
        assert page.count(SAMPLED) == sum(fence.sampled for fence in found), path.stem
        shown = [fence for fence in found if fence.language == "text"]
        assert shown and all(fence.code.strip() for fence in shown), path.stem
