"""Runs side by side on one machine: each a process of its own, placed on a GPU or given threads.

The parent decides and writes down; a child trains, and saves by itself. So whatever is killed, the
next call of the same command finds whole runs done, and begun ones at their last checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from archzoo.analysis.compare.places import Slot
from archzoo.analysis.compare.plan import STARTS, Plan, Run
from archzoo.analysis.compare.prepared import PLACES
from archzoo.analysis.compare.processes import Process, Starter, wait
from archzoo.analysis.compare.runs import (
    TABLE_OF_BASE,
    evaluated,
    read_outcome,
    state_of,
    step_of,
    write_outcome,
)
from archzoo.training import settings
from archzoo.training.directory import Lock, in_use
from archzoo.training.ending import SIGNALS
from archzoo.trust import user_imports

POLL = 0.2  # seconds
SHOWN = 6  # lines of a failed run's log
PATIENCE = 150.0  # seconds that runs have to save and end


class Job(NamedTuple):
    """What a process does for a run.

    Attributes:
        run: Which one.
        tests: Whether it is measured on the test part, too.
    """

    run: Run
    tests: bool


class Event(NamedTuple):
    """Something that happened, for whoever shows it.

    Attributes:
        kind: "started", "ended", "failed", "chosen" or "stopping".
        run: Which run; None: of an arm, or of all.
        text: In words.
    """

    kind: str
    run: Run | None
    text: str


class Runner:
    """Trains the runs of a plan, and measures those that count.

    Args:
        plan: Which runs.
        output: The comparison's directory; runs lie in its directory runs/.
        places: Where they are trained.
        minutes: After which runs are saved and ended, to be continued by the next call.
        tell: Is told what happens.
        start: What starts processes.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        places: list[Slot],
        minutes: float | None,
        tell: Callable[[Event], None],
        start: Starter,
    ) -> None:
        self.plan, self.output, self.places, self.tell = plan, output, places, tell
        self.ends = None if minutes is None else time.monotonic() + 60 * minutes
        self.starter = start
        self.waiting = deque[Job]()
        self.going: dict[int, tuple[Job, Process, Slot]] = {}
        self.failed: dict[Run, str] = {}
        #: Bases that this comparison trains: others beside it, which share them, wait.
        self.claimed: dict[Run, Lock] = {}
        self.chosen: dict[str, float] = {}  # the learning rate of each arm
        self._again: set[Run] = set()
        self._seen: set[tuple[str, bool]] = set()  # jobs that were made
        self._free = list(range(len(places)))

    def directory(self, run: Run) -> Path:
        """Where a run's files are."""
        return run.directory(self.output)

    # ------------------------------------------------------------------------ what is left

    def _add(self, run: Run, tests: bool) -> None:
        if (run.key, tests) in self._seen or run in self.failed:
            return
        self._seen.add((run.key, tests))
        if not self.is_done(run, tests):
            for read in run.reads.values():
                self._add(read, tests=True)
            self.waiting.append(Job(run, tests))

    def is_done(self, run: Run, tests: bool) -> bool:
        """Whether nothing is left to be done for a run."""
        directory = self.directory(run)
        state = state_of(directory)
        if state == "cut":
            return True
        if state != "trained":
            return False
        step = read_outcome(directory).get(f"{self.plan.measured}_step")
        parts = ("validation", "test") if tests else ("validation",)
        done = all(evaluated(directory, part, step) for part in parts)
        of_base = tests and self._forgets(run)
        return done and (not of_base or bool(evaluated(directory, "test", step, TABLE_OF_BASE)))

    @staticmethod
    def _forgets(run: Run) -> bool:
        """Whether a run is asked what is left of what its base had learnt."""
        return run.base is not None and not run.is_base

    def metrics(self, run: Run, part: str) -> dict[str, float]:
        """The metrics of a run that is whole; {}: it is not, or not measured.

        Args:
            run: Which.
            part: "validation" or "test".
        """
        directory = self.directory(run)
        if state_of(directory) != "trained":
            return {}
        step = read_outcome(directory).get(f"{self.plan.measured}_step")
        return evaluated(directory, part, step)

    def _choose(self) -> None:
        """Choose the rate of every arm whose runs for that are done, and add what follows."""
        going = {job.run for job, _, _ in self.going.values()} | {job.run for job in self.waiting}
        for arm, rates in self.plan.rates.items():
            tried = [self.plan.runs[arm, r, seed] for r in rates for seed in self.plan.tune_seeds]
            if arm in self.chosen or going & set(tried):
                continue
            rate = choose(self.plan, arm, lambda run: self.metrics(run, "validation"))
            if rate is None:
                continue
            self.chosen[arm] = rate
            if len(rates) > 1:
                self.tell(Event("chosen", None, f"{arm}: the learning rate is {rate:g}"))
            for run in self.plan.then(arm, rate):
                self._add(run, tests=True)

    # ------------------------------------------------------------------------ processes

    def run(self) -> bool:
        """Train and measure all that is left; whether all of it was done."""
        for run in self.plan.first():
            # Where nothing is chosen, a run is measured by the process that trains it.
            self._add(run, tests=not self.plan.chooses)
        if self.waiting:  # other seeds' come next, for whichever rate is chosen
            for run in self.plan.bases:
                self._add(run, tests=True)
        self._choose()
        try:
            return self._work()
        finally:
            self.starter.close()

    def _work(self) -> bool:
        while self.waiting or self.going:
            if SIGNALS.received or (self.ends is not None and time.monotonic() > self.ends):
                self._stop()
                return False
            self._start_some()
            time.sleep(POLL)
            self.tell(Event("", None, ""))
            if self._collect():
                self._choose()
        return not self.failed

    def _start_some(self) -> None:
        for _ in range(len(self.waiting)):
            if not self._free:
                return
            job = self.waiting.popleft()
            # A process of an earlier call, which was killed, may still be saving its step.
            if in_use(self.directory(job.run)) or self._waits(job.run):
                self.waiting.append(job)
                continue
            if job.run in self.failed:
                continue
            if not self._claim(job.run):
                self.waiting.append(job)
                continue
            if job.run.is_base and self.is_done(job.run, job.tests):  # by another comparison
                self._give_back(job.run)
                continue
            self._start(job, self._place())

    def _place(self) -> int:
        """Take the free place whose device has the fewest runs."""
        names = [slot.name for _, _, slot in self.going.values()]
        found = min(self._free, key=lambda number: names.count(self.places[number].name))
        self._free.remove(found)
        return found

    def _claim(self, run: Run) -> bool:
        """Whether this comparison may start a run; no other one has just started the same base.

        The run holds its directory by itself only once it trains, seconds later.
        """
        if not run.is_base:
            return True
        directory = self.directory(run)
        try:
            self.claimed[run] = Lock(directory.with_name(f".{directory.name}"))
        except ValueError:
            return False
        return True

    def _give_back(self, run: Run) -> None:
        """Let other comparisons start a base, where this one has trained it."""
        if (lock := self.claimed.pop(run, None)) is not None:
            lock.release()

    def _waits(self, run: Run) -> bool:
        """Whether what a run reads is not trained yet; where that failed, the run fails, too."""
        waits = False
        for read in run.reads.values():
            if state_of(self.directory(read)) == "trained":
                continue
            if read in self.failed or self.is_done(read, tests=True):  # it was cut
                self.failed[run] = f"its base {read.name} is not trained"
                self.tell(Event("failed", run, self.failed[run]))
                return False
            waits = True
        return waits

    def _start(self, job: Job, number: int) -> None:
        run, slot = job.run, self.places[number]
        log = self.output / "logs" / f"{run.name}.log"
        what = {
            "commands": list(self.commands(job)),
            "facts": str(self.directory(run) / "facts.json"),
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"on {slot.name}\n")
        process = self.starter.start(what, log, slot.environment)
        self.going[number] = job, process, slot
        self.tell(Event("started", run, f"on {slot.name}"))

    def commands(self, job: Job) -> Iterator[list[str]]:
        """What is left to be done for a run, as commands of `archzoo`.

        Args:
            job: The run, and whether it is tested.
        """
        run, directory = job.run, self.directory(job.run)
        imports = [word for module in user_imports for word in ("--import", module)]
        trained = state_of(directory) == "trained"
        path = self.output / "settings" / f"{run.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(settings.written(run.settings) + "\n", encoding="utf-8")
        read = [
            word
            for setting, other in run.reads.items()
            if not PLACES.match(setting)
            for word in (f"--{setting}", str(self._checkpoint(other)))
        ]
        if run.prepare and not trained:
            made = run.prepared(self.output)
            if not (made.exists() and (directory / "last.ckpt").exists()):
                shutil.rmtree(made, ignore_errors=True)  # of a run that has not begun
                yield [*run.preparing(self.output), *imports]
            read += [f"--{STARTS}", str(made)]
        if not trained:
            given = ["--trainer.default_root_dir", str(directory.parent), *read]
            yield ["fit", *imports, "--config", str(path), *given, "--resume", "auto"]
        # Model and data are the checkpoint's; how they are run is as in training.
        trainer = [*imports, "--trainer", json.dumps(run.settings["trainer"])]
        beside = self._beside(run)
        given = [*trainer, *beside]
        if run.settings.get("objective"):  # it measures by settings that no checkpoint holds
            given = ["--config", str(path), *trainer, *read]
        data = run.settings["data"].get("init_args") or {}
        for name in ("path", "cache_dir"):  # which no checkpoint may say by itself
            if isinstance(data.get(name), str):
                given += [f"--data.{name}", data[name]]
        step = read_outcome(directory).get(f"{self.plan.measured}_step")
        checkpoint = str(directory / f"{self.plan.measured}.ckpt")
        for part, command in (("validation", "validate"), ("test", "test")):
            if trained:
                wanted = not evaluated(directory, part, step)
            else:
                wanted = part == "test" or not self._ends_validated(run)
            if wanted and (part == "validation" or job.tests):
                yield [command, "--ckpt_path", checkpoint, *given]
        if run.base is None or not self._forgets(run) or not job.tests:
            return
        if not (trained and evaluated(directory, "test", step, TABLE_OF_BASE)):
            # What is left of what the base had learnt.
            given = [*trainer, *beside, "--data", json.dumps(run.base.settings["data"])]
            yield ["test", "--ckpt_path", checkpoint, *given, "--table", TABLE_OF_BASE]

    def _beside(self, run: Run) -> list[str]:
        """Where the base of an adapted run lies, which its checkpoint leaves out.

        The checkpoint says so, too, and is believed only of what is under the current directory.
        """
        adapted = any(run.settings["model"].get(name) for name in ("adapter", "adapters"))
        if adapted and run.prepare:
            return [f"--{STARTS}", str(run.prepared(self.output))]
        if run.base is None or not adapted:
            return []
        return [f"--{STARTS}", str(self._checkpoint(run.base))]

    def _checkpoint(self, run: Run) -> Path:
        """What others read of a run."""
        return self.directory(run) / "last.ckpt"

    def _ends_validated(self, run: Run) -> bool:
        """Whether training itself evaluates the checkpoint that is measured."""
        trainer = run.settings["trainer"]
        interval, steps = trainer["val_check_interval"], self.plan.facts(run).steps
        if trainer["limit_val_batches"] is not None or self.plan.measured == "best":
            return self.plan.measured == "best"
        batches = steps * trainer["accumulate_grad_batches"]
        whole = isinstance(interval, int) and trainer["check_val_every_n_epoch"] is None
        return whole and batches % interval == 0

    def _collect(self) -> bool:
        """Take note of the processes that have ended; whether there was one."""
        ended = [n for n, (_, process, _) in self.going.items() if process.poll() is not None]
        for number in ended:
            job, process, _ = self.going.pop(number)
            self._free.append(number)
            self._note(job, process.poll() or 0)
            self._give_back(job.run)
        return bool(ended)

    def _note(self, job: Job, status: int) -> None:
        run, directory = job.run, self.directory(job.run)
        steps = self.plan.facts(run).steps
        if status:
            text = self._why(run, status)
            self.failed[run] = text
            if state_of(directory) != "trained":
                write_outcome(directory, state="failed", why=text)
            self.tell(Event("failed", run, text))
            return
        reached = step_of(directory)
        best = step_of(directory, "best")
        state = "trained" if reached is not None and reached >= steps else "cut"
        write_outcome(directory, state=state, steps=steps, last_step=reached, best_step=best)
        if state == "trained" and not self.is_done(run, job.tests) and run not in self._again:
            self._again.add(run)  # training has not evaluated its last step
            self.waiting.appendleft(job)
            return
        if state == "cut":
            self.tell(Event("ended", run, f"cut at step {reached or 0:,} of {steps:,}"))
            return
        parts = ("validation", "test") if job.tests else ("validation",)
        found = {part: self.metrics(run, part).get(f"{part}/{self.plan.metric}") for part in parts}
        metric = self.plan.metric.replace("_", " ")
        shown = [
            f"{part} {metric} {value:.4f}" for part, value in found.items() if value is not None
        ]
        self.tell(Event("ended", run, ", ".join(shown)))

    def _why(self, run: Run, status: int) -> str:
        """The end of a failed run's log, and what ended it."""
        log = self.output / "logs" / f"{run.name}.log"
        lines: list[str] = []
        with suppress(OSError):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        begins = [n for n, line in enumerate(lines) if line.startswith("$ archzoo")]
        lines = lines[begins[-1] + 1 :] if begins else lines
        kept = [line for line in lines if line.strip()][-SHOWN:]
        if status < 0:
            name = signal.Signals(-status).name
            memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            kept.append(f"ended by {name}{memory}: the same command resumes it")
        return "\n".join(kept) or f"exit status {status}, see {log}"

    def _stop(self) -> None:
        """End every process, which saves its step first."""
        self.tell(Event("stopping", None, f"{len(self.going)} runs are saved and ended"))
        left = [process for _, process, _ in self.going.values()]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in left:
                process.send_signal(number)
            left = wait(left, PATIENCE)
        self.going.clear()
        for run in list(self.claimed):
            self._give_back(run)


