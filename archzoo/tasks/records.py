"""Documents out of files that are not plain text: records with a field, and compressed files.

Each record is a document, and so is a whole text that is compressed. Files are streamed: of JSON
lines and CSV one record is in memory at a time, of Parquet and Arrow a few thousand.

This module imports neither torch nor Lightning; pyarrow, and zstd before Python 3.14, are optional
and imported where a file needs them.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import shlex
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from archzoo.tasks.hub import go_offline

FIELD = "text"  # that holds a record's text, unless another one is named
LONGEST = 64 << 20  # bytes of a record in a file of lines: what is longer is no such file
BLOCK = 1 << 20  # bytes of a text that are unpacked at once
ROWS = 1000  # of a table that are read at once
_EVERY = 1000  # records after which progress is reported

Report = Callable[[int], None]
Segment = tuple[bool, bytes]  # whether it begins a document, and UTF-8


class Kind(NamedTuple):
    """What a file's name says of its content.

    Attributes:
        packing: "gzip", "zstd", or "" where it is not compressed.
        format: "text", or which records it holds: "json", "csv", "tsv", "parquet", "arrow".
    """

    packing: str = ""
    format: str = "text"

    @property
    def is_plain(self) -> bool:
        """Whether it is UTF-8 text that can be read where it lies."""
        return self == Kind()

    @property
    def holds_records(self) -> bool:
        """Whether a field has to be chosen."""
        return self.format != "text"


PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def kind_of(path: Path) -> Kind:
    """What a file is by its name; a .json file holds records if its first line is one.

    Raises:
        ValueError: It is of a kind that cannot be read where it is compressed.
    """
    packing = PACKINGS.get(path.suffix.lower(), "")
    inner = Path(path.stem) if packing else path
    kind = Kind(packing, FORMATS.get(inner.suffix.lower(), "text"))
    if packing and kind.format in ("parquet", "arrow"):
        raise ValueError(
            f"{path}: a {kind.format} file that is compressed as a whole cannot be read: unpack it "
            f"({'gzip' if packing == 'gzip' else 'zstd'} -d {path}); it is compressed inside"
        )
    if inner.suffix.lower() == ".json" and _begins_with_record(path, packing):
        return Kind(packing, "json")
    return kind


def _begins_with_record(path: Path, packing: str) -> bool:
    try:
        with _Unpacked(path, packing) as file:
            line = file.readline(BLOCK).strip()
        return line.startswith(b"{") and line.endswith(b"}") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def is_array(path: Path) -> bool:
    """Whether a .json file is one array of records, of which no line is one."""
    packing = PACKINGS.get(path.suffix.lower(), "")
    inner = Path(path.stem) if packing else path
    if inner.suffix.lower() != ".json":
        return False
    try:
        with _Unpacked(path, packing) as file:
            begin = file.read(BLOCK)
    except ValueError:
        return False
    return re.match(rb"\s*\[\s*\{", begin) is not None


def segments(path: Path, kind: Kind, field: str, report: Report) -> Iterator[Segment]:
    """The documents of a file, each in one segment or several.

    Args:
        path: Of the file.
        kind: What `kind_of` says of it.
        field: The field or column that holds the text of a record.
        report: Told how many bytes of the file have been read, now and then.

    Raises:
        ValueError: The file is damaged, or a record has no such text; says which and what helps.
        ModuleNotFoundError: A package is needed to read it; says which.
    """
    if kind.format in ("parquet", "arrow"):
        tables = _parquet if kind.format == "parquet" else _arrow
        yield from of_tables(tables(path, field, report), path, field)
        return
    with _Unpacked(path, kind.packing) as file:
        if kind.format == "text":
            yield from _whole(file, path, report)
            return
        records = _json_lines if kind.format == "json" else _csv_rows
        separator = "\t" if kind.format == "tsv" else ","
        for count, (line, text) in enumerate(records(file, path, field, separator)):
            yield True, _utf8(text, f"{path}, line {line}", field)
            if count % _EVERY == 0:
                report(file.position)
    report(path.stat().st_size)


def _whole(file: _Unpacked, path: Path, report: Report) -> Iterator[Segment]:
    """A compressed text as one document.

    Raises:
        ValueError: It is not UTF-8.
    """
    decoder, done, begins = getincrementaldecoder("utf-8")(), 0, True
    block = b"-"
    while block:
        block = file.read(BLOCK)
        wrong = block.find(b"\0")
        try:
            decoder.decode(block[:wrong] if wrong >= 0 else block, final=not block)
        except UnicodeDecodeError as error:
            # Of a character that began in the block before, that is its first byte.
            wrong = error.start + len(block[: wrong if wrong >= 0 else None]) - len(error.object)
            byte = error.object[error.start]
            raise _not_utf8(path, byte, done + wrong) from None
        if wrong >= 0:
            raise _not_utf8(path, 0, done + wrong)
        yield begins, block
        begins, done = False, done + len(block)
        report(file.position)


def _not_utf8(path: Path, byte: int, offset: int) -> ValueError:
    return ValueError(
        f"{path} is not UTF-8 text: unpacked, byte 0x{byte:02x} at offset {offset}; convert the "
        "text to UTF-8 or take it out of the folder"
    )


def _utf8(text: Any, where: str, field: str) -> bytes:
    """The bytes of a record's text.

    Raises:
        ValueError: It is no text, or one that a file of UTF-8 could not hold.
    """
    if not isinstance(text, str):
        what = "empty (null)" if text is None else f"of type {type(text).__name__}"
        raise ValueError(
            f"{where}: field {field!r} is {what}, not text: name another field (data.field), or "
            "leave such records out"
        )
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {field!r} has half a surrogate pair (U+{ord(text[error.start]):04X}), "
            "which is no character: take the record out, or write the file anew"
        ) from None
    if b"\0" in content:
        raise ValueError(f"{where}: field {field!r} has a NUL character: take it out of the text")
    return content


def missing(where: str, field: str, names: Sequence[str]) -> ValueError:
    """Says that a record has no such field, and which of those that it has may be meant.

    Args:
        where: What the message begins with.
        field: That was asked for.
        names: Of the fields that there are.
    """
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.5)
    known = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    has = f"it has {known}" if names else "it has none"
    other = shlex.quote(near[0] if near else names[0]) if names else ""
    hint = f": --data.field {other}" if names else ", or take another file"
    return ValueError(
        f"{where}: there is no field {field!r}: {has}; name the one that holds the text{hint}"
    )


# ---------------------------------------------------------------------------- bytes


class _Unpacked:
    """The bytes of a file, unpacked where it is compressed.

    Attributes:
        lines: How many were read.
    """

    def __init__(self, path: Path, packing: str) -> None:
        self.path, self.packing, self.lines = path, packing, 0
        self._damage: tuple[type[BaseException], ...] = (gzip.BadGzipFile, zlib.error)
        zstd = _zstd(path) if packing == "zstd" else None
        self._raw = open(path, "rb")  # noqa: SIM115  # closed by __exit__
        self._file: Any = self._raw
        if packing == "gzip":
            self._file = gzip.GzipFile(fileobj=self._raw)
        elif zstd is not None:
            self._damage = (zstd.ZstdError,)
            self._file = zstd.ZstdFile(self._raw)

    def __enter__(self) -> _Unpacked:
        return self

    def __exit__(self, *error: object) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        """Bytes of the file as it lies on the disk that have been read."""
        return self._raw.tell()

    def read(self, size: int) -> bytes:
        return self._checked(self._file.read, size)

    def readline(self, size: int) -> bytes:
        line = self._checked(self._file.readline, size)
        self.lines += bool(line)
        return line

    def _checked(self, read: Callable[[int], bytes], size: int) -> bytes:
        after = f" after line {self.lines}" if self.lines else ""
        try:
            return read(size)
        except EOFError:
            raise ValueError(
                f"{self.path} ends{after} in the middle of its {self.packing} data: it was cut "
                "off, so fetch or write it again"
            ) from None
        except self._damage as error:
            with open(self.path, "rb") as file:
                first = file.read(4)
            magic = b"\x1f\x8b" if self.packing == "gzip" else b"\x28\xb5\x2f\xfd"
            if not first.startswith(magic):
                raise ValueError(
                    f"{self.path} is not {self.packing} data, whatever its name says: give it the "
                    "name of what it is"
                ) from None
            raise ValueError(
                f"{self.path} is damaged{after}, its {self.packing} data cannot be unpacked "
                f"({error}): fetch or write it again"
            ) from None


def _zstd(path: Path) -> Any:
    for name in ("compression.zstd", "backports.zstd"):  # Python's own since 3.14
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(
        f"{path}: reading zstd before Python 3.14 needs the package backports.zstd: "
        "pip install 'archzoo[data]', or unpack the file (zstd -d)"
    )


def _lines(file: _Unpacked, path: Path) -> Iterator[str]:
    """Lines with their ends; `file.lines` is the number of the one that came last.

    Raises:
        ValueError: One is not UTF-8, or too long to be a record.
    """
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(
                f"{path}, line {file.lines} is longer than {LONGEST >> 20} MB: it is not a file "
                "with a record on each line"
            )
        if file.lines == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {file.lines} is not UTF-8: byte 0x{line[error.start]:02x} at "
                f"offset {error.start} of the line; convert the file to UTF-8"
            ) from None


# ---------------------------------------------------------------------------- records in lines


def _json_lines(
    file: _Unpacked, path: Path, field: str, _separator: str
) -> Iterator[tuple[int, Any]]:
    for line in _lines(file, path):
        if not line.strip():
            continue
        where = f"{path}, line {file.lines}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", "") or str(error).partition(";")[0]
            whole = ""
            if file.lines == 1 and line.lstrip().startswith("["):
                whole = f"; if it is one array, jq -c '.[]' {path} writes a record on each line"
            raise ValueError(f"{where} is not JSON ({why}): mend or remove it{whole}") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{where} is not a record with fields but of type {type(record).__name__}: each "
                'line must be an object such as {"text": "..."}'
            )
        if field not in record:
            raise missing(where, field, list(record))
        yield file.lines, record[field]


def _csv_rows(file: _Unpacked, path: Path, field: str, separator: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(max(LONGEST, csv.field_size_limit()))
    rows = csv.reader(_lines(file, path), delimiter=separator, strict=True)
    try:
        names = next(rows, None)
        if names is None:
            return
        if names.count(field) != 1:
            if field in names:
                raise ValueError(f"{path}: its first line names {field!r} more than once")
            raise missing(f"{path}, line 1, which names the columns", field, names)
        column, begins = names.index(field), rows.line_num + 1
        for row in rows:
            if row:
                if len(row) != len(names):
                    raise ValueError(
                        f"{path}, line {begins} has {len(row)} columns, and line 1 names "
                        f"{len(names)}: quote fields that hold {separator!r} or a line end"
                    )
                yield begins, row[column]
            begins = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {rows.line_num}: not {'TSV' if separator == chr(9) else 'CSV'} "
            f"({error}): mend the quotes"
        ) from None


# ---------------------------------------------------------------------------- tables


def _pyarrow(path: object, name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: reading it needs the package pyarrow: pip install 'archzoo[data]'"
        ) from None


def _parquet(path: Path, field: str, report: Report) -> Iterator[Any]:
    parquet = _pyarrow(path, "pyarrow.parquet")
    arrow = _pyarrow(path, "pyarrow")
    size = path.stat().st_size
    if not size:
        return
    try:
        with parquet.ParquetFile(path) as file:
            check_column(file.schema_arrow, path, field)
            rows, done = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(ROWS, columns=[field]):
                yield batch
                done += batch.num_rows
                report(size * done // rows)
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, "Parquet", error) from None


def _arrow(path: Path, field: str, report: Report) -> Iterator[Any]:
    arrow = _pyarrow(path, "pyarrow")
    if not path.stat().st_size:
        return
    try:
        with arrow.OSFile(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = arrow.ipc.open_file if is_file else arrow.ipc.open_stream
            reader = opened(source)
            check_column(reader.schema, path, field)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                yield batch
                report(source.tell())
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, "Arrow", error) from None


def _damaged(path: Path, what: str, error: BaseException) -> ValueError:
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(f"{path} is not a whole {what} file ({why}): fetch or write it again")


def check_column(schema: Any, where: object, field: str) -> None:
    """Refuses a table without such a column of text.

    Args:
        schema: pyarrow's.
        where: What the message begins with.
        field: Name of the column.

    Raises:
        ValueError: There is none.
    """
    if field not in schema.names:
        raise missing(str(where), field, schema.names)
    kind = schema.field(field).type
    kind = getattr(kind, "value_type", None) if str(kind).startswith("dictionary") else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        texts = [f.name for f in schema if "string" in str(f.type) and "<" not in str(f.type)]
        others = f": --data.field {' or '.join(texts)} is text" if texts else ""
        raise ValueError(f"{where}: field {field!r} holds {kind}, not text{others}")


def of_tables(tables: Iterable[Any], where: object, field: str) -> Iterator[Segment]:
    """The documents of pyarrow's batches or tables, a row each.

    Args:
        tables: That follow each other.
        where: What a message begins with.
        field: Name of the column.

    Raises:
        ValueError: A row has no text.
    """
    row = 0
    for table in tables:
        column = table.column(field)
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            texts = (value.as_py() for value in column)
        count = 0
        try:
            for text in texts:
                count += 1
                yield True, _utf8(text, f"{where}, row {row + count}", field)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}, row {row + count + 1} is not UTF-8: byte "
                f"0x{error.object[error.start]:02x}; convert the texts to UTF-8"
            ) from None
        row += count


# ---------------------------------------------------------------------------- datasets

ADDRESS = "hf://"
_STATE = "state.json"  # of a dataset that `save_to_disk` wrote: which .arrow files it has


def is_address(path: object) -> bool:
    """Whether a path is the name of a Hugging Face dataset."""
    return str(path).startswith(ADDRESS)


def of_saved_datasets(files: list[Path]) -> list[Path]:
    """Of a folder's files those to read: of a dataset that `datasets` saved its tables alone."""
    states = {file.parent: file for file in files if file.name == _STATE}
    known: dict[Path, list[Path]] = {}
    for folder, file in states.items():
        try:
            listed = json.loads(file.read_text(encoding="utf-8"))["_data_files"]
            known[folder] = [folder / Path(entry["filename"]).name for entry in listed]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for folder, tables in known.items():
        if gone := [table for table in tables if table not in files]:
            raise ValueError(f"{folder} is a dataset that lacks {gone[0].name}: save it again")
    above = {folder.parent for folder in known}
    kept = []
    for file in files:
        if file.parent in known:
            kept += known[file.parent] if file.name == _STATE else []
        elif not (file.parent in above and file.name == "dataset_dict.json"):
            kept.append(file)
    return kept


