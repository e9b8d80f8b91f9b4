"""The cache of encoded texts: nothing is read that was not written so, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from archzoo.cli import main
from archzoo.tasks import Text, cache
from archzoo.tasks.corpus import Corpus


@pytest.fixture
def text(tmp_path):
    def make(content=None, **arguments):
        path = tmp_path / "corpus.txt"
        if content is not None:
            path.write_text(content, encoding="utf-8", newline="")
        arguments = {"path": path, "cache_dir": tmp_path / "cache", **arguments}
        return Text(**{"context_length": 8, "batch_size": 4, **arguments})

    return make


CONTENT = "".join(f"{n:05} and some words\n" for n in range(200))


def first(task):
    return task.train_dataloader().batch(0)["tokens"]


def entry(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def forge(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    meta["content"] |= changes
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGES = {
    "a bit": lambda folder: flip(folder / "train.bin"),
    "ids beyond": lambda folder: (folder / "train.bin").write_bytes(
        b"\xff\xff" * ((folder / "train.bin").stat().st_size // 2)
    ),
    "other content": lambda folder: (folder / "validation.bin").write_bytes(
        bytes((folder / "validation.bin").stat().st_size)
    ),
    "shorter": lambda folder: (folder / "train.bin").write_bytes(b"1"),
    "no tokens": lambda folder: (folder / "train.bin").unlink(),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_bytes(b"{}"),
    "tokenizer's bit": lambda folder: flip(folder / "tokenizer.json", 200),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "meta": lambda folder: (folder / "meta.json").write_bytes(b"\xff{"),
    "a list": lambda folder: (folder / "meta.json").write_text("[1]"),
    "a count": lambda folder: forge(folder, train_bytes=1),
    "nothing": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_was_damaged_is_made_again(text, tmp_path, damage, capsys):
    whole = first(text(CONTENT))
    folder = entry(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder)
    capsys.readouterr()
    task = text()
    assert torch.equal(first(task), whole)
    assert "is damaged: it is rebuilt" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in entry(tmp_path).iterdir()} == before
    text().prepare()
    assert capsys.readouterr().err == ""


def test_a_run_keeps_reading_while_another_heals_the_entry(text, tmp_path):
    task = text(CONTENT)
    whole = first(task)
    flip(entry(tmp_path) / "meta.json")
    text().prepare()
    assert torch.equal(first(task), whole)


def test_another_text_s_entry_is_not_taken_for_this_one(text, tmp_path):
    """Such as one that was copied over by hand, or whose name happens to be the same."""
    text(CONTENT.replace("some", "same")).prepare()
    other = entry(tmp_path)
    other.rename(tmp_path / "other")
    whole = first(text(CONTENT))
    folder = entry(tmp_path)
    for file in folder.iterdir():
        file.write_bytes((tmp_path / "other" / file.name).read_bytes())
    assert torch.equal(first(text()), whole)


def test_a_text_that_changes_while_it_is_read_is_refused(text, tmp_path, monkeypatch):
    task = text(CONTENT)
    segments = Corpus.segments

    def changing(self, *spans):
        for segment in segments(self, *spans):
            self.path.write_text(CONTENT.replace("some", "same"))
            yield segment

    monkeypatch.setattr(Corpus, "segments", changing)
    with pytest.raises(ValueError, match="changed while it was read: start again once it rests"):
        task.prepare()
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_at_once_make_one_entry(text, tmp_path):
    text(CONTENT)
    code = (
        "import sys; from archzoo.tasks import Text\n"
        "task = Text(sys.argv[1], tokenizer='bpe', vocab_size=270, context_length=8,"
        " batch_size=4, cache_dir=sys.argv[2])\n"
        "print(task.train_dataloader().batch(0)['tokens'].sum().item())"
    )
    command = [sys.executable, "-c", code, tmp_path / "corpus.txt", tmp_path / "cache"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert said[0] == said[1] and [process.returncode for process in both] == [0, 0]
    assert cache.read(
        entry(tmp_path), json.loads((entry(tmp_path) / "meta.json").read_text())["recipe"]
    )


def test_two_threads_make_one_entry(text, tmp_path):
    text(CONTENT)
    tasks = [text() for _ in range(4)]
    threads = [threading.Thread(target=task.prepare) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({first(task).sum().item() for task in tasks}) == 1
    entry(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_is_said_and_read(text, tmp_path):
    text(CONTENT).prepare()
    (tmp_path / "cache").chmod(0o500)
    try:
        text().prepare()
        with pytest.raises(OSError, match=r"cannot write the encoded text to .*set cache_dir"):
            text(CONTENT + "more").prepare()
    finally:
        (tmp_path / "cache").chmod(0o700)


def test_a_file_in_the_place_of_the_cache_is_said(text, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match=r"cannot write the encoded text to .*set cache_dir"):
        text(CONTENT).prepare()


def test_without_a_home_it_is_said(text, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OSError, match=r"there is no home directory.*set cache_dir"):
        text(CONTENT, cache_dir=None).prepare()


def test_what_a_killed_process_left_is_removed(text, tmp_path):
    left = tmp_path / "cache" / "text-0123.abc.partial"
    fresh = tmp_path / "cache" / "text-4567.abc.partial"
    for folder in (left, fresh):
        folder.mkdir(parents=True)
        (folder / "train.bin").write_bytes(b"12")
    for path in (left / "train.bin", left):
        os.utime(path, (0, 0))
    text(CONTENT).prepare()
    assert not left.exists() and fresh.exists()


def test_it_says_where_texts_are_kept_and_removes_them(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    text(CONTENT, cache_dir=None).prepare()
    folder = next((tmp_path / "home/archzoo").iterdir())
    said = capsys.readouterr().err
    assert str(folder) in said and "archzoo cache --clear" in said and len(said.splitlines()) == 1
    (folder.parent / "keep.txt").write_text("not ours")
    assert main(["cache"]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "corpus.txt") in said and "1 encoded text" in said
    assert main(["cache", "--clear"]) == 0
    assert not folder.exists() and (folder.parent / "keep.txt").exists()
    assert main(["cache", "--directory", str(tmp_path / "nowhere")]) == 0
    assert "0 encoded texts" in capsys.readouterr().out


def test_subwords_are_learned_from_a_part_and_that_is_said(text, capsys, monkeypatch):
    monkeypatch.setattr("archzoo.tasks.text.SAMPLE", 1000)
    text(CONTENT, tokenizer="bpe", vocab_size=260).prepare()
    said = capsys.readouterr().err
    assert "bpe learns its subwords from 0.0 MB of the" in said and "to encode (bpe)" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_line_in_a_terminal_and_lines_elsewhere(terminal, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    progress = cache.Progress("encoding a.txt", 60_000_000)
    for second in range(40):
        clock[0] = second / 2
        progress(second * 1_500_000)
    progress.end()
    said = capsys.readouterr().err
    assert "encoding a.txt: 6.0 MB of 60.0 MB, 18 s left" in said  # at 2 s, and not before
    if terminal:
        assert "\n" not in said and said.endswith("\r") and said.count("\r") > 20
        assert max(map(len, said.split("\r"))) < 60
    else:
        assert len(said.splitlines()) == 2 and "\r" not in said


def test_ctrl_c_says_so_and_leaves_nothing(tmp_path):
    (tmp_path / "corpus.txt").write_text(CONTENT * 300)
    code = (
        "import sys, time; from archzoo.tasks import Text, text, tokenizers\n"
        "learn = tokenizers.learn_bpe\n"
        "def slow(texts, size):\n"
        "    print('now', flush=True); time.sleep(60); return learn(texts, size)\n"
        "tokenizers.learn_bpe = slow\n"
        "Text(sys.argv[1], tokenizer='bpe', cache_dir=sys.argv[2]).prepare()"
    )
    command = [sys.executable, "-c", code, tmp_path / "corpus.txt", tmp_path / "cache"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores Ctrl-C, and hands that on.
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, **pipes, **hears) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert "was not encoded to its end: nothing was kept of it" in said
    assert list((tmp_path / "cache").iterdir()) == []
