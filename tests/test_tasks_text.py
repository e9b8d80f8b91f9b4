"""Text: the cache, the windows, the lanes, and what is refused."""

import gzip
import hashlib
import inspect
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.tasks import Addition, Text, build, draw
from archzoo.tasks.corpus import Corpus
from archzoo.tasks.stream import IGNORED
from archzoo.tasks.tokenizers import (
    LibraryTokenizer,
    SentencePieceTokenizer,
    learn_bpe,
    learn_characters,
)

torch.set_num_threads(1)

DATA = Path(__file__).parents[1] / "data"
PARTS = ("train", "validation", "test")


@pytest.fixture
def text(tmp_path):
    """Makes a task on a text; the cache stays inside the test's folder."""

    def make(content=None, **arguments):
        path = tmp_path / "corpus.txt"
        if content is not None:
            path.write_text(content, encoding="utf-8", newline="")
        arguments = {"path": path, "cache_dir": tmp_path / "cache", **arguments}
        return Text(**{"context_length": 8, "batch_size": 4, **arguments})

    return make


def numbers(count):
    """A text in which every line is another one."""
    return "".join(f"{n:05}\n" for n in range(count))


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---------------------------------------------------------------------------- corpora


def test_the_docstring_shows_what_the_code_does(text):
    task = text(path=DATA / "shakespeare.txt", **defaults("context_length", "batch_size"))
    assert inspect.cleandoc(Text.__doc__).count(
        "\n".join(f"    {line}" for line in draw(task).splitlines())
    )


def defaults(*names):
    return {name: inspect.signature(Text).parameters[name].default for name in names}


@pytest.mark.parametrize("name", ["shakespeare.txt", "three_kingdoms.txt"])
def test_the_corpora_are_what_their_page_says(name):
    content = (DATA / name).read_bytes()
    page = (DATA / "README.md").read_text()
    assert 500_000 <= len(content) <= 2_000_000
    for fact in (
        f"{len(content):,} bytes",
        f"{len(set(content.decode())):,} different",
        hashlib.sha256(content).hexdigest(),
    ):
        assert fact in page
    assert hashlib.sha256(content).hexdigest() in (DATA / "rebuild.py").read_text()


