"""What the README shows, for the tests that run it."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """(code, the text block right after it, or "") of each fenced block in a language."""
    pattern = rf"^```{language}\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    return re.findall(pattern, README, re.MULTILINE | re.DOTALL)


def missing(shown: str, printed: str) -> list[str]:
    """The parts of an output that is shown which were not printed so."""
    return [part for part in parts(shown) if f"\n{part}\n" not in unspaced(printed)]


def unspaced(text: str) -> str:
    """Its lines but empty ones, between line ends."""
    return "".join(f"\n{line.rstrip()}" for line in text.splitlines() if line.strip()) + "\n"


def parts(shown: str) -> list[str]:
    """What stands between the dots of an output that is shown: no line is missing in it."""
    return [part.strip("\n") for part in unspaced(shown).split("\n...\n") if part.strip()]