Metrics = Callable[[Run], dict[str, float]]


def choose(plan: Plan, arm: str, metrics: Metrics) -> float | None:
    """An arm's learning rate: the one of the best mean of the metric on validation data.

    The mean is over the seeds that choose it; a rate of which a run is missing, cut or failed is
    not taken. Of equals, such as exact matches of 0 or 100 %, the one of the lower loss is taken.

    Args:
        plan: The comparison.
        arm: Which arm.
        metrics: A run's metrics on validation data; {}: it has none.

    Returns:
        None where no rate has all of its runs.
    """
    if len(plan.rates[arm]) == 1:
        return plan.rates[arm][0]
    means = rate_means(plan, arm, metrics, plan.metric)
    losses = rate_means(plan, arm, metrics, "loss")
    sign = 1 if plan.lower else -1
    return min(
        means,
        key=lambda rate: (sign * means[rate], losses.get(rate, math.inf), rate),
        default=None,
    )


def rate_means(plan: Plan, arm: str, metrics: Metrics, metric: str) -> dict[float, float]:
    """The mean over `tune_seeds` of each learning rate that has all of its runs.

    Args:
        plan: The comparison.
        arm: Which arm.
        metrics: A run's metrics on validation data; {}: it has none.
        metric: Which of them.
    """
    found = {}
    for rate in plan.rates[arm]:
        runs = [plan.runs[arm, rate, seed] for seed in plan.tune_seeds]
        values = [metrics(run).get(f"validation/{metric}", math.nan) for run in runs]
        if not any(map(math.isnan, values)):
            found[rate] = statistics.fmean(values)
    return found
