"""What a comparison found: one table in the terminal, CSV and Markdown, and its curves."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from archzoo.analysis import report
from archzoo.analysis.compare.claims import Verdict, judge
from archzoo.analysis.compare.plan import Plan, Run, matched
from archzoo.analysis.compare.runner import rate_means
from archzoo.analysis.compare.runs import read_outcome, row_of_run, state_of
from archzoo.analysis.compare.statistics import Difference, Summary, paired, summary
from archzoo.analysis.curves import read
from archzoo.analysis.evidence import command_line, write_rows
from archzoo.analysis.figures import pyplot, save
from archzoo.analysis.report import write_report

PERCENT = ("exact_match", "accuracy")  # within the names of what is shown in per cent
LINES = ("-", "--", ":", "-.")  # of curves, once their ten colours are used up
ANECDOTE = "one seed: an anecdote, which says nothing of another seed"


class ArmResult(NamedTuple):
    """An arm's figures, at its learning rate.

    Attributes:
        name: Of the arm.
        rate: The learning rate; None: none could be chosen.
        rows: Of its whole runs, by seed.
        tried: The metric on validation data by learning rate, of those that are whole.
    """

    name: str
    rate: float | None
    rows: dict[int, dict[str, Any]]
    tried: dict[float, float]


class Results(NamedTuple):
    """All that a comparison found so far.

    Attributes:
        plan: The comparison.
        arms: Every arm, in order.
        others: Runs that count nothing: (run, what became of it).
        part: "test", or "validation" where nothing was tested yet.
    """

    plan: Plan
    arms: list[ArmResult]
    others: list[tuple[Run, str]]
    part: str

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """A metric of the part by arm and seed; one after some steps is of validation."""
        name = f"{'validation' if '@' in metric else self.part}/{metric}"
        return {
            arm.name: {seed: float(row[name]) for seed, row in arm.rows.items() if row.get(name)}
            for arm in self.arms
        }


def collect(plan: Plan, output: Path, chosen: dict[str, float]) -> Results:
    """Read the runs of a comparison, and write each as a row of runs.csv.

    A row is named by its arm, key and checkpoint, so that no other settings replace it.

    Args:
        plan: The comparison.
        output: Its directory.
        chosen: The learning rate of every arm that has one.
    """
    begun, others = {}, []
    of_bases = {(run.arm, "base", run.seed): run for run in plan.bases}
    for index, run in [*of_bases.items(), *plan.runs.items()]:
        directory = run.directory(output)
        state = state_of(directory)
        if state in ("trained", "cut", "failed"):
            begun[index] = row_of_run(run, plan, directory)
            chose = not run.is_base and chosen.get(run.arm) == run.rate
            begun[index]["chosen"] = "yes" if chose else ""
        if state in ("cut", "failed"):
            why = str(read_outcome(directory).get("why", "")).splitlines()
            step = begun[index]["step"]
            about = f"at step {step} of {plan.facts(run).steps}" if state == "cut" else ""
            others.append((run, f"{state} {about or (why[-1] if why else '')}".strip()))
    command = {"command": command_line()}
    if begun:
        rows = [row | command for row in begun.values()]
        write_rows(output / "runs.csv", rows, key=("arm", "key", "checkpoint"))
    whole = {index: row for index, row in begun.items() if row["state"] == "trained"}

    def validated(run: Run) -> dict[str, float]:
        row = whole.get((run.arm, run.rate, run.seed), {})
        return {n: float(v) for n, v in row.items() if n.startswith("validation/") and v}

    arms = []
    for name in plan.arms:
        rate = chosen.get(name)
        mine = {seed: row for (arm, of, seed), row in whole.items() if (arm, of) == (name, rate)}
        arms.append(ArmResult(name, rate, mine, rate_means(plan, name, validated, plan.metric)))
    tested = any(f"test/{plan.metric}" in row for arm in arms for row in arm.rows.values())
    part = "test" if tested else "validation"
    if tested:  # a run that is not tested yet is not half a row
        arms = [
            arm._replace(
                rows={s: row for s, row in arm.rows.items() if row.get(f"test/{plan.metric}")}
            )
            for arm in arms
        ]
    return Results(plan, arms, others, part)


# ---------------------------------------------------------------------------- numbers as text


def _scale(metric: str) -> tuple[float, str]:
    return (100.0, " %") if any(word in metric for word in PERCENT) else (1.0, "")


def title_of(metric: str) -> str:
    """A metric as people say it."""
    part, slash, name = metric.partition("/")
    if part in ("train", "validation", "test") and slash:
        return f"{part} {title_of(name)}"
    metric, at, step = metric.partition("@")
    after = f" after {int(step):,} steps" if at else ""
    return metric.replace("bits_per_byte", "bits/byte").replace("_", " ") + after


def mean_and_spread(values: list[float], metric: str) -> str:
    """``2.835 ± 0.005``; of one seed the mean alone."""
    if not values:
        return ""
    found, (scale, unit) = summary(values), _scale(metric)
    return _with_spread(found, scale) + unit


def _with_spread(found: Summary, scale: float) -> str:
    mean = found.mean * scale
    if found.spread is None:
        return f"{mean:.4g}"
    spread = found.spread * scale
    places = 4
    if spread > 0:  # two digits of the spread, and the mean to the same place
        places = max(min(1 - math.floor(math.log10(spread)), 6), 0)
    return f"{mean:.{places}f} ± {spread:.{places}f}"


def difference_text(found: Difference | None, metric: str, lower: bool) -> str:
    """``-0.96 % (-1.59 to -0.32)``, relative where lower is better, else in points.

    Args:
        found: The paired difference; None: no text.
        metric: Of what.
        lower: Whether lower is better.
    """
    if found is None:
        return ""
    shown = found.relative() if lower else found
    unit = " %" if lower or _scale(metric)[1] else ""
    scale = 100 if unit else 1
    mean = f"{shown.mean * scale:+.2f}{unit}"
    if shown.low is None or shown.high is None:
        return mean
    return f"{mean} ({shown.low * scale:+.2f} to {shown.high * scale:+.2f})"


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:g} B"


def _mean_of(rows: dict[int, dict[str, Any]], *names: str) -> float | None:
    values = [float(row[name]) for row in rows.values() for name in names if row.get(name)]
    return statistics.fmean(values) if values else None


# ---------------------------------------------------------------------------- tables


def headings(results: Results) -> list[str]:
    """Of the table of arms."""
    metric, part = results.plan.metric, results.part
    names = ["arm", "n", "parameters", *(["trained"] if _some(results) else []), "active", "rate"]
    names += [f"{part} {title_of(metric)}", *([f"{part} loss"] if metric != "loss" else [])]
    names += [title_of(name) for name in results.plan.beside]
    control = results.arms[0].name
    return [
        *names,
        f"against {control} (95 %)",
        "tokens/s",
        "peak memory",
        "state at 1k",
        "at 16k",
    ]


def _some(results: Results) -> bool:
    """Whether an arm trains only some of its parameters."""
    return any(arm.trainable < arm.sizes.parameters for arm in results.plan.arms.values())


def cells(results: Results) -> list[list[str]]:
    """The table of arms, a row an arm."""
    plan, values = results.plan, results.values(results.plan.metric)
    losses, control = results.values("loss"), results.arms[0].name
    beside = {name: results.values(name) for name in plan.beside}
    found = []
    for arm in results.arms:
        sizes = plan.arms[arm.name].sizes
        against = None if arm.name == control else paired(values[arm.name], values[control])
        speed = _mean_of(arm.rows, "tokens_per_second")
        memory = _mean_of(arm.rows, "peak_memory_mb", "process_memory_mb")
        row = [
            arm.name,
            str(len(arm.rows)),
            f"{sizes.parameters:,}",
            *([f"{plan.arms[arm.name].trainable:,}"] if _some(results) else []),
            f"{sizes.active:,}",
            "" if arm.rate is None else f"{arm.rate:g}",
            mean_and_spread(list(values[arm.name].values()), plan.metric),
        ]
        if plan.metric != "loss":
            row.append(mean_and_spread(list(losses[arm.name].values()), "loss"))
        row += [
            *(mean_and_spread(list(beside[n][arm.name].values()), n) for n in beside),
            difference_text(against, plan.metric, plan.lower),
            "" if speed is None else f"{speed:,.0f}",
            "" if memory is None else _size(memory * 2**20),
            _size(sizes.state_1k),
            _size(sizes.state_16k),
        ]
        found.append(row)
    return found


def rate_cells(results: Results) -> list[list[str]]:
    """The metric on validation data at every learning rate, a row an arm; the chosen one marked."""
    plan = results.plan
    rates = sorted({rate for entries in plan.rates.values() for rate in entries})
    scale, unit = _scale(plan.metric)
    rows = []
    for arm in results.arms:
        row = [arm.name]
        for rate in rates:
            value = arm.tried.get(rate)
            text = "none" if value is None else f"{value * scale:.4f}{unit}"
            row.append(f"{text} *" if rate == arm.rate else text)
        rows.append(row)
    return [["arm", *(f"{rate:g}" for rate in rates)], *rows]


def notes(results: Results) -> list[str]:
    """What must be said beside the table, a line each."""
    plan, found = results.plan, []
    if len(plan.seeds) == 1:
        found.append(ANECDOTE)
    control, *others = plan.arms.values()
    for arm in others:
        found.append(f"{arm.name}: {matched(arm, control)}")
        if arm.tokens != control.tokens:
            found.append(f"{arm.name}: {arm.tokens:,} tokens, {control.name} {control.tokens:,}")
        if arm.batches != control.batches:
            found.append(f"{arm.name}: other batches than {control.name}'s")
    for result in results.arms:
        rates = sorted(plan.rates[result.name])
        if result.rate is None:
            found.append(f"{result.name}: no learning rate has all of its runs")
        elif len(rates) > 1 and result.rate in (rates[0], rates[-1]):
            smallest = result.rate == rates[0]
            which, further = ("smallest", rates[0] / 2) if smallest else ("largest", rates[-1] * 2)
            found.append(
                f"{result.name}: WARNING: the best learning rate, {result.rate:g}, is the {which} "
                f"tried: add {further:g}"
            )
    for run, what in results.others:
        found.append(f"{run.arm}, rate {run.rate:g}, seed {run.seed}: {what}; not counted")
    if results.part == "validation":
        found.append("nothing is tested yet: these are figures of the validation data")
    return found


def verdicts(results: Results) -> list[Verdict]:
    """What is to be said of each claim."""
    found = []
    for claim in results.plan.claims:
        metric = claim.metric or results.plan.metric
        found += judge(claim, results.values(metric), relative=claim.is_relative(metric))
    return found


def _aligned(columns: list[str], rows: list[list[str]], title: str) -> Table:
    table = Table(box=None, header_style="bold", title=title or None, title_justify="left")
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def shown(results: Results) -> list[Table]:
    """The tables for a terminal."""
    tables = [_aligned(headings(results), cells(results), results.plan.name)]
    if results.plan.chooses:
        first, *rows = rate_cells(results)
        title = f"validation {title_of(results.plan.metric)}, *: chosen"
        tables.append(_aligned([f"{title}    rate", *first[1:]], rows, ""))
    return tables


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, numbers at the right."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, marks, *rows])


def page(results: Results, command: str, figure: str | None) -> str:
    """All of it in Markdown.

    Args:
        results: What was found.
        command: That made it.
        figure: The picture's file name, if there is one.
    """
    plan = results.plan
    seeds = ", ".join(map(str, plan.seeds))
    first = next(iter(plan.arms.values()))
    parts = [
        f"# {plan.name}",
        f"{first.steps:,} steps of {first.tokens // first.steps:,} tokens, seeds {seeds}, "
        f"{plan.precision}, the {plan.measured} checkpoint on the {results.part} part. "
        "Mean ± standard deviation over seeds; the difference to the first arm is paired by seed, "
        "with its 95 % interval (Student's t).",
        f"```bash\n{command}\n```",
        markdown(headings(results), cells(results)),
        "\n".join(f"- {note}" for note in notes(results)),
    ]
    if plan.chooses:
        columns, *rows = rate_cells(results)
        seeds = ", ".join(map(str, plan.tune_seeds))
        parts += [
            f"## Learning rates\n\nThe {title_of(plan.metric)} on validation data, the mean over "
            f"the seeds {seeds}; the chosen rate is marked.",
            markdown(columns, rows),
        ]
    if found := verdicts(results):
        parts.append("## Verdict\n\n" + "\n".join(f"- {verdict.text}" for verdict in found))
    differing = [arm for arm in plan.arms.values() if arm.differs]
    if differing:
        lines = [f"- `{arm.name}`: `{arm.differs}`" for arm in differing]
        parts.append(f"## What differs from `{first.name}`\n\n" + "\n".join(lines))
    if figure:
        parts.append(f"![curves]({figure})")
    return "\n\n".join(part for part in parts if part) + "\n"


def write(results: Results, output: Path) -> list[Path]:
    """Write table.csv, table.md and curves.png; the files written."""
    figure = _draw(results, output / "curves.png")
    paths = [_write_csv(results, output / "table.csv")]
    page_path = output / "table.md"
    text = page(results, command_line(), None if figure is None else figure.name)
    partial = page_path.with_name(f".{page_path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(page_path)
    return [*paths, page_path, *([figure] if figure else [])]


def _write_csv(results: Results, path: Path) -> Path:
    """A row an arm, all numbers plain; rows of other settings stay."""
    plan, metric = results.plan, results.plan.metric
    control = results.arms[0].name
    verdicts_of: dict[str, list[Verdict]] = {}
    for verdict in verdicts(results):
        verdicts_of.setdefault(verdict.arm, []).append(verdict)
    rows = []
    for arm in results.arms:
        facts = plan.arms[arm.name]
        first_row = next(iter(arm.rows.values()), {})
        # Of all runs that are planned, so that a row of some seeds makes way for that of all.
        keys = " ".join(run.key for (of, _, _), run in plan.runs.items() if of == arm.name)
        row: dict[str, Any] = {
            "comparison": plan.name,
            "arm": arm.name,
            "key": hashlib.sha256(f"{keys} {plan.measured}".encode()).hexdigest()[:12],
            "seeds": " ".join(map(str, arm.rows)),
            "n": len(arm.rows),
            "part": results.part,
            "checkpoint": plan.measured,
            "learning_rate": "" if arm.rate is None else f"{arm.rate:g}",
            "steps": facts.steps,
            "tokens": facts.tokens,
            "precision": plan.precision,
            "parameters": facts.sizes.parameters,
            "trainable": facts.trainable,
            "active": facts.sizes.active,
            "state_1k": facts.sizes.state_1k,
            "state_16k": facts.sizes.state_16k,
        }
        for name in dict.fromkeys((metric, "loss", *plan.beside)):
            values = results.values(name)
            if values[arm.name]:
                found = summary(list(values[arm.name].values()))
                row[name] = f"{found.mean:.6g}"
                row[f"{name}_sd"] = "" if found.spread is None else f"{found.spread:.4g}"
            against = paired(values[arm.name], values[control]) if arm.name != control else None
            if against is not None:
                row[f"{name}_difference"] = f"{against.mean:.4g}"
                for end, value in (("low", against.low), ("high", against.high)):
                    row[f"{name}_difference_{end}"] = "" if value is None else f"{value:.4g}"
        row["against"] = "" if arm.name == control else control
        mine = verdicts_of.get(arm.name, [])
        # Of several claims each by its metric and control.
        row["verdict"] = "; ".join(
            f"{v.claim.metric or metric} against {v.control}: {v.verdict}"
            if len(mine) > 1
            else v.verdict
            for v in mine
        )
        for name, names in (
            ("tokens_per_second", ("tokens_per_second",)),
            ("peak_memory_mb", ("peak_memory_mb", "process_memory_mb")),
        ):
            value = _mean_of(arm.rows, *names)
            row[name] = "" if value is None else f"{value:.5g}"
        row |= {n: first_row[n] for n in ("machine", "torch", "triton", "cuda") if n in first_row}
        rows.append(row | {"command": command_line()})
    return write_rows(path, rows, key=("comparison", "arm", "key"))


def write_html(results: Results, output: Path, path: Path, command: str) -> None:
    """Write all of it as one HTML file, whose plots are interactive.

    Args:
        results: What was found.
        output: The comparison's directory, of the runs.
        path: The file.
        command: That made it.
    """
    plan = results.plan
    note = "Mean ± standard deviation over seeds; differences are paired by seed."
    sections: list[report.Table | report.Chart | str] = [" ".join(f"{n}." for n in notes(results))]
    sections += [f"Claim: {verdict.text}." for verdict in verdicts(results)]
    sections.append(report.Table("Arms", headings(results), cells(results), note))
    if plan.chooses:
        first, *rows = rate_cells(results)
        title = f"Validation {title_of(plan.metric)} by learning rate"
        sections.append(report.Table(title, first, rows, "*: chosen"))
    for metric, found in bands(results, output).items():
        series = [
            report.Series(entry.name, entry.steps, entry.mean, entry.low, entry.high)
            for entry in found
        ]
        spread = "The band is one standard deviation over seeds." if len(plan.seeds) > 1 else ""
        name = title_of(metric)
        sections.append(report.Chart(name, "step", name, series, note=spread))
    row = next((row for arm in results.arms for row in arm.rows.values()), {})
    names: tuple[str, ...] = ("machine", "torch", "triton", "cuda", "commit")
    facts = {name: str(row[name]) for name in names if name in row}
    settings = {
        "metric": plan.metric,
        "part": results.part,
        "checkpoint": plan.measured,
        "precision": plan.precision,
        "seeds": plan.seeds,
        "learning_rates": plan.rates,
        "arms": {arm.name: next(iter(_settings(plan, arm.name)), {}) for arm in results.arms},
    }
    write_report(
        path, plan.name, command=command, settings=settings, sections=sections, facts=facts
    )


def _settings(plan: Plan, arm: str) -> list[dict[str, Any]]:
    """The settings of an arm's runs, which seed and learning rate are different in."""
    return [run.settings for (name, _, _), run in plan.runs.items() if name == arm]