class Dataset:
    """A dataset of Hugging Face's, by name: ``hf://OWNER/NAME/CONFIGURATION#SPLIT``.

    The library `datasets` loads it, from the network or from what it has kept of it, and maps it
    into memory.

    Args:
        address: Configuration and split may be left out; the split is train then.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        ValueError: There is no such dataset, or it cannot be reached.

    Attributes:
        fingerprint: Of its content.
        size: Bytes of its tables.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        name, _, split = address.removeprefix(ADDRESS).removeprefix("datasets/").partition("#")
        parts = [part for part in name.split("/") if part]
        if not 1 <= len(parts) <= 3:
            raise ValueError(
                f"{address} names no dataset: write {ADDRESS}OWNER/NAME, {ADDRESS}OWNER/NAME/"
                f"CONFIGURATION, or either with #SPLIT behind it"
            )
        try:
            datasets = import_module("datasets")
        except ModuleNotFoundError as error:
            if error.name != "datasets":
                raise
            raise ModuleNotFoundError(
                f"{address}: loading a dataset by its name needs the package datasets: "
                "pip install 'archzoo[datasets]'"
            ) from None
        configuration = parts[2] if len(parts) > 2 else None
        go_offline()
        try:
            self.data = datasets.load_dataset(
                "/".join(parts[:2]), configuration, split=split or "train"
            )
        except Exception as error:  # of many libraries, the network's among them
            why = " ".join(str(error).split())
            raise ValueError(
                f"{address} cannot be loaded ({type(error).__name__}: {why[:300]}): check the "
                "name and the network, or save it to files elsewhere and name those"
            ) from None
        self.fingerprint = f"{address} {self.data._fingerprint}"
        self.size = int(self.data.data.nbytes)

    def segments(self, field: str, report: Report) -> Iterator[Segment]:
        """As the function `segments`."""
        check_column(self.data.features.arrow_schema, self.address, field)
        data = self.data.select_columns([field]).with_format("arrow")
        rows = max(len(data), 1)

        def tables() -> Iterator[Any]:
            done = 0
            for table in data.iter(ROWS):
                yield table
                done += table.num_rows
                report(self.size * done // rows)

        yield from of_tables(tables(), self.address, field)
