"""Changed YAML files: each is built and takes a step, or is refused in one line.

A file of `configs/`, shrunk to a model and data that take a step at once, with one or two changes:
another type or nesting, a hostile name, a key misspelt, left out or given twice, aliases in
aliases, characters and bytes that do not belong. A key that is misspelt or given twice must be
refused; nothing that a file names may be imported or called but the parts of the zoo.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from campaign.strangers import NAMES, ask, at, hostile, places, watched

SLICE, LIMIT = 15, 60
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = {
    "Recall": {"batch_size": 2, "alike": 2, "validation_examples": 2, "test_examples": 2},
    "Addition": {"batch_size": 2, "validation_examples": 4, "test_examples": 4},
    "Text": {"batch_size": 2, "context_length": 32, "path": "corpus.txt", "cache_dir": "cache"},
    "Mixed": {"batch_size": 2, "context_length": 128, "path": "corpus.txt", "cache_dir": "cache"},
    "KeyValues": {"batch_size": 2, "pairs": 8},
}
SMALL |= dict.fromkeys(["Subtraction", "Arithmetic", "RankedAddition"], SMALL["Addition"])
FREE = ("arms", "compare", "claim")  # looked at when an arm is run, or all are compared


def prepare(directory: Path) -> None:
    words = "To be, or not to be, that is the question: 0123456789\n"
    (directory / "corpus.txt").write_text(words * 400, encoding="utf-8")


def case(draw: random.Random, prepared: Path, place: Path) -> str:
    shutil.copy(prepared / "corpus.txt", place)
    source = draw.choice(CONFIGS)
    settings = small(yaml.safe_load(source.read_text(encoding="utf-8")))
    mutation = draw.choice(MUTATIONS)
    found = mutation(draw, settings)
    content, refused = found if isinstance(found, tuple) else (found, False)
    path = place / source.name
    path.write_bytes(content)
    command = ["fit", "--config", source.name, "--trainer.fast_dev_run", "1"]
    command += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", "out"]
    with watched(place):
        status, said = ask(command)
    if refused:
        what = f"{mutation.__name__} was accepted:\n{content[:3000].decode(errors='replace')}"
        assert status, what
    # A user's own file chooses where texts are kept.
    cache = "" if status else str(yaml.safe_load(content)["data"]["init_args"].get("cache_dir"))
    allowed = KNOWN | {source.name, cache}
    elsewhere = [p.name for p in place.iterdir() if p.name not in allowed]
    assert status or not elsewhere, f"{elsewhere} was written: {said}"
    return "refused" if status else "built"


KNOWN = {"corpus.txt", "cache", "out", "evil.py", "stranger"}


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """The same experiment at a size that takes a step at once."""
    model, data = settings["model"], settings["data"]
    if "base" in settings.get("compare", {}):  # what its arms start from is trained by `compare`
        model["preset"] = "transformer_micro"
    model |= {"dim": 16, "depth": 2, "heads": 2, "width": 32}
    if "objective" not in settings:  # which needs weights that are not there
        model.pop("weights", None)
    data.setdefault("init_args", {})
    data["init_args"] |= SMALL[data["class_path"]]
    return settings


def written(settings: Any, **more: Any) -> bytes:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, **more).encode()


def keys_of(settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The places of the keys of mappings that are looked at."""
    return [
        place
        for place in places(settings)
        if place[0] not in FREE and isinstance(at(settings, place[:-1]), dict)
    ]


# ---------------------------------------------------------------------------- mutations
# Each returns the file's bytes, and True behind them if no such file may be accepted.


def other_values(draw: random.Random, settings: dict[str, Any]) -> bytes:
    for _ in range(draw.choice([1, 1, 1, 2])):
        place = draw.choice(list(places(settings)))
        above = at(settings, place[:-1])
        above[place[-1]] = copy.deepcopy(hostile(draw))
        if any(value is above[place[-1]] for value in (settings,)):
            break
    return _dump(settings)


def names(draw: random.Random, settings: dict[str, Any]) -> bytes:
    """A class, a path or a preset is another one."""
    slot = draw.choice(["mixer", "feed_forward", "embedding", "rotary", "bias", "preset"])
    value: Any = draw.choice(NAMES)
    if draw.random() < 0.5:
        value = {"class_path": value, "init_args": draw.choice([{}, {"command": "touch PWNED"}])}
    where = draw.randrange(4)
    if where < 2:
        settings["model"][slot] = value
    elif where == 2:
        settings["data"] = value
    else:
        settings["trainer"][draw.choice(["callbacks", "logger", "strategy", "plugins"])] = (
            draw.choice([value, [value]])
        )
    return _dump(settings)