# ---------------------------------------------------------------------------- curves


class Band(NamedTuple):
    """A metric over the steps of an arm's runs.

    Attributes:
        name: Of the arm.
        steps: That all seeds have.
        mean: Over the seeds.
        low: Mean less a standard deviation; the mean for one seed.
        high: Mean plus a standard deviation.
    """

    name: str
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(results: Results, output: Path, arm: ArmResult, metric: str) -> Band | None:
    """An arm's curve and its spread; None where its logs have no such metric.

    Args:
        results: What was found.
        output: The comparison's directory.
        arm: Which.
        metric: A column of the logs.
    """
    found = []
    for row in arm.rows.values():
        try:
            curve = read(output / "runs" / str(row["run"]), metric)
        except (OSError, ValueError):
            return None
        found.append(dict(zip(curve.steps, curve.values, strict=True)))
    if not found:
        return None
    steps = sorted(set.intersection(*(set(values) for values in found)))
    columns = [summary([values[step] for values in found]) for step in steps]
    means = [column.mean for column in columns]
    spreads = [column.spread or 0.0 for column in columns]
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    return Band(arm.name, steps, means, low, high)


def bands(results: Results, output: Path) -> dict[str, list[Band]]:
    """The curves of the arms, by metric: training loss, and on validation data what they have."""
    wanted = dict.fromkeys(["train/loss", "validation/loss", f"validation/{results.plan.metric}"])
    found = {
        metric: [b for arm in results.arms if (b := band(results, output, arm, metric))]
        for metric in wanted
    }
    return {metric: entries for metric, entries in found.items() if entries}


