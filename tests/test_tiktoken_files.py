"""Files of tiktoken's: what is known without the package; tests/extras holds them against it."""

import base64

import pytest

from archzoo.tasks import Text
from archzoo.tasks.tokenizers import Tokenizer, from_files, from_ranks

WORDS = ["th", "he", "the", " the", "in", "ing", "  ", "12", "123", "aa", "aaa", "é", "'s", "\n\n"]


def ranks_of(words):
    """Ranks of all bytes and some words, as a file of tiktoken's has them."""
    tokens = [bytes([n]) for n in range(256)]
    return {token: n for n, token in enumerate([*tokens, *(word.encode() for word in words)])}


def file_of(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def test_a_file_is_read_by_its_name(tmp_path):
    ranks = ranks_of(WORDS)
    (tmp_path / "cl100k_base.tiktoken").write_bytes(file_of(ranks))
    for path in (tmp_path, tmp_path / "cl100k_base.tiktoken"):
        tokenizer = Tokenizer.load(path)
        tokens = tokenizer.encode("the thing's 1234<|endoftext|>")
        names = [tokenizer.decode([token]) for token in tokens]
        assert names[:9] == ["the", " ", "th", "ing", "'s", " ", "123", "4", "<"]
        assert (
            tokens[0] == ranks[b"the"]
            and tokenizer.decode(tokens) == "the thing's 1234<|endoftext|>"
        )
        assert tokenizer.stop_token == 100257 and tokenizer.vocab_size == 100277
        assert tokenizer.token_bytes[ranks["é".encode()]] == 2
        assert tokenizer.token_bytes[100257] == 0
    again = from_files(tokenizer.files())  # as checkpoints keep it
    assert again.fingerprint() == tokenizer.fingerprint() and again.encode(
        "the é"
    ) == tokenizer.encode("the é")
    (tmp_path / "text.txt").write_text("the thing 's 123\n" * 100)
    task = Text(
        tmp_path / "text.txt",
        str(tmp_path / "cl100k_base.tiktoken"),
        context_length=8,
        cache_dir=tmp_path / "c",
    )
    assert task.vocab_size == 100277


def test_a_model_file_may_be_one_too(tmp_path):
    """As Llama 3's tokenizer.model is."""
    (tmp_path / "tokenizer.model").write_bytes(file_of(ranks_of(WORDS)))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.stop_token == 128001 and tokenizer.decode(tokenizer.encode("the")) == "the"


def test_ranks_with_a_pattern_of_their_own():
    tokenizer = from_ranks(ranks_of(WORDS), r"\S+|\s+", {"<|endoftext|>": 999})
    assert tokenizer.stop_token == 999
    assert len(tokenizer.encode("123 aaa")) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "my.tiktoken",
            file_of(ranks_of([])),
            "does not say how a text is cut.*cl100k_base.*from_ranks",
        ),
        (
            "gpt2.tiktoken",
            b"IQ== 0\nIg==\n",
            "line 2 is not a token in base64 and its rank: b'Ig=='",
        ),
        ("gpt2.tiktoken", b"IQ== 0\nI\xff 1\n", "line 2 is not a token in base64"),
        ("gpt2.tiktoken", b"IQ== 0\nIQ== 1\n", r"line 2: token b'!' comes twice"),
        ("gpt2.tiktoken", b"IQ== 0\nIg== 0\n", "two of its tokens have the same rank"),
        ("gpt2.tiktoken", b"IQ== 0\n", "byte 0x00 has no token: all 256"),
        (
            "gpt2.tiktoken",
            file_of(ranks_of([]) | {b"th": 50256}),
            "of another encoding than its name",
        ),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}") as caught:
        Tokenizer.load(tmp_path / name)
    assert "\n" not in str(caught.value)
