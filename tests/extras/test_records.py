"""Parquet, Arrow, zstd and datasets of Hugging Face's: what files of the same texts give."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from archzoo.cli import main
from archzoo.tasks import Text

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstd = pytest.importorskip("backports.zstd")

pytestmark = pytest.mark.extras

TEXTS = [f"<{n:03}" + f" {chr(97 + n % 26) * 3}" * (20 + n % 5) + ">\n" for n in range(150)]
TABLE = arrow.table({"id": list(range(150)), "body": TEXTS})


@pytest.fixture
def text(tmp_path: Path) -> Any:
    def make(path: object, **arguments: Any) -> Text:
        sizes = {"context_length": 64, "batch_size": 4, "validation_fraction": 0.2}
        given = sizes | {"test_fraction": 0.2, "cache_dir": tmp_path / "cache"} | arguments
        return Text(str(path), **given)

    return make


@pytest.fixture
def batch(tmp_path: Path, text: Any) -> Any:
    """Of the same texts as files."""
    (tmp_path / "folder").mkdir()
    for n, content in enumerate(TEXTS):
        (tmp_path / "folder" / f"{n:03}.txt").write_text(content)
    return text(tmp_path / "folder").train_dataloader().batch(5)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def write(path: Path, table: Any = TABLE) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=40)
        return path
    with arrow.OSFile(str(path), "wb") as file:
        kind = arrow.ipc.new_file if path.stem == "file" else arrow.ipc.new_stream
        with kind(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=33)
    return path


def json_lines(name: str = "text") -> bytes:
    return "".join(json.dumps({name: content}) + "\n" for content in TEXTS).encode()


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_tables(text: Any, batch: Any, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert same(text(path, field="body").train_dataloader().batch(5), batch)
    columns = [arrow.array(TEXTS, arrow.large_string()), TABLE["body"].dictionary_encode()]
    if not name.endswith("parquet"):  # which an older pyarrow cannot write
        columns.append(arrow.array(TEXTS, arrow.string_view()))
    for column in columns:
        write(path, arrow.table({"body": column}))
        assert same(text(path, field="body").train_dataloader().batch(5), batch)


def test_zstd(text: Any, batch: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    content = json_lines()
    path.write_bytes(zstd.compress(content[:3000]) + zstd.compress(content[3000:]))  # two frames
    assert same(text(path).train_dataloader().batch(5), batch)
    (tmp_path / "one.txt.zst").write_bytes(zstd.compress("".join(TEXTS).encode()))
    text(tmp_path / "one.txt.zst").prepare()
    path.write_bytes(zstd.compress(content)[:-200])
    refused("ends.* in the middle of its zstd data", text(path))
    path.write_bytes(gzip.compress(content))
    refused("is not zstd data, whatever its name says", text(path))
    packed = bytearray(zstd.compress(content))
    packed[40:80] = bytes(40)
    path.write_bytes(packed)
    refused("is damaged, its zstd data cannot be unpacked|in the middle of its zstd", text(path))


def test_datasets_that_were_saved(text: Any, batch: Any, tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    assert same(text(tmp_path / "saved").train_dataloader().batch(5), batch)
    parts = datasets.DatasetDict(
        {"test": whole.select(range(50)), "train": whole.select(range(50, 150))}
    )
    parts.save_to_disk(tmp_path / "parts")
    both = text(tmp_path / "parts")
    both.prepare()
    assert sum(both._meta[f"{part}_documents"] for part in ("train", "validation", "test")) == 150
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    refused(
        "is a dataset that lacks data-00001-of-00003.arrow: save it again", text(tmp_path / "saved")
    )


def test_a_dataset_by_its_name(text: Any, batch: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """`datasets` takes a folder of that name for the dataset, so the network is not needed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")
    import huggingface_hub.constants

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where no one answers
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(json_lines())
    (folder / "test.jsonl").write_bytes(json_lines("text"))
    task = text("hf://owner/name")
    assert same(task.train_dataloader().batch(5), batch)
    assert datasets.config.HF_HUB_OFFLINE  # or the library would try for half a minute
    for address in ("hf://datasets/owner/name", "hf://owner/name/default#test"):
        assert same(text(address).train_dataloader().batch(5), batch)
    assert task.fingerprint() == text("hf://owner/name").fingerprint()
    refused(
        "hf://owner/name: there is no field 'txt': it has text; .*--data.field text",
        text("hf://owner/name", field="txt"),
    )
    refused(
        r"hf://owner/other cannot be loaded \(.*check the name and the network",
        text("hf://owner/other"),
    )
    refused("hf://owner/name#dev cannot be loaded", text("hf://owner/name#dev"))
    refused("hf:// names no dataset: write hf://OWNER/NAME", text("hf://"))


def refused(message: str, task: Text) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        task.prepare()
    assert "\n" not in str(caught.value)


def test_bad_tables_are_refused_in_one_line(text: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    refused(
        "a.parquet: there is no field 'text': it has id, body; .*--data.field body|id", text(path)
    )
    refused("field 'id' holds int64, not text: --data.field body is text", text(path, field="id"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    refused("a.parquet is not a whole Parquet file", text(path, field="body"))
    write(path, TABLE.select(["body"]))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(200) + whole[300:])
    refused("a.parquet is not a whole Parquet file", text(path, field="body"))
    path.write_bytes(b"")
    refused("a.parquet is empty", text(path))
    write(path, arrow.table({"text": ["a", None, "b"]}))
    refused(r"a.parquet, row 2: field 'text' is empty \(null\), not text", text(path))
    latin = arrow.Array.from_buffers(
        arrow.string(),
        2,
        [None, arrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), arrow.py_buffer(b"a\xe9")],
    )
    write(tmp_path / "file.arrow", arrow.table({"text": latin}))
    refused("file.arrow, row 2 is not UTF-8: byte 0xe9", text(tmp_path / "file.arrow"))
    (tmp_path / "stream.arrow").write_bytes(b"no table at all")
    refused("stream.arrow is not a whole Arrow file", text(tmp_path / "stream.arrow"))


def test_a_run_learns_from_parquet(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet")
    given = "--model.preset retnet_micro --data Text --data.path a.parquet --data.field body"
    sizes = "--data.context_length 32 --data.cache_dir cache --trainer.max_steps 3 --name records"
    split = "--data.validation_fraction 0.2 --data.test_fraction 0.2"
    assert main(["fit", *given.split(), *sizes.split(), *split.split()]) == 0
    test = "test --ckpt_path runs/records/last.ckpt --data.cache_dir cache"
    assert main(test.split()) == 0
    assert "bits/byte" in capsys.readouterr().out
