"""Language modelling on any UTF-8 file or folder, read from an encoded copy on disk."""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from archzoo.tasks import cache, tokenizers
from archzoo.tasks.counter_random import Integers, random_bits
from archzoo.tasks.stream import IGNORED, Batch, Task
from archzoo.tasks.tokenizers import Tokenizer

CHUNK = 1 << 16  # bytes encoded at once: enough for speed, little beside a model
BYTES = "int32"  # of how many bytes a token stands for
SAMPLE = 4_000_000  # bytes that a tokenizer learns from: unigram takes 30 times as much memory
RECORDS = {".jsonl", ".ndjson", ".csv", ".tsv"}  # names of files that are not plain text
# How gzip, zip, xz, zstd, bzip2, 7z and parquet begin.
PACKED = (b"\x1f\x8b", b"PK\3\4", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh", b"7z\xbc", b"PAR1")
_FORMAT = 4  # of the cache; another number makes old caches unused

Span = tuple[int, int]  # bytes of a corpus, from the first to before the second
Split = Literal["auto", "documents", "place"]


def tokenizer_at(path: str) -> Tokenizer:
    """The tokenizer of a file, as `Tokenizer.load` reads it, or that of a run's checkpoint.

    Raises:
        ValueError: The checkpoint holds none.
    """
    if not path.endswith(".ckpt") or not Path(path).is_file():
        return Tokenizer.load(path)
    from archzoo.checkpoint import read_task

    own = read_task(path)[1]
    if own is None:
        raise ValueError(f"{path} holds no tokenizer")
    return own


class Text(Task):
    r"""The next token of a text: any UTF-8 file, or all files of a folder in the order of names.

    The text has three parts, to train, to validate and to test on. A single file is cut by place:
    its end is the test part, what comes before that is the validation part. Of a folder each file
    is a document, whose content decides by a hash which part has it whole, whatever its name, the
    other files and the seed are; so copies of a document are never in two parts. Subwords are
    learned from the train part alone.

    A training window has `context_length` tokens. How the first one begins in Shakespeare by
    characters (a blank is drawn as ␣)::

        position  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
        token     t  ,  ␣  L  o  r  d  ␣  B  r  u  t  u  s  . \n
        label     ,  ␣  L  o  r  d  ␣  B  r  u  t  u  s  . \n \n

    Windows lie side by side and come in an order that is a function of (seed, epoch), cut at
    another offset in every epoch. With `carry_state` they come in the order of the text instead:
    each row of a batch is a lane, a contiguous part of the text, and continues where the same row
    of the batch before ended (`continues`), for truncated back-propagation through time.

    Besides the perplexity of a token, validation and test give the bits per byte, which tokenizers
    do not change the meaning of::

        bits per byte = sum over targets of -ln p / (ln 2 * bytes of the text of these targets)

    with the bytes of UTF-8. A special token has none; in a text of files there are no such targets.

    The encoded text is cached under a name made from the text's content and the tokenizer, and
    mapped into memory, never loaded.

    Args:
        path: A file or folder of UTF-8 text, or a pattern such as data/*.txt.
        tokenizer: characters, bpe, unigram, or the path of a tokenizer.json, of a sentencepiece
            .model, or of a checkpoint; in Python a Tokenizer as well.
        vocab_size: Tokens to learn; null takes all characters of the text, or 4,096 subwords.
        context_length: Tokens of a window.
        batch_size: Windows in a batch, all ranks together.
        carry_state: Read the text in order, in lanes, instead of shuffled windows.
        validation_fraction: Part of the text that is kept for validation.
        cache_dir: Where the encoded text is kept; null means ~/.cache/archzoo.
        seed: Chooses the order of the windows.
        test_fraction: Part of the text that is kept for test; 0: test reads the validation part,
            as runs did before there was a choice.
        split: documents: each file is whole in one part. place: each file is cut into the parts.
            auto: documents where the text is several files of which validation and test get
            between half and twice their fractions, else place.

    Raises:
        FileNotFoundError: there is no such text or tokenizer.
        ValueError: the text is empty, not UTF-8 or too short, or an argument does not suit it.
        OSError: the cache cannot be written.
    """

    metrics = ("perplexity", "bits_per_byte", "token_accuracy")
    added: ClassVar[dict[str, Any]] = {"test_fraction": 0.0, "split": "place"}
    characters = ""  # that a tokenizer of characters learns beside those of the text

    def __init__(
        self,
        path: str = "data/shakespeare.txt",
        tokenizer: str = "characters",
        vocab_size: int | None = None,
        context_length: int = 256,
        batch_size: int = 16,
        carry_state: bool = False,
        validation_fraction: float = 0.05,
        cache_dir: str | None = None,
        seed: int = 0,
        test_fraction: float = 0.05,
        split: Split = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("path", path), ("cache_dir", cache_dir), ("tokenizer", tokenizer)):
            if value is not None and not str(value).strip():  # Path takes it for this directory
                raise ValueError(f"{name} is empty: name one, or omit {name} for its default")
        if context_length < 1:
            raise ValueError(f"context_length {context_length} is not positive")
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction {validation_fraction} is not between 0 and 1")
        if not 0 <= test_fraction < 1:
            raise ValueError(f"test_fraction {test_fraction} is not 0 or between 0 and 1")
        if validation_fraction + test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {validation_fraction} and test_fraction {test_fraction} "
                "leave nothing to train on: together they must be below 1"
            )
        if split not in get_args(Split):
            raise ValueError(f"split {split!r} is not one of {', '.join(get_args(Split))}")
        if not str(path):
            raise ValueError("path is empty: give a UTF-8 file, a folder of them, or a pattern")
        # Not in the signature, which is the command line's too: an object cannot be typed there.
        self._given = tokenizer if isinstance(tokenizer, Tokenizer) else None
        if self._given is None:
            tokenizers.check_name(str(tokenizer))
        self.context_length = context_length
        self.carry_state = carry_state
        self.seed = seed
        self._cache: Path | None = None
        self._meta: dict[str, Any] = {}

    # Preparing.

    def prepare(self) -> None:
        """Learns or loads the tokenizer and encodes the text, or finds both in the cache."""
        if self._cache is not None:
            return
        arguments = self.arguments
        corpus = Corpus(arguments["path"])
        given: Tokenizer | None = None
        digest = corpus.digest()
        recipe = [_FORMAT, digest, *self.split_settings().values()]
        if arguments["tokenizer"] in tokenizers.NAMES:
            recipe += [arguments["tokenizer"], arguments["vocab_size"]]
            recipe += [self.characters] if self.characters else []
        else:
            given = self._given or tokenizer_at(arguments["tokenizer"])
            if arguments["vocab_size"] not in (None, given.vocab_size):
                raise ValueError(
                    f"vocab_size {arguments['vocab_size']} does not fit {arguments['tokenizer']}, "
                    f"which has {given.vocab_size} tokens: omit vocab_size"
                )
            recipe += [given.fingerprint()]
        folder = cache.entry(arguments["cache_dir"], recipe)
        meta, began = cache.read(folder, recipe), time.monotonic()
        made = meta is None
        if meta is None:
            self._make(corpus, given, folder, recipe)
            meta = cache.read(folder, recipe)
            if meta is None:
                raise OSError(f"{folder} was changed while it was written: try again")
        self._check_length(meta)
        if made:
            where = arguments["cache_dir"]
            command = "archzoo cache --clear" + (f" --directory {where}" if where else "")
            cache.say(
                f"encoded {corpus.path} ({cache.megabytes(corpus.size)}, {arguments['tokenizer']}) "
                f"in {time.monotonic() - began:.0f} s; kept in {folder}, `{command}` removes it"
            )
        self.tokenizer = Tokenizer.load(folder)
        self._meta = meta
        self._digest = digest
        self._cache = folder

    def _make(
        self, corpus: Corpus, given: Tokenizer | None, folder: Path, recipe: list[Any]
    ) -> None:
        """Encodes the text into the cache, and says what takes long."""
        name = self.arguments["tokenizer"]
        if folder.exists():
            cache.say(f"{folder} is damaged: it is rebuilt")
        if corpus.size > SAMPLE:
            cache.say(f"{corpus.path}: {cache.megabytes(corpus.size)} to encode ({name})")
        try:
            cache.fill(folder, recipe, lambda partial: self._encode(corpus, given, partial))
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C and the like
                cache.say(f"{corpus.path} was not encoded to its end: nothing was kept of it")
            raise

    @property
    def test_part(self) -> str:
        return "test" if self.arguments["test_fraction"] else "validation"

    def split_settings(self) -> dict[str, Any]:
        names = ("validation_fraction", "test_fraction", "split")
        return {name: self.arguments[name] for name in names}

    def take_up_split(self, settings: dict[str, Any]) -> None:
        super().take_up_split(settings)
        if self._cache is not None:
            self._cache = None
            self.prepare()

    def fingerprint(self) -> dict[str, Any]:
        lanes = {"batch_size": self.batch_size} if self.carry_state else {}
        return super().fingerprint() | lanes | {"text": self._digest[:16]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        began = state_dict["batch_size"]
        fitting = self.trainer is None or self.trainer.state.fn == "fit"
        if fitting and self.carry_state and began != self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size}: with carry_state a text is read in that many "
                f"lanes, and this run began with {began}, so it can only continue with {began}"
            )
        super().load_state_dict(state_dict)

    def _encode(self, corpus: Corpus, given: Tokenizer | None, folder: Path) -> dict[str, Any]:
        """Writes tokenizer and parts of the text into a folder; their sizes, and the like."""
        parts, split = corpus.split(**self.split_settings())
        tokenizer = given or self._learn(corpus, parts["train"])
        tokenizer.save(folder)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        meta: dict[str, Any] = {
            "dtype": dtype,
            "path": str(corpus.path),
            "tokenizer": self.arguments["tokenizer"],
            "split": split,
        }
        progress, done = cache.Progress(f"encoding {corpus.path}", corpus.size), 0
        for part, spans in parts.items():
            count = size = untold = 0
            with ExitStack() as files:
                file = files.enter_context(open(folder / f"{part}.bin", "wb"))
                lengths = None
                if part != "train":
                    lengths = files.enter_context(open(folder / f"{part}_bytes.bin", "wb"))
                for texts in _groups(corpus.texts(*spans), 8):
                    encoded = _encode_many(tokenizer, texts, corpus.path)
                    for content, tokens in zip(texts, encoded, strict=True):
                        if tokens.max(initial=0) >= tokenizer.vocab_size:
                            raise ValueError(
                                f"{corpus.path}: the tokenizer gave token {tokens.max()} and says "
                                f"that it has {tokenizer.vocab_size}"
                            )
                        file.write(tokens.astype(dtype).tobytes())
                        count += len(tokens)
                        size += len(content.encode())
                        if lengths is None:
                            continue
                        if not len(tokens):  # nothing but what the tokenizer drops
                            untold += len(content.encode())
                            continue
                        told = tokenizer.bytes_of(content, tokens)
                        told[0] += untold
                        untold = 0
                        lengths.write(told.astype(BYTES).tobytes())
                    done += sum(len(text.encode()) for text in texts)
                    progress(done)
            meta |= {f"{part}_tokens": count, f"{part}_bytes": size}
        progress.end()
        before = corpus.digested
        if corpus.digest() != before:
            raise ValueError(f"{corpus.path} changed while it was read: start again once it rests")
        return meta

    def _learn(self, corpus: Corpus, train: list[Span]) -> Tokenizer:
        name, vocab_size = self.arguments["tokenizer"], self.arguments["vocab_size"]
        if name == "characters":  # of all the text: a character that is left out cannot be encoded
            return tokenizers.learn_characters(corpus.texts((0, corpus.size)), vocab_size)
        learn = tokenizers.learn_bpe if name == "bpe" else tokenizers.learn_unigram
        size = sum(stop - start for start, stop in train)
        stride = -(-size // SAMPLE)  # chunks from all over the training part
        if stride > 1:
            cache.say(
                f"{name} learns its subwords from {cache.megabytes(size // stride)} of the "
                f"{cache.megabytes(size)} to train on, sampled from all over them"
            )
        texts = corpus.texts(*train)
        return learn((text for n, text in enumerate(texts) if n % stride == 0), vocab_size)

    def _check_length(self, meta: dict[str, Any]) -> None:
        train = meta["train_tokens"]
        lanes = self.batch_size if self.carry_state else 1
        need = lanes * self.context_length + 1
        if train < need:
            each = f" in each of {lanes} lanes" if self.carry_state else ""
            raise ValueError(
                f"{self.arguments['path']} is shorter than one window{each}: {train} tokens to "
                f"train on, {need} needed; take a smaller context_length or a longer text"
            )
        for part, what in (("validation", "validate"), ("test", "test")):
            fraction = self.arguments[f"{part}_fraction"]
            if fraction and (tokens := meta[f"{part}_tokens"]) < 2:
                raise ValueError(
                    f"{self.arguments['path']} leaves {tokens} tokens to {what} on, 2 needed; "
                    f"take a larger {part}_fraction than {fraction}, or a longer text"
                )

    # Batches.

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a validation token: bits per byte = nats per token / ln 2 / this."""
        self.prepare()
        return float(self._meta["validation_bytes"] / self._meta["validation_tokens"])

    def rows(self, split: str) -> int:
        tokens = self._tokens(split) - 1  # the last one is only ever a label
        if split == "train":
            if self.carry_state:
                return tokens // self.batch_size // self.context_length * self.batch_size
            return self._windows
        lanes = self.batch_rows(split) if self.carry_state else 1
        return -(-(tokens // lanes) // self.context_length) * lanes

    def batch_rows(self, split: str) -> int:
        """Rows of a batch: a short validation text carries its state in fewer lanes."""
        if split == "train" or not self.carry_state:
            return self.batch_size
        return min(self.batch_size, max(1, (self._tokens(split) - 1) // self.context_length))

    def training_batch(self, number: int, rows: Integers) -> Batch:
        if self.carry_state:
            return self._lanes("train", number, rows)
        numbers = number * self.batch_size + rows
        epochs, places = np.divmod(numbers, self._windows)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order, offset = _order(self.seed, epoch, self._windows)
            # Windows may shift by what remains after the last one, at most by one window.
            free = min(
                self._tokens("train") - self._windows * self.context_length, self.context_length
            )
            starts[here] = order[places[here]] * self.context_length + offset % free
        return self._read("train", starts, numbers)

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        if self.carry_state:
            return self._lanes(split, number, rows)
        numbers = number * self.batch_size + rows
        return self._read(split, numbers * self.context_length, numbers)

    @property
    def _windows(self) -> int:
        # One window less than fits, so that all of them can be shifted.
        return max(1, (self._tokens("train") - self.context_length) // self.context_length)

    def _lanes(self, split: str, number: int, rows: Integers) -> Batch:
        lanes = self.batch_rows(split)
        length = (self._tokens(split) - 1) // lanes
        step = number % (self.rows(split) // lanes)
        starts = rows * length + step * self.context_length
        batch = self._read(split, starts, number * lanes + rows, (rows + 1) * length)
        batch["continues"] = torch.full((len(rows),), step > 0)
        return batch

    def _read(
        self, split: str, starts: Integers, numbers: Integers, stops: Integers | None = None
    ) -> Batch:
        """Reads windows; what lies at `stops` (the end of the text) or after it becomes padding."""
        assert self._cache is not None
        last = self._tokens(split) - 1
        places = starts[:, None] + np.arange(self.context_length + 1)
        # Mapped anew each time: pages that were read count as memory in use until the map is
        # closed, in the end the whole file.
        part = self._part(split)
        stream = np.memmap(self._cache / f"{part}.bin", self._meta["dtype"], "r")
        tokens = torch.from_numpy(stream[np.minimum(places, last)].astype(np.int64))
        examples = np.repeat(numbers[:, None], self.context_length, 1)
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "examples": torch.from_numpy(examples),
        }
        if split != "train":
            told = np.memmap(self._cache / f"{part}_bytes.bin", BYTES, "r")
            batch["bytes"] = torch.from_numpy(told[np.minimum(places[:, 1:], last)].astype("int64"))
        padding = places[:, :-1] >= (last if stops is None else stops[:, None])
        if padding.any():
            absent = torch.from_numpy(padding)
            batch["labels"] = batch["labels"].masked_fill(absent, IGNORED)
            batch["documents"] = -absent.long()
        return batch

    def _tokens(self, split: str) -> int:
        return int(self._meta[f"{self._part(split)}_tokens"])

    def _part(self, split: str) -> str:
        """Which part a split reads."""
        return self.test_part if split == "test" else split


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> tuple[Integers, int]:
    """The order of the windows in an epoch, and a number that their offset is made from."""
    bits = random_bits(seed, epoch, np.arange(windows + 1), 1)[0]
    return np.argsort(bits[:-1], kind="stable"), int(bits[-1] >> np.uint64(1))


# ---------------------------------------------------------------------------- files


class Corpus:
    """UTF-8 files read as one text, a chunk at a time.

    Files follow each other in the order of their names, hidden ones are left out; a line end is
    put between two files where there is none.

    Args:
        path: A file, a folder, or a pattern of file names.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: there is no text in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = [self.path]
        if not self.path.exists():
            self.files = sorted(file for file in map(Path, glob(str(path))) if file.is_file())
            if not self.files:
                raise FileNotFoundError(f"no text at {path}: give a UTF-8 file or a folder of them")
        elif self.path.is_dir():
            found = (file.relative_to(self.path) for file in self.path.rglob("*") if file.is_file())
            visible = [f for f in found if not any(part.startswith(".") for part in f.parts)]
            self.files = [self.path / file for file in sorted(visible, key=Path.as_posix)]
        elif not self.path.is_file():
            raise ValueError(f"{path} is a device or a pipe, not a file: give a UTF-8 file")
        for file in self.files:
            if file.suffix.lower() in RECORDS or _is_json_lines(file):
                raise ValueError(
                    f"{file} holds records, not text, and would be read character by character: "
                    "choosing a field of them (data.field) comes later, so write the texts into "
                    "a .txt file, or give this one such a name to read it as it is"
                )
        sizes = [file.stat().st_size for file in self.files]
        self.starts = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
        self.size = self.starts[-1]
        self.digested = ""  # what `digest` gave last
        self.digests: list[bytes] = []  # of each file's content, where there are several
        if not self.size:
            raise ValueError(f"{path} is empty: there is no text to learn from")

    def digest(self) -> str:
        """A hash of the content and of where the files end."""
        digest = hashlib.sha256(json.dumps(self.starts).encode())
        progress, done = cache.Progress(f"reading {self.path}", self.size), 0
        self.digests.clear()
        for path in self.files:
            of_file = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    if len(self.files) > 1:
                        of_file.update(block)
                    done += len(block)
                    progress(done)
            self.digests.append(of_file.digest())
        progress.end()
        self.digested = digest.hexdigest()
        return self.digested

    def split(
        self, validation_fraction: float, test_fraction: float, split: Split = "auto"
    ) -> tuple[dict[str, list[Span]], str]:
        """The parts "train", "validation" and, where it has a fraction, "test"; and how it is done.

        Args:
            validation_fraction: Of the text.
            test_fraction: The same; 0: there is no such part.
            split: As for `Text`.

        Raises:
            ValueError: no document would be in one of the parts.
        """
        fractions = {"validation": validation_fraction, "test": test_fraction}
        fractions = {part: fraction for part, fraction in fractions.items() if fraction}
        if split != "place" and (split == "documents" or len(self.files) > 1):
            parts = self._by_document(fractions)
            sizes = {n: sum(stop - start for start, stop in spans) for n, spans in parts.items()}
            if split == "documents":
                if empty := [part for part, size in sizes.items() if not size]:
                    raise ValueError(
                        f"{self.path}: none of its {len(self.files)} documents is in the "
                        f"{empty[0]} part: take split place, which cuts each of them, or more files"
                    )
                return parts, "documents"
            shares = {part: sizes[part] / self.size / fractions[part] for part in fractions}
            if sizes["train"] and all(0.5 <= share <= 2 for share in shares.values()):
                return parts, "documents"
        return self._by_place(fractions), "place"

    def _by_document(self, fractions: dict[str, float]) -> dict[str, list[Span]]:
        """Each file whole in a part, which a hash of its content chooses."""
        if not self.digests:
            self.digest()
        spans = list(pairwise(self.starts))
        # A file of the text as a whole has no digest of its own, and is the text.
        numbers = [int.from_bytes(digest[:8], "big") / 2**64 for digest in self.digests]
        parts: dict[str, list[Span]] = {part: [] for part in ("train", *fractions)}
        for number, span in zip(numbers, spans, strict=True):
            # Test has the first numbers: what it holds does not depend on validation's fraction.
            chosen, border = "train", 0.0
            for part, fraction in reversed(fractions.items()):
                border += fraction
                if number < border:
                    chosen = part
                    break
            parts[chosen].append(span)
        return parts

    def _by_place(self, fractions: dict[str, float]) -> dict[str, list[Span]]:
        """Every file's beginning to train on, then a part of it to validate and one to test on."""
        parts: dict[str, list[Span]] = {part: [] for part in ("train", *fractions)}
        for path, (first, last) in zip(self.files, pairwise(self.starts), strict=True):
            size = end = last - first
            kept = 0.0
            for part in reversed(fractions):  # from the end
                kept += fractions[part]
                border = _border(path, size, 1 - kept, end)
                parts[part].append((first + border, first + end))
                end = border
            parts["train"].append((first, first + end))
        return parts

    def texts(self, *spans: Span) -> Iterator[str]:
        """The text of each span in turn, in chunks that end with a line if possible.

        Raises:
            ValueError: the text is not UTF-8.
        """
        before = "\n"
        for start, stop in spans:
            some = range(max(bisect_right(self.starts, start) - 1, 0), len(self.files))
            for number in some:
                path, first, last = self.files[number], self.starts[number], self.starts[number + 1]
                if first >= stop:
                    break
                begin, end = max(start, first) - first, min(stop, last) - first
                if begin >= end:
                    continue
                if not before.endswith("\n"):
                    yield "\n"
                with open(path, "rb") as file:
                    file.seek(begin)
                    for content, offset in _chunks(file.read, begin, end):
                        before = _decode(content, path, offset)
                        yield before


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file has a whole record in its first line, as some data sets have."""
    if path.suffix.lower() != ".json":
        return False
    with open(path, "rb") as file:
        line = file.readline(CHUNK).strip()
    if not line.startswith(b"{") or not line.endswith(b"}"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


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
    raise ValueError(
        f"{path} is not UTF-8 text: byte 0x{content[wrong]:02x} at offset {offset + wrong}; "
        f"{way} or take it out of the folder"
    )


def _groups(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _encode_many(tokenizer: Tokenizer, texts: list[str], path: Path) -> list[NDArray[np.int64]]:
    try:
        return tokenizer.encode_many(texts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
