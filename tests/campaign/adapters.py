"""Damaged and hostile adapters: each is refused in one line, or is the one that was written.

Mutations of a directory of `save_adapter`, and of an adapted run's `last.ckpt`, which leaves its
base out: those of `checkpoints`, and changes of the adapter, its options and its targets, of the
base's place and digest. Each is asked with one of the commands that read adapters, beside the base.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from campaign.checkpoints import (
    append,
    edit_header,
    flip_bits,
    no_file,
    splice,
    state_of_another_kind,
    swap_files,
    truncate,
    zip_bomb,
)
from campaign.strangers import NAMES, ask, at, hostile, places, watched

SLICE, LIMIT = 8, 60
FIT = "--trainer.max_steps 1 --trainer.limit_val_batches 1 --trainer.accelerator cpu --name"
BASE = "--model.preset yuan_micro --data Addition --data.digits 1 --data.batch_size 2"
LORA = "--model.weights base/last.ckpt --model.adapter LoRA --model.adapter.rank 2 "
LORA += "--model.adapter.targets [query,up,router]"


def prepare(directory: Path) -> None:
    """A base, a run beside it, `lora/last.ckpt`, and its adapter alone, `alone`."""
    import archzoo
    from archzoo.checkpoint import load

    here = Path.cwd()
    try:
        os.chdir(directory)
        for name, words in (("base", BASE), ("lora", LORA)):
            words = f"fit {words} {FIT} {name} --trainer.default_root_dir ."
            status, said = ask(words.split())
            assert status == 0, said
        archzoo.save_adapter("alone", load("lora/last.ckpt").model)
    finally:
        os.chdir(here)


def case(draw: random.Random, prepared: Path, place: Path) -> str:
    form = draw.choice(("ckpt", "alone"))
    shutil.copytree(prepared / "base", place / "base")
    target = place / "stranger" / ("last.ckpt" if form == "ckpt" else "alone")
    target.parent.mkdir()
    if form == "ckpt":
        shutil.copy(prepared / "lora" / "last.ckpt", target)
    else:
        shutil.copytree(prepared / "alone", target)
    mutation = draw.choice(MUTATIONS[form])
    changed = mutation(draw, target)
    with watched(place):
        if _ask(draw, target):
            return "refused"
        try:
            found = _weights(target)
        except (ValueError, OSError) as error:
            _check_line(error)
            return "not read"
        expected = _weights(prepared / "lora" / "last.ckpt", prepared / "base" / "last.ckpt")
        if changed is not True:  # of what the tensors are, settings may say other things
            assert found.keys() == expected.keys(), f"{mutation.__name__}: other weights"
            for name, tensor in expected.items():
                same = found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
                assert same, f"{mutation.__name__}: {name} was loaded silently"
        return "read"


def _check_line(error: Exception) -> None:
    line = str(error).strip()
    assert line and "\n" not in line and len(line) < 2_000, f"not one line: {line!r}"


def _weights(target: Path, base: Path | None = None) -> dict[str, Any]:
    from archzoo.checkpoint import load

    return dict(load(target, base=base).model.state_dict())


def _ask(draw: random.Random, target: Path) -> int:
    """Ask a command, or Python; 1 where it was refused."""
    import archzoo
    from archzoo.checkpoint import load

    where = os.path.relpath(target)
    few = "--trainer.fast_dev_run 1 --trainer.accelerator cpu --trainer.default_root_dir out"
    commands = [f"show {where}", f"adapter merge {where} --out merged"]
    commands += [f"generate {where} 1+1= --max_tokens 2 --device cpu"]
    if target.is_dir():
        commands += [f"generate base 1+1= --adapter {where} --max_tokens 2 --device cpu"]
    else:
        commands += [f"test --ckpt_path {where} {few}", f"fit --ckpt_path {where} {few}"]
    question = draw.choice([*commands, "python"])
    if question != "python":
        return ask(question.split())[0]
    model = load("base").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        if target.is_dir():
            archzoo.load_adapter(target, model)
        else:
            load(target)
    except (ValueError, OSError) as error:
        _check_line(error)
        after = model.state_dict()
        assert after.keys() == before.keys(), "refused, and something was attached"
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        return 1
    return 0


def change_file(draw: random.Random, target: Path) -> bool:
    """One or two settings of the adapter, its base or its task are other ones."""

    def change(settings: dict[str, Any]) -> None:
        for _ in range(draw.choice([1, 1, 2])):
            here = draw.choice(list(places(settings)))
            above = at(settings, here[:-1])
            if isinstance(above, list) or draw.random() < 0.8:
                above[here[-1]] = hostile(draw)
            else:
                del above[here[-1]]

    return _with_settings(target, change)


def hostile_adapter(draw: random.Random, target: Path) -> bool:
    """Another class, sizes that no memory holds, regular expressions, paths elsewhere."""

    def change(settings: dict[str, Any]) -> None:
        spec, base = settings["adapter"], settings["base"]
        where = draw.randrange(6)
        if where == 0:
            spec["class_path"] = draw.choice(NAMES)
        elif where == 1:
            spec["init_args"]["rank"] = draw.choice([0, -1, 10**6, 10**9, 2**62, 2**70, True])
        elif where == 2:
            bad = ["(a+)+$", "..", "blocks.9.mixer.query", "head", "embedding", "x" * 10_000]
            spec["init_args"]["targets"] = draw.choice([[draw.choice(bad)], [], "query", [[]]])
        elif where == 3:
            spec["init_args"]["targets"] = ["query"] * draw.choice([2, 20_000])
        elif where == 4:
            base["path"] = draw.choice(["/etc/passwd", "/dev/zero", "..", "~", "stranger", "", "/"])
        else:
            base["digest"] = draw.choice(["0" * 64, "", "f" * 10_000, "../x"])

    return _with_settings(target, change)


def _with_settings(target: Path, change: Callable[[dict[str, Any]], None]) -> bool:
    """Change ``{"adapter", "base", "task"}`` of either form; True: they may say other things."""
    if target.is_dir():
        content = json.loads((target / "adapter.json").read_text())
        change(content)
        try:
            text = json.dumps(content)
        except (RecursionError, TypeError, ValueError):
            text = "[" * 10_000
        (target / "adapter.json").write_text(text)
        return True
    content = torch.load(target, weights_only=True)
    hyper = content["hyper_parameters"]
    settings = {
        "adapter": hyper["adapter"],
        "base": content["base_weights"],
        "task": content["task"],
    }
    change(settings)
    hyper["adapter"] = settings.get("adapter")
    content["base_weights"], content["task"] = settings.get("base"), settings.get("task")
    torch.save(content, target)
    return True


BOTH: list[Callable[[random.Random, Path], Any]] = [
    flip_bits, truncate, append, splice, no_file, change_file, hostile_adapter, hostile_adapter,
]  # fmt: skip
MUTATIONS = {
    "ckpt": [*BOTH, state_of_another_kind, zip_bomb],
    "alone": [*BOTH, edit_header, swap_files],
}
