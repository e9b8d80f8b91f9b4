"""Damaged and hostile checkpoints: each is refused in one line, or loads to the right thing.

Mutations of a run's `last.ckpt` and of a directory that `save_pretrained` wrote: flipped bits,
truncation, edits of the safetensors' header, other types and hostile names in the settings, zip
bombs, files that are no files. Each is asked with one of the commands that read checkpoints. What
loads must be what was saved: the weights bit for bit, the settings as the file says and of the
types that the arguments have.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from campaign.strangers import ask, at, hostile, places, watched

SLICE, LIMIT = 15, 60
KINDS = ("retnet", "moe", "text")
FIT = "--trainer.max_steps 1 --trainer.limit_val_batches 1 --trainer.accelerator cpu "
FITS = {
    "retnet": "--model.preset retnet_micro --data Addition --data.digits 2",
    "moe": "--model.preset yuan_micro --data Sorting",
    "text": "--model.preset transformer_micro --data Text --data.path corpus.txt "
    "--data.tokenizer characters --data.context_length 16",
}


def prepare(directory: Path) -> None:
    """A run of each kind, `KIND/last.ckpt`, and the same as a directory, `KIND/saved`."""
    import archzoo
    from archzoo.checkpoint import load

    (directory / "corpus.txt").write_text("To be, or not to be, that is the question: 0123\n" * 200)
    for kind in KINDS:
        settings = f"fit {FITS[kind]} {FIT} --data.batch_size 2 --name {kind}".split()
        status, said = ask([*settings, "--trainer.default_root_dir", str(directory)])
        assert status == 0, said
        found = load(directory / kind / "last.ckpt")
        archzoo.save_pretrained(directory / kind / "saved", *found)


def case(draw: random.Random, prepared: Path, place: Path) -> str:
    kind, form = draw.choice(KINDS), draw.choice(("ckpt", "saved"))
    shutil.copy(prepared / "corpus.txt", place)
    target = place / "stranger" / ("last.ckpt" if form == "ckpt" else "saved")
    target.parent.mkdir()
    source = prepared / kind / target.name
    (shutil.copy if form == "ckpt" else shutil.copytree)(source, target)
    mutation = draw.choice(MUTATIONS[form])
    settings = mutation(draw, target)
    question = draw.choice(["generate", "grid", "router", "test", "fit", "weights", "python"])
    with watched(place):
        status = _ask(question, target, kind)
        if status:
            return "refused"
        # Whatever the command did with it: what is read now is what the file says.
        _, found = _read(target)
        if found is None:
            return "not read"
        _, clean = _read(source)
        assert clean is not None
        if settings is None:
            _same_weights(clean, found, f"{mutation.__name__}: other weights loaded silently")
            return "whole"
        _as_said(settings, found)
        return "read as it says"


# ---------------------------------------------------------------------------- asking


def _ask(question: str, target: Path, kind: str) -> int:
    where = os.path.relpath(target)
    few = "--trainer.fast_dev_run 1 --trainer.accelerator cpu --trainer.default_root_dir out"
    commands = {
        "generate": f"generate {where} 1+1= --max_tokens 2 --device cpu",
        "grid": f"grid {where} --digits 2 --problems 2 --device cpu",
        "router": f"router {where} --batches 1 --device cpu",
        "test": f"test --ckpt_path {where} {few}",
        "fit": f"fit --ckpt_path {where} {few}",
        "weights": f"fit --model.weights {where} {few}",
    }
    if question == "python":
        return _read(target)[0]
    return ask(commands[question].split())[0]


def _read(target: Path) -> tuple[int, Any]:
    """(0, what a checkpoint holds) by the Python API, or (1, None) where it is refused."""
    from archzoo.checkpoint import load

    try:
        return 0, load(target)
    except (ValueError, OSError) as error:
        line = str(error)
        assert line and "\n" not in line.strip(), f"not one line: {line!r}"
        return 1, None


def _same_weights(clean: Any, found: Any, message: str) -> None:
    first, other = clean.model.state_dict(), found.model.state_dict()
    assert first.keys() == other.keys(), message
    for name, tensor in first.items():
        bits = tensor.dtype == other[name].dtype and torch.equal(
            tensor.contiguous().flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)
        )
        assert bits, f"{message}: {name}"


def _as_said(settings: dict[str, Any], found: Any) -> None:
    """The decoder's own settings are what the file says, and of their arguments' types."""
    from archzoo.decoder import Decoder

    for name, parameter in signature(Decoder, eval_str=True).parameters.items():
        if name not in settings:
            continue
        said, read = settings[name], found.model.config[name]
        if isinstance(said, dict | list) or isinstance(read, dict | list):
            continue
        same = said == read or (said != said and read != read)
        assert same, f"{name}: the file says {said!r}, and {read!r} was read"
        if said is not None:
            legal = str(parameter.annotation)
            kind = type(said).__name__
            fits = kind in legal or (kind == "int" and "float" in legal) or repr(said) in legal
            assert fits, f"{name}={said!r} of type {kind} was accepted where {legal} is expected"


# ---------------------------------------------------------------------------- mutations
# Each changes the file or directory at `target`, and returns the decoder's settings if it is they
# that were changed, None where what loads must be what was saved.


def _files(target: Path) -> list[Path]:
    return [target] if target.is_file() else sorted(target.iterdir())


def weights_of(target: Path) -> Path:
    """The file of tensors: the checkpoint itself, or what lies in the directory."""
    return target if target.is_file() else next(target.glob("*.safetensors"))


def flip_bits(draw: random.Random, target: Path) -> None:
    weights = weights_of(target)
    content = bytearray(weights.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 8, 100])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    weights.write_bytes(content)


def truncate(draw: random.Random, target: Path) -> None:
    path = draw.choice(_files(target))
    content = path.read_bytes()
    if path.suffix not in (".safetensors", ".ckpt"):
        # A configuration may lose its end without loss: the line break.
        content = content.rstrip()
    path.write_bytes(content[: draw.choice([0, 1, 8, draw.randrange(len(content))])])


def append(draw: random.Random, target: Path) -> None:
    weights = weights_of(target)
    weights.write_bytes(weights.read_bytes() + draw.randbytes(draw.choice([1, 22, 1000])))


def splice(draw: random.Random, target: Path) -> None:
    """A segment of the file stands where another was."""
    weights = weights_of(target)
    content = bytearray(weights.read_bytes())
    size = draw.choice([1, 4, 64, 1024])
    first, other = (draw.randrange(len(content) - size) for _ in range(2))
    content[first : first + size] = content[other : other + size]
    weights.write_bytes(content)


def edit_header(draw: random.Random, target: Path) -> None:
    """Another header of the safetensors, with a length that fits it."""
    weights = weights_of(target)
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    change = draw.randrange(8)
    if change == 0:
        entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I32", "U32", "F8_E4M3", "X", "C64"])
    elif change == 1:
        entry["shape"] = draw.choice([entry["shape"][::-1], [], [-1], [2**40, 2**40], ["1"], "x"])
    elif change == 2:
        entry["data_offsets"] = draw.choice([[0, 0], [0, 2**62], [-1, 4], [8, 4], ["0", "4"]])
    elif change == 3:
        header[name + draw.choice(["x", ".weight", "\x00"])] = header.pop(name)
    elif change == 4:
        other = draw.choice(sorted(header.keys() - {"__metadata__"}))
        header[name], header[other] = header[other], header[name]
    elif change == 5:
        header["__metadata__"] = hostile_metadata(draw, header, name)
    elif change == 6:
        header[name] = hostile(draw)
    else:
        del header[name]
    try:
        text = json.dumps(header).encode()
    except (RecursionError, ValueError):
        text = b"[" * 10_000
    text += b" " * draw.choice([0, 7])
    length = draw.choice([len(text)] * 5 + [0, 2**63 - 1, len(text) - 1])
    weights.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])


def hostile_metadata(draw: random.Random, header: dict[str, Any], name: str) -> Any:
    """Metadata that says other than it did: of shared weights, of the digest."""
    metadata = dict(header.get("__metadata__", {}))
    change = draw.randrange(4)
    if change == 0:
        metadata[draw.choice(["head.weight", "blocks.0.x", name])] = draw.choice([name, "x", ""])
    elif change == 1 and metadata:
        metadata[draw.choice(sorted(metadata))] = draw.choice(["", "0" * 64, "sha256:"])
    elif change == 2:
        return hostile(draw)
    else:
        metadata = dict.fromkeys(metadata, draw.choice([7, None, []]))
    return metadata


def change_settings(draw: random.Random, target: Path) -> dict[str, Any]:
    """One or two settings of decoder, task or tokenizer are other ones."""

    def change(settings: dict[str, Any]) -> None:
        for _ in range(draw.choice([1, 1, 2])):
            here = draw.choice(list(places(settings)))
            above = at(settings, here[:-1])
            if isinstance(above, list) or draw.random() < 0.8:
                above[here[-1]] = hostile(draw)
            elif draw.random() < 0.5:
                del above[here[-1]]
            else:
                above[draw.choice(["x", "", "class_path", "mixer", 7])] = above.pop(here[-1])

    return _with_settings(target, change)


def hostile_part(draw: random.Random, target: Path) -> dict[str, Any]:
    """A part, a task or a file that the settings name is another one."""

    def change(settings: dict[str, Any]) -> None:
        decoder, task = settings["decoder"], settings["task"]
        value = draw.choice([_command, _named])(draw)
        where = draw.randrange(6)
        if where < 2:
            decoder[draw.choice(["mixer", "feed_forward", "embedding", "rotary", "bias"])] = value
        elif where == 2:
            decoder["pattern"] = [value]
        elif where == 3 and isinstance(decoder["feed_forward"].get("init_args"), dict):
            decoder["feed_forward"]["init_args"]["router"] = value
        elif where == 4:
            settings["task"] = value
        else:
            path = draw.choice(["/etc/passwd", "..", "/", "~", "/dev/zero", "/proc/self/environ"])
            task["class_path"] = "Text"
            task["init_args"][draw.choice(["path", "cache_dir", "tokenizer"])] = path

    return _with_settings(target, change)


def huge(draw: random.Random, target: Path) -> dict[str, Any]:
    """Sizes that no machine has memory for."""

    def change(settings: dict[str, Any]) -> None:
        name = draw.choice(["vocab_size", "dim", "depth", "heads", "width", "loops"])
        size = draw.choice([10**5, 10**8, 10**9, 2**62])
        if draw.random() < 0.3:  # (10**5 tiny rows are a batch that a machine has memory for)
            settings["task"]["init_args"]["batch_size"] = max(size, 10**9)
        else:
            settings["decoder"][name] = size

    return _with_settings(target, change)


def _command(draw: random.Random) -> Any:
    from campaign.strangers import COMMAND

    return copy.deepcopy(COMMAND)


def _named(draw: random.Random) -> Any:
    from campaign.strangers import NAMES

    arguments = draw.choice([{}, {"command": "touch PWNED"}, None, []])
    return {"class_path": draw.choice(NAMES), "init_args": arguments}


def _with_settings(target: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Change ``{"decoder", "task", "tokenizer"}`` of either form; the decoder's come back."""
    from archzoo.decoder import Decoder

    if target.is_dir():
        config = json.loads((target / "config.json").read_text())
        change(config)
        try:
            text = json.dumps(config)
        except (RecursionError, TypeError, ValueError):
            text = "[" * 10_000
        (target / "config.json").write_text(text)
        found = config.get("decoder")
    else:
        content = torch.load(target, weights_only=True)
        names = signature(Decoder).parameters
        hyper = content["hyper_parameters"]
        settings = {"decoder": {n: hyper[n] for n in names}, "task": content["task"]}
        change(settings)
        decoder = settings.get("decoder")
        if isinstance(decoder, dict):
            content["hyper_parameters"] = {
                name: entry for name, entry in hyper.items() if name not in names
            } | decoder
        else:
            content["hyper_parameters"] = decoder
        content["task"] = settings.get("task")
        torch.save(content, target)
        found = decoder
    return found if isinstance(found, dict) else {}


