"""Files from strangers: refused in one line, in a moment, within bounds; changed weights found."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import archzoo
from archzoo.checkpoint import load, read_safely, weights_digest
from archzoo.checkpoint.archives import Archive
from archzoo.cli import main
from archzoo.decoder import Decoder
from archzoo.tasks import Addition
from archzoo.training.files import write_checkpoint

OLD = Path(__file__).parent / "checkpoints"  # written before there were digests


def run_content(model: Decoder, **more: Any) -> dict[str, Any]:
    """What a run writes, as far as a model is concerned."""
    return {
        "hyper_parameters": {"learning_rate": 1e-3, **model.config},
        "state_dict": OrderedDict((f"decoder.{n}", t) for n, t in model.state_dict().items()),
        "task": Addition().config(),
        "tokenizer": {},
        **more,
    }


def micro(name: str = "retnet_micro", **arguments: Any) -> Decoder:
    return archzoo.create_model(name, **arguments)


def refused(path: Path, match: str, kind: type[Exception] = ValueError) -> None:
    for read in (load, read_safely) if path.is_file() else (load,):
        with pytest.raises(kind, match=match) as error:
            read(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


# ---------------------------------------------------------------------------- older files


@pytest.mark.parametrize("name", ["retnet_micro.ckpt", "skywork_micro.ckpt", "skywork_micro"])
def test_files_of_earlier_versions_give_the_same_logits(name: str) -> None:
    expected = json.loads((OLD / "logits.json").read_text())
    found = load(OLD / name)
    with torch.no_grad():
        logits = found.model(torch.tensor(expected["tokens"])).logits
    # Another processor may add in another order; bit for bit it is elsewhere.
    torch.testing.assert_close(logits, torch.tensor(expected["logits"][name]), rtol=1e-5, atol=1e-5)
    assert found.tokenizer is not None and found.tokenizer.vocab_size == 14
    assert found.task is not None and found.task["class_path"] == "archzoo.tasks.Addition"
    texts = archzoo.generate(found.model, "1+1=", tokenizer=found.tokenizer, max_tokens=2).texts
    assert texts is not None


@pytest.mark.filterwarnings("ignore:test reads the validation part")  # an earlier run's
def test_an_earlier_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--ckpt_path", str(OLD / "retnet_micro.ckpt"), "--trainer.accelerator", "cpu"]
    assert main([*fit, "--trainer.max_steps", "42", "--name", "on"]) == 0
    assert read_safely("runs/on/last.ckpt")["global_step"] == 42


@pytest.mark.parametrize("name", ["retnet_micro.ckpt", "skywork_micro.ckpt"])
def test_the_reader_gives_what_torch_does(name: str) -> None:
    with Archive(OLD / name) as archive:
        mine = archive.everything()

    def compare(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, list | tuple):
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                compare(one, other)
        else:
            assert a == b

    compare(mine, torch.load(OLD / name, weights_only=True))
    state = mine["state_dict"]
    tied = [state[f"decoder.{part}.weight"].data_ptr() for part in ("head", "embedding")]
    assert (tied[0] == tied[1]) == name.startswith("skywork")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_plain_data_and_tensors_are_read(tmp_path: Path, protocol: int) -> None:
    long = torch.arange(12.0).reshape(3, 4)
    marked = torch.ones(2)
    marked.computed = {"beside": 1}  # type: ignore[attr-defined]
    content = {
        "numbers": [1, -(2**70), 1.5, float("inf"), True, None, 3 + 4j],
        "texts": ("é", b"\x00\xff", bytearray(b"ab")),
        "sets": {1, 2},
        "size": torch.Size([2, 3]),
        "views": [long, long.t(), long[1:, 2], long[:, :0], torch.tensor(2.0)],
        "dtypes": [torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.bool, torch.uint16)],
        "others": [torch.nn.Parameter(torch.ones(2)), marked, torch.float16, torch.Generator()],
    }
    content["others"].pop()
    torch.save(content, tmp_path / "all.pt", pickle_protocol=protocol)
    found = read_safely(tmp_path / "all.pt")
    assert found["numbers"] == content["numbers"] and found["sets"] == {1, 2}
    assert found["texts"] == ("é", b"\x00\xff", b"ab") and found["size"] == (2, 3)
    assert found["others"][2] is torch.float16
    for name in ("views", "dtypes"):
        for one, other in zip(found[name], content[name], strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()
    assert found["views"][0].data_ptr() == found["views"][1].data_ptr()


# ---------------------------------------------------------------------------- digests


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    model = micro()
    archzoo.save_pretrained(tmp_path / "model", model)
    weights = tmp_path / "model" / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        assert file.metadata()["digest"] == weights_digest(model.state_dict())
    flip(weights, weights.stat().st_size - 5)
    refused(tmp_path / "model", "not those that were written, by their digest")


def test_a_flipped_bit_in_a_run_is_found(tmp_path: Path) -> None:
    model = micro()
    write_checkpoint(run_content(model), tmp_path / "run.ckpt")
    content = read_safely(tmp_path / "run.ckpt")
    assert content["digest"] == weights_digest(model.state_dict())
    content["state_dict"]["decoder.head.weight"][0, 0] += 1
    torch.save(content, tmp_path / "edited.ckpt")
    refused(tmp_path / "edited.ckpt", "not those that were written, by their digest")
    # The archive's own sums find it anywhere, in files without a digest too.
    content = (OLD / "retnet_micro.ckpt").read_bytes()
    (tmp_path / "old.ckpt").write_bytes(content)
    flip(tmp_path / "old.ckpt", content.index(b"PK\x03\x04", len(content) // 4) - 60)
    with pytest.raises(ValueError, match="is damaged"):
        read_safely(tmp_path / "old.ckpt")


def test_the_digest_is_of_names_shapes_dtypes_and_bytes() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    digest = weights_digest(weights)
    assert digest == weights_digest(dict(reversed(weights.items())))
    assert digest == weights_digest(weights | {"a": weights["a"].t().contiguous().t()})
    for other in (
        {"c": weights["a"], "b": weights["b"]},
        weights | {"a": weights["a"].reshape(3, 2)},
        weights | {"b": weights["b"].half()},
        weights | {"a": weights["a"].clone().index_fill_(1, torch.tensor([0]), -0.0)},
    ):
        assert weights_digest(other) != digest


def test_a_file_of_another_tool_has_no_digest_and_loads(tmp_path: Path) -> None:
    model = micro()
    archzoo.save_pretrained(tmp_path, model)
    changed = load_file(tmp_path / "model.safetensors")
    changed["head.weight"] = changed["head.weight"] * 2
    save_file(changed, tmp_path / "model.safetensors")
    assert load(tmp_path).model.head.weight.equal(model.head.weight * 2)


def test_training_keeps_the_digest_of_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load(OLD / "retnet_micro.ckpt")
    base = weights_digest(found.model.state_dict())
    fit = ["fit", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0"]
    Path("start.ckpt").write_bytes((OLD / "retnet_micro.ckpt").read_bytes())
    start = ["--model.weights", "start.ckpt", "--name", "on"]
    assert main([*fit, *start, "--trainer.max_steps", "2"]) == 0
    assert read_safely("runs/on/last.ckpt")["base"] == base
    assert main([*fit, "--ckpt_path", "runs/on/last.ckpt", "--trainer.max_steps", "3"]) == 0
    content = read_safely("runs/on/last.ckpt")
    assert content["base"] == base and content["digest"] != base
    archzoo.save_pretrained("model", *load("runs/on/last.ckpt"))
    assert json.loads(Path("model/config.json").read_text())["base"] == base
    assert archzoo.from_pretrained("model")[0].base == base
    assert found.model.base is None


# ---------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("kept", [["head.weight"], ["embedding.weight"], []])
def test_tied_weights_that_another_tool_wrote(tmp_path: Path, kept: list[str]) -> None:
    """Under one name, whichever, without the note of the other; or under both."""
    model = micro(tie_weights=True)
    archzoo.save_pretrained(tmp_path, model)
    weights = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    for name in {"head.weight", "embedding.weight"} - set(kept) if kept else ():
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    again = load(tmp_path).model
    assert again.head.weight is again.embedding.weight
    assert again.head.weight.equal(model.head.weight)
    assert again.parameter_count() == model.parameter_count()
    if not kept:
        weights["head.weight"] = weights["head.weight"] + 1
        save_file(weights, tmp_path / "model.safetensors")
        refused(tmp_path, "embedding.weight and head.weight differ, which are one tensor")


def test_weights_keep_their_layout(tmp_path: Path) -> None:
    model = micro(width=48)
    archzoo.save_pretrained(tmp_path, model)
    for name, tensor in load(tmp_path).model.state_dict().items():
        assert tensor.stride() == model.state_dict()[name].stride(), name


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        archzoo.save_pretrained(
            tmp_path / "model", micro(vocab_size=Addition().vocab_size), Addition().tokenizer
        )
        write_checkpoint(run_content(micro()), tmp_path / "model" / "run.ckpt")
        archzoo.save_adapter(tmp_path / "model", archzoo.adapt(micro(), "LoRA"))
    finally:
        os.umask(before)
    for file in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file


def test_swapped_arguments_are_named(tmp_path: Path) -> None:
    model, tokenizer, path = micro(), Addition().tokenizer, str(tmp_path / "m")
    for arguments, name in (
        ((model, path), "directory is a Decoder and not a path"),
        ((path, tokenizer, model), "model is a CharacterTokenizer and not a Decoder"),
        ((path, model, Addition().config()), "tokenizer is a dict and not"),
        ((path, model, tokenizer, Addition()), "task is a Addition and not a dict"),
    ):
        with pytest.raises(TypeError, match=name) as error:
            archzoo.save_pretrained(*arguments)
        assert "save_pretrained(directory, model, tokenizer, task)" in str(error.value)
    with pytest.raises(TypeError, match="given by its path, and this is a Decoder"):
        archzoo.from_pretrained(model)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------------------- hostile files


def directory(place: Path, **decoder: Any) -> Path:
    archzoo.save_pretrained(place, micro())
    config = json.loads((place / "config.json").read_text())
    config["decoder"] |= decoder
    (place / "config.json").write_text(json.dumps(config))
    return place


def checkpoint(place: Path, **settings: Any) -> Path:
    content = run_content(micro())
    content["hyper_parameters"] |= settings
    torch.save(content, place)
    return place


def rewritten(source: Path, target: Path, changes: dict[str, bytes], **options: Any) -> Path:
    """A copy of an archive with other records; what none had is added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            new.writestr(info.filename, changes.pop(name, old.read(info)))
        for name, content in changes.items():
            new.writestr(f"archive/{name}", content)
    return target


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def wide(levels: int) -> list[Any]:
    """A list that holds ten times the one before, each of which holds ten times ..."""
    value: list[Any] = ["x"] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


