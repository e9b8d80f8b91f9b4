"""Texts from files of records and compressed files: the same documents, or one clear line.

Parquet and datasets of Hugging Face's are in tests/extras/test_records.py.
"""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from archzoo.analysis.extend import windows_of
from archzoo.cli import main
from archzoo.tasks import Mixed, Text, build, cache
from archzoo.tasks.corpus import Corpus
from archzoo.tasks.records import kind_of
from archzoo.tasks.stream import IGNORED

torch.set_num_threads(1)

PARTS = ("train", "validation", "test")
DOCUMENTS = [
    f"<{n:03}"
    + f" {chr(97 + n % 26) * 3}{chr(97 + n // 26) * 3}" * (9 + n % 5)
    + ">"
    + "\n" * (n % 2)
    for n in range(120)
]
DOCUMENTS[7] = 'commas, "quotes"\r\n\nand é 😀\ttabs'
DOCUMENTS[8] = ""
FRACTIONS = {"validation_fraction": 0.2, "test_fraction": 0.2}


@pytest.fixture
def text(tmp_path):
    def make(path, **arguments):
        arguments = FRACTIONS | {"cache_dir": tmp_path / "cache", **arguments}
        return Text(path, **{"context_length": 8, "batch_size": 4, **arguments})

    return make


def json_lines(documents, field="text"):
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(documents))


def write(path, documents=DOCUMENTS, field="text"):
    """A file of records by its name, a folder of texts where that has no suffix."""
    names = path.name.split(".")
    if len(names) == 1:
        path.mkdir()
        for n, document in enumerate(documents):
            (path / f"{n:04}.txt").write_text(document, encoding="utf-8", newline="")
        return path
    opened = gzip.open if names[-1] == "gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if names[1] in ("csv", "tsv"):
            rows = csv.writer(file, delimiter="," if names[1] == "csv" else "\t")
            rows.writerow(["id", field])
            rows.writerows(enumerate(documents))
        else:
            file.write(json_lines(documents, field))
    return path


def decoded(task, split):
    tokens = np.fromfile(task._cache / f"{split}.bin", task._meta["dtype"])
    return task.tokenizer.decode(tokens.tolist())


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def refused(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- equal contents


NAMES = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.gz", "a.json.gz"]


@pytest.mark.parametrize("name", NAMES)
def test_records_give_what_files_of_the_same_texts_give(text, tmp_path, name):
    plain = text(write(tmp_path / "folder"), tokenizer="bpe", vocab_size=300)
    task = text(write(tmp_path / name), tokenizer="bpe", vocab_size=300)
    for split in PARTS:
        loaders = (
            task.train_dataloader() if split == "train" else task.evaluation_loader(split)
            for task in (plain, task)
        )
        for ours, theirs in zip(*loaders, strict=True):
            assert same(ours, theirs)
    assert task.fingerprint() == plain.fingerprint() and task._cache == plain._cache
    assert "".join(decoded(task, part) for part in PARTS).count("<") == 118
    assert 'commas, "quotes"\r\n\nand é 😀\ttabs\n' in "".join(decoded(task, p) for p in PARTS)
    left = [path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()]
    assert sorted(left) == ["text", "unpacked"]  # and no text that was unpacked


def test_several_files_of_records_follow_each_other(text, tmp_path):
    whole = text(write(tmp_path / "whole.jsonl"))
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "0.jsonl.gz", DOCUMENTS[:50])
    write(folder / "1.csv", DOCUMENTS[50:51])
    write(folder / "2.jsonl", DOCUMENTS[51:])
    shards = text(folder)
    assert same(shards.train_dataloader().batch(3), whole.train_dataloader().batch(3))
    assert shards._cache == whole._cache


def test_a_compressed_text_is_one_document(text, tmp_path):
    content = "".join(DOCUMENTS)
    (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(content.encode()))
    plain, packed = text(tmp_path / "a.txt"), text(tmp_path / "b.txt.gz")
    plain.prepare()
    packed.prepare()
    assert packed._cache == plain._cache and packed._meta["split"] == "place"
    both = Corpus(f"{tmp_path}/*.txt*", None, tmp_path / "cache")  # plain files stay where they are
    assert "".join(both.texts((0, both.size) if both.size else [])) == ""
    both.unpack()
    assert "".join(both.texts((0, both.size))) == content * 2
    (scratch,) = (tmp_path / "cache").glob("*.partial")
    assert (scratch / "text").stat().st_size == len(content.encode())
    both.close()
    assert not scratch.exists()


