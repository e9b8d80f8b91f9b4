"""What the campaigns with files share: hostile values, and asking a command in-process.

Every command has to end in success, or in exit status 1 with one line on stderr: no traceback, no
code run, nothing read that was not named, within two seconds of processor time and 100 MB.
"""

from __future__ import annotations

import contextlib
import io
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CANARY = "PWNED"
# A module beside the user's work that a file may name; being imported is enough to be seen.
EVIL = f"""
import pathlib
pathlib.Path(__file__).with_name("{CANARY}").touch()
from archzoo.mixers.attention import Attention as Mixer
def call(*arguments, **more): return Mixer
"""
SECONDS, MEGABYTES = 5.0, 300  # ours, twice and thrice what is promised: the machine may be busy

COMMAND = {"class_path": "os.system", "init_args": {"command": f"touch {CANARY}"}}
NAMES = [
    "os.system",
    "builtins.exec",
    "builtins.eval",
    "evil.Mixer",
    "evil.call",
    "stranger.evil.Mixer",
    "antigravity.fly",
    "this.s",
    "torch.load",
    "torch.nn.Linear",
    "subprocess.Popen",
    "archzoo.cli.main",
    "archzoo.checkpoint.load",
    "archzoo.checkpoint.Path",
    "Attention",
    "Retention",
    "GatedFeedForward",
    "MixtureOfExperts",
    "Mixer",
    "Text",
    "Addition",
    "Mixed",
    "",
    ".",
    "..",
    "a" * 100_000,
    "RetNetion",
    "\x00",
    "ünïcode.名",
]
FORBIDDEN = ("evil", "stranger", "antigravity", "this")  # modules that nothing has to import
DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]


def hostile(draw: random.Random) -> Any:
    """A value that no setting expects, or a great one, or a name."""
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice([None, True, False]),
        lambda: draw.choice([0, 1, -1, 2, 3, 10**8, 10**9, 10**12, 2**63, -(2**63), 10**30]),
        lambda: draw.choice([0.0, -0.5, 1.5, 1e30, 1e-30, float("inf"), float("nan")]),
        lambda: draw.choice(["", "yes", "no", "1", "0x10", "null", "../..", "/etc/passwd", "~"]),
        lambda: draw.choice(NAMES),
        lambda: {"class_path": draw.choice(NAMES), "init_args": {}},
        lambda: {"class_path": draw.choice(NAMES)},
        lambda: {"class_path": draw.choice(NAMES), "init_args": {"command": f"touch {CANARY}"}},
        lambda: {"class_path": draw.choice([None, 7, [], {}]), "init_args": draw.choice([[], 3])},
        lambda: COMMAND,
        lambda: draw.choice([[], [[]], {}, [None], [1, 2], {"a": {"b": []}}]),
        lambda: [COMMAND],
        lambda: DEEP,
        lambda: "x" * draw.choice([10, 10_000]),
        lambda: list(range(draw.choice([3, 10_000]))),
    ]
    return draw.choice(kinds)()


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of keys to everything inside nested lists and dicts."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, entry in entries:
        yield (*above, key)
        yield from places(entry, (*above, key))


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


@contextlib.contextmanager
def watched(place: Path) -> Iterator[None]:
    """Fails if code of the stranger ran, or if what happens takes too much time or memory."""
    (place / "evil.py").write_text(EVIL)
    (place / "stranger").mkdir(exist_ok=True)
    (place / "stranger" / "evil.py").write_text(EVIL)
    import matplotlib.pyplot  # noqa: F401, what is promised counts from the imports on

    import archzoo.training.command  # noqa: F401

    sys.path.insert(0, "")  # as `python -m archzoo` has it
    memory, begin = _peak(), time.process_time()
    try:
        yield
        taken, grown = time.process_time() - begin, _peak() - memory
        assert not list(place.rglob(CANARY)), "a stranger's code was run"
        imported = [name for name in FORBIDDEN if name in sys.modules]
        assert not imported, f"a stranger's file imported {imported}"
        assert taken < SECONDS, f"{taken:.1f} s of processor time"
        assert grown < MEGABYTES, f"{grown:.0f} MB more memory"
    finally:
        sys.path.remove("")
        for name in FORBIDDEN:
            for module in [m for m in sys.modules if m.partition(".")[0] == name]:
                del sys.modules[module]


def _peak() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ask(arguments: list[str]) -> tuple[int, str]:
    """(exit status, output) of an `archzoo` command; a refusal must be one line on stderr.

    An exception that leaves the command is what a user would see as a traceback, and is raised.
    """
    from archzoo.cli import main

    out, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Lightning's
        status = main(arguments)
    lines = errors.getvalue().strip().splitlines()
    if status:
        # A text that was prepared before the mistake showed has its own line.
        lines = [line for line in lines if not line.startswith(("encoded ", "encoding "))]
        assert len(lines) == 1 and lines[0].startswith("error: "), f"{status}: {lines}"
        assert len(lines[0]) < 2_000, f"a line of {len(lines[0])} characters"
    return status, out.getvalue() + errors.getvalue()
