"""Tokenizers out of tiktoken's files: lines of a token in base64 and its rank.

tiktoken cuts a text by a regular expression, and then merges in each part, as long as there is one,
the two neighbours whose concatenation has the lowest rank. Neither the expression nor the special
tokens are in the file; they belong to its name. What comes out is a tokenizer of the `tokenizers`
library, so that the package tiktoken is not needed.
"""

from __future__ import annotations

import base64
import re
from binascii import Error as NotBase64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import tokenizers

SUFFIX = ".tiktoken"

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CL100K = _WORD + r"|\p{N}{1,3}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Encoding(NamedTuple):
    """What belongs to the name of a file.

    Attributes:
        pattern: The regular expression that cuts a text.
        special: Special tokens and their ids.
    """

    pattern: str
    special: Mapping[str, int]


_P50K = Encoding(_GPT2, {"<|endoftext|>": 50256})
ENCODINGS = {
    "gpt2": _P50K,
    "r50k_base": _P50K,
    "p50k_base": _P50K,
    "cl100k_base": Encoding(
        _CL100K,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Encoding(_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": Encoding(
        _WORD + r"|\p{N}" + _REST,
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
    "llama3": Encoding(_CL100K, {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}),
}


def library_of_file(content: bytes, name: str) -> tokenizers.Tokenizer:
    """The tokenizer of a file.

    Args:
        content: Of the file.
        name: Of the file, which says how a text is cut.

    Raises:
        ValueError: It is not such a file, or nothing is known of its name.
    """
    stem = Path(name).stem.lower()
    encoding = ENCODINGS.get("llama3" if name == "tokenizer.model" else stem)
    if encoding is None:
        raise ValueError(
            "a tiktoken file does not say how a text is cut before its ranks are applied: give it "
            f"the name of its encoding ({', '.join(ENCODINGS)}) and {SUFFIX}, or hand over what "
            "archzoo.tasks.tokenizers.from_ranks makes of another pattern"
        )
    return library_of(read_ranks(content), *encoding)


def is_ranks(content: bytes) -> bool:
    """Whether a file is one of tiktoken's by how it begins, whatever its name."""
    line = content[:4096].partition(b"\n")[0]
    return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\r?", line) is not None


def read_ranks(content: bytes) -> dict[bytes, int]:
    """The tokens of a file and their ranks.

    Raises:
        ValueError: A line is something else, or comes twice.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            value = int(rank)
        except (ValueError, NotBase64):
            raise ValueError(
                f"line {number} is not a token in base64 and its rank: {line[:40]!r}"
            ) from None
        if token in ranks or not token or value < 0:
            raise ValueError(f"line {number}: token {token!r} comes twice, or is none")
        ranks[token] = value
    if len(set(ranks.values())) < len(ranks):
        raise ValueError("two of its tokens have the same rank")
    return ranks


def library_of(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int] | None = None
) -> tokenizers.Tokenizer:
    """The tokenizer of ranks, such as those of an own `tiktoken.Encoding`.

    Args:
        ranks: Tokens and their ids, the lower of which is merged first; every byte is one.
        pattern: The regular expression that cuts a text.
        special: Special tokens and their ids.

    Raises:
        ValueError: A byte has no token, or two tokens have the same id.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    special = special or {}
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise ValueError(f"byte 0x{absent[0]:02x} has no token: all 256 bytes need one")
    taken = set(ranks.values())
    if clash := [name for name, token in special.items() if token in taken]:
        raise ValueError(
            f"the special token {clash[0]} has id {special[clash[0]]}, as one of its other tokens "
            "has: the file is of another encoding than its name says"
        )
    letters = _letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {written(token): rank for token, rank in ranks.items()} | dict(special)
    merges: list[tuple[str, str]] = []
    for token, _ in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in parts if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written(left), written(right)) for left, right in known]
    # A part that is a token as a whole is that token, whichever merges lead to it.
    library = Library(models.BPE(vocabulary, merges, ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in special])
    return library


def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level tokenizer, as GPT-2 has it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
