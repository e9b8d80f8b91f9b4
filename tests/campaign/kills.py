"""Ended runs: a `fit` is ended at random moments, resumed each time, and is the run that was not.

Signals are real, and so are the processes. Compared bit for bit with the run that nobody ended:
weights and optimizer of last.ckpt, weights of best.ckpt, and all rows of metrics.csv but the
times. Asked to end, a run must exit with 128 and the signal's number and say how to resume.
"""

from __future__ import annotations

import csv
import ctypes
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

SLICE, LIMIT = 0, 900
STEPS = 48
COMMON = f"""
fit --model.preset retnet_micro --model.dropout 0.1 --model.warmup_steps 4 --trainer.accelerator cpu
--trainer.max_steps {STEPS} --trainer.val_check_interval 10 --trainer.log_every_n_steps 2 --name run
--trainer.default_root_dir . --resume auto
"""
ADDITION = """
--data Addition --data.digits 2 --data.batch_size 4 --data.validation_examples 64
--data.test_examples 8 --data.steps_per_epoch 25
"""
KINDS = {
    "addition": ADDITION,
    "accumulated": ADDITION + "--trainer.accumulate_grad_batches 3",
    "beyond": ADDITION + "--data.ood_digits [3,4] --data.ood_examples 32",
    "averaged": ADDITION + "--trainer.callbacks+ EMAWeightAveraging --trainer.callbacks.decay 0.9",
    "stream": """
        --data Text --data.path ../corpus.txt --data.cache_dir ../cache --data.context_length 32
        --data.batch_size 2 --data.carry_state true
    """,
    "windows": """
        --data Text --data.path ../corpus.txt --data.cache_dir ../cache --data.context_length 32
        --data.batch_size 4
    """,
}
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TIMES = ("seconds", "tokens_per_second", "memory_mb")  # columns that end so are never the same


def prepare(directory: Path) -> None:
    """The runs that nobody ends."""
    text = "".join(f"{n} green bottles, hanging on the wall; " for n in range(400))
    Path("corpus.txt").write_text(text, encoding="utf-8")
    for kind in KINDS:
        place = directory / kind
        place.mkdir()
        status = os.waitstatus_to_exitcode(os.waitpid(_start(place, kind), 0)[1])
        assert status == 0, (kind, (place / "said.txt").read_text())


def case(draw: random.Random, prepared: Path, place: Path) -> str:
    kind = draw.choice(list(KINDS))
    for name in ("corpus.txt", "cache"):
        (place / name).symlink_to(prepared / name)
    here = place / kind
    here.mkdir()
    every = draw.choice([1, 3, 7, 500])
    for _ in range(draw.randint(1, 3)):
        _end(draw, here, kind, every)
    status = os.waitstatus_to_exitcode(os.waitpid(_start(here, kind, every), 0)[1])
    assert status == 0, (here / "said.txt").read_text()
    _compare(prepared / kind / "run", here / "run")
    return kind


def _end(draw: random.Random, here: Path, kind: str, every: int) -> None:
    """Start or resume the run and end it somewhere."""
    log = here / "run" / "metrics.csv"
    more, number = draw.randint(0, 12), draw.choice([signal.SIGKILL, *ASKING])
    rows = _count(log) + more
    process = _start(here, kind, every)
    deadline = time.monotonic() + LIMIT / 6
    ended, status = 0, 0
    while not ended and _count(log) < rows and time.monotonic() < deadline:
        time.sleep(0.002)
        ended, status = os.waitpid(process, os.WNOHANG)
    # Where no row is waited for: while it is set up, or in the first steps.
    time.sleep(draw.uniform(0, 0.08 if more else 3))
    if not ended:
        os.kill(process, number)
        status = os.waitpid(process, 0)[1]
    status = os.waitstatus_to_exitcode(status)
    said = (here / "said.txt").read_text()
    if status == -number and not said:
        return  # before it could know of signals
    # It may have been done by then.
    assert status in (0, -number if number == signal.SIGKILL else 128 + number), (status, said)
    assert status == 0 or number == signal.SIGKILL or f"ended by {number.name}" in said, said
    moved = [path for path in here.glob("run-*") if (path / "last.ckpt").exists()]
    assert not moved, "the run was moved aside"


def _start(here: Path, kind: str, every: int = 7) -> int:
    """A process that trains, forked off this one, which has imported everything."""
    from archzoo.cli import main

    if process := os.fork():
        return process
    status = 99
    try:
        os.chdir(here)
        if sys.platform == "linux":  # a campaign that is killed leaves no run behind
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for number in ASKING:
            signal.signal(number, signal.SIG_DFL)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        command = [*COMMON.split(), *KINDS[kind].split(), "--checkpoint.every_n_steps", str(every)]
        status = main(command)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _count(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def _compare(whole: Path, segments: Path) -> None:
    names = [sorted(path.name for path in run.iterdir()) for run in (whole, segments)]
    left = set(names[1]) - {".lock"}  # which the system has let go of
    assert left == set(names[0]), names
    logs = [_rows(run / "metrics.csv") for run in (whole, segments)]
    assert logs[0] == logs[1], "\n".join(map(str, _apart(*logs)))
    for name in ("last.ckpt", "best.ckpt"):
        states = [torch.load(run / name, weights_only=True) for run in (whole, segments)]
        for key in ("global_step", "state_dict", "current_model_state", "optimizer_states"):
            found = [_same(state.get(key)) for state in states]
            assert found[0] == found[1], (name, key)


def _rows(log: Path) -> list[dict[str, str]]:
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{n: v for n, v in row.items() if v and not n.endswith(TIMES)} for row in rows]


def _apart(first: list[Any], second: list[Any]) -> list[Any]:
    longer = max(len(first), len(second))
    pairs = [(log + [None] * longer)[:longer] for log in (first, second)]
    return [(n, *pair) for n, pair in enumerate(zip(*pairs, strict=True)) if pair[0] != pair[1]]


def _same(value: Any) -> Any:
    """With a tensor's bytes in its place, to be compared by ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: _same(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_same(entry) for entry in value]
    return value