class Claims:
    """Pickles as a tensor of any shape on a storage of any length."""

    def __init__(self, elements: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.parts = elements, shape, stride


class Storage:
    """Pickles as a storage of that many elements, in the archive's first record."""

    def __init__(self, elements: int) -> None:
        self.elements = elements


class Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, Storage):
            return ("storage", torch.FloatStorage, "0", "cpu", thing.elements)
        return None

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, Claims):
            elements, shape, stride = thing.parts
            arguments = (Storage(elements), 0, shape, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments
        return NotImplemented


def claiming(path: Path, claims: Claims) -> Path:
    """A run's checkpoint whose head claims to be larger than its record."""
    torch.save(run_content(micro()), path.with_suffix(".real"))
    content = run_content(micro())
    content["state_dict"] = {"decoder.head.weight": claims}
    content["hyper_parameters"]["vocab_size"] = claims.parts[1][0]
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return rewritten(path.with_suffix(".real"), path, {"data.pkl": buffer.getvalue()})


def bomb(path: Path) -> Path:
    torch.save(run_content(micro()), path.with_suffix(".real"))
    changes = {"data/0": bytes(2**26)}
    return rewritten(path.with_suffix(".real"), path, changes, compression=zipfile.ZIP_DEFLATED)


def json_file(place: Path, text: str) -> Path:
    archzoo.save_pretrained(place, micro())
    (place / "config.json").write_text(text)
    return place


def header(place: Path, size: int, text: str = "") -> Path:
    archzoo.save_pretrained(place, micro())
    (place / "model.safetensors").write_bytes(struct.pack("<Q", size) + text.encode())
    return place


def sparse(place: Path) -> Path:
    """A safetensors file with a hole instead of 8 TB of weights."""
    rows = 2**36
    directory(place, vocab_size=rows)
    entry = {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, rows * 32 * 4]}
    layers = {
        f"blocks.{n}.x": {"dtype": "F32", "shape": [0], "data_offsets": [rows * 128, rows * 128]}
        for n in range(2)
    }
    text = json.dumps({"head.weight": entry, **layers}).encode()
    with open(place / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + rows * 128)
    return place


