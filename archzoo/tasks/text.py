"""Language modelling on texts and records of any file or folder, from an encoded copy on disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from archzoo.tasks import cache, tokenizers
from archzoo.tasks.corpus import CHUNK, Corpus, Spans, Split
from archzoo.tasks.counter_random import Integers, random_bits
from archzoo.tasks.stream import IGNORED, Batch, Task
from archzoo.tasks.tokenizers import Tokenizer

GROUP = 8 * CHUNK  # characters encoded at once
BYTES = "int32"  # of how many bytes a token stands for
SAMPLE = 4_000_000  # bytes that a tokenizer learns from: unigram takes 30 times as much memory
STARTS = "int64"  # of the documents, in tokens
_FORMAT = 5  # of the cache; another number makes old caches unused


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

    Files of records are read too, JSON lines, CSV, TSV and Parquet, of which `field` names the one
    that holds the text; so are files that gzip or zstd compressed, and datasets of Hugging Face's.
    Each record is a document, as each file of a folder of texts is, and the same documents give
    the same tokens in the same parts, whatever they are read from.

    The text has three parts, to train, to validate and to test on. A single document is cut by
    place: its end is the test part, what comes before that is the validation part. Of several,
    the content of each decides by a hash which part has it whole, whatever its name, the others
    and the seed are; so copies of a document are never in two parts. Subwords are learned from the
    train part alone. Documents that are whole in a part are separate: in a window that holds the
    end of one and the beginning of the next, the model reads nothing across, and the first token of
    a document is nowhere a label.

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
        path: A file or folder of UTF-8 text or of records, a pattern such as data/*.txt, or
            hf://OWNER/NAME, a dataset that the library datasets loads.
        tokenizer: characters, bpe, unigram, or the path of a tokenizer.json, of a sentencepiece
            .model, of a .tiktoken file, or of a checkpoint; in Python a Tokenizer as well.
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
        field: Of a record, the one that holds its text; null: text.
        separate_documents: Whether the model is told where in a window another document begins;
            null: where split puts whole documents into the parts.

    Raises:
        FileNotFoundError: there is no such text or tokenizer.
        ValueError: the text is empty, not UTF-8 or too short, or an argument does not suit it.
        ModuleNotFoundError: a package is not installed that reads such a file.
        OSError: the cache cannot be written.
    """

    metrics = ("perplexity", "bits_per_byte", "token_accuracy")
    added: ClassVar[dict[str, Any]] = {
        "test_fraction": 0.0,
        "split": "place",
        "field": None,
        "separate_documents": False,
    }
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
        field: str | None = None,
        separate_documents: bool | None = None,
    ) -> None:
        super().__init__()
        given = {"path": path, "cache_dir": cache_dir, "tokenizer": tokenizer, "field": field}
        for name, value in given.items():
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
        with Corpus(arguments["path"], arguments["field"], arguments["cache_dir"]) as corpus:
            self._prepare(corpus)

    def _prepare(self, corpus: Corpus) -> None:
        arguments = self.arguments
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
        corpus.unpack()
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
            count = size = untold = documents = 0
            with ExitStack() as files:
                file, starts = (
                    files.enter_context(open(folder / f"{part}{name}.bin", "wb"))
                    for name in ("", "_documents")
                )
                lengths = None
                if part != "train":
                    lengths = files.enter_context(open(folder / f"{part}_bytes.bin", "wb"))
                for begins, texts in _groups(corpus.segments(spans), GROUP):
                    encoded = _encode_many(tokenizer, texts, corpus.path)
                    tokens = np.concatenate(encoded)
                    if tokens.max(initial=0) >= tokenizer.vocab_size:
                        raise ValueError(
                            f"{corpus.path}: the tokenizer gave token {tokens.max()} and says "
                            f"that it has {tokenizer.vocab_size}"
                        )
                    file.write(tokens.astype(dtype).tobytes())
                    ends = count + np.cumsum([len(some) for some in encoded])
                    first = np.concatenate([[count], ends[:-1]])[np.array(begins, bool)]
                    starts.write(first.astype(STARTS).tobytes())
                    documents += len(first)
                    count += len(tokens)
                    sizes = [len(content.encode()) for content in texts]
                    size += sum(sizes)
                    done += sum(sizes)
                    progress(done)
                    if lengths is None:
                        continue
                    for content, some in zip(texts, encoded, strict=True):
                        if not len(some):  # nothing but what the tokenizer drops
                            untold += len(content.encode())
                            continue
                        told = tokenizer.bytes_of(content, some)
                        told[0] += untold
                        untold = 0
                        lengths.write(told.astype(BYTES).tobytes())
            meta |= {f"{part}_tokens": count, f"{part}_bytes": size, f"{part}_documents": documents}
        progress.end()
        if corpus.stamp() != corpus.stamped:
            raise corpus.changed()
        return meta

    def _learn(self, corpus: Corpus, train: Spans) -> Tokenizer:
        name, vocab_size = self.arguments["tokenizer"], self.arguments["vocab_size"]
        if name == "characters":  # of all the text: a character that is left out cannot be encoded
            return tokenizers.learn_characters(self._seen(corpus), vocab_size)
        learn = tokenizers.learn_bpe if name == "bpe" else tokenizers.learn_unigram
        size = int((train[:, 1] - train[:, 0]).sum())
        stride = -(-size // SAMPLE)  # chunks from all over the training part
        if stride > 1:
            cache.say(
                f"{name} learns its subwords from {cache.megabytes(size // stride)} of the "
                f"{cache.megabytes(size)} to train on, sampled from all over them"
            )
        texts = corpus.texts(train)
        if stride > 1:  # line ends that were put between documents would be every second one
            texts = (text for text in texts if text != "\n")
        return learn((text for n, text in enumerate(texts) if n % stride == 0), vocab_size)

    def _seen(self, corpus: Corpus) -> Iterator[str]:
        """What a tokenizer of characters learns from: all of the text, in few segments."""
        for _, texts in _groups(corpus.segments((0, corpus.size)), GROUP):
            yield "".join(texts)

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
        if self._separate(part):
            begins = np.memmap(self._cache / f"{part}_documents.bin", STARTS, "r")
            documents = torch.from_numpy(np.searchsorted(begins, places, "right") - 1)
            batch["documents"] = documents[:, :-1].contiguous()
            next_begins = documents[:, 1:] != documents[:, :-1]
            batch["labels"] = batch["labels"].masked_fill(next_begins, IGNORED)
        padding = places[:, :-1] >= (last if stops is None else stops[:, None])
        if padding.any():
            absent = torch.from_numpy(padding)
            batch["labels"] = batch["labels"].masked_fill(absent, IGNORED)
            known = batch.get("documents", torch.zeros_like(batch["tokens"]))
            batch["documents"] = known.masked_fill(absent, -1)
        return batch

    def _separate(self, part: str) -> bool:
        """Whether a window is told where in it another document begins."""
        wanted = self.arguments["separate_documents"]
        if wanted is None:
            wanted = self._meta["split"] == "documents"
        return bool(wanted) and self._meta[f"{part}_documents"] > 1

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


def _groups(
    segments: Iterable[tuple[bool, str]], size: int
) -> Iterator[tuple[list[bool], list[str]]]:
    """Pieces of at least so many characters together, but for the last ones."""
    marks: list[bool] = []
    texts: list[str] = []
    count = 0
    for begins, text in segments:
        marks.append(begins)
        texts.append(text)
        count += len(text)
        if count >= size:
            yield marks, texts
            marks, texts, count = [], [], 0
    if texts:
        yield marks, texts


def _encode_many(tokenizer: Tokenizer, texts: list[str], path: object) -> list[NDArray[np.int64]]:
    try:
        return tokenizer.encode_many(texts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