def state_of_another_kind(draw: random.Random, target: Path) -> None:
    """A checkpoint with entries of the wrong kind."""
    content = torch.load(target, weights_only=True)
    key = draw.choice(sorted(content))
    value = hostile(draw)
    if key == "state_dict" and draw.random() < 0.7:
        name = draw.choice([n for n in content[key] if n.startswith("decoder.")])
        tensor = content[key][name]
        content[key][name] = draw.choice(
            [value, tensor.int(), tensor.to(torch.complex64), tensor[:0], tensor.flatten(), None]
        )
    else:
        content[key] = value
    torch.save(content, target)


def zip_bomb(draw: random.Random, target: Path) -> None:
    """Entries of a .ckpt that expand beyond all measure, or are there many times."""
    with zipfile.ZipFile(target) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    big = draw.choice(sorted(entries))
    size = draw.choice([2**24, 2**26])
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, bytes(size) if name == big else content)
        if draw.random() < 0.3:
            root = big.partition("/")[0]
            for number in range(2_000):
                file.writestr(f"{root}/data/x{number}", b"")


def no_file(draw: random.Random, target: Path) -> None:
    """Something else stands at the name: a FIFO, a directory, a device, nothing."""
    path = draw.choice(_files(target))
    path.unlink()
    kind = draw.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)