def test_another_field_and_a_byte_order_mark(text, tmp_path):
    plain = text(write(tmp_path / "folder"))
    for name in ("a.jsonl", "a.csv"):
        path = write(tmp_path / name, field="body")
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        task = text(path, field="body")
        assert same(task.train_dataloader().batch(1), plain.train_dataloader().batch(1))
    mixed = Mixed(
        path=tmp_path / "a.csv", field="body", context_length=64, cache_dir=tmp_path / "cache"
    )
    assert "documents" not in mixed.train_dataloader().batch(0)


def test_unpacking_is_done_once(text, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz")
    first = text(path).train_dataloader().batch(0)
    monkeypatch.setattr(Corpus, "unpack", lambda self: pytest.fail("unpacked again"))
    assert same(text(path).train_dataloader().batch(0), first)
    monkeypatch.undo()
    other = text(path, tokenizer="bpe", vocab_size=300)  # the note is there, the entry is not
    other.prepare()
    assert other._digest == text(path).fingerprint()["text"] or len(other._digest) == 64
    # The same name with another content, and the same content by another field.
    write(path, DOCUMENTS[:60])
    assert not same(text(path).train_dataloader().batch(0), first)


# ---------------------------------------------------------------------------- documents


def starts_of(task, part):
    return np.fromfile(task._cache / f"{part}_documents.bin", "int64")


@pytest.mark.parametrize("carry_state", [False, True])
def test_documents_are_separate(text, tmp_path, carry_state):
    task = text(write(tmp_path / "a.jsonl"), context_length=200, carry_state=carry_state)
    task.prepare()
    assert task._meta["split"] == "documents"
    for part in PARTS:
        loader = task.train_dataloader() if part == "train" else task.evaluation_loader(part)
        content, starts = decoded(task, part), starts_of(task, part)
        assert (
            len(starts)
            == task._meta[f"{part}_documents"]
            == content.count("<") + ("commas" in content)
        )
        lone = {content[start] for start in starts}
        assert lone <= {"<", "c"}
        asked = 0
        for batch in loader:
            tokens, labels, documents = batch["tokens"], batch["labels"], batch["documents"]
            known = documents >= 0
            # Ids rise by one where a document begins, and the label before that is none.
            begins = task.tokenizer.encode("<")[0]
            rises = documents.diff() > 0
            assert torch.equal(tokens[:, 1:][rises] == begins, documents.diff()[rises] == 1) or (
                "commas" in content
            )
            assert (labels[:, :-1][rises] == IGNORED).all()
            held = labels != IGNORED
            assert (held <= known).all()
            asked += int(held.sum())
            inside = held[:, :-1] & ~rises & known[:, 1:]
            assert torch.equal(labels[:, :-1][inside], tokens[:, 1:][inside])
        if part != "train" and not carry_state:
            assert asked == task._tokens(part) - len(starts)  # all but the first of each


def test_a_model_reads_nothing_across_documents(text, tmp_path):
    import archzoo

    task = text(write(tmp_path / "a.jsonl"), context_length=200)
    batch = task.train_dataloader().batch(0)
    net = archzoo.create_model("retnet_micro", vocab_size=task.vocab_size).double().eval()
    whole = net(batch["tokens"], documents=batch["documents"]).logits
    row, begin = 0, int((batch["documents"][0] != batch["documents"][0, 0]).nonzero()[0])
    alone = net(batch["tokens"][row : row + 1, begin:]).logits
    end = int((batch["documents"][0, begin:] == batch["documents"][0, begin]).sum())
    torch.testing.assert_close(whole[row, begin : begin + end], alone[0, :end])


def test_who_wants_documents_joined_or_separate_says_so(text, tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert "documents" not in text(path, separate_documents=False).train_dataloader().batch(0)
    few = write(tmp_path / "few.jsonl", DOCUMENTS[:2])
    assert "documents" not in text(few).train_dataloader().batch(0)  # each is cut by place
    separate = text(few, separate_documents=True, context_length=60)
    documents = separate.train_dataloader().batch(0)["documents"]
    assert set(documents.flatten().tolist()) == {0, 1}


def test_long_windows_read_over_documents(text, tmp_path, monkeypatch):
    """Where a model is asked for longer texts than it was trained on, as `archzoo extend` does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = text(write(tmp_path / "a.jsonl"))
    task.prepare()
    found = SimpleNamespace(task=task.config(), tokenizer=task.tokenizer)
    windows = windows_of(found, 300, 3)
    assert windows.tokens.shape == (3, 300) and (windows.labels != IGNORED).all()


# ---------------------------------------------------------------------------- bad input


def test_a_field_of_plain_text_is_refused(text, tmp_path):
    folder = write(tmp_path / "folder")
    refused(
        ValueError,
        "field 'body': .* holds plain text.*omit field",
        text(folder, field="body").prepare,
    )
    write(folder / "more.jsonl")
    message = r"holds records \(more.jsonl\) and plain text \(0000.txt\).*such as '.*/\*.jsonl'"
    refused(ValueError, message, text(folder).prepare)
    text(f"{folder}/*.jsonl").prepare()
    refused(ValueError, "field is empty", lambda: text(folder, field=""))


BAD = {
    "not JSON": (b'{"text": "a"}\n\n{"text": "b"\n', r"a.jsonl, line 3 is not JSON \(Expecting"),
    "an array": (b'[\n{"text": "a"}\n]\n', r"line 1 is not JSON .*jq -c '\.\[\]' .*a.jsonl writes"),
    "deep": (b"[" * 100_000, "line 1 is not JSON"),
    "a number": (b'{"text": "a"}\n3\n', "line 2 is not a record with fields but of type int"),
    "no field": (
        b'{"id": 1, "content": "a", "txt": "b"}\n',
        "line 1: there is no field 'text': it has id, content, txt; .*: --data.field txt$",
    ),
    "no field at all": (b"{}\n", "line 1: there is no field 'text': it has none"),
    "null": (b'{"text": null}\n', r"line 1: field 'text' is empty \(null\), not text"),
    "not text": (b'{"text": ["a"]}\n', "line 1: field 'text' is of type list, not text"),
    "surrogate": (rb'{"text": "a\ud83d"}' + b"\n", r"line 1: .* half a surrogate pair \(U\+D83D\)"),
    "NUL": (rb'{"text": "a\u0000"}' + b"\n", "line 1: field 'text' has a NUL character"),
    "latin": (
        b'{"text": "a"}\n{"text": "caf\xe9"}\n',
        "line 2 is not UTF-8: byte 0xe9 at offset 13",
    ),
    "empty": (b"", "a.jsonl is empty"),
    "blank lines": (b"\n \n", "a.jsonl is empty"),
    "empty texts": (b'{"text": ""}\n', "a.jsonl is empty"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(text, tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    refused(ValueError, message, text(path).prepare)
    path.with_name("a.jsonl.gz").write_bytes(gzip.compress(content))
    refused(ValueError, message.replace("a.jsonl", "a.jsonl.gz"), text(f"{path}.gz").prepare)
    assert not list((tmp_path / "cache").glob("*"))


BAD_ROWS = {
    "no column": (
        "id,body\n1,a\n",
        "line 1, which names the columns: there is no field 'text': it",
    ),
    "twice": ("text,text\na,b\n", "names 'text' more than once"),
    "ragged": ('id,text\n1,"a\nb"\n2,b,c\n', "line 4 has 3 columns, and line 1 names 2: quote"),
    "open quote": ('id,text\n1,"a\nb\n', r"line 3: not CSV \(unexpected end of data\)"),
    "bad quote": ('id,text\n1,"a"b\n', r"line 2: not CSV \('.' expected after"),
    "empty": ("", "a.csv is empty"),
    "no rows": ("id,text\n", "a.csv is empty"),
}


@pytest.mark.parametrize(("content", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(text, tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    refused(ValueError, message, text(tmp_path / "a.csv").prepare)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_an_array_of_records_is_not_learnt_as_a_text(text, tmp_path, name):
    content = json.dumps([{"text": "To be"}] * 90, indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    refused(ValueError, f"{name} is one JSON array of records", text(tmp_path / name).prepare)
    with_field = text(tmp_path / name, field="text")
    refused(ValueError, r"on each line, as jq -c '\.\[\]' does", with_field.prepare)
    (tmp_path / name).rename(tmp_path / name.replace("json", "txt"))
    text(tmp_path / name.replace("json", "txt")).prepare()


def test_a_field_of_several_words_is_quoted(text, tmp_path):
    (tmp_path / "a.csv").write_text("the text\nTo be\n")
    refused(ValueError, "--data.field 'the text'$", text(tmp_path / "a.csv").prepare)


def test_a_record_without_end_takes_no_memory(text, tmp_path, monkeypatch):
    monkeypatch.setattr("archzoo.tasks.records.LONGEST", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (3 << 20)))
    refused(ValueError, "line 1 is longer than 1 MB: it is not a file", text(path).prepare)


def test_damaged_gzip_is_said(text, tmp_path):
    path = write(tmp_path / "a.jsonl.gz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-400])
    refused(ValueError, r"ends after line \d+ in the middle of its gzip data", text(path).prepare)
    path.write_bytes(whole[:200] + b"\xff" * 200 + whole[400:])
    refused(ValueError, "a.jsonl.gz is damaged.*fetch or write it again", text(path).prepare)
    path.write_bytes(b'{"text": "a"}')
    refused(ValueError, "is not gzip data, whatever its name says", text(path).prepare)
    for content, byte, offset in (
        (b"ab\xc3(", "c3", 2),
        (b"a\0", "00", 1),
        (b"ab\xe4\xb8", "e4", 2),
    ):
        path = tmp_path / "b.txt.gz"
        path.write_bytes(gzip.compress(b"x" * ((1 << 20) - 1) + content))
        where = (1 << 20) - 1 + offset
        refused(
            ValueError,
            f"not UTF-8 text: unpacked, byte 0x{byte} at offset {where}",
            text(path).prepare,
        )


def test_a_compressed_file_says_what_to_name_it(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"to be or not " * 99))
    refused(
        ValueError, "unpack the file, name it a.txt.gz or take", text(tmp_path / "a.txt").prepare
    )
    with pytest.raises(ValueError, match=r"gzip -d .*a.parquet.gz\); it is compressed inside"):
        kind_of(Path("a.parquet.gz"))


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("a.parquet", "pyarrow", "archzoo[data]"),
        ("a.jsonl.zst", "backports.zstd", "archzoo[data]"),
        ("hf://owner/name", "datasets", "archzoo[datasets]"),
    ],
)
def test_what_is_not_installed_is_named(tmp_path, name, package, extra, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in ("pyarrow", "pyarrow.parquet", "datasets", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    Path("a.parquet").write_bytes(b"PAR1")
    Path("a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    given = ["--model.preset", "retnet_micro", "--data", "Text", "--data.path", name]
    assert main(["fit", *given]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert package in line and f"pip install '{extra}'" in line


def test_it_says_what_it_does_and_ctrl_c_leaves_nothing(text, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz")
    text(path).prepare()
    assert "encoded" in capsys.readouterr().err
    main(["cache", "--directory", str(tmp_path / "cache"), "--clear"])
    assert "1 encoded text" in capsys.readouterr().out
    assert not list((tmp_path / "cache").iterdir())

    def interrupted(*given):
        yield True, b"a"
        raise KeyboardInterrupt

    monkeypatch.setattr("archzoo.tasks.records.segments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text(path).prepare()
    assert "a.jsonl.gz was not unpacked to its end" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_that_changes_meanwhile_is_refused(text, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz")
    unpack = Corpus.unpack

    def changing(self):
        unpack(self)
        write(path, DOCUMENTS[:90])

    monkeypatch.setattr(Corpus, "unpack", changing)
    refused(ValueError, "a.jsonl.gz changed while it was read", text(path).prepare)
    assert not list((tmp_path / "cache").iterdir())


def test_progress_is_shown(text, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.jsonl", [f"{n}" for n in range(3000)])
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(cache.time, "monotonic", lambda: float(next(clock)))
    with Corpus(path, None, tmp_path / "cache") as corpus:
        corpus.unpack()
    assert "unpacking" in capsys.readouterr().err


MEASURE = """
import resource, sys, numpy
from archzoo.tasks.corpus import Corpus
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
base = peak()
with Corpus(sys.argv[1], None, sys.argv[2]) as corpus:
    corpus.digest()
    parts, _ = corpus.split(0.05, 0.05)
    assert sum(len(text) for text in corpus.texts(*parts.values())) == corpus.size > 60_000_000
print(peak() - base)
"""


def test_many_records_take_little_memory(tmp_path):
    """40,000 documents of 60 MB: as one list of texts they would be seen here."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", compresslevel=1) as file:
        for n in range(40_000):
            file.write(json.dumps({"text": f"{n:07} " + "some words " * 136 + "\n"}) + "\n")
    command = [sys.executable, "-c", MEASURE, tmp_path / "a.jsonl.gz", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30


def test_a_stranger_s_checkpoint_may_name_no_dataset():
    config = {"class_path": "Text", "init_args": {"path": "hf://owner/name"}}
    refused(
        ValueError, "path='hf://owner/name' is an address, which no file", lambda: build(config)
    )