def fifo(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def fifo_in(place: Path, name: str) -> Path:
    archzoo.save_pretrained(place, micro(vocab_size=Addition().vocab_size), Addition().tokenizer)
    fifo(place / name)
    return place


def task_of_size(place: Path, name: str, amount: float) -> Path:
    content = run_content(micro())
    content["task"]["init_args"][name] = amount
    torch.save(content, place)
    return place


def adapter(place: Path, **arguments: Any) -> Path:
    """An adapter's directory, of a LoRA with other arguments than it was written with."""
    archzoo.save_adapter(place, archzoo.adapt(micro(), "LoRA"))
    content = json.loads((place / "adapter.json").read_text())
    content["adapter"]["init_args"] |= arguments
    (place / "adapter.json").write_text(json.dumps(content))
    return place


def adapter_file(place: Path, text: str) -> Path:
    (adapter(place) / "adapter.json").write_text(text)
    return place


def adapter_pipe(place: Path) -> Path:
    fifo(adapter(place) / "adapter.json")
    return place


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "vocabulary": (lambda p: directory(p, vocab_size=10**8), "configuration says 100000000"),
    "depth": (lambda p: directory(p, depth=10**5), "depth=100000"),
    "dim": (lambda p: directory(p, dim=10**9), "dim=1000000000"),
    "width": (lambda p: directory(p, width=10**12), "has shape|describes no decoder"),
    "heads": (lambda p: directory(p, heads=10**18), "does not divide"),
    "loops": (lambda p: directory(p, loops=10**9), "loops=1000000000 is more than 10,000"),
    "context": (lambda p: directory(p, context_length=10**15), "context_length=1000000000000000"),
    "pattern": (lambda p: directory(p, pattern=["Attention"] * 10**4), "10,000 mixers"),
    "experts": (
        lambda p: directory(
            p,
            feed_forward={
                "class_path": "MixtureOfExperts",
                "init_args": {"experts": 10**9, "router": "LinearRouter"},
            },
        ),
        "do not fit|describes no decoder|is not valid",
    ),
    "rows": (
        lambda p: directory(
            p, embedding={"class_path": "LearnedPositions", "init_args": {"longest": 10**10}}
        ),
        "miss embedding",
    ),
    "a run's vocabulary": (lambda p: checkpoint(p, vocab_size=10**8), "says 100000000"),
    "a run's depth": (lambda p: checkpoint(p, depth=10**5), "depth=100000"),
    "a run's batch": (lambda p: task_of_size(p, "batch_size", 10**9), "batch_size=1000000000"),
    "a large batch": (lambda p: task_of_size(p, "batch_size", 10**5), "batch_size=100000"),
    "a run's examples": (lambda p: task_of_size(p, "test_examples", 1e12), "test_examples"),
    "an expanded tensor": (
        lambda p: claiming(p, Claims(10**6, (10**8, 32), (0, 0))),
        "expand to 12,800,000,000 bytes",
    ),
    "a storage that is not there": (
        lambda p: claiming(p, Claims(10**9, (10**6, 32), (32, 1))),
        "too short|expand",
    ),
    "a tensor beyond its storage": (
        lambda p: claiming(p, Claims(10**6, (10**7, 32), (32, 1))),
        "larger than its storage",
    ),
    "a bomb": (bomb, "would expand to"),
    "nested data": (lambda p: checkpoint(p, mixer=nested(80)), "nests deeper than 64"),
    "wide data": (lambda p: checkpoint(p, mixer=wide(8)), "expands more than 100 times"),
    "nested JSON": (lambda p: json_file(p, '{"a":' * 70 + "1" + "}" * 70), "deeper than 64"),
    "very deep JSON": (lambda p: json_file(p, "[" * 10**5), "deeper than 64"),
    "long JSON": (lambda p: json_file(p, "[" + "[]," * 10**6 + "1]"), "longer than"),
    "a long header": (lambda p: header(p, 2**60), "that is not read; it is a file of another kind"),
    "a header that nests": (lambda p: header(p, 1000, "[" * 1000), "truncated or damaged"),
    "a hole": (sparse, "more than this machine's"),
    "a pipe": (fifo, "is a pipe and not a regular file"),
    "a device": (lambda p: Path("/dev/zero"), "is a device and not a regular file"),
    "a pipe for a configuration": (lambda p: fifo_in(p, "config.json"), "is a pipe"),
    "a pipe for weights": (lambda p: fifo_in(p, "model.safetensors"), "is a pipe"),
    "an adapter's targets": (lambda p: adapter(p, targets=["query"] * 10**5), "100,000 targets"),
    "an adapter's expression": (lambda p: adapter(p, targets=["(a+)+$"]), "no regular expression"),
    "an adapter's layers": (lambda p: adapter(p, layers=[0] * 10**5), "100,000 layers"),
    "an adapter's nested JSON": (lambda p: adapter_file(p, "[" * 10**5), "deeper than 64"),
    "an adapter's long JSON": (lambda p: adapter_file(p, "[" + "0," * 10**6), "longer than"),
    "a pipe for an adapter": (adapter_pipe, "is a pipe"),
    "a pipe for a tokenizer": (lambda p: fifo_in(p, "tokenizer.json"), "is a pipe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_fill_a_memory_is_refused_at_once(name: str, tmp_path: Path) -> None:
    make, match = HOSTILE[name]
    path = make(tmp_path / "file")
    load(OLD / "retnet_micro.ckpt")  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    refused(path, match)
    assert time.perf_counter() - begin < 2, "two readers, a second each"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize(
    ("cls", "arguments", "match"),
    [
        ("LoRA", {"rank": 10**9}, "rank=1000000000 must be at least 1 and at most"),
        ("FourierFT", {"frequencies": 10**12}, "frequencies=1000000000000"),
        ("PromptTuning", {"length": 10**10}, "has shape|describes no decoder"),
        ("PTuning", {"length": 4, "encoder": "lstm"}, "they miss embedding.head"),
        ("MoLoRA", {"experts": 10**9}, "has shape|describes no decoder"),
    ],
)
def test_an_adapter_that_would_fill_a_memory_is_refused_at_once(
    tmp_path: Path, cls: str, arguments: dict[str, Any], match: str
) -> None:
    """And nothing is put on the model, which is its base."""
    base = micro()
    net = micro()
    net.load_state_dict(base.state_dict())
    archzoo.save_adapter(tmp_path, archzoo.adapt(net, cls))
    content = json.loads((tmp_path / "adapter.json").read_text())
    content["adapter"]["init_args"] |= arguments
    (tmp_path / "adapter.json").write_text(json.dumps(content))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=match) as error:
        archzoo.load_adapter(tmp_path, base)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert (
        base.config["adapter"] is None and base.state_dict().keys() == micro().state_dict().keys()
    )


def test_a_deep_key_does_not_end_the_process(tmp_path: Path) -> None:
    """Python hashes a tuple in a tuple in ... by recursion, without a bound."""
    torch.save(run_content(micro()), tmp_path / "real")
    deep = b"\x80\x02}" + b")" + b"\x85" * 2 * 10**5 + b"K\x01s."
    rewritten(tmp_path / "real", tmp_path / "deep.ckpt", {"data.pkl": deep})
    program = "import sys; from archzoo.checkpoint import load; load(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "deep.ckpt")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(OLD.parent.parent)},
    )
    assert done.returncode == 1 and "a key that is not plain" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------- wrong types


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"vocab_size": "64"}, "vocab_size='64': a decoder needs an integer"),
        ({"depth": True}, "depth=True: a decoder needs an integer"),
        ({"dim": 10**5000}, "dim=a int too long to show"),
        ({"width": 2.5}, "width=2.5 is not valid: it takes int | None"),
        ({"tie_weights": "yes"}, "tie_weights='yes' is not valid: it takes bool | None"),
        ({"norm": "batch"}, "norm='batch' is not valid: it takes .*'rms', 'layer'"),
        ({"dropout": "0.1"}, "dropout='0.1' is not valid: it takes float | None"),
        ({"pattern": "Attention"}, "pattern='Attention' is not valid"),
        ({"pattern": [3]}, r"pattern=\[3\] is not valid"),
        ({"mixer": 3}, "mixer=3 is not valid: it takes a part's name"),
        ({"mixer": {"class_path": 3}}, "mixer=.* is not valid"),
        ({"mixer": {"class_path": "Retention", "init_args": [1]}}, "mixer=.* is not valid"),
        (
            {"mixer": {"class_path": "Retention", "init_args": {"gate": "no"}}},
            "Retention: gate='no' is not valid: it takes bool",
        ),
    ],
)
def test_wrong_types_of_settings(tmp_path: Path, decoder: dict[str, Any], message: str) -> None:
    if decoder.get("dim") != 10**5000:  # which JSON's reader refuses itself
        refused(directory(tmp_path / "d", **decoder), message)
        refused(checkpoint(tmp_path / "c", **decoder), message)
    else:
        refused(checkpoint(tmp_path / "c", **decoder), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": []}, r"task=\[\] is not valid"),
        ({"task": {"class_path": "Addition"}}, "task=.* is not valid"),
        ({"tokenizer": 3}, "tokenizer=3 is not a file's name"),
        ({"tokenizer": ".."}, r"tokenizer='\.\.' is not a file's name"),
        ({"tokenizer": "/etc/passwd"}, "is not a file's name"),
        ({"tokenizer": "config.json"}, r"config\.json: "),
    ],
)
def test_wrong_types_beside_the_decoder(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    archzoo.save_pretrained(tmp_path, micro())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, message)