def swap_files(draw: random.Random, target: Path) -> None:
    """Any file instead of any other."""
    first, other = draw.choice(_files(target)), draw.choice(_files(target))
    other.write_bytes(first.read_bytes())


def damage_text(draw: random.Random, target: Path) -> dict[str, Any]:
    """Bytes of config.json or tokenizer.json are other ones, or stand deep in brackets."""
    path = draw.choice([p for p in _files(target) if p.suffix == ".json"])
    content = bytearray(path.read_bytes())
    change = draw.randrange(4)
    if change == 0:
        content[draw.randrange(len(content))] = draw.randrange(256)
    elif change == 1:
        content = bytearray(b'{"decoder":' * draw.choice([70, 10_000]))
    elif change == 2:
        content = bytearray("\ufeff".encode() + bytes(content))
    else:
        content[:0] = draw.choice([b"\xff\xfe", b"[", b"null", b"NaN", b'""'])
    path.write_bytes(content)
    try:
        return dict(json.loads((target / "config.json").read_text()).get("decoder", {}))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return {}


BOTH: list[Callable[[random.Random, Path], Any]] = [
    flip_bits, truncate, append, splice, change_settings, hostile_part, huge, no_file,
]  # fmt: skip
MUTATIONS = {
    "ckpt": [*BOTH, state_of_another_kind, zip_bomb],
    "saved": [*BOTH, edit_header, swap_files, damage_text],
}
