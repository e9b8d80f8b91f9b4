"""How a campaign runs: numbered cases of a seed, side by side, each of which can be run again.

A campaign is a module beside this one, with

* ``case(draw, prepared, place) -> str``: one case. ``draw`` is a `random.Random` of its own, from
  which everything random comes (torch is seeded as well); ``prepared`` the directory that `prepare`
  filled; ``place`` an empty directory, which is the current one. It returns a word for what came of
  it, such as "refused", by which the cases are counted. Whatever it raises is a failure.
* ``prepare(directory)``, if there is something to make once for all cases.
* ``SLICE``: how many cases the normal test suite runs. ``LIMIT``: seconds for one case [120].
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RUNNERS = {"runner", "__main__", "strangers"}
ROOM = 12 * 2**30  # bytes of addresses for a process; torch alone takes some


class Failure(NamedTuple):
    """A case that went wrong, and how."""

    number: int
    report: str

    def __str__(self) -> str:
        return f"case {self.number}: {self.report.rstrip()}"


class Outcome(NamedTuple):
    """What came of a campaign: how many cases ended in each word, and what failed."""

    words: Counter[str]
    failures: list[Failure]


def names() -> list[str]:
    """The campaigns that there are."""
    return sorted({path.stem for path in HERE.glob("*.py")} - RUNNERS)


def module_of(name: str) -> Any:
    return importlib.import_module(f"campaign.{name}")


@contextlib.contextmanager
def prepared(name: str) -> Iterator[Path]:
    """The directory that a campaign's `prepare` filled."""
    with tempfile.TemporaryDirectory(prefix=f"archzoo-{name}-") as directory:
        if prepare := getattr(module_of(name), "prepare", None):
            with _inside(Path(directory)):
                prepare(Path(directory))
        yield Path(directory)


def run_case(name: str, seed: int, number: int, directory: Path) -> str:
    """One case, here and now; raises what it raises."""
    import torch

    draw = random.Random(f"{name} {seed} {number}")
    torch.manual_seed(int(hashlib.sha256(f"{name} {seed} {number}".encode()).hexdigest()[:8], 16))
    with tempfile.TemporaryDirectory(prefix=f"archzoo-{name}-") as place, _inside(Path(place)):
        return str(module_of(name).case(draw, directory, Path(place)))


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def run(name: str, cases: int, seed: int = 0, jobs: int = 1, first: int = 0) -> Outcome:
    """A campaign in processes of its own, so that a crash or an endless loop is a failure too.

    Args:
        name: Of the campaign.
        cases: How many.
        seed: Other seeds give other cases.
        jobs: Processes side by side.
        first: The number of the first case.
    """
    words, failures = Counter[str](), list[Failure]()
    numbers = iter(range(first, first + cases))
    limit = getattr(module_of(name), "LIMIT", 120)
    with prepared(name) as directory:
        workers = [_Worker(name, seed, directory) for _ in range(min(jobs, cases))]
        busy = [worker for worker in workers if worker.start(next(numbers, None))]
        while busy:
            soonest = min(worker.began for worker in busy) + limit - time.monotonic()
            wait([worker.pipe for worker in busy], timeout=max(soonest, 0.01))
            for worker in list(busy):
                word, report = worker.result(limit)
                if word is None and report is None:
                    continue  # it is still at work
                if report is None:
                    words[str(word)] += 1
                else:
                    failures.append(Failure(worker.number, report))
                    again = f"python tests/campaign {name} --seed {seed} --case {worker.number}"
                    print(f"{failures[-1]}\n  {again}", flush=True)
                if not worker.start(next(numbers, None)):
                    busy.remove(worker)
        for worker in workers:
            worker.stop()
    return Outcome(words, sorted(failures))


class _Worker:
    """A process that runs one case after the other; it is made anew when one kills it."""

    def __init__(self, name: str, seed: int, directory: Path) -> None:
        self.arguments = (name, seed, directory)
        self.number, self.began = -1, 0.0
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        self.fresh = True
        theirs.close()

    def start(self, number: int | None) -> bool:
        if number is None:
            return False
        if not self.process.is_alive():
            self._begin()
        if self.fresh:
            self.pipe.recv()  # it has imported what it needs, which is no part of a case
            self.fresh = False
        self.number, self.began = number, time.monotonic()
        self.pipe.send(number)
        return True

    def result(self, limit: float) -> tuple[str | None, str | None]:
        """(word, None), (None, report), or (None, None) while the case runs."""
        if self.pipe.poll():
            try:
                word, report = self.pipe.recv()
                return word, report
            except EOFError:
                self.process.join()
                return None, f"the process ended with {self.process.exitcode}"
        if time.monotonic() - self.began > limit:
            self.stop()
            return None, f"more than {limit} s"
        return None, None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _work(pipe: Connection, name: str, seed: int, directory: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no GPU's driver starts within a limit of memory
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":  # what asks for all of the memory gets an error, not the machine
        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    module_of(name)
    pipe.send("ready")
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((run_case(name, seed, number, directory), None))
        except Exception as error:
            lines = traceback.format_exception_only(error)
            place = traceback.extract_tb(error.__traceback__)[-1]
            report = f"{''.join(lines).strip()} ({Path(place.filename).name}:{place.lineno})"
            pipe.send((None, report))


def summary(name: str, seed: int, outcome: Outcome, seconds: float) -> str:
    """One line."""
    failed = len(outcome.failures)
    counts = ", ".join(f"{count:,} {word}" for word, count in sorted(outcome.words.items()))
    cases = outcome.words.total() + failed
    return (
        f"{name}: {cases:,} cases of seed {seed} in {seconds:,.0f} s: {counts or 'none passed'}; "
        f"{failed:,} FAILED"
    )
