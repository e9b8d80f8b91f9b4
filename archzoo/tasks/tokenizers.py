"""Tokenizers: characters, byte-level BPE and unigram, learned from a text or read from a file.

Everything learned here gives a text back as it was: `decode(encode(text)) == text`. (One exception:
sentencepiece writes blanks as U+2581, so a unigram tokenizer gives that character back as a blank.)

This module imports neither torch nor Lightning; `tokenizers` and `sentencepiece` are imported by
the classes that use them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from archzoo.tasks import tiktoken_files
from archzoo.tasks.tiktoken_files import SUFFIX

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

NAMES = ("characters", "bpe", "unigram")
STOP, PAD = "<stop>", "<pad>"
DEFAULT_VOCAB_SIZE = 4096  # of learned subwords; characters take as many as the text has


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        stop_token: The token that ends a text, None where there is none.
        pad_token: The token that fills rows up, None where there is none.
    """

    stop_token: int | None = None
    pad_token: int | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids, special tokens included."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens have none, incomplete UTF-8 becomes U+FFFD."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """File names and contents from which `from_files` rebuilds the tokenizer."""

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of UTF-8 of the text that each token stands for, (vocab_size,).

        A special token stands for none: 0. Where a token's text depends on what is beside it, this
        is one case of it; `bytes_of` is exact.
        """
        lengths = np.zeros(self.vocab_size, np.int64)
        for token in range(self.vocab_size):
            # The second of two: some decoders write the first one of a text differently.
            once, twice = self.decode([token]), self.decode([token, token])
            lengths[token] = len(_utf8(twice)) - len(_utf8(once))
        return lengths

    def bytes_of(self, text: str, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of a text that each of its tokens stands for; together they are all of it.

        What a tokenizer drops or changes (blanks, letters it does not know) counts to the last
        token of the text.

        Args:
            text: Of at least one token.
            tokens: What `encode` gives of it.
        """
        counts: NDArray[np.int64] = self.token_bytes[tokens]
        counts[-1] += len(_utf8(text)) - counts.sum()
        return counts

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode` for several texts, as arrays; may run on several cores."""
        return [np.asarray(self.encode(text), np.int64) for text in texts]

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's file into a directory, which is made where it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            partial = directory / f"{name}.{os.getpid()}.partial"
            try:
                partial.write_bytes(content)
                partial.replace(directory / name)  # readers see the old file or the whole new one
            finally:
                partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Reads a `tokenizer.json`, a sentencepiece `.model` or a `.tiktoken` file.

        Of a directory it is the one that it holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else.
        """
        path = Path(path)
        if path.is_dir():
            others = (sorted(path.glob(f"*{suffix}")) for suffix in (".model", SUFFIX))
            found = [path / "tokenizer.json", *chain(*others)]
            file = next((file for file in found if file.is_file()), None)
            if file is None:
                runs = sorted(map(str, path.glob("*.ckpt")))
                hint = f"; the checkpoint {runs[-1]} holds its run's" if runs else ""
                raise FileNotFoundError(
                    f"{path} holds no tokenizer.json, .model or {SUFFIX} file{hint}"
                )
            path = file
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {path}: give a tokenizer.json, a sentencepiece .model, a "
                f"{SUFFIX} file, or one of " + ", ".join(NAMES)
            )
        try:
            return from_files({path.name: path.read_bytes()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def single(self, text: str) -> int | None:
        """The token that a text is, a special one by its name; None: it is several, or none."""
        tokens = self.encode(text)
        return tokens[0] if len(tokens) == 1 else None

    @property
    def digit_tokens(self) -> list[int] | None:
        """The tokens of 0 to 9, None where a digit is not one token or digits are merged."""
        try:
            digits = [self.encode(digit) for digit in "0123456789"]
            together = self.encode("01234567890")
        except ValueError:
            return None
        tokens = [digit[0] for digit in digits if len(digit) == 1]
        return tokens if together == [*tokens, *tokens[:1]] else None

    def fingerprint(self) -> str:
        """A short hash of everything that decides how a text is encoded."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files().items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()[:16]

    def show(self, token: int) -> str:
        """One token in few printable characters, for tables."""
        if token in (self.stop_token, self.pad_token):
            return "stop" if token == self.stop_token else "pad"
        text = self.decode([token])
        return "".join(
            "␣" if letter == " " else letter if letter.isprintable() else repr(letter)[1:-1]
            for letter in text
        )


# ---------------------------------------------------------------------------- characters


class CharacterTokenizer(Tokenizer):
    """One token a character, in the order given; then, optionally, a stop and a pad token.

    It looks characters up in a table instead of running the `tokenizers` library, which takes
    1.5 s for a megabyte where this takes 0.01 s. Its file is a `tokenizer.json` of that library.

    Args:
        characters: Each character once.
        special: Whether there are a stop and a pad token.
    """

    def __init__(self, characters: str, *, special: bool = False) -> None:
        self.characters = characters
        self.special = special
        if special:
            self.stop_token, self.pad_token = len(characters), len(characters) + 1
        codes = _codes(characters)
        self._table = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # the last: any other
        self._table[codes] = np.arange(len(codes), dtype=np.int32)

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 2 * self.special

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        lengths = [len(_utf8(character)) for character in self.characters]
        return np.array(lengths + [0] * (2 * self.special), np.int64)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._encode(text).tolist()
        return tokens

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [self._encode(text).astype(np.int64) for text in texts]

    def _encode(self, text: str) -> NDArray[np.int32]:
        tokens: NDArray[np.int32] = self._table[np.minimum(_codes(text), len(self._table) - 1)]
        if len(tokens) and tokens.min() < 0:
            index = int(np.argmax(tokens < 0))
            known = self.characters if len(self.characters) <= 100 else self.characters[:100] + "…"
            raise ValueError(
                f"character {text[index]!r} (U+{ord(text[index]):04X}) at position {index} is not "
                f"one of the {len(self.characters)} that this tokenizer knows ({known!r}): remove "
                "it, or train with a tokenizer that knows all text, bpe or unigram"
            )
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        count = len(self.characters)
        return "".join(self.characters[token] for token in tokens if token < count)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._library().to_str(pretty=True).encode()}

    def _library(self) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        vocabulary = {letter: index for index, letter in enumerate(self.characters)}
        if self.special:
            vocabulary |= {STOP: len(vocabulary), PAD: len(vocabulary) + 1}
        library = Library(models.WordLevel(vocabulary, unk_token=""))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        library.decoder = decoders.Fuse()
        if self.special:
            library.add_special_tokens([AddedToken(name, special=True) for name in (STOP, PAD)])
        return library


class WordTokenizer(Tokenizer):
    """One token a word, in the order given; a text is words with blanks between them.

    For tasks whose symbols are more than there are characters, such as the keys and values of
    `Recall`: ``k12 v7``. Its file is a `tokenizer.json` of the `tokenizers` library.

    Args:
        words: Each word once, none with a blank in it.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._tokens = {word: token for token, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._tokens[word] for word in text.split()]
        except KeyError as error:
            first, last = self.words[0], self.words[-1]
            raise ValueError(
                f"{error.args[0]!r} is not one of the {len(self.words)} words that this tokenizer "
                f"knows ({first} .. {last}), which are separated by blanks"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.words[token] for token in tokens if token < len(self.words))

    def files(self) -> dict[str, bytes]:
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers

        library = Library(models.WordLevel(self._tokens, unk_token=""))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return {"tokenizer.json": library.to_str().encode()}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def learn_characters(texts: Iterable[str], vocab_size: int | None = None) -> CharacterTokenizer:
    """A tokenizer of all characters of the texts, in code point order.

    Raises:
        ValueError: there are more characters than `vocab_size`.
    """
    found = np.empty(0, np.uint32)
    for text in texts:
        found = np.union1d(found, _codes(text))
    if vocab_size is not None and len(found) > vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: the text has {len(found)} different "
            f"characters; take vocab_size {len(found)} or tokenizer bpe"
        )
    return CharacterTokenizer("".join(map(chr, found.tolist())))


# ---------------------------------------------------------------------------- subwords


class LibraryTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library: learned here, or anyone's.

    It gives all tokens of a text and no others, always the same ones: what such a file says of
    truncating, padding, adding tokens and dropping merges is for whoever wrote it, and switched
    off. A special token's name within a text is text like any other.

    Args:
        library: The library's tokenizer, which is changed accordingly.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        from tokenizers import AddedToken

        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None):
            library.model.dropout = None
        self.library = library
        self.stop_token = self._special(STOP, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
        self.pad_token = self._special(PAD, "<|padding|>", "[PAD]")
        # What ends a text is special, whatever the file calls it.
        added = library.get_added_tokens_decoder().items()
        control = [
            word.content for token, word in added if token in (self.stop_token, self.pad_token)
        ]
        library.add_special_tokens([AddedToken(name, special=True) for name in control])
        library.encode_special_tokens = True
        self._words: _Words | None = None

    def _special(self, *names: str) -> int | None:
        tokens = (self.library.token_to_id(name) for name in names)
        return next((token for token in tokens if token is not None), None)

    @property
    def vocab_size(self) -> int:
        # Ids may have gaps; the largest one decides how many rows an embedding needs.
        return max(self.library.get_vocab().values(), default=-1) + 1

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        if "ByteLevel" not in _types_of(json.loads(self.library.to_str())["decoder"]):
            return super().token_bytes
        # Each character of such a token is a byte; what was added is text as it is.
        lengths = np.zeros(self.vocab_size, np.int64)
        for word, token in self.library.get_vocab().items():
            lengths[token] = len(word)
        for token, added in self.library.get_added_tokens_decoder().items():
            lengths[token] = 0 if added.special else len(_utf8(added.content))
        return lengths

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return tokens

    def single(self, text: str) -> int | None:
        special = self.library.token_to_id(text)
        return super().single(text) if special is None else special

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        if self._words is None and _splits_at_blanks(self.library):
            self._words = _Words(self._encode_many)
        return self._encode_many(texts) if self._words is None else self._words.encode_many(texts)

    def _encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.library.decode(list(tokens), skip_special_tokens=True)
        return text

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.library.to_str().encode()}


def _types_of(decoder: dict[str, Any] | None) -> list[str]:
    """The kinds of a library's decoder and of those that it is made of."""
    if decoder is None:
        return []
    return [decoder["type"], *chain(*map(_types_of, decoder.get("decoders", [])))]


# A word with the blanks before it, or blanks at the end of a text; blanks are those of Unicode, to
# which Python adds four control characters.
_WORD = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")


# Taken while words are looked up and new ones kept, which threads must not do at once; no attribute
# of a tokenizer, which could not be copied then.
_KEEPING = threading.Lock()


class _Words:
    """Encodes a text word by word, each word once: many times as fast as the library.

    Only for tokenizers that never make a token across the border between a word and the blanks
    that follow it, see `_splits_at_blanks`.

    Args:
        encode_many: Of the tokenizer, for words that are new.
    """

    MOST, LONGEST = 200_000, 64  # words that are remembered, and characters of such a word

    def __init__(self, encode_many: Callable[[Sequence[str]], list[NDArray[np.int64]]]) -> None:
        self._encode_many = encode_many
        self._forget()

    def _forget(self) -> None:
        self._index: dict[str, int] = {}
        self._starts = np.zeros(1, np.int64)  # of each word's tokens, and the end of the last ones
        self._tokens = np.zeros(0, np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """As `Tokenizer.encode_many`."""
        words = [_WORD.findall(text) for text in texts]
        with _KEEPING:
            return self._encoded(words)

    def _encoded(self, words: list[list[str]]) -> list[NDArray[np.int64]]:
        """The tokens of each text's words."""
        new = [word for word in dict.fromkeys(chain(*words)) if word not in self._index]
        if len(self._index) + len(new) > self.MOST:
            self._forget()
            new = list(dict.fromkeys(chain(*words)))
        new.sort(key=lambda word: len(word) > self.LONGEST)  # the long ones last
        kept = len(self._index) + sum(len(word) <= self.LONGEST for word in new)
        if new:
            found = self._encode_many(new)
            self._index |= zip(
                new, range(len(self._index), len(self._index) + len(new)), strict=True
            )
            ends = self._starts[-1] + np.cumsum([len(tokens) for tokens in found])
            self._starts = np.concatenate([self._starts, ends])
            self._tokens = np.concatenate([self._tokens, *found]).astype(np.int32)
        result = [self._joined(some) for some in words]
        if kept < len(self._index):
            for word in new[kept - len(self._index) :]:
                del self._index[word]
            self._starts = self._starts[: kept + 1]
            self._tokens = self._tokens[: self._starts[-1]]
        return result

    def _joined(self, words: list[str]) -> NDArray[np.int64]:
        """The tokens of words that are all known, one after the other."""
        which = np.fromiter(map(self._index.__getitem__, words), np.int64, len(words))
        lengths = self._starts[which + 1] - self._starts[which]
        shift = self._starts[which] - (np.cumsum(lengths) - lengths)
        places = np.arange(int(lengths.sum())) + np.repeat(shift, lengths)
        joined: NDArray[np.int64] = self._tokens[places].astype(np.int64)
        return joined


def _splits_at_blanks(library: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer is one that `learn_bpe` makes: no token crosses a word's end.

    Byte-level splitting lets blanks begin a subword, or be one, but never end one that has
    anything else in it; which subword the last of them begins is decided by what follows.
    """
    made = json.loads(library.to_str())
    return bool(
        all(added["special"] for added in made["added_tokens"])
        and made["normalizer"] is None
        and made["model"]["type"] == "BPE"
        and made["pre_tokenizer"] == json.loads(_bpe_parts()[0].__getstate__())
    )


def _bpe_parts() -> tuple[Any, Any]:
    """How `learn_bpe` cuts a text before it learns, and how it puts one together again."""
    from tokenizers import decoders, pre_tokenizers

    cutting = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return cutting, decoders.ByteLevel()


def learn_bpe(texts: Iterable[str], vocab_size: int | None = None) -> LibraryTokenizer:
    """Byte-level BPE: the 256 bytes, then the most frequent merges; every digit is one token.

    Raises:
        ValueError: `vocab_size` is too small for the bytes.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: byte-level BPE starts from the "
            f"{len(alphabet)} bytes; take at least {len(alphabet)} or tokenizer characters"
        )
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = _bpe_parts()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return LibraryTokenizer(library)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model: learned here, or anyone's.

    Args:
        model: The bytes of a `.model` file.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        if not model:  # the library would take it for "no model yet"
            raise OSError("an empty sentencepiece model")
        self.model = model
        self.processor: sentencepiece.SentencePieceProcessor = SentencePieceProcessor(
            model_proto=model
        )
        self.stop_token = _defined(self.processor.eos_id())
        self.pad_token = _defined(self.processor.pad_id())

    @property
    def vocab_size(self) -> int:
        return int(self.processor.vocab_size())

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        processor = self.processor
        lengths = np.zeros(self.vocab_size, np.int64)
        for token in range(self.vocab_size):
            if processor.is_byte(token):
                lengths[token] = 1
            elif not (processor.is_control(token) or processor.is_unknown(token)):
                lengths[token] = len(_utf8(processor.id_to_piece(token).replace("\u2581", " ")))
        return lengths

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.processor.encode(text, add_bos=False, add_eos=False)
        return tokens

    def single(self, text: str) -> int | None:
        special = self.processor.piece_to_id(text)
        known = special != self.processor.unk_id()
        return (
            int(special) if known and self.processor.is_control(special) else super().single(text)
        )

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.processor.decode(list(tokens))
        return text

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        found = self.processor.encode(list(texts), num_threads=cores, add_bos=False, add_eos=False)
        return [np.asarray(tokens, np.int64) for tokens in found]

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}


def _defined(token: int) -> int | None:
    return token if token >= 0 else None


def learn_unigram(texts: Iterable[str], vocab_size: int | None = None) -> SentencePieceTokenizer:
    """A unigram model (Kudo 2018); every digit is one token, rare characters become bytes.

    The text is taken as it is: no normalisation, blanks and line ends are kept.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the frequent characters.
    """
    import sentencepiece

    vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short_lines(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a short text may not fill the vocabulary
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            user_defined_symbols=["\n"],
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # the same model from the same text
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size {vocab_size} does not suit a unigram model of this text, which needs the "
            f"256 bytes and its frequent characters ({_last_sentence(error)}); take a larger "
            "vocab_size, or tokenizer bpe"
        ) from None
    return SentencePieceTokenizer(model.getvalue())


def _short_lines(texts: Iterable[str], length: int = 1000) -> Iterator[str]:
    # The trainer takes lines and skips those of more than 4,192 bytes.
    for text in texts:
        for line in text.splitlines():
            yield from (line[start : start + length] for start in range(0, len(line), length))


def _last_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1].strip().rstrip(".")


# ---------------------------------------------------------------------------- from names and files


def from_files(files: dict[str, bytes]) -> Tokenizer:
    """Rebuilds the tokenizer whose `Tokenizer.files` these are.

    Raises:
        ValueError: the content is not a valid tokenizer.
    """
    if len(files) != 1:
        raise ValueError(f"a tokenizer is one file, not {len(files)}: {', '.join(files)}")
    ((name, content),) = files.items()
    if name.endswith(SUFFIX) or (name.endswith(".model") and tiktoken_files.is_ranks(content)):
        return LibraryTokenizer(tiktoken_files.library_of_file(content, name))
    if not name.endswith(".json"):
        try:
            return SentencePieceTokenizer(content)
        except (RuntimeError, OSError):
            raise ValueError("not a sentencepiece model, and the name is not .json") from None
    from tokenizers import Tokenizer as Library

    try:
        text = content.decode()
        library = Library.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"not a tokenizer.json: {error}") from None
    return _own(json.loads(text)) or LibraryTokenizer(library)


def from_ranks(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int] | None = None
) -> LibraryTokenizer:
    """The tokenizer of a `tiktoken.Encoding`, or of a file of ranks with a pattern of its own.

    Args:
        ranks: Tokens and their ids, the lower of which is merged first; every byte is one.
        pattern: The regular expression that cuts a text.
        special: Special tokens and their ids.

    Raises:
        ValueError: A byte has no token, or two tokens have the same id.
    """
    return LibraryTokenizer(tiktoken_files.library_of(ranks, pattern, special))


def _own(file: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of characters or of words that wrote this file, None if another one did."""
    model = file["model"]
    if model.get("type") != "WordLevel" or model.get("unk_token") != "":
        return None
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if (file.get("pre_tokenizer") or {}).get("type") == "WhitespaceSplit":
        return WordTokenizer(names)
    special = names[-2:] == [STOP, PAD]
    return CharacterTokenizer("".join(names[:-2] if special else names), special=special)


def check_name(name: str) -> None:
    """Refuses what is neither the name of a tokenizer nor the path of one.

    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        ValueError: it looks like a name, and there is no such tokenizer.
    """
    if name in NAMES or Path(name).exists():
        return
    if Path(name).suffix or os.sep in name:
        Tokenizer.load(name)  # says that nothing is there
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"unknown tokenizer {name!r}: there are {', '.join(NAMES)}, or give the path of a "
        f"tokenizer.json, .model or {SUFFIX} file{hint}"
    )


# ---------------------------------------------------------------------------- streaming


class StreamDecoder:
    """Turns tokens into text while they come, a character only when all of its bytes are there.

    Args:
        tokenizer: What decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Tokens already shown stay for one round: some decoders write a subword differently at
        # the beginning of a text.
        self._shown: list[int] = []
        self._pending: list[int] = []
        self._sent = 0  # characters of the pending tokens that were returned

    def push(self, token: int) -> str:
        """Takes one token, returns the text that is now certain, maybe none."""
        self._pending.append(token)
        text = self._text()
        # An incomplete character decodes to U+FFFD at the end; what comes before is certain.
        certain = text.rstrip("\ufffd")
        new = certain[self._sent :]
        self._sent += len(new)
        if len(certain) == len(text):
            self._shown, self._pending, self._sent = self._pending, [], 0
        return new

    def finish(self) -> str:
        """What is left when no more tokens come."""
        rest = self._text()[self._sent :]
        self._shown, self._pending, self._sent = [], [], 0
        return rest

    def _text(self) -> str:
        before = self.tokenizer.decode(self._shown)
        return self.tokenizer.decode(self._shown + self._pending)[len(before) :]
