"""Long documents, read into a state: the tokens of the whole text, resumed bit for bit."""

from __future__ import annotations

import io
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import micro
from test_state_files import KINDS, make, same

import archzoo
from archzoo.checkpoint import load
from archzoo.cli import main
from archzoo.contract.measure import relative_error
from archzoo.demo.decoding import load_sides
from archzoo.generation import Reading, generate, read_document
from archzoo.generation.reading import segments
from archzoo.states import map_state
from archzoo.tasks.tokenizers import (
    CharacterTokenizer,
    LibraryTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    learn_bpe,
    learn_unigram,
)
from archzoo.tasks.writing import PLAIN

WORDS = [
    *(
        "the",
        "a",
        "cat",
        "sat",
        "on",
        "",
        "mat\n\n",
        "é日本語",
        "12",
        "345",
        "don't",
        "x=y()",
        "...",
    ),
    *("\t🙂🙂", "Ünïcode", "supercalifragilistic"),
]


def text_of(length: int, seed: int = 0, blanks: bool = True) -> str:
    draw = random.Random(seed)
    join = [" ", " ", " ", "  ", "\n", "\r\n", "\t "] if blanks else [""]
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        parts += [draw.choice(WORDS), draw.choice(join)]
    return "".join(parts)


def gpt2(texts: list[str]) -> Tokenizer:
    """Another's byte-level BPE: no digits are parted, and a blank begins a text."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return LibraryTokenizer(library)


def llama(texts: list[str]) -> Tokenizer:
    """Another's sentencepiece model: normalised, with a blank before every text."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


TOKENIZERS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "characters": lambda texts: CharacterTokenizer("".join(sorted(set(texts[0])))),
    "bpe": lambda texts: learn_bpe(texts, 500),
    "unigram": lambda texts: learn_unigram(texts, 400),
    "gpt2": gpt2,
    "llama": llama,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_segments_have_the_tokens_of_the_whole_text(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]([text_of(20_000) + text_of(2_000, 1, blanks=False)])
    for seed in range(4):
        text = text_of(6_000, seed) + text_of(3_000, seed, blanks=seed % 2 == 0)
        path = tmp_path / "text"
        path.write_bytes(text.encode())
        found = list(segments(path, 0, tokenizer, PLAIN, 1_000))
        assert "".join(part for part, _ in found) == text and len(found) > 8
        assert [t for _, tokens in found for t in tokens] == tokenizer.encode(text)
        # From any of them on, it is the same.
        begin = len("".join(part for part, _ in found[:3]).encode())
        assert list(segments(path, begin, tokenizer, PLAIN, 1_000)) == found[3:]


@pytest.mark.parametrize("name", ["bpe", "unigram", "gpt2"])
def test_text_without_a_blank_is_cut_where_its_tokens_end(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name](["a" * 90 + "\n" + text_of(9_000)])
    runs = ("a" * 3_000, "ab" * 1_500)
    for text in (
        *(runs if name == "bpe" else ()),
        "日本語" * 1_000,
        text_of(3_000, 3, blanks=False),
    ):
        (tmp_path / "text").write_bytes(text.encode())
        found = list(segments(tmp_path / "text", 0, tokenizer, PLAIN, 1_000))
        assert [t for _, tokens in found for t in tokens] == tokenizer.encode(text)


def test_text_that_is_one_token_cannot_be_cut(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 3_000)
    tokenizer = learn_bpe(["a" * 3_000])
    with pytest.raises(ValueError, match="from byte 0: the tokenizer joins text across every"):
        list(segments(tmp_path / "text", 0, tokenizer, PLAIN, 1_000))


