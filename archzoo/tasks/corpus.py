"""What texts are read from: files and records, as documents that follow each other.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from archzoo import shipped
from archzoo.tasks import cache, records

CHUNK = 1 << 16  # bytes encoded at once: enough for speed, little beside a model
MANY = 1 << 16  # documents whose places are handled at once
# How gzip, zip, xz, zstd, bzip2, 7z and parquet begin.
PACKED = (b"\x1f\x8b", b"PK\3\4", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh", b"7z\xbc", b"PAR1")
READ_BY_NAME = {PACKED[0]: ".gz", PACKED[3]: ".zst", PACKED[6]: ".parquet"}
_FORMAT = 1  # of what is remembered of unpacked files

Span = tuple[int, int]  # bytes of a corpus, from the first to before the second
Spans = NDArray[np.int64]  # (spans, 2)
Split = Literal["auto", "documents", "place"]


class Corpus:
    """Documents of UTF-8 read as one text, a chunk at a time.

    A file of text is a document, and so is every record of a file of records, see
    `archzoo.tasks.records`, and a text that is compressed. Files follow each other in the order of
    their names, hidden ones are left out; a line end is put between two documents where there is
    none. What documents were read from makes no difference: the same ones have the same `digest`.

    What is not plain text is written down as such once, beside the cache, until `close`.

    Args:
        path: A file, a folder, a pattern of file names, or hf:// and the name of a dataset.
        field: The field of a record that holds its text; None: text.
        cache_dir: As for `Text`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: there is no text in it.
    """

    def __init__(
        self, path: str | Path, field: str | None = None, cache_dir: str | None = None
    ) -> None:
        self.path: str | Path = str(path) if records.is_address(path) else Path(path)
        self.cache_dir = cache_dir
        self.field = records.FIELD if field is None else field
        self._dataset = records.Dataset(str(path)) if records.is_address(path) else None
        self.files = _files(shipped.text(str(path))) if self._dataset is None else []
        self._kinds = [records.kind_of(file) for file in self.files]
        self._check_kinds(field)
        self.digested = ""  # what `digest` gave last, and `stamp` then
        self.stamped = ""
        self.starts = np.zeros(1, np.int64)  # of the documents, and the end of the last one
        self._numbers = np.zeros(0, np.uint64)  # of each document, a hash of its content
        self._scratch: Path | None = None  # a folder for what is unpacked
        self._opened: tuple[int, BinaryIO] | None = None
        self._sources: list[Path] = []  # the files that the documents are read from
        self._places = np.zeros((0, 2), np.int64)  # of each document: which of them, where in it
        sizes = [file.stat().st_size for file in self.files]
        self._read_size = self._dataset.size if self._dataset is not None else sum(sizes)
        self.is_plain = bool(self.files) and all(kind.is_plain for kind in self._kinds)
        if self.is_plain:
            self._set_out(self.files, [(n, 0) for n in range(len(sizes))], sizes)
        elif not self._read_size:
            raise ValueError(f"{path} is empty: there is no text to learn from")

    def _check_kinds(self, field: str | None) -> None:
        if self._dataset is not None:
            return
        kinds = list(zip(self.files, self._kinds, strict=True))
        tables = [file for file, kind in kinds if kind.holds_records]
        texts = [file for file, kind in kinds if not kind.holds_records]
        if tables and texts:
            pattern = tables[0].with_name("*" + "".join(tables[0].suffixes))
            raise ValueError(
                f"{self.path} holds records ({tables[0].name}) and plain text ({texts[0].name}): "
                f"say which are meant, such as '{pattern}'"
            )
        if len(texts) == 1 == len(kinds) and records.is_array(texts[0]):
            raise ValueError(
                f"{texts[0]} is one JSON array of records: write a record on each line, as "
                "jq -c '.[]' does, or call it .txt to learn from the JSON itself"
            )
        if field is not None and texts:
            raise ValueError(
                f"field {field!r}: {self.path} holds plain text, which has no fields: omit field, "
                "or give a file of records: .jsonl, .csv, .tsv, .parquet"
            )

    def _set_out(self, sources: list[Path], places: Any, sizes: Any) -> None:
        self._sources = sources
        self._places = np.asarray(places, np.int64).reshape(-1, 2)
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int64)
        if not self.size:
            raise ValueError(f"{self.path} is empty: there is no text to learn from")

    @property
    def size(self) -> int:
        """Bytes of the text."""
        return int(self.starts[-1])

    @property
    def count(self) -> int:
        """How many documents there are."""
        return len(self.starts) - 1

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes what was unpacked."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def digest(self) -> str:
        """A hash of the content and of where the documents end.

        Where files must be unpacked for it, the cache remembers what it was.

        Raises:
            ValueError: a file cannot be read, or changes meanwhile.
        """
        self.stamped = stamp = self.stamp()
        if self.is_plain:
            self.digested = stamp
            return stamp
        recipe = [_FORMAT, self.field, stamp]
        folder = cache.entry(self.cache_dir, recipe, cache.UNPACKED)
        known = cache.read(folder, recipe)
        if known is None:
            self.unpack()
            known = {"digest": self.digested, "path": str(self.path), "bytes": self.size}
            if self.stamp() != stamp:
                raise self.changed()
            cache.fill(folder, recipe, lambda _: known)
        self.digested = known["digest"]
        return self.digested

    def stamp(self) -> str:
        """A hash of the files as they lie there; of plain ones it is their `digest`."""
        if self._dataset is not None:
            return self._dataset.fingerprint
        if self.is_plain:
            return self._digest()
        progress, done = cache.Progress(f"reading {self.path}", self._read_size), 0
        whole = hashlib.sha256()
        for file, kind in zip(self.files, self._kinds, strict=True):
            of_file = hashlib.sha256()
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    of_file.update(block)
                    done += len(block)
                    progress(done)
            whole.update(json.dumps([*kind, of_file.hexdigest()]).encode())
        progress.end()
        return whole.hexdigest()

    def changed(self) -> ValueError:
        """Says that the text is not what it was."""
        return ValueError(f"{self.path} changed while it was read: start again once it rests")

    def unpack(self) -> None:
        """Writes down what is not plain text; does nothing when called again."""
        if self._sources:
            return
        root = cache.home(self.cache_dir)
        places, sizes = array("q"), array("q")
        try:
            self._scratch = cache.scratch(root)
            with open(self._scratch / "text", "wb") as out:
                end = 0
                for source, begins, content in self._segments():
                    if source:
                        places.extend((source, 0))
                        sizes.append(self.files[source - 1].stat().st_size)
                        continue
                    if begins:
                        places.extend((0, end))
                        sizes.append(0)
                    out.write(content)
                    sizes[-1] += len(content)
                    end += len(content)
            self._set_out([self._scratch / "text", *self.files], places, sizes)
            self.digested = self._digest()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise cache.cannot_write(root, error) from None
        except KeyboardInterrupt:
            cache.say(f"{self.path} was not unpacked to its end: nothing was kept of it")
            raise

    def _segments(self) -> Iterator[tuple[int, bool, bytes]]:
        """What `records.segments` gives of each file, after a 0; of a plain one, 1 + its number."""
        progress, done = cache.Progress(f"unpacking {self.path}", self._read_size), 0

        def report(position: int) -> None:
            progress(done + position)

        if self._dataset is not None:
            for begins, content in self._dataset.segments(self.field, report):
                yield 0, begins, content
        for number, (file, kind) in enumerate(zip(self.files, self._kinds, strict=True)):
            if kind.is_plain:
                yield 1 + number, True, b""
            else:
                for begins, content in records.segments(file, kind, self.field, report):
                    yield 0, begins, content
            done += file.stat().st_size
            progress(done)
        progress.end()

    def _digest(self) -> str:
        """The hash of the text, and those of its documents."""
        digest = hashlib.sha256(b"[")
        for first in range(0, len(self.starts), MANY):
            some = ", ".join(map(str, self.starts[first : first + MANY].tolist()))
            digest.update((", " if first else "").encode() + some.encode())
        digest.update(b"]")
        if self._opened is not None:  # what it has read ahead may have changed
            self._opened[1].close()
            self._opened = None
        progress, done = cache.Progress(f"reading {self.path}", self.size), 0
        numbers = np.zeros(self.count, np.uint64)
        for first in range(0, self.count, MANY):
            sizes = np.diff(self.starts[first : first + MANY + 1]).tolist()
            for number, size in enumerate(sizes, first):
                of_document = hashlib.sha256()
                file = self._open(number, 0)
                while size and (block := file.read(min(size, 1 << 20))):
                    digest.update(block)
                    if self.count > 1:
                        of_document.update(block)
                    size -= len(block)
                    done += len(block)
                    progress(done)
                numbers[number] = int.from_bytes(of_document.digest()[:8], "big")
        progress.end()
        self._numbers = numbers
        return digest.hexdigest()

    def _open(self, number: int, offset: int) -> BinaryIO:
        """The file that a document is read from, at a byte of the document."""
        source, begin = self._places[number].tolist()
        if self._opened is None or self._opened[0] != source:
            if self._opened is not None:
                self._opened[1].close()
            file: BinaryIO = open(self._sources[source], "rb")  # noqa: SIM115  # closed by `close`
            self._opened = source, file
        file = self._opened[1]
        if file.tell() != begin + offset:
            file.seek(begin + offset)
        return file

    def split(
        self, validation_fraction: float, test_fraction: float, split: Split = "auto"
    ) -> tuple[dict[str, Spans], str]:
        """The parts "train", "validation" and, where it has a fraction, "test"; and how it is done.

        Args:
            validation_fraction: Of the text.
            test_fraction: The same; 0: there is no such part.
            split: As for `Text`.

        Raises:
            ValueError: no document would be in one of the parts.
        """
        self.unpack()
        fractions = {"validation": validation_fraction, "test": test_fraction}
        fractions = {part: fraction for part, fraction in fractions.items() if fraction}
        if split != "place" and (split == "documents" or self.count > 1):
            parts = self._by_document(fractions)
            sizes = {part: _size(spans) for part, spans in parts.items()}
            if split == "documents":
                if empty := [part for part, size in sizes.items() if not size]:
                    raise ValueError(
                        f"{self.path}: none of its {self.count} documents is in the "
                        f"{empty[0]} part: take split place, which cuts each of them, or more files"
                    )
                return parts, "documents"
            shares = {part: sizes[part] / self.size / fractions[part] for part in fractions}
            if sizes["train"] and all(0.5 <= share <= 2 for share in shares.values()):
                return parts, "documents"
        return self._by_place(fractions), "place"

    def _by_document(self, fractions: dict[str, float]) -> dict[str, Spans]:
        """Each document whole in a part, which a hash of its content chooses."""
        if len(self._numbers) != self.count:
            self._digest()
        spans = np.stack([self.starts[:-1], self.starts[1:]], axis=1)
        # A file of the text as a whole has no digest of its own, and is the text.
        numbers = self._numbers / 2**64
        # Test has the first numbers: what it holds does not depend on validation's fraction.
        names = [*reversed(fractions), "train"]
        borders = np.cumsum([fractions[part] for part in reversed(fractions)])
        chosen = np.searchsorted(borders, numbers, side="right")
        return {part: spans[chosen == names.index(part)] for part in ("train", *fractions)}

    def _by_place(self, fractions: dict[str, float]) -> dict[str, Spans]:
        """Every file's beginning to train on, then a part of it to validate and one to test on."""
        spans = {part: array("q") for part in ("train", *fractions)}
        for number in range(self.count):
            first, last = self.starts[number : number + 2].tolist()
            size = end = last - first
            kept = 0.0
            for part in reversed(fractions):  # from the end
                kept += fractions[part]
                border = self._border(number, size, 1 - kept, end)
                spans[part].extend((first + border, first + end))
                end = border
            spans["train"].extend((first, first + end))
        return {part: np.frombuffer(some, np.int64).reshape(-1, 2) for part, some in spans.items()}

    def _border(self, number: int, size: int, fraction: float, end: int) -> int:
        """The byte of a document where the first line begins after a part of it, before `end`.

        Where no line ends soon, it is where a character begins.
        """
        border = min(int(size * fraction), end)
        back = min(border, 3)  # a character has at most three bytes after its first
        block = self._open(number, border - back).read(min(back + CHUNK, size - border + back))
        line = border + block.find(b"\n", back) + 1 - back
        if border < line < end:
            return line
        while border < size and back and block[back] & 0xC0 == 0x80:
            border, back = border - 1, back - 1
        return border

    def texts(self, *spans: Span | Spans) -> Iterator[str]:
        """The text of each span in turn, in chunks that end with a line if possible.

        Raises:
            ValueError: the text is not UTF-8.
        """
        for _, text in self.segments(*spans):
            yield text

    def segments(self, *spans: Span | Spans) -> Iterator[tuple[bool, str]]:
        """The same, each after whether a document, or what a span has of it, begins with it."""
        self.unpack()
        before = "\n"
        for start, stop in _each(*spans):
            some = max(int(np.searchsorted(self.starts, start, "right")) - 1, 0)
            for number in range(some, self.count):
                first, last = self.starts[number : number + 2].tolist()
                if first >= stop:
                    break
                begin, end = max(start, first) - first, min(stop, last) - first
                if begin >= end:
                    continue
                if not before.endswith("\n"):
                    yield False, "\n"
                path, begins = self._sources[self._places[number, 0]], True
                for content, offset in _chunks(self._reader(number, begin), begin, end):
                    before = _decode(content, path, offset)
                    yield begins, before
                    begins = False

    def _reader(self, number: int, position: int) -> Callable[[int], bytes]:
        """Reads on in a document, whatever else is read in between."""

        def read(size: int) -> bytes:
            nonlocal position
            block = self._open(number, position).read(size)
            position += len(block)
            return block

        return read