def misspelt(draw: random.Random, settings: dict[str, Any]) -> tuple[bytes, bool]:
    place = draw.choice(keys_of(settings))
    above = at(settings, place[:-1])
    name = str(place[-1])
    other = draw.choice([name + "x", "x" + name, name[:-1] + "_", name.upper(), name * 2])
    entries = {other if key == place[-1] else key: value for key, value in above.items()}
    above.clear()
    above.update(entries)
    return written(settings), other not in (name,)


def left_out(draw: random.Random, settings: dict[str, Any]) -> bytes:
    place = draw.choice(keys_of(settings))
    del at(settings, place[:-1])[place[-1]]
    return written(settings)


def given_twice(draw: random.Random, settings: dict[str, Any]) -> tuple[bytes, bool]:
    """A line of a mapping again, with the same or another value."""
    lines = written(settings).decode().splitlines()
    plain = [n for n, line in enumerate(lines) if line.partition(": ")[2] and "- " not in line]
    number = draw.choice(plain)
    key = lines[number].partition(": ")[0]
    again = draw.choice([lines[number], f"{key}: {draw.choice(['7', 'null', 'Attention'])}"])
    lines.insert(number + 1, again)
    return "\n".join(lines).encode(), True


def nested(draw: random.Random, settings: dict[str, Any]) -> bytes:
    """Something a level deeper or higher than it should be."""
    place = draw.choice(list(places(settings)))
    above, value = at(settings, place[:-1]), at(settings, place)
    change = draw.randrange(4)
    if change == 0:
        above[place[-1]] = [value]
    elif change == 1:
        above[place[-1]] = {str(place[-1]): value}
    elif change == 2 and isinstance(value, dict) and isinstance(above, dict):
        above |= value
        above.pop(place[-1], None)
    else:
        above[place[-1]] = list(value) if isinstance(value, dict) else str(value)
    return _dump(settings)


def whole(draw: random.Random, settings: dict[str, Any]) -> tuple[bytes, bool]:
    """What is no mapping at all."""
    contents = [b"", b"- 1\n- 2\n", b"7\n", b"null\n", b"model\n", b"[]", b"---\n---\n", b"a: b: c"]
    return draw.choice(contents), False


def aliases(draw: random.Random, settings: dict[str, Any]) -> tuple[bytes, bool]:
    """Lists of aliases of lists of aliases: a billion entries in a few lines."""
    depth, each = draw.choice([(9, 10), (30, 2), (3, 2)])
    lines = ["a0: &a0 [x, x]"]
    lines += [
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * each)}]" for level in range(1, depth)
    ]
    where = draw.choice(["model:\n  mixer: *a{n}", "data: *a{n}", "trainer:\n  callbacks: *a{n}"])
    return "\n".join([*lines, where.format(n=depth - 1)]).encode(), True


def own_anchor(draw: random.Random, settings: dict[str, Any]) -> tuple[bytes, bool]:
    """A value that holds itself."""
    return draw.choice([b"model: &a\n  mixer: *a\n", b"&a [*a]", b"data: &d {init_args: *d}"]), True


def tags(draw: random.Random, settings: dict[str, Any]) -> tuple[bytes, bool]:
    """Tags that make Python objects where a reader lets them."""
    tag = draw.choice(
        [
            "!!python/object/apply:os.system ['touch PWNED']",
            "!!python/name:os.system",
            "!!python/module:antigravity",
            "!!python/object/new:evil.Mixer []",
            "!unknown x",
        ]
    )
    settings["model"]["mixer"] = "TAG"
    return written(settings).replace(b"TAG", tag.encode()), True


def bytes_changed(draw: random.Random, settings: dict[str, Any]) -> bytes:
    content = bytearray(written(settings))
    for _ in range(draw.choice([1, 1, 3])):
        here = draw.randrange(len(content))
        if draw.random() < 0.5:
            content[here] = draw.choice(b"\x00\xff\t:-{}[]&*!|>'\"%@`#\n 9x")
        else:
            del content[here : here + draw.choice([1, 5, 50])]
    return bytes(content)


def deep(draw: random.Random, settings: dict[str, Any]) -> tuple[bytes, bool]:
    level = draw.choice([70, 1_000, 20_000])
    return b"model: " + draw.choice([b"[" * level + b"]" * level, b"{a: " * level]), True


def _dump(settings: Any) -> bytes:
    try:
        return written(settings)
    except (RecursionError, yaml.YAMLError, UnicodeEncodeError):
        return b"model: " + b"[" * 300


MUTATIONS: list[Callable[[random.Random, dict[str, Any]], Any]] = [
    other_values, other_values, other_values, names, names, misspelt, left_out, given_twice,
    nested, whole, aliases, own_anchor, tags, bytes_changed, bytes_changed, deep,
]  # fmt: skip