def _draw(results: Results, path: Path) -> Path | None:
    """The curves, and the metric by learning rate; None where there is nothing to draw."""
    found = bands(results, path.parent)
    if not found:
        return None
    try:
        plt = pyplot()
    except ValueError as error:
        print(f"no curves are drawn: {error}")
        return None
    styles = {
        arm.name: {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
        for number, arm in enumerate(results.arms)
    }
    panels: list[Callable[[Any], None]] = [
        lambda panel, metric=metric: _draw_bands(  # type: ignore[misc]
            panel, found[metric], metric, styles
        )
        for metric in found
    ]
    if results.plan.chooses:
        panels.append(lambda panel: _draw_rates(panel, results, styles))
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    beside = 0.5 + 0.08 * max(map(len, styles))  # inches, for one legend of all panels
    size = (5 * columns + beside, max(3.6 * lines, 0.2 * len(styles)))
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for number, panel in enumerate(axes.flat):
        if number < len(panels):
            panels[number](panel)
        else:
            panel.set_axis_off()
    named: dict[str, Any] = {}
    for panel in axes.flat:
        for line, name in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(name, line)
    names = [name for name in styles if name in named]
    figure.legend([named[n] for n in names], names, loc="outside right upper", fontsize=8)
    save(figure, path)
    return path


def _draw_bands(
    panel: Any, found: list[Band], metric: str, styles: dict[str, dict[str, str]]
) -> None:
    several, (scale, unit) = False, _scale(metric)
    for entry in found:
        marker = "." if len(entry.steps) < 20 else None
        mean, low, high = (
            [value * scale for value in values] for values in (entry.mean, entry.low, entry.high)
        )
        style = styles[entry.name]
        panel.plot(entry.steps, mean, marker=marker, label=entry.name, **style)
        if low != high:
            several = True
            panel.fill_between(entry.steps, low, high, alpha=0.2, linewidth=0, color=style["color"])
    spread = " (mean ± standard deviation over seeds)" if several else ""
    panel.set_title(f"{title_of(metric)}{unit}{spread}", fontsize=10)
    panel.set_xlabel("step")


def _draw_rates(panel: Any, results: Results, styles: dict[str, dict[str, str]]) -> None:
    scale, unit = _scale(results.plan.metric)
    for arm in results.arms:
        if not arm.tried:
            continue
        rates = sorted(arm.tried)
        values = [arm.tried[rate] * scale for rate in rates]
        style = styles[arm.name]
        panel.plot(rates, values, marker=".", label=arm.name, **style)
        if arm.rate in arm.tried:
            color = style["color"]
            panel.plot(arm.rate, arm.tried[arm.rate] * scale, "o", color=color, markersize=9)
    panel.set_xscale("log")
    every = sorted({rate for arm in results.arms for rate in arm.tried})
    panel.set_xticks(every, [f"{rate:g}" for rate in every])
    panel.minorticks_off()
    title = f"validation {title_of(results.plan.metric)}{unit} by learning rate"
    panel.set_title(f"{title} (circles: chosen)", fontsize=10)
    panel.set_xlabel("learning rate")