@pytest.mark.parametrize("tokenizer", ["characters", "bpe", "unigram"])
@pytest.mark.parametrize("name", ["shakespeare.txt", "three_kingdoms.txt"])
def test_the_corpora_are_encoded_without_loss(text, tmp_path, name, tokenizer):
    # A part of each: the tokenizers take a second for a megabyte.
    content = (DATA / name).read_text(encoding="utf-8")[:60_000]
    task = text(content, tokenizer=tokenizer, vocab_size=None if tokenizer != "bpe" else 600)
    task.prepare()
    assert "".join(decoded(task, part) for part in PARTS) == content
    assert task.bytes_per_token == pytest.approx(
        len(decoded(task, "validation").encode()) / task._tokens("validation")
    )
    # What each token stands for is what decoding up to it adds.
    for part in PARTS[1:]:
        tokens = np.fromfile(task._cache / f"{part}.bin", task._meta["dtype"]).tolist()
        told = np.fromfile(task._cache / f"{part}_bytes.bin", "int32")
        assert len(told) == len(tokens)
        ends = np.cumsum(told)
        assert ends[-1] == len(decoded(task, part).encode()) == task._meta[f"{part}_bytes"]
        for count in (1, 2, 50, len(tokens) // 2):
            begun = task.tokenizer.decode(tokens[:count]).rstrip("\ufffd")
            assert 0 <= ends[count - 1] - len(begun.encode()) < 4  # bytes of half a character


def decoded(task, split):
    tokens = np.fromfile(task._cache / f"{split}.bin", task._meta["dtype"])
    return task.tokenizer.decode(tokens.tolist())


# ---------------------------------------------------------------------------- files


@settings(max_examples=60, deadline=None)
@given(
    content=st.text("ab é\n 😀\t", min_size=4, max_size=300),
    fractions=st.tuples(st.floats(0.05, 0.5), st.sampled_from([0.0, 0.05, 0.1, 0.4])),
    chunk=st.integers(4, 64),
)
def test_chunks_and_split_lose_nothing(tmp_path_factory, content, fractions, chunk):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(content, encoding="utf-8", newline="")
    corpus = Corpus(path)
    parts, split = corpus.split(*fractions)
    assert split == "place" and list(parts) == list(PARTS[: 2 + bool(fractions[1])])
    spans = [span for (span,) in parts.values()]
    assert spans[0][0] == 0 and spans[-1][1] == corpus.size == len(content.encode())
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archzoo.tasks.corpus.CHUNK", chunk)
        chunks = [text for span in spans for text in corpus.texts(span)]
    assert "".join(chunks) == content
    assert all(len(text.encode()) <= 2 * chunk + 3 for text in chunks[1:]) or "\n" in content


def test_cutting_into_chunks_does_not_change_the_tokens(text, monkeypatch):
    content = (DATA / "shakespeare.txt").read_text()[:40_000].replace("\n\n", "\n \n\n   ")
    whole = text(content, tokenizer="bpe", vocab_size=500)
    whole.prepare()
    monkeypatch.setattr("archzoo.tasks.corpus.CHUNK", 300)
    cut = text(content, tokenizer=next(Path(whole.arguments["cache_dir"]).glob("text-*")))
    cut.prepare()
    assert cut._cache != whole._cache
    for part in (*(f"{name}.bin" for name in PARTS), "validation_bytes.bin", "test_bytes.bin"):
        assert (cut._cache / part).read_bytes() == (whole._cache / part).read_bytes()


def test_files_are_read_in_the_order_of_names_and_each_keeps_its_end(text, tmp_path):
    folder = tmp_path / "books"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "b" / "1.txt").write_text("cc\n" * 20)
    (folder / "a.txt").write_text("aa\nbb")  # no line end: one is put between
    (folder / "c.txt").write_text("dd" * 20)
    old = {"validation_fraction": 0.2, "test_fraction": 0.0}  # the parts before there were three
    task = text(path=folder, **old)
    task.prepare()
    assert decoded(task, "train") == "aa\nb" + "\n" + "cc\n" * 17 + "dd" * 16
    assert decoded(task, "validation") == "b\n" + "cc\n" * 3 + "dd" * 4
    assert task._meta["split"] == "place"  # by document, train has nothing
    (folder / "notes.md").write_text("no text of ours")
    chosen = text(path=folder / "*.txt", cache_dir=tmp_path / "other", **old)
    chosen.prepare()
    assert decoded(chosen, "train") == "aa\nb" + "\n" + "dd" * 16
    three = text(path=folder / "*.txt", validation_fraction=0.1, test_fraction=0.1)
    three.prepare()
    assert decoded(three, "train") == decoded(chosen, "train")  # what was trained on stays
    kept = "".join(decoded(three, part) for part in PARTS[1:])
    assert Counter(kept) == Counter(decoded(chosen, "validation"))


def test_the_parts_are_contiguous_and_begin_a_line(text):
    task = text(numbers(200), validation_fraction=0.25, test_fraction=0.15)
    task.prepare()
    assert decoded(task, "train") == "".join(f"{n:05}\n" for n in range(121))
    assert decoded(task, "validation") == "".join(f"{n:05}\n" for n in range(121, 171))
    assert decoded(task, "test") == "".join(f"{n:05}\n" for n in range(171, 200))
    assert task.test_part == "test"
    for split in PARTS[1:]:
        loader = task.evaluation_loader(split)
        asked = "".join(
            content_of(task, batch, row) for batch in loader for row in range(len(batch["tokens"]))
        )
        assert asked.startswith(decoded(task, split)[:-1])  # padding follows
    before = text(validation_fraction=0.25, test_fraction=0.0)
    before.prepare()
    assert before.test_part == "validation" and not (before._cache / "test.bin").exists()
    assert before.rows("test") == before.rows("validation")
    batches = zip(before.test_dataloader(), before.val_dataloader(), strict=True)
    assert all(same(*both) for both in batches)


