"""Checkpoints of shards, put together without running code."""

import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from archzoo.checkpoint import shards
from archzoo.checkpoint.shards import INDEX, NAMES, REST, make_whole, read_shards

CODE = "an index or a chunk ran code"


class Runs:
    """What runs code when it is read."""

    def __reduce__(self):
        return (pytest.fail, (CODE,))


@pytest.fixture
def place(tmp_path):
    """A checkpoint of one shard, of two parameters in two groups."""
    names = ["norm.weight", "linear.weight"]
    weights = {"norm.weight": torch.randn(3), "linear.weight": torch.randn(4, 3)}
    optimizer = {
        "state": {n: {"step": torch.tensor(2.0), "mean": torch.randn(3)} for n in names},
        "param_groups": [
            {"lr": 0.1, "betas": (0.9, 0.95), "params": ["linear.weight"]},
            {"lr": 0.2, "betas": (0.9, 0.95), "params": ["norm.weight"]},
        ],
    }
    folder = tmp_path / "last.ckpt"
    dcp.save({"state_dict": weights, "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 2, NAMES: names}, folder / REST)
    return folder, weights, optimizer


def test_shards_are_put_together(place):
    folder, weights, optimizer = place
    content = read_shards(folder)
    assert content.keys() == {"global_step", "state_dict", "optimizer_states"}
    assert content["state_dict"].keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(content["state_dict"][name], weight)
    (state,) = content["optimizer_states"]
    assert [group["params"] for group in state["param_groups"]] == [[1], [0]]
    assert [group["lr"] for group in state["param_groups"]] == [0.1, 0.2]
    mean = optimizer["state"]["linear.weight"]["mean"]
    assert torch.equal(state["state"][1]["mean"], mean)


def test_the_whole_file_is_made_once(place, monkeypatch):
    folder, weights, _ = place
    whole = make_whole(folder)
    assert torch.equal(
        torch.load(whole, weights_only=True)["state_dict"]["norm.weight"], weights["norm.weight"]
    )
    monkeypatch.setattr(shards, "read_shards", lambda place: pytest.fail("it was made again"))
    assert make_whole(folder) == whole
    assert not list(folder.glob("*.partial"))


def test_an_index_that_names_anything_else_is_refused(place):
    folder, *_ = place
    (folder / INDEX).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(
        ValueError, match=r"last.ckpt is damaged, or holds more than data: it names"
    ):
        read_shards(folder)


def rewritten(folder, change):
    """The index, changed."""
    index = pickle.loads((folder / INDEX).read_bytes())
    change(index)
    (folder / INDEX).write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("kind", ["tensor", "bytes"])
def test_a_chunk_that_holds_code_is_refused(place, kind):
    folder, *_ = place
    name = "state_dict.norm.weight" if kind == "tensor" else "optimizer_0.param_groups.0.lr"
    buffer = io.BytesIO()
    torch.save(Runs(), buffer)
    (folder / "evil").write_bytes(buffer.getvalue())

    def change(index):
        for key, stored in index.storage_data.items():
            if key.fqn == name:
                stored.relative_path, stored.offset = "evil", 0
                stored.length = len(buffer.getvalue())

    rewritten(folder, change)
    with pytest.raises(ValueError, match="more than data"):
        read_shards(folder)


def test_files_elsewhere_are_not_read(place):
    folder, *_ = place
    (shard,) = folder.glob("*.distcp")
    (folder.parent / "elsewhere").write_bytes(shard.read_bytes())

    def change(index):
        for stored in index.storage_data.values():
            stored.relative_path = os.path.join("..", "elsewhere")

    rewritten(folder, change)
    with pytest.raises(ValueError, match="a chunk lies in"):
        read_shards(folder)


def test_what_is_cut_short_or_missing_is_said(place):
    folder, *_ = place
    (shard,) = folder.glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is cut short"):
        read_shards(folder)
    shard.unlink()
    with pytest.raises(ValueError, match="damaged"):
        read_shards(folder)


def test_chunks_must_fill_their_tensor(place):
    folder, *_ = place

    def change(index):
        index.state_dict_metadata["state_dict.norm.weight"].size = torch.Size([2**40])

    rewritten(folder, change)
    with pytest.raises(ValueError, match=r"the chunks of state_dict.norm.weight do not make"):
        read_shards(folder)