def test_a_runs_weights_that_do_not_fit(tmp_path: Path) -> None:
    """Wherever `--ckpt_path` leads: not a traceback of torch's."""
    for settings, message in (
        ({"width": 56}, r"gate_up\.weight has shape \(96, 32\) where \(112, 32\) is expected"),
        ({"norm_placement": "post"}, r"they have norm\.weight"),
        ({"depth": 1}, r"they have blocks\.1\."),
    ):
        refused(checkpoint(tmp_path / "run.ckpt", **settings), message)
    content = run_content(micro())
    for name, entry in content["state_dict"].items():
        content["state_dict"][name] = entry.long()
    torch.save(content, tmp_path / "run.ckpt")
    refused(tmp_path / "run.ckpt", "is int64 where float32 or the like is expected")


def test_wrong_types_in_a_run(tmp_path: Path) -> None:
    for change, message in (
        ({"tokenizer": {"tokenizer.json": "text"}}, "holds no tokenizer where it should"),
        ({"tokenizer": {"tokenizer.json": torch.zeros(3)}}, "run.ckpt holds no tokenizer where"),
        ({"task": "Addition"}, "task='Addition' is not valid"),
        ({"state_dict": {"decoder.head.weight": 3}}, r"head\.weight is not a tensor"),
    ):
        torch.save(run_content(micro()) | change, tmp_path / "run.ckpt")
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / "run.ckpt")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.complex64, torch.bool])
def test_weights_that_are_not_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    archzoo.save_pretrained(tmp_path, micro())
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.weight"] = weights["head.weight"].to(dtype)
    save_file(weights, tmp_path / "model.safetensors")
    kind = str(dtype).removeprefix("torch.")
    refused(tmp_path, rf"head\.weight is {kind} where float32 or the like is expected")