def documents(folder, count=200):
    folder.mkdir()
    for n in range(count):
        word = f" {chr(97 + n % 26) * 3}{chr(97 + n // 26) * 3}"
        (folder / f"{n:03}.txt").write_text(f"<{n:03}" + word * (20 + n % 5) + ">\n")
    return folder


def test_documents_are_whole_in_one_part_which_their_content_chooses(text, tmp_path):
    folder = documents(tmp_path / "books")
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    task = text(path=folder, tokenizer="bpe", vocab_size=300, **fractions)
    task.prepare()
    assert task._meta["split"] == "documents"
    found = {part: decoded(task, part).splitlines() for part in PARTS}
    every = [line for lines in found.values() for line in lines]
    assert len(every) == len(set(every)) == 200
    assert all(line.startswith("<") and line.endswith(">") for line in every)
    assert {part: len(lines) for part, lines in found.items()} == pytest.approx(
        {"train": 120, "validation": 40, "test": 40}, abs=15
    )
    # Neither names, nor the other documents, nor the seed have a say; a copy stays where it is.
    (folder / "zzz.txt").write_bytes((folder / "000.txt").read_bytes())
    (folder / "150.txt").rename(folder / "a.txt")
    for n in range(0, 100, 3):
        (folder / f"{n:03}.txt").unlink()
    fewer = text(path=folder, seed=5, **fractions)
    fewer.prepare()
    for part in PARTS:
        assert set(decoded(fewer, part).splitlines()) <= set(found[part])
    # More to validate on takes nothing from test.
    wider = text(path=folder, validation_fraction=0.3, test_fraction=0.2, split="documents")
    wider.prepare()
    assert decoded(wider, "test") == decoded(fewer, "test")
    assert set(decoded(wider, "validation").splitlines()) > set(
        decoded(fewer, "validation").splitlines()
    )


def test_a_tokenizer_learns_from_the_train_part_alone(text, tmp_path):
    folder = documents(tmp_path / "books")
    task = text(path=folder, tokenizer="bpe", vocab_size=300, validation_fraction=0.2)
    task.prepare()
    learned = learn_bpe([decoded(task, "train")], 300)
    assert task.tokenizer.files() == learned.files()
    every = learn_bpe([decoded(task, part) for part in PARTS], 300)
    assert task.tokenizer.files() != every.files()


def test_few_documents_are_cut_by_place_unless_documents_are_wanted(text, tmp_path):
    folder = documents(tmp_path / "books", 3)
    task = text(path=folder, validation_fraction=0.2, test_fraction=0.2)
    task.prepare()
    assert task._meta["split"] == "place"
    assert all(f"<{n:03}" in decoded(task, "train") for n in range(3))
    wanted = text(path=folder, split="documents")
    refused(
        ValueError, "none of its 3 documents is in the .* part: take split place", wanted.prepare
    )
    whole = text(path=documents(tmp_path / "more"), split="place", validation_fraction=0.2)
    whole.prepare()
    assert whole._meta["split"] == "place" and decoded(whole, "train").count("<") == 200


# ---------------------------------------------------------------------------- the cache


def test_the_cache_is_used_and_follows_the_content(text, tmp_path):
    text(numbers(100)).prepare()
    (cache,) = (tmp_path / "cache").iterdir()
    stamp = (cache / "train.bin").stat().st_mtime_ns
    again = text()
    again.prepare()
    assert (cache / "train.bin").stat().st_mtime_ns == stamp

    changed = text(numbers(99) + "00990\n")
    changed.prepare()
    text(tokenizer="bpe", vocab_size=260).prepare()
    text(validation_fraction=0.3).prepare()
    text(test_fraction=0.3).prepare()
    text(split="place").prepare()
    text(context_length=4, batch_size=2, carry_state=True, seed=4).prepare()  # the same encoding
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 6
    assert not any("partial" in name for name in names)