def _size(spans: Spans) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _each(*spans: Span | Spans) -> Iterator[Span]:
    """Spans one by one, however many there are."""
    for given in spans:
        some = np.reshape(given, (-1, 2))
        for first in range(0, len(some), MANY):
            yield from some[first : first + MANY].tolist()


def _files(path: str) -> list[Path]:
    """The files that a path means, in the order of their names.

    Raises:
        FileNotFoundError: there are none.
        ValueError: it is neither a file nor a folder.
    """
    here = Path(path)
    if not here.exists():
        files = sorted(file for file in map(Path, glob(path)) if file.is_file())
        if not files:
            beside = {file.name for file in here.parent.glob("*")}
            if here.parent == Path("data"):
                beside |= {file.name for file in (shipped.root() / "data").glob("*.txt")}
            near = get_close_matches(here.name, sorted(beside), n=1)
            hint = f"; nearest: {here.with_name(near[0])}" if near else ""
            raise FileNotFoundError(
                f"no text at {path}: give a UTF-8 file or a folder of them{hint}"
            )
        return files
    if here.is_dir():
        found = (file.relative_to(here) for file in here.rglob("*") if file.is_file())
        visible = [f for f in found if not any(part.startswith(".") for part in f.parts)]
        return records.of_saved_datasets(
            [here / file for file in sorted(visible, key=Path.as_posix)]
        )
    if not here.is_file():
        raise ValueError(f"{path} is a device or a pipe, not a file: give a UTF-8 file")
    return [here]