def test_foreign_weights_of_several_dtypes(tmp_path: Path) -> None:
    archzoo.save_pretrained(tmp_path, micro())
    weights = load_file(tmp_path / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"].half()
    save_file(weights, tmp_path / "model.safetensors")
    refused(tmp_path, r"norm\.weight is float16 where head\.weight is float32")


@pytest.mark.filterwarnings("ignore:test reads the validation part")  # an earlier run's
def test_what_a_run_cannot_resume_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for change, message in (
        ({"training": 3}, "its training is a int where a dict is expected"),
        ({"training": {"totals": {}, "carried": {}}}, "not written by archzoo's training"),
        ({"loops": {}}, "run.ckpt is damaged, or another model's: KeyError 'fit_loop'"),
        ({"lr_schedulers": [3]}, "run.ckpt is damaged, or another model's: AttributeError"),
    ):
        torch.save(read_safely(OLD / "retnet_micro.ckpt") | change, "run.ckpt")
        fit = ["fit", "--ckpt_path", "run.ckpt", "--trainer.max_steps", "41", "--name", "on"]
        assert main([*fit, "--trainer.accelerator", "cpu"]) == 1
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: ") and message in said[-1]


def test_a_module_is_read_without_running_anything(tmp_path: Path) -> None:
    from archzoo.training.module import LanguageModel

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{tmp_path / 'it_ran'}'",)

    content = read_safely(OLD / "retnet_micro.ckpt")
    torch.save(content | {"evil": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"holds code \((posix|nt)\.system\)"):
        LanguageModel.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "it_ran").exists()
    module = LanguageModel.load_from_checkpoint(OLD / "retnet_micro.ckpt", learning_rate=0.5)
    assert module.learning_rate == 0.5
    weights = load(OLD / "retnet_micro.ckpt").model.state_dict()
    assert all(t.equal(weights[name]) for name, t in module.net.state_dict().items())