# ---------------------------------------------------------------------------- the state


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_bpe([text_of(20_000)], 300)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("abacus digits", "abacus_micro")])
def test_segment_by_segment_is_the_whole_at_once(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make(kind, torch.float64, vocab_size=300)
    text = text_of(1_400)
    (tmp_path / "text").write_bytes(text.encode())
    held = read_document(model, tmp_path / "text", tokenizer, segment=600)
    tokens = tokenizer.encode(text)
    assert held.read.tolist() == [len(tokens)] and held.tail[0].tolist() == tokens[-256:]
    with torch.no_grad():
        output = model(torch.tensor([tokens]), model.init_state(1))
    wanted = model.copy_state(output.state)
    map_state(lambda a, b: a if close(a, b) else pytest.fail(f"{a} {b}"), held.state, wanted)
    assert close(held.logits, output.logits[:, -1])


def close(one: Any, other: Any) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return relative_error(one, other) < 1e-12


class Interrupted(Exception):
    """Someone has pressed Ctrl-C."""


@pytest.mark.parametrize("kind", ["retnet_micro", "pattern"])
def test_an_interruption_changes_no_bit(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(kind, vocab_size=300)
    path, state = tmp_path / "text", tmp_path / "state"
    path.write_bytes(text_of(6_000).encode())
    given: dict[str, Any] = {"segment": 600, "save_every": 0}
    whole = read_document(model, path, tokenizer, segment=600)
    seen: list[Reading] = []
    stop_at = [1, 3, 4, 100]

    def watch(reading: Reading) -> None:
        seen.append(reading)
        if len(seen) == stop_at[0]:
            raise Interrupted

    while True:
        try:
            found = read_document(model, path, tokenizer, state=state, on_segment=watch, **given)
            break
        except Interrupted:
            stop_at.pop(0)
    assert same(found, whole)
    assert len(seen) == len({reading.done for reading in seen}), "nothing is read twice"
    assert seen[-1].done == seen[-1].size and seen[-1].resumed > 0
    assert same(archzoo.load_state(state, model), whole)
    # It has been read: the same call reads nothing more.
    assert same(read_document(model, path, tokenizer, state=state, **given), whole)
    assert not list(tmp_path.glob(".*partial"))
    # What is read after it, and the text that follows, is that of one conversation.
    after = read_document(model, path, tokenizer, conversation=found, **given)
    assert after.read.tolist() == [2 * int(whole.read[0])]
    assert same(found, whole), "it stays as it is"
    assert len(generate(model, conversation=after, max_tokens=3).tokens[0]) == 3


def test_what_cannot_be_read_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(vocab_size=300)
    path, state = tmp_path / "text", tmp_path / "state"
    text = text_of(3_000)
    path.write_bytes(text.encode())
    given: dict[str, Any] = {"segment": 600, "state": state}
    read_document(model, path, tokenizer, **given)
    changed = {
        "larger": (text + "x", "holds another file, and not"),
        "other": (text[:-1] + "#", "has changed since .* was saved: remove that file"),
    }
    for content, match in changed.values():
        path.write_bytes(content.encode())
        with pytest.raises(ValueError, match=match):
            read_document(model, path, tokenizer, **given)
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match="holds a reading with another segment"):
        read_document(model, path, tokenizer, segment=700, state=state)
    archzoo.save_state(state, model.init_state(1), model)
    with pytest.raises(ValueError, match="is there already, and not the state of a document"):
        read_document(model, path, tokenizer, **given)
    for content, match in (
        (b"", "is empty: there is nothing to read"),
        (b"a" * 70_000 + b"\xff" + b"a" * 700, "byte 0xff at offset 70000; convert the file"),
        (b"a\xe2\x82", "byte 0xe2 at offset 1; convert the file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_document(model, path, tokenizer)
    path.write_text("abc" * 400 + "Z")
    with pytest.raises(ValueError, match="from byte 1200: character 'Z'"):
        read_document(make(), path, CharacterTokenizer("abc"), segment=600)
    with pytest.raises(ValueError, match="segment=10 must be at least 512"):
        read_document(model, path, tokenizer, segment=10)
    with pytest.raises(ValueError, match="a directory and not a regular file"):
        read_document(model, tmp_path, tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no text at .*other: give the path of a UTF-8"):
        read_document(model, tmp_path / "other", tokenizer)
    rows = generate(model, [[1], [2]], max_tokens=1, keep_state=True).conversation
    with pytest.raises(ValueError, match="has 2 rows, and a document is read into one"):
        read_document(model, path, tokenizer, conversation=rows)


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Peak memory of this process, which the first of two texts has warmed up."""
    model = micro("retnet_micro")
    tokenizer = CharacterTokenizer("abcdefgh ")
    path = tmp_path / "text"
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = []
    for times in (2_500, 2_500, 15_000):
        path.write_text("abc def " * times)
        read_document(model, path, tokenizer)
        peaks.append(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[2] - peaks[1] < 4e6, "100,000 tokens more"


# ---------------------------------------------------------------------------- the command


def test_the_command_reads_resumes_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = make(vocab_size=9), CharacterTokenizer("abcdefgh ")
    archzoo.save_pretrained("model", model, tokenizer)
    Path("long.txt").write_text(text := "abc def " * 500)
    command = ["read", "model", "long.txt", "--segment", "600", "--save_every", "0"]
    called = 0

    def press(*call: object) -> None:
        nonlocal called
        called += 1
        if called == 5:  # the first save has tried the model twice
            raise KeyboardInterrupt

    pressed = torch.nn.Module.register_forward_pre_hook
    monkeypatch.setattr(
        "archzoo.checkpoint.load",
        lambda *given: (loaded := load(*given), pressed(loaded.model.embedding, press))[0],
    )
    assert main(command) == 130
    assert "interrupted: 1,200 bytes are in long.txt.state" in capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "long.txt: 4,000 tokens" in printed and "resumed at byte 1,200" in printed
    assert "long.txt.state: the state after 4,000 tokens" in printed
    assert main(command) == 0
    assert "long.txt: had been read" in capsys.readouterr().out
    assert main(["generate", "model", "ab", "--state", "long.txt.state", "--max_tokens", "3"]) == 0
    [wanted] = generate(model, text + "ab", tokenizer=tokenizer, max_tokens=3).texts or []
    assert capsys.readouterr().out.startswith(f"ab{wanted}\n")
    Path("more.txt").write_text("fed " * 200)
    assert main(["read", "model", "more.txt", "--after", "long.txt.state"]) == 0
    assert "more.txt.state: the state after 4,800 tokens" in capsys.readouterr().out
    assert main(["read", "model", "nothing.txt"]) == 1
    assert "nothing.txt" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = str(tmp_path / "mute"), tmp_path / "text.txt"
    archzoo.save_pretrained(model, micro("retnet_micro"))
    text.write_text("a cat")
    for command in (["generate", model, "a"], ["read", model, str(text)]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "mute holds no tokenizer" in said and "archzoo.save_pretrained(" in said
        assert said.count("\n") == 1
    with pytest.raises(ValueError, match="mute holds no tokenizer"):
        load_sides([model])