def test_a_damaged_cache_is_made_again(text, tmp_path):
    task = text(numbers(100))
    whole = task.train_dataloader().batch(0)
    (cache,) = (tmp_path / "cache").iterdir()
    with open(cache / "train.bin", "r+b") as file:
        file.truncate(10)
    assert same(text().train_dataloader().batch(0), whole)


def test_a_full_disk_gets_one_clear_line_and_leaves_nothing(text, tmp_path):
    """A file-size limit stands for the full disk: both fail in the middle of writing."""
    task = text(numbers(20_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        refused(OSError, "cannot write the encoded text to .*set cache_dir", task.prepare)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").iterdir()) == []
    task.prepare()  # once there is disk space


def test_the_default_cache_is_the_user_s(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text(numbers(100))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    Text(tmp_path / "corpus.txt", context_length=4).prepare()
    assert len(list((tmp_path / "home" / "archzoo").iterdir())) == 1


MEASURE = """
import resource, sys, numpy, tokenizers
from archzoo.tasks import Text
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
base = peak()
task = Text(sys.argv[1], cache_dir=sys.argv[2], context_length=64, batch_size=32)
loader = task.train_dataloader()
for number in range(300): loader.batch(number * 7)
for _ in task.val_dataloader(): pass
print(peak() - base)
"""


@pytest.mark.parametrize(
    ("megabytes", "limit"), [(60, 60), pytest.param(200, 200, marks=pytest.mark.slow)]
)
def test_a_large_file_takes_little_memory(tmp_path, megabytes, limit):
    """Its encoded copy is twice as large; loaded or left mapped it would be seen here."""
    line = numbers(1_000_000 // 6)
    with open(tmp_path / "large.txt", "w") as file:
        for _ in range(megabytes):
            file.write(line)
    command = [sys.executable, "-c", MEASURE, tmp_path / "large.txt", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < limit


# ---------------------------------------------------------------------------- windows


def content_of(task, batch, row):
    return task.tokenizer.decode(batch["tokens"][row].tolist())


def test_labels_are_the_next_tokens(text):
    content = numbers(500)
    for task in (text(content), text(carry_state=True)):
        batch = task.train_dataloader().batch(3)
        assert batch["tokens"].shape == batch["labels"].shape == (4, 8)
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        for row in range(4):
            window = content_of(task, batch, row)
            window += task.tokenizer.decode(batch["labels"][row, -1:].tolist())
            assert window in content


def test_every_window_comes_once_an_epoch_in_another_order(text):
    content = numbers(500)
    task = text(content)
    loader = task.train_dataloader()
    epochs = []
    windows = task.rows("train")
    for epoch in range(3):
        starts = []
        for number in range(epoch * windows, (epoch + 1) * windows):
            batch = task.training_batch(number // 4, np.array([number % 4]))
            assert batch["examples"][0].tolist() == [number] * 8
            starts.append(content.index(content_of(task, batch, 0)))
        covered = Counter(place for start in starts for place in range(start, start + 8))
        assert set(covered.values()) == {1}  # side by side, no gap, no overlap
        assert len(covered) == windows * 8 > 0.98 * task._tokens("train") - 8
        epochs.append(starts)
    orders = [np.argsort(starts).tolist() for starts in epochs]
    assert all(order != sorted(order) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert len({min(starts) for starts in epochs}) > 1  # cut at another offset
    assert len(loader) == -(-windows // 4)


def test_a_window_depends_on_seed_and_number_alone(text):
    whole = text(numbers(500), batch_size=32)
    for batch_size in (1, 4, 16):
        loader = text(batch_size=batch_size).train_dataloader()
        # The numbers cross the end of an epoch.
        joined = [loader.batch(n) for n in range(10 * 32 // batch_size, 12 * 32 // batch_size)]
        expected = [whole.train_dataloader().batch(n) for n in (10, 11)]
        for key in ("tokens", "labels", "examples"):
            assert torch.equal(
                torch.cat([batch[key] for batch in joined]),
                torch.cat([batch[key] for batch in expected]),
            )
    loader = whole.train_dataloader()
    parts = [loader.batch(5, rank, 4) for rank in range(4)]
    assert same({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, loader.batch(5))
    other = text(batch_size=32, seed=1).train_dataloader()
    assert not torch.equal(other.batch(0)["tokens"], loader.batch(0)["tokens"])


@pytest.mark.parametrize("carry_state", [False, True])
@pytest.mark.parametrize("length", [3, 8, 10_000])
@pytest.mark.parametrize("split", PARTS[1:])
def test_an_evaluation_asks_for_every_token_once(text, carry_state, length, split):
    task = text(numbers(300), validation_fraction=0.1, test_fraction=0.2, carry_state=carry_state)
    task.context_length = length
    train = task.arguments | {"context_length": length if length < 100 else 8}
    task = Text(**train)
    batches = list(task.evaluation_loader(split))
    asked = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    tokens = task._tokens(split) - 1
    lanes = task.batch_rows(split) if carry_state else 1
    assert asked == tokens // lanes * lanes
    told = sum(int(batch["bytes"][batch["labels"] != IGNORED].sum()) for batch in batches)
    assert told == asked  # a byte each
    for batch in batches:
        if "documents" in batch:
            assert torch.equal(batch["documents"] == -1, batch["labels"] == IGNORED)
            assert (batch["documents"].diff() <= 0).all()  # padding at the end of a row


# ---------------------------------------------------------------------------- carried state


def test_lanes_continue_where_they_ended(text):
    content = numbers(400)
    task = text(content, carry_state=True)
    loader = task.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) > 10
    assert [batch["continues"].tolist() for batch in batches] == [
        [step > 0] * 4 for step in range(len(batches))
    ]
    train = decoded(task, "train")
    lane = (len(train) - 1) // 4
    for row in range(4):
        read = "".join(content_of(task, batch, row) for batch in batches)
        assert read == train[row * lane : row * lane + len(read)]
        assert len(read) == lane // 8 * 8
        # The label at the end of a window is the first token of the next.
        for before, after in pairwise(batches):
            assert before["labels"][row, -1] == after["tokens"][row, 0]
    again = loader.batch(len(batches))  # the next epoch begins at the beginning
    assert not again["continues"].any()
    assert torch.equal(again["tokens"], batches[0]["tokens"])
    parts = [loader.batch(2, rank, 2) for rank in range(2)]
    assert same({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, loader.batch(2))


def test_validation_carries_state_too(text):
    task = text(numbers(400), carry_state=True)
    batches = list(task.val_dataloader())
    assert [batch["continues"].any().item() for batch in batches] == [
        step > 0 for step in range(len(batches))
    ]
    for before, after in pairwise(batches):
        assert torch.equal(before["labels"][:, -1], after["tokens"][:, 0])
    few = {"validation_fraction": 0.005, "test_fraction": 0.0}
    short = text(numbers(400), carry_state=True, batch_size=16, **few)
    (batch,) = short.val_dataloader()  # 12 characters fill one lane
    assert batch["tokens"].shape[0] == short.batch_rows("validation") == 1


# ---------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_goes_in_as_an_object(text, tmp_path):
    """As its file does, from the same cache; what the task was made with stays plain data."""
    own = learn_characters(["abcd\n"])
    own.save(tmp_path / "own")
    task, other = (text("abc\n" * 50, tokenizer=given) for given in (own, tmp_path / "own"))
    task.prepare()
    other.prepare()
    assert task.tokenizer.files() == own.files() == other.tokenizer.files()
    assert task._cache == other._cache and task.fingerprint() == other.fingerprint()
    assert json.loads(json.dumps(task.config()))["init_args"]["tokenizer"] == "given"


def test_a_given_tokenizer_is_used(text, tmp_path):
    first = text(numbers(300), tokenizer="bpe", vocab_size=270)
    first.prepare()
    first.tokenizer.save(tmp_path / "bpe")
    for path in (tmp_path / "bpe", tmp_path / "bpe" / "tokenizer.json"):
        task = text(tokenizer=path)
        task.prepare()
        assert isinstance(task.tokenizer, LibraryTokenizer)
        assert task.vocab_size == first.vocab_size
        assert same(task.train_dataloader().batch(0), first.train_dataloader().batch(0))
    unigram = text(numbers(300), tokenizer="unigram", vocab_size=300)
    unigram.prepare()
    unigram.tokenizer.save(tmp_path)
    task = text(tokenizer=tmp_path / "tokenizer.model")
    task.prepare()
    assert isinstance(task.tokenizer, SentencePieceTokenizer)


def test_many_tokens_are_kept_in_32_bits(text, tmp_path):
    content = "".join(map(chr, range(0x4E00, 0x9F00))) + "".join(map(chr, range(0x20000, 0x2C000)))
    task = text(content, validation_fraction=0.01)
    assert task.vocab_size > 1 << 16
    assert task._meta["dtype"] == "uint32"
    assert "".join(decoded(task, part) for part in PARTS) == content


def test_a_task_is_made_again_from_its_configuration(text):
    task = text(numbers(300), seed=7)
    assert json.loads(json.dumps(task.config())) == task.config()
    again = build(task.config(), **{n: task.arguments[n] for n in ("path", "cache_dir")})
    assert same(task.train_dataloader().batch(5), again.train_dataloader().batch(5))
    assert again.stop_token is None
    assert set(inspect.signature(Text).parameters) == set(task.arguments)


# ---------------------------------------------------------------------------- bad input


def refused(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_no_text(text, tmp_path):
    refused(FileNotFoundError, "no text at .*nowhere.txt", text(path="nowhere.txt").prepare)
    misspelt = text(path="data/shakespear.txt").prepare
    refused(FileNotFoundError, "folder of them; nearest: data/shakespeare.txt$", misspelt)
    refused(ValueError, "corpus.txt is empty", text("").prepare)
    (tmp_path / "folder").mkdir()
    refused(ValueError, "folder is empty", text(path=tmp_path / "folder").prepare)


@pytest.mark.parametrize(
    ("content", "byte", "offset"),
    [
        pytest.param(b"abc\xffdef", "0xff", 3, id="latin"),
        pytest.param(b"a\n" * 70_000 + b"\xc3(", "0xc3", 140_000, id="in the third chunk"),
        pytest.param("é ".encode() * 30_000 + b"\x80", "0x80", 90_000, id="no line ends"),
        pytest.param("hello".encode("utf-16-le"), "0x00", 1, id="utf-16"),
        pytest.param(b"truncated \xe4\xb8", "0xe4", 10, id="truncated"),
    ],
)
def test_a_binary_text_is_refused_at_its_offset(text, tmp_path, content, byte, offset):
    (tmp_path / "corpus.txt").write_bytes(content)
    message = rf"corpus.txt is not UTF-8 text: byte {byte} at offset {offset};"
    for tokenizer in ("characters", "bpe"):
        refused(ValueError, message, text(tokenizer=tokenizer).prepare)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "to be"}\n'),
        ("A.NDJSON", "{}\n"),
        ("table.csv", "number,text\n1,to be\n"),
        ("table.tsv", "1\tto be\n"),
        ("train.json", '{"text": "to be"}\n{"text": "or not"}\n'),
    ],
)
def test_records_are_not_read_as_characters(text, tmp_path, name, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "text.txt").write_text(numbers(100))
    (folder / name).write_text(content * 50)
    for path in (folder, f"{folder}/*"):
        refused(ValueError, rf"holds records \({name}\) and plain text", text(path=path).prepare)
    (folder / name).rename(folder / "as_it_stands.txt")
    text(path=folder).prepare()


def test_json_that_is_a_text_like_any_other_is_read(text, tmp_path):
    (tmp_path / "settings.json").write_text("{\n" + '  "depth": 4,\n' * 100 + "}\n")
    text(path=tmp_path / "settings.json").prepare()


@pytest.mark.parametrize(
    ("content", "way"),
    [
        (gzip.compress(b"to be or not " * 99), "unpack the file"),
        (b"PAR1\x15\x00\x15" * 99, "unpack the file"),
        ("to be".encode("utf-16"), "convert the file to UTF-8"),
    ],
    ids=["gzip", "parquet", "utf-16"],
)
def test_what_can_be_done_with_a_binary_file_is_said(text, tmp_path, content, way):
    (tmp_path / "corpus.txt").write_bytes(content)
    refused(ValueError, f"is not UTF-8 text: .*; {way}", text().prepare)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("a" * 5000, id="one line"),
        pytest.param("字" * 2000 + "\n", id="one line of three bytes each"),
        pytest.param("\ufeff" + numbers(50), id="byte order mark"),
        pytest.param(numbers(50).replace("\n", "\r\n"), id="crlf"),
        pytest.param("\n" * 5000, id="line ends"),
        pytest.param(" " * 5000 + "x", id="blanks"),
        pytest.param("\x1c\x85\u2028 " * 500, id="other blanks"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
def test_odd_texts_are_encoded_without_loss(text, content, tokenizer, monkeypatch):
    monkeypatch.setattr("archzoo.tasks.corpus.CHUNK", 1000)  # bytes encoded at once
    sizes = {"vocab_size": 260, "validation_fraction": 0.4, "context_length": 1}
    task = text(content, tokenizer=tokenizer, **sizes)
    task.prepare()
    parts = (
        np.fromfile(task._cache / f"{part}.bin", task._meta["dtype"]).tolist() for part in PARTS
    )
    assert "".join(map(task.tokenizer.decode, parts)) == content
    for part in PARTS[1:]:
        told = np.fromfile(task._cache / f"{part}_bytes.bin", "int32")
        assert told.sum() == task._meta[f"{part}_bytes"] and told.min() >= 1
    assert sum(task._meta[f"{part}_bytes"] for part in PARTS) == len(content.encode())


def test_odd_files_are_read_or_refused_in_one_line(text, tmp_path):
    refused(ValueError, "shorter than one window", text("x").prepare)
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "text.txt").write_text(numbers(100))
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "deep" / "loop").symlink_to(folder)  # a folder within itself
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    task = text(path=folder)
    task.prepare()
    assert [file.name for file in Corpus(folder).files] == ["empty.txt", "text.txt"]
    refused(ValueError, "pipe is a device or a pipe", text(path=folder / "pipe").prepare)
    refused(ValueError, "is a device or a pipe", text(path="/dev/zero").prepare)
    refused(FileNotFoundError, "no text at .*self", text(path=folder / "self").prepare)
    (folder / "text.bin").write_bytes(bytes(range(256)))
    refused(
        ValueError, "text.bin is not UTF-8 text: byte 0x00 at offset 0", text(path=folder).prepare
    )


def test_a_text_shorter_than_one_window(text):
    refused(
        ValueError,
        "corpus.txt is shorter than one window: 12 tokens to train on, 21 needed",
        text("00000\n00001\n00002\n", context_length=20, validation_fraction=0.5).prepare,
    )
    refused(
        ValueError,
        "shorter than one window in each of 100 lanes",
        text(numbers(100), carry_state=True, batch_size=100).prepare,
    )
    refused(
        ValueError,
        "leaves 1 tokens to validate on, 2 needed",
        text("abcdefghijk", validation_fraction=0.01, test_fraction=0.0).prepare,
    )
    refused(
        ValueError,
        "leaves 1 tokens to test on, 2 needed; take a larger test_fraction than 0.01, or a longer",
        text("abcdefghijkl", validation_fraction=0.2, test_fraction=0.01).prepare,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 5}, "vocab_size 5 is too small: the text has 11 different characters"),
        ({"vocab_size": 200, "tokenizer": "bpe"}, "vocab_size 200 is too small"),
        ({"vocab_size": 100, "tokenizer": "unigram"}, "vocab_size 100 does not suit"),
    ],
)
def test_a_vocabulary_too_small_for_the_text(text, arguments, message):
    refused(ValueError, message, text(numbers(100), **arguments).prepare)


def test_a_given_tokenizer_that_does_not_know_the_text(text, tmp_path):
    task = text(numbers(100))
    task.prepare()
    task.tokenizer.save(tmp_path / "digits")
    refused(
        ValueError,
        r"corpus.txt: character 'H' \(U\+0048\)",
        text("Hello\n" * 100, tokenizer=tmp_path / "digits").prepare,
    )
    refused(
        ValueError,
        "vocab_size 99 does not fit .*, which has 11 tokens",
        text(numbers(100), tokenizer=tmp_path / "digits", vocab_size=99).prepare,
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokenizer": "character"}, ValueError, "did you mean characters?"),
        ({"tokenizer": "gone/tokenizer.json"}, FileNotFoundError, "no tokenizer at gone"),
        ({"context_length": 0}, ValueError, "context_length 0 is not positive"),
        ({"validation_fraction": 1.0}, ValueError, "validation_fraction 1.0 is not between"),
        ({"test_fraction": -0.1}, ValueError, "test_fraction -0.1 is not 0 or between"),
        (
            {"validation_fraction": 0.5, "test_fraction": 0.5},
            ValueError,
            "validation_fraction 0.5 and test_fraction 0.5 leave nothing to train on",
        ),
        ({"split": "files"}, ValueError, "split 'files' is not one of auto, documents, place"),
        ({"batch_size": 0}, ValueError, "batch_size 0 is not positive"),
        ({"path": ""}, ValueError, "path is empty: name one, or omit path"),
        ({"cache_dir": " "}, ValueError, "cache_dir is empty"),
        ({"tokenizer": ""}, ValueError, "tokenizer is empty"),
    ],
)
def test_bad_arguments_are_refused_at_once(text, arguments, error, message):
    refused(error, message, lambda: text(**arguments))


def test_a_fingerprint_says_what_training_sees(text, tmp_path):
    """Where a text lies and how many windows a batch has is no part of it; its content is."""
    first = text(numbers(100)).fingerprint()
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text(numbers(100))
    moved = text(path=elsewhere, batch_size=2, cache_dir=tmp_path / "other").fingerprint()
    assert moved == first == json.loads(json.dumps(first))
    changed = text(numbers(100).replace("00050", "00051")).fingerprint()
    assert {name for name in first if changed[name] != first[name]} == {"text"}
    for name, value in {"seed": 1, "context_length": 4, "validation_fraction": 0.2}.items():
        other = text(numbers(100), **{name: value}).fingerprint()
        assert {key for key in first if other[key] != first[key]} == {name}
    lanes = [text(numbers(100), carry_state=True, batch_size=n).fingerprint() for n in (2, 4)]
    assert lanes[0] != lanes[1]
    sums = [Addition(**given).fingerprint() for given in ({}, {"test_examples": 3}, {"digits": 4})]
    assert sums[0] == sums[1] != sums[2]


def test_a_text_continues_with_another_batch_size(text):
    """Every window once an epoch, whatever was changed in between; lanes cannot change."""
    task = text(numbers(400), batch_size=3)
    task.prepare()
    windows = task.rows("train")
    seen = [b["tokens"] for b, _ in zip(task.train_dataloader(), range(5), strict=False)]
    task = text(numbers(400), batch_size=5)
    done = {"batches": 5, "examples": 15, "batch_size": 3, "split": task.split_settings()}
    task.load_state_dict(done)
    loader, number = task.train_dataloader(), 5
    while sum(map(len, seen)) < windows:
        seen.append(loader.batch(number)["tokens"])
        number += 1
    rows = {tuple(row) for row in torch.cat(seen)[:windows].tolist()}
    assert len(rows) == windows
    lanes = text(numbers(400), batch_size=5, carry_state=True)
    with pytest.raises(ValueError, match="began with 3, so it can only continue with 3"):
        lanes.load_state_dict(done)