def _border(path: Path, size: int, fraction: float, end: int) -> int:
    """The byte of a file where the first line begins after a fraction of it, and before `end`.

    Where no line ends soon, it is where a character begins.
    """
    border = min(int(size * fraction), end)
    back = min(border, 3)  # a character has at most three bytes after its first
    with open(path, "rb") as file:
        file.seek(border - back)
        block = file.read(back + CHUNK)
    line = border + block.find(b"\n", back) + 1 - back
    if border < line < end:
        return line
    while border < size and back and block[back] & 0xC0 == 0x80:
        border, back = border - 1, back - 1
    return border


def _chunks(read: Any, begin: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Cuts what `read` gives into chunks, each with its offset."""
    rest, position = b"", begin
    while position < end:
        block = read(min(CHUNK, end - position))
        if not block:
            raise ValueError("the text became shorter while it was read")
        position += len(block)
        content = rest + block
        cut = len(content) if position == end else _cut(content)
        yield content[:cut], position - len(content)
        rest = content[cut:]


def _cut(content: bytes) -> int:
    """Where to cut: before a line that starts with no blank, else before the last character.

    Byte-level BPE never makes a token across such a line's start, so cutting there changes nothing.
    """
    cut = content.rfind(b"\n") + 1
    while cut and not content[cut : cut + 1].strip():  # a blank, or not read yet
        cut = content.rfind(b"\n", 0, cut - 1) + 1
    if 0 < cut < len(content):
        return cut
    cut = len(content) - 1
    while cut > len(content) - 4 and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _decode(content: bytes, path: Path, offset: int) -> str:
    wrong = content.find(b"\0")
    if wrong < 0:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            wrong = error.start
    packed = not offset and any(content.startswith(begin) for begin in PACKED)
    way = "unpack the file" if packed else "convert the file to UTF-8"
    for begin, suffix in READ_BY_NAME.items():
        if packed and content.startswith(begin):
            way += f", name it {path.name}{suffix}"
    raise ValueError(
        f"{path} is not UTF-8 text: byte 0x{content[wrong]:02x} at offset {offset + wrong}; "
        f"{way} or take it out of the folder"
    )
