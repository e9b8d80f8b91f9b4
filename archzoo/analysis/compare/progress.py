"""How far a comparison is: a live table on a terminal, lines elsewhere, and for another process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from archzoo.analysis.compare.plan import Plan, Run
from archzoo.analysis.compare.runner import Event, Runner
from archzoo.analysis.compare.runs import (
    evaluated,
    progress,
    read_outcome,
    state_of,
    write_json,
)
from archzoo.analysis.tables import Screen, show
from archzoo.training.directory import in_use

PAUSE = 60.0  # seconds between two lines that say how far it is
HEADINGS = ("arm", "seed", "rate", "step", "loss", "validation", "state")


class Line(NamedTuple):
    """A run in the table.

    Attributes:
        arm: Its name.
        seed: Of weights and data.
        rate: The learning rate.
        step: Reached so far.
        steps: Of the whole run.
        loss: Of training.
        value: The metric on validation data, where it is done.
        state: In a word.
        seconds: It has been training.
        place: Name of its directory.
    """

    arm: str
    seed: int
    rate: float
    step: int
    steps: int
    loss: float | None
    value: float | None
    state: str
    seconds: float
    place: str


def write_plan(plan: Plan, output: Path, command: str) -> None:
    """Write down which runs there are, for `compare --status`.

    Args:
        plan: The comparison.
        output: Its directory.
        command: That it was started with.
    """
    runs = [
        {
            "arm": f"base {run.arm}" if run.is_base else run.arm,
            "seed": run.seed,
            "learning_rate": run.rate,
            "name": run.name,
            "key": run.key,
            "steps": plan.facts(run).steps,
            "first": run.is_base or run in plan.first(),
            "base": run.is_base,
        }
        for run in [*plan.bases, *plan.runs.values()]
    ]
    content = {"name": plan.name, "metric": plan.metric, "measured": plan.measured}
    write_json(output / "compare.json", content | {"command": command, "runs": runs})


def read_plan(output: Path) -> dict[str, Any]:
    """What `write_plan` wrote.

    Raises:
        FileNotFoundError: No comparison was begun there.
        ValueError: The file is damaged.
    """
    path = output / "compare.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{output} holds no compare.json: give the --output of archzoo compare"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for run in found["runs"]:
            assert {"arm", "seed", "learning_rate", "name", "steps"} <= run.keys()
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError):
        raise ValueError(f"{path} is damaged: the same compare command writes it anew") from None
    return dict(found)


def lines(found: dict[str, Any], output: Path) -> list[Line]:
    """Every run as it stands on the disk.

    Args:
        found: As `read_plan` gives it.
        output: The comparison's directory.
    """
    lines = []
    for run in found["runs"]:
        above = output.parent / "bases" if run.get("base") else output / "runs"
        directory = above / Path(str(run["name"])).name
        far, outcome = progress(directory), read_outcome(directory)
        state: str = state_of(directory)
        if in_use(directory):
            state = "running"
        elif state == "waiting" and far.step:
            state = "interrupted"
        step = outcome.get(f"{found['measured']}_step")
        values = evaluated(directory, "validation", step) if state == "trained" else {}
        if state == "trained" and evaluated(directory, "test", step):
            state = "done"
        value = values.get(f"validation/{found['metric']}")
        # A short run logs no row of its last steps, but what is trained has done them all.
        reached = int(run["steps"]) if state in ("trained", "done") else far.step
        lines.append(
            Line(
                str(run["arm"]),
                int(run["seed"]),
                float(run["learning_rate"]),
                min(reached, int(run["steps"])),
                int(run["steps"]),
                far.loss,
                value,
                state,
                far.seconds,
                directory.name,
            )
        )
    return lines


def table(found: list[Line], title: str, most: int | None = None) -> Table:
    """The runs as a table; where they are more than fit, those that run and failed come first.

    Args:
        found: The runs.
        title: Above it.
        most: Rows at most; None: all.
    """
    result = Table(box=None, header_style="bold", title=title, title_justify="left")
    for heading in HEADINGS:
        result.add_column(heading, justify="left" if heading in ("arm", "state") else "right")
    shown = found
    if most is not None and len(found) > most:
        order = ("running", "failed", "interrupted", "cut", "waiting", "trained", "done")
        ranked = sorted(found, key=lambda line: order.index(line.state))
        shown = [line for line in found if line in ranked[: max(most, 1)]]
    for line in shown:
        loss = "" if line.loss is None else f"{line.loss:.4f}"
        value = "" if line.value is None else f"{line.value:.4f}"
        step = f"{line.step:,} / {line.steps:,}"
        result.add_row(line.arm, str(line.seed), f"{line.rate:g}", step, loss, value, line.state)
    return result


def counts(found: list[Line]) -> str:
    """How many runs are in which state, as text."""
    states = [line.state for line in found]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def seconds_left(found: list[Line], at_once: int) -> float | None:
    """Seconds until all runs are trained, by what steps of their arms took; None: unknown.

    Args:
        found: The runs.
        at_once: Runs that are trained side by side.
    """
    paces: dict[str, list[float]] = {}
    for line in found:
        if line.step and line.seconds:
            paces.setdefault(line.arm, []).append(line.seconds / line.step)
    if not paces:
        return None
    every = [pace for entries in paces.values() for pace in entries]
    usual = sum(every) / len(every)
    left = longest = 0.0
    for line in found:
        if line.state in ("trained", "done", "cut", "failed"):
            continue
        known = paces.get(line.arm)
        pace = sum(known) / len(known) if known else usual
        seconds = pace * (line.steps - line.step)
        left, longest = left + seconds, max(longest, seconds)
    return max(left / at_once, longest)


def clock(seconds: float) -> str:
    """A time as people read it: 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Show:
    """Shows a comparison while it runs: a live table on a terminal, elsewhere lines.

    Args:
        plan: The comparison.
        output: Its directory.
        at_once: Runs side by side.
    """

    def __init__(self, plan: Plan, output: Path, at_once: int) -> None:
        self.plan, self.output, self.at_once = plan, output, at_once
        self.console = Screen(highlight=False, soft_wrap=True)
        self.found = read_plan(output)
        self.runner: Runner | None = None
        self._live: Live | None = None
        self._began = self._said = self._drawn = time.monotonic()

    def __enter__(self) -> Show:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _wanted(self) -> list[Line]:
        """The runs that are done or will be: not those of learning rates that are not chosen."""
        every = lines(self.found, self.output)
        if self.runner is None or not self.plan.chooses:
            return every
        first = {run.name for run in [*self.plan.bases, *self.plan.first()]}
        for arm, rates in self.plan.rates.items():
            rate = self.runner.chosen.get(arm, rates[0])  # one of them, for the time left
            first |= {run.name for run in self.plan.then(arm, rate)}
        return [line for line in every if line.place in first]

    def tell(self, event: Event) -> None:
        """Show what happened."""
        if event.kind:
            self._say(event)
        now = time.monotonic()
        if self._live is not None and now - self._drawn > 1.0:
            self._drawn = now
            found = self._wanted()
            self._live.update(self._picture(found, self.console), refresh=True)
        elif self._live is None and now - self._said > max(PAUSE, (now - self._began) / 10):
            self._said = now
            self.console.print(self._far(self._wanted()))

    def _picture(self, found: list[Line], console: Console) -> Group:
        most = max(console.height - 5, 3)
        return Group(table(found, self.plan.name, most), Text(self._far(found)))

    def _far(self, found: list[Line]) -> str:
        left = seconds_left(found, self.at_once)
        about = "" if left is None else f"; about {clock(left)} left"
        return f"{clock(time.monotonic() - self._began)}  {counts(found)}{about}"

    def _say(self, event: Event) -> None:
        run = event.run
        whose = "" if run is None else f"{title_of(run)}  "
        word = {"ended": "done  ", "started": "started  ", "failed": "FAILED  "}.get(event.kind, "")
        text = event.text.replace("\n", "\n    ") if event.kind == "failed" else event.text
        when = clock(time.monotonic() - self._began)
        self.console.print(f"{when}  {whose}{word}{text}", markup=False)


def title_of(run: Run) -> str:
    """A run as people say it."""
    arm = f"base {run.arm}" if run.is_base else run.arm
    return f"{arm}, rate {run.rate:g}, seed {run.seed}"


def show_status(output: Path) -> None:
    """Print how far a comparison is, from any process.

    Args:
        output: Its directory.
    """
    found = read_plan(output)
    every = lines(found, output)
    running = in_use(output)
    begun = [line for line in every if line.state != "waiting"]
    wanted = {run["name"] for run in found["runs"] if run.get("first")}
    shown = [line for line in every if line.place in wanted or line in begun]
    show(table(shown, str(found["name"])))
    word = f"running: {running}" if running else "not running; the same command resumes it"
    if not running and all(line.state in ("trained", "done", "cut") for line in shown):
        word = "not running"
    if not running and (output / "table.md").is_file():
        word += f"; its table is {output / 'table.md'}"
    print(f"{counts(shown)}; {word}")
    if not running:
        print(f"  {found['command']}")
