"""The tables of docs/ from the rows of results/ and from classes: nothing in them is typed.

    python benchmarks/tables.py              write them anew, between their marks
    python benchmarks/tables.py --check      say which are not what the rows say
    python benchmarks/tables.py --figures    draw the figures of lengths, scaling, kernels and speed
                                             again; speed: only of whole models' speed and GPUs

A table stands in a page between <!-- table: NAME --> and <!-- end -->.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
H100, H200 = "nvidia-h100-80gb-hbm3-torch2.11.0", "nvidia-h200-torch2.11.0"
CPU = "amd-epyc-torch2.13.0"
INTEL = "intel-r-xeon-r-processor-torch2.13.0"
LENGTHS = (  # exact match by length
    f"{H100}-bfloat16-claims-abacus_coverage-lengths",
    f"{H200}-bfloat16-claims-abacus-lengths-best",
    f"{H200}-bfloat16-claims-abacus-lengths-last",
    f"{CPU}-float32-abacus-cpu-lengths-best",
    f"{CPU}-float32-abacus-cpu-lengths-last",
)
Row = dict[str, str]


def rows_of(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(headings: list[str], rows: list[list[str]], numbers: int = 1) -> str:
    """A table whose columns from `numbers` on stand at the right."""
    marks = ["---"] * numbers + ["---:"] * (len(headings) - numbers)
    lines = [headings, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a fraction (Wilson 1927)."""
    z = 1.96
    middle = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    variance = fraction * (1 - fraction) / count + z * z / (4 * count**2)
    half = math.sqrt(variance) / (1 + z * z / count)
    return middle - z * half, middle + z * half


def per_cent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def three(number: str) -> str:
    """A number to three digits."""
    return f"{float(number):#.3g}".rstrip(".")


# ---------------------------------------------------------------------------- arithmetic


def coverage() -> str:
    """Exact match at the last length that positions reach, and one further."""
    found = []
    for row in rows_of(f"{H100}-bfloat16-claims-abacus_coverage-lengths"):
        bound = int(row["coverage"]) - 1  # an answer may have one digit more
        at = float(row[f"digits_{bound}"])
        low, high = wilson(at, int(row["problems"]))
        lengths = [n for n in range(1, 31) if float(row[f"digits_{n}"]) >= 0.1]
        found.append(
            (bound, [
                row["run"].removeprefix("abacus_coverage_shift_").rpartition("_")[0],
                str(bound),
                per_cent(float(row["inside"])),
                per_cent(at),
                f"{100 * low:.0f} to {100 * high:.0f} %",
                per_cent(float(row[f"digits_{bound + 1}"])),
                str(max(lengths)),
            ])
        )  # fmt: skip
    headings = ["largest shift", "positions reach", "1 to 7 digits", "at the reach", "95 %"]
    headings += ["one digit further", "longest with one in ten right"]
    return markdown(headings, [cells for _, cells in sorted(found)], 0)


def addition_seeds() -> str:
    """Exact match of configs/addition.yaml on the test sums, by seed and rounding."""
    rows = rows_of("intel-r-xeon-r-processor-torch2.11.0-float32-addition-seeds")
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        key = row["capability"], int(row["threads"])
        found.setdefault(key, []).append((int(row["seed"]), float(row["exact_match"])))
    cells = []
    for (capability, threads), runs in found.items():
        seeds = [seed for seed, _ in runs]
        cells.append([
            capability,
            str(threads),
            str(seeds[0]) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}",
            ", ".join(f"{100 * match:.2f}" for _, match in runs),
        ])  # fmt: skip
    headings = ["ATEN_CPU_CAPABILITY", "threads", "seeds", "exact match, %"]
    return markdown(headings, cells, 4)


def addition_batches() -> str:
    """Other recipes for configs/addition.yaml: how many seeds learn to carry."""
    looks = {"val_check_interval", "enable_progress_bar", "log_every_n_steps", "accelerator"}
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows_of("intel-r-xeon-r-processor-torch2.11.0-float32-addition-batches"):
        flag = r"--(?:(?:model|data|trainer)\.|(?=ema ))([\w.]+) (\S+)"
        given = [pair for pair in re.findall(flag, row["command"]) if pair[0] not in looks]
        settings = ", ".join(f"`{name}` {value}" for name, value in given)
        found.setdefault((settings, row["asked"]), []).append(float(row["exact_match"]))
    cells = [
        [*key, str(len(runs)), str(sum(match >= 0.99 for match in runs)), f"{100 * min(runs):.1f}"]
        for key, runs in found.items()
    ]
    headings = ["settings", "sums asked", "seeds", "at 99 % or more", "the worst, %"]
    return markdown(headings, cells, 2)


def addition_against() -> str:
    """The fit of configs/addition.yaml beside that of an earlier commit."""
    name = "intel-r-xeon-r-processor-torch2.11.0-float32-addition-against-714a3c4"
    cells = []
    for row in rows_of(name):
        match = f"{100 * float(row['exact_match']):.2f}"
        cells.append([row["commit"], row["seed"], row["seconds"], row["cpu_seconds"], match])
    return markdown(["commit", "seed", "seconds", "of a core", "exact match, %"], cells)


def abacus() -> str:
    """Exact match by ranges of lengths, of both checkpoints."""
    spans = [(1, 20), (21, 30), (31, 60), (61, 100), (101, 110), (21, 100)]
    found = []
    for which in ("last", "best"):
        for row in rows_of(f"{H200}-bfloat16-claims-abacus-lengths-{which}"):
            means = [
                statistics.fmean(float(row[f"digits_{n}"]) for n in range(low, high + 1))
                for low, high in spans
            ]
            name = row["run"].removeprefix("abacus_").rpartition("_")[0]
            cells = [f"`{name}`", f"`{which}.ckpt`", f"{int(row['parameters']):,}"]
            found.append(cells + [per_cent(mean) for mean in means])
    headings = ["arm", "checkpoint", "parameters", *(f"{low}-{high}" for low, high in spans)]
    return markdown(headings, found, 2)


def abacus_cpu() -> str:
    """Exact match of best.ckpt and last.ckpt by length, in per cent."""
    best, last = (
        {row["run"]: row for row in rows_of(f"{CPU}-float32-abacus-cpu-lengths-{which}")}
        for which in ("best", "last")
    )
    columns = {"1-7": range(1, 8), "8": [8], "9": [9], "10": [10], "12": [12]}
    found = []
    for run in sorted(best, reverse=True):
        seed = run.rpartition("_")[2]
        name = f"RoPE beside Abacus, seed {seed}" if "both" in run else f"seed {seed}"
        cells = [name]
        for lengths in columns.values():
            pair = [
                100 * statistics.fmean(float(rows[run][f"digits_{n}"]) for n in lengths)
                for rows in (best, last)
            ]
            cells.append(f"{pair[0]:.0f}, {pair[1]:.0f}")
        found.append(cells)
    order = [cells for cells in found if "RoPE" not in cells[0]]
    return markdown(["", *columns], order + [cells for cells in found if "RoPE" in cells[0]])


def rope_scaling() -> str:
    """Perplexity of the last 64 characters, and of the window, by scaling and length."""
    rows = rows_of(f"{H200}-float32-claims-rope_scaling-lengths")
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    names = {"none": "none", "ntk": "NTK", "ntk x2": "NTK, twice the ratio", "yarn": "YaRN"}
    found = []
    for scaling in dict.fromkeys(row["scaling"] for row in rows):
        cells = [names.get(scaling, scaling)]
        for length in lengths:
            mine = [r for r in rows if (r["scaling"], r["length"]) == (scaling, length)]
            tails = [float(r["tail"]) for r in mine]
            window = statistics.geometric_mean(float(r["window"]) for r in mine)
            spread = f" ({min(tails):#.3g} to {max(tails):#.3g})" if len(tails) > 1 else ""
            cells.append(f"{statistics.geometric_mean(tails):#.3g}{spread}, {window:#.3g}")
        found.append(cells)
    return markdown(["scaling", *(f"{int(length):,}" for length in lengths)], found)


def learning_rates() -> str:
    """Exact match and loss on held-out sums at the last step, by learning rate and mixer."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows_of(f"{H200}-float32-claims-addition_learning_rates"):
        mixer, _, rate = row["arm"].partition("_")
        found.setdefault(rate, {}).setdefault(mixer, []).append(row)
    mixers = ("retention", "attention")
    lines = []
    for rate in sorted(found, key=float):
        cells = [rate]
        for mixer in mixers:
            rows = found[rate][mixer]
            match = [float(row["validation/exact_match/last"]) for row in rows]
            loss = statistics.fmean(float(row["validation/loss/last"]) for row in rows)
            cells += [", ".join(f"{100 * value:.1f}" for value in match), f"{loss:#.2g}"]
        lines.append(cells)
    headings = ["learning rate"]
    for mixer in mixers:
        headings += [f"{mixer}: exact match, %", "mean loss"]
    return markdown(headings, lines)


# ---------------------------------------------------------------------------- retention


def compared(name: str, against: str, metric: str) -> str:
    """The arms of a comparison at their chosen rates, by a metric of the test part."""
    chosen: dict[str, list[Row]] = {}
    for row in rows_of(f"{H200}-bf16-mixed-claims-{name}"):
        if row["chosen"]:
            chosen.setdefault(row["arm"], []).append(row)
    values = {
        arm: {row["seed"]: float(row[f"test/{metric}"]) for row in rows}
        for arm, rows in chosen.items()
    }
    found = []
    for arm, rows in chosen.items():
        mine = values[arm].values()
        found.append([
            f"`{arm}`",
            str(len(rows)),
            f"{int(rows[0]['parameters']):,}",
            f"{int(rows[0]['state_1k']) / 1024:,.0f}",
            f"{float(rows[0]['learning_rate']):g}",
            f"{statistics.fmean(mine):.3f} ± {statistics.stdev(mine):.3f}",
            "" if arm == against else _difference(values[arm], values[against]),
        ])  # fmt: skip
    headings = ["arm", "runs", "parameters", "state at 1k, KiB", "rate", "test bits a byte"]
    return markdown([*headings, f"against `{against}`"], found)


def recall() -> str:
    """Accuracy of multi-query recall by mixer and width, of the better of two learning rates."""
    sizes = {"all": "", "64 pairs": "/64x256", "128": "/128x512", "256": "/256x1024"}
    found = []
    for row in rows_of(f"{H200}-bf16-mixed-claims-recall"):
        if not row["chosen"]:
            continue
        arm, _, dim = row["arm"].partition("+dim=")
        state = (int(row[c]) / 1024 for c in ("state_1k", "state_16k"))
        accuracy = [f"{100 * float(row[f'test/token_accuracy{s}']):.1f}" for s in sizes.values()]
        rate = f"{float(row['learning_rate']):g}"
        found.append([f"`{arm}`", dim, *(f"{kib:,.1f}" for kib in state), rate, *accuracy])
    headings = ["arm", "width", "state at 1k, KiB", "at 16k", "rate"]
    return markdown([*headings, "accuracy, %: all", *list(sizes)[1:]], found)


# ---------------------------------------------------------------------------- adaptation

NOT_RUN = "not run yet"


def claimed_rows(name: str) -> list[Row]:
    """The runs of a claims file that count, at each arm's chosen rate; none where it is not run."""
    files = sorted(RESULTS.glob(f"*-claims-{name}.csv"))
    return [row for row in rows_of(files[0].stem) if row["chosen"]] if files else []


def by_seed(rows: list[Row], metric: str) -> dict[str, dict[int, float]]:
    """A metric by arm and seed: of the test part, or of validation after some steps."""
    column = f"{'validation' if '@' in metric else 'test'}/{metric}"
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(column):
            found.setdefault(row["arm"], {})[int(row["seed"])] = float(row[column])
    return found


def is_share(metric: str) -> bool:
    """Whether it is a fraction, of which differences are in points."""
    return "exact_match" in metric or "accuracy" in metric


def unit_of(metric: str, relative: bool) -> tuple[str, float, int]:
    """What differences of a metric are given in, by what they are multiplied, and their places."""
    if relative:
        return "%", 100, 1
    return ("points", 100, 1) if is_share(metric) else ("nats" if metric == "kl" else "", 1, 3)


def claims_of(name: str, measured: str = "exact_match") -> list[list[str]]:
    """Every claim of a file: what is said, what was found with its interval, and the verdict.

    Args:
        name: Of the file in configs/claims, without its end.
        measured: The metric of a claim that names none.
    """
    import yaml

    from archzoo.analysis.compare.claims import judge, read_claims
    from archzoo.analysis.compare.statistics import paired

    path = ROOT / f"configs/claims/{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows, arms, found = claimed_rows(name.replace("/", "-")), list(content.get("arms", ())), []
    for claim in read_claims(content.get("claim"), arms, path.name):
        metric, control = claim.metric or measured, claim.control or arms[0]
        relative = claim.is_relative(metric)
        unit, scale, places = unit_of(metric, relative)
        margin = f"{scale * (claim.margin or 0):g} {unit}".strip()
        if claim.rule == "equivalence":
            says = f"equal, within {margin}"
        elif claim.rule == "non_inferiority":
            says = f"not {'lower' if claim.sign > 0 else 'higher'} by {margin}"
        else:
            says = "higher" if claim.sign > 0 else "lower"
            says += "" if claim.paper is None else f", by {abs(scale * claim.paper):.1f} {unit}"
        said_of = metric.replace("_", " ").replace("@", " after ").replace("/base", " of addition")
        cells = [f"`{claim.arm}` against `{control}`", said_of.replace("/", ": "), says]
        values = by_seed(rows, metric)
        difference = paired(values.get(claim.arm or "", {}), values.get(control, {}))
        if difference is None:
            found.append([*cells, "", "", NOT_RUN])
            continue
        shown = difference.relative() if relative else difference
        interval = ""
        if shown.low is not None and shown.high is not None:
            low, high = (f"{scale * bound:+.{places}f}" for bound in (shown.low, shown.high))
            interval = f"{low} to {high} (n = {shown.seeds})"
        (verdict,) = judge(claim, values, relative=relative)
        more = re.search(r"[\d,]+ seeds would decide|no number of seeds would", verdict.text)
        said = f"**{verdict.verdict}**" + (f": {more[0]}" if more else "")
        mean = f"{scale * shown.mean:+.{places}f} {unit}".strip()
        found.append([*cells, mean, interval, said])
    return found


CLAIM_HEADINGS = ["arm", "measured", "the papers", "here", "95 %", "verdict"]


def adaptation() -> str:
    """Every claim about adapters: the paper's figure, ours with its interval, and the verdict."""
    files = sorted(path.stem for path in (ROOT / "configs/claims/adaptation").glob("*.yaml"))
    found = [[name, *cells] for name in files for cells in claims_of(f"adaptation/{name}")]
    return markdown(["experiment", *CLAIM_HEADINGS], found, 4)


def adaptation_arms() -> str:
    """Every arm: what it trains, how well it does, and what is left of addition."""
    found = []
    for path in sorted((ROOT / "configs/claims/adaptation").glob("*.yaml")):
        rows = claimed_rows(f"adaptation-{path.stem}")
        for arm in dict.fromkeys(row["arm"] for row in rows):
            mine = [row for row in rows if row["arm"] == arm and row.get("test/loss")]
            if not mine:
                continue
            cells = [path.stem, f"`{arm}`", str(len(mine)), f"{int(mine[0]['trainable']):,}"]
            cells.append(f"{float(mine[0]['learning_rate']):g}")
            for column in ("exact_match", "token_accuracy", "loss", "exact_match/base"):
                values = [float(row[f"test/{column}"]) for row in mine if row.get(f"test/{column}")]
                if not values:
                    cells.append("")
                    continue
                scale, places = (100, 1) if is_share(column) else (1, 3)
                spread = scale * statistics.stdev(values) if len(values) > 1 else 0.0
                mean = scale * statistics.fmean(values)
                cells.append(f"{mean:.{places}f} ± {spread:.{places}f}")
            found.append(cells)
    headings = ["experiment", "arm", "runs", "trained", "rate", "exact match, %"]
    headings += ["characters, %", "loss", "addition, exact match, %"]
    return markdown(headings, found, 2) if found else NOT_YET


# ---------------------------------------------------------------------------- preferences

# What is shown of each arm: the column of the rows, its scale and places.
OF_ANSWERS = {
    "reward": (1, 3),
    "score": (1, 3),
    "kl": (1, 2),
    "exact_match": (100, 1),
    "length": (1, 2),
    "cost/seconds": (1, 1),
    "cost/all_seconds": (1, 1),
    "cost/written": (1e-3, 0),
    "cost/passes": (1e-6, 2),
    "cost/all_passes": (1e-6, 2),
}


def preferences(name: str) -> str:
    """Every claim of a file about preferences."""
    return markdown(CLAIM_HEADINGS, claims_of(name, "score"), 3)


def preferences_arms(name: str) -> str:
    """Every arm: what became of its answers, and what its training has taken."""
    rows, found = claimed_rows(name), []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm and row.get("test/score")]
        cells = [f"`{arm}`", str(len(mine)), f"{int(mine[0]['steps']):,}"] if mine else []
        for column, (scale, places) in OF_ANSWERS.items() if mine else ():
            values = [scale * float(row[f"test/{column}"]) for row in mine]
            spread = f" ± {statistics.stdev(values):,.{places}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):,.{places}f}{spread}")
        found += [cells] if cells else []
    if not found:
        return NOT_YET
    headings = ["arm", "runs", "steps", "reward", "score", "KL, nats", "exact match, %", "length"]
    headings += ["seconds", "with the reward model's", "written, thousand"]
    headings += ["passes, million", "with the reward model's"]
    return markdown(headings, found) + measured_on(rows)


# ---------------------------------------------------------------------------- 1 bit, merging

EXACT = ("exact match, %", 100, 1)
OF_BOTH = {
    "exact_match": EXACT,
    "exact_match/Addition": ("sums", 100, 1),
    "exact_match/Subtraction": ("differences", 100, 1),
    "loss": ("loss", 1, 3),
}


def arms_of(name: str, columns: dict[str, tuple[str, float, int]], *facts: str) -> str:
    """Every arm of a claims file: means and standard deviations over its runs.

    Args:
        name: Of the file in configs/claims, without its end.
        columns: Of the rows' test part: what is written above, the scale and the places.
        *facts: Columns of whole numbers, which all runs of an arm have in common.
    """
    rows, found = claimed_rows(name.replace("/", "-")), []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm and row.get("test/loss")]
        if not mine:
            continue
        cells = [f"`{arm}`", str(len(mine)), *(f"{int(mine[0][fact]):,}" for fact in facts)]
        for column, (_, scale, places) in columns.items():
            cells.append(mean_and_spread(mine, f"test/{column}", scale, places))
        found.append(cells)
    if not found:
        return NOT_YET
    headings = ["arm", "runs", *facts, *(title for title, _, _ in columns.values())]
    return markdown(headings, found) + measured_on(rows)


def mean_and_spread(rows: list[Row], column: str, scale: float, places: int) -> str:
    """The mean of a column over runs, and its standard deviation."""
    values = [scale * float(row[column]) for row in rows]
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{spread}"


def dropped() -> str:
    """Exact match by the size of changes and the share of them that is dropped."""
    rows = [row for row in claimed_rows("merging-drop") if row.get("test/loss")]
    if not rows:
        return NOT_YET
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row["arm"], []).append(row)
    columns = {"": "0 %", "_50": "50 %", "_90": "90 %", "_99": "99 %", "_90_as_is": "90 %, as is"}
    found = []
    for size in ("small", "middle", "large"):
        mine = [of.get(f"{size}{end}") for end in columns]
        cells = [mean_and_spread(arm, "test/exact_match", 100, 1) if arm else "" for arm in mine]
        found.append([f"`{size}`", *cells])
    if base := of.get("base"):
        found.append(["`base`, without any", mean_and_spread(base, "test/exact_match", 100, 1)])
        found[-1] += [""] * (len(columns) - 1)
    headings = ["changes", *(f"dropped: {title}" for title in columns.values())]
    return markdown(headings, found) + measured_on(rows)


# ---------------------------------------------------------------------------- mixtures


def variants(name: str, against: str, more: dict[str, str]) -> str:
    """The variants of an experiment: parameters, loss, and what `more` names of the log."""
    by_variant: dict[str, list[Row]] = {}
    for row in rows_of(f"{H200}-bfloat16-claims-{name}"):
        by_variant.setdefault(row["arm"], []).append(row)
    loss = {
        variant: {row["seed"]: float(row["validation/loss/best"]) for row in rows}
        for variant, rows in by_variant.items()
    }
    order = [
        against,
        *(variant for variant in sorted(by_variant, key=_natural) if variant != against),
    ]
    found = []
    for variant in order:
        rows, mean = by_variant[variant], statistics.fmean(loss[variant].values())
        spread = f" ± {statistics.stdev(loss[variant].values()):.4f}" if len(rows) > 1 else ""
        short = ", cut short" if any(row.get("cut_short") for row in rows) else ""
        cells = [
            f"`{variant}`{short}",
            str(len(rows)),
            f"{int(rows[0]['parameters']):,}",
            f"{int(rows[0]['active']):,}",
            f"{mean:.4f}{spread}",
            "" if variant == against else _difference(loss[variant], loss[against]),
        ]
        for column, digits in more.items():
            values = [float(row[column]) for row in rows if row.get(column)]
            cells.append(f"{statistics.fmean(values):.{digits}f}" if values else "")
        found.append(cells)
    headings = ["arm", "runs", "parameters", "active", "best validation loss"]
    headings += [f"against `{against}`", *(TITLES[column] for column in more)]
    return markdown(headings, found)


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 95 %, by n


def _difference(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """The mean difference over the seeds of both, with its 95 % interval (paired, Student's t)."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean, base = statistics.fmean(differences), statistics.fmean(theirs.values())
    if len(differences) == 1:
        return f"{100 * mean / base:+.2f} %"
    half = STUDENT[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    low, high = (100 * bound / base for bound in (mean - half, mean + half))
    return f"{100 * mean / base:+.2f} % ({low:+.2f} to {high:+.2f})"


TITLES = {
    "train/metric/drop_rate/last": "drop rate, late",
    "train/metric/max1_max2/first": "Max1/Max2, early",
    "train/metric/max1_max2/last": "late",
    "train/metric/coefficient/last": "coefficient, late",
}
GATE = {
    "train/metric/drop_rate/last": "3",
    "train/metric/max1_max2/first": "2",
    "train/metric/max1_max2/last": "2",
}


def _natural(name: str) -> list[str]:
    return [f"{float(p):09.3f}" if p[:1].isdigit() else p for p in name.split("_")]


def same_runs() -> str:
    """Arms that are one run by several names: every figure of theirs is equal."""
    seen: dict[tuple[str, ...], list[str]] = {}
    seeds: dict[tuple[str, ...], list[str]] = {}
    for name in ("normalised_gate", "adaptive_balance", "moe_router", "filtered_attention"):
        for row in rows_of(f"{H200}-bfloat16-claims-{name}"):
            if row["validation/loss/best"]:
                key = tuple(
                    value for column, value in sorted(row.items())
                    if column.startswith(("validation/", "train/loss/last", "train/gradient"))
                )  # fmt: skip
                seen.setdefault(key, []).append(f"`{row['arm']}` of `{name}`")
                seeds.setdefault(key, []).append(row["seed"])
    several: dict[tuple[str, ...], list[str]] = {}
    for key, names in seen.items():
        if len(names) > 1:
            several.setdefault(tuple(names), []).append(seeds[key][0])
    lines = [f"{' and '.join(names)}: seed {', '.join(of)}" for names, of in several.items()]
    return "\n".join(f"- {line}" for line in lines) or "- none"


# ---------------------------------------------------------------------------- kernels

NEEDED = {"16": {"2048": 1.5}, "8": {}, "4": {}}  # times fla that are required; else by width


def kernels() -> str:
    """Milliseconds of a pass, contenders side by side; fla is the better of its forms."""
    rows = [r for r in rows_of(f"{H100}-bf16-retention-kernels") if r["pass"] != "step"]
    found = []
    for shape in dict.fromkeys((r["heads"], r["dk"], r["dv"], r["time"]) for r in rows):
        here = [r for r in rows if (r["heads"], r["dk"], r["dv"], r["time"]) == shape]
        for way, title in (("graph", "graph"), ("eager", "Python")):

            def least(kind: str, which: str, way: str = way, here: list[Row] = here) -> float:
                return min(
                    float(r["milliseconds"])
                    for r in here
                    if r["launch"] == way and r["pass"] == which and r["contender"].startswith(kind)
                )

            names = ("archzoo", "fla", "cuDNN")
            times = {n: [least(n, p) for p in ("forward", "forward+backward")] for n in names}
            mine = times["archzoo"][1]
            needed = 3.0 if shape[2] in ("256", "512") else NEEDED[shape[0]].get(shape[3], 2.0)
            ratio = f"{times['fla'][1] / mine:.2f}"
            last = [r for r in here if r["pass"] == "forward+backward"][-1]
            floor = max(float(last["floor_bytes_ms"]), float(last["floor_operations_ms"]))
            first = way == "graph"
            found.append([
                " x ".join(shape[:3]) if first else "",
                f"{int(shape[3]):,}" if first else "",
                title,
                *(f"{times[n][0]:.3f} / {times[n][1]:.3f}" for n in names),
                ratio if float(ratio) >= needed else f"**{ratio}**",
                f"{needed:g}",
                f"{times['cuDNN'][1] / mine:.1f}",
                f"{mine / floor:.1f}",
            ])  # fmt: skip
    headings = ["heads x dk x dv", "T", "launched by", *("archzoo", "fla", "cuDNN")]
    headings += ["fla / archzoo", "needed", "cuDNN / archzoo", "over the floor"]
    return markdown(headings, found, 3)


# ---------------------------------------------------------------------------- whole models

BENCHES = (f"{H100}-bench", f"{H200}-bench")  # the first that there is
BENCH = next((name for name in BENCHES if (RESULTS / f"{name}.csv").exists()), BENCHES[0])
BASES = ("retnet_base", "transformer_base")
LENGTHS_TRAINED, CONTEXTS = (
    (2_048, 8_192, 32_768),
    ((1, (1_024, 16_384, 65_536)), (64, (1_024, 8_192))),
)
BANDWIDTH = 3.35e12  # of an H100 SXM, by its data sheet


def bench_rows(quantity: str) -> list[Row]:
    """What `archzoo bench` measured of a quantity, peers included; none where it is not there."""
    names = [name for name in (BENCH, f"{BENCH}-peers") if (RESULTS / f"{name}.csv").exists()]
    found = [row for name in names for row in rows_of(name) if row["quantity"] == quantity]
    named = {(row["contender"], row["length"], row["batch"]): row for row in found}
    return list(named.values())  # of two rows the later file's


def pictures(measured: list[Row], *measures: str) -> str:
    """Links to the rows, with the commits that these are of, and to the figures that there are."""
    found = [(name, f"{BENCH}-{name}.png") for name in measures]
    there = [f"![{name}](../results/{file})" for name, file in found if (RESULTS / file).exists()]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in measured))
    rows = f"[The rows](../results/{BENCH}.csv): {measured[0]['machine']}, commit {commits}"
    return "".join(f"\n\n{link}" for link in [rows, *there])


def speed_training() -> str:
    """Tokens/s, MFU and peak memory by contender and length, and the speed over nanoGPT's."""
    rows = bench_rows("training")
    if not rows:
        return NOT_YET
    speed = {(r["contender"], int(r["length"])): r for r in rows}
    found = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = [f"`{name}`"]
        for length in LENGTHS_TRAINED:
            row, nano = speed.get((name, length)), speed.get(("nanogpt:compiled", length))
            if row is None or not row["median"]:
                cells += [row["stopped"].partition(":")[0] if row else "", ""]
                continue
            figures = [f"{float(row['median']) / 1e3:,.0f}"]
            if nano and nano["median"]:
                figures[0] += f" ({float(row['median']) / float(nano['median']):.2f})"
            figures += [f"{float(row['mfu']):.1%}"] if row.get("mfu") else []
            cells += [", ".join(figures), f"{float(row['memory_bytes']) / 2**30:.1f}"]
        found.append(cells)
    headings = ["thousand tokens/s (over nanoGPT's), MFU"]
    for length in LENGTHS_TRAINED:
        headings += [f"T {length:,}", "GiB"]
    return markdown(headings, found) + pictures(rows, "training", "training-memory")


def speed_decoding() -> str:
    """Milliseconds a step at batch 1, and tokens/s at batch 64, by contender and context."""
    rows = bench_rows("decode") + bench_rows("batch")
    if not rows:
        return NOT_YET
    found = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = [f"`{name}`"]
        for batch, lengths in CONTEXTS:
            for length in lengths:
                size = (name, str(length), str(batch))
                here = [r for r in rows if (r["contender"], r["length"], r["batch"]) == size]
                if not here or not here[0]["median"]:
                    cells.append(here[0]["stopped"].partition(":")[0] if here else "")
                elif here[0]["quantity"] == "decode":
                    cells.append(three(here[0]["median"]))
                else:
                    cells.append(f"{float(here[0]['median']):,.0f}")
        found.append(cells)
    headings = ["", *(f"batch {b}, {n // 1024}k" for b, lengths in CONTEXTS for n in lengths)]
    return markdown(headings, found) + pictures(rows, "decode", "batch")


def speed_parts() -> str:
    """Where a step of `fit` goes at 2,048 tokens, milliseconds, by what kernels are for."""
    name = f"{BENCH}-profile"
    if not (RESULTS / f"{name}.csv").exists():
        return NOT_YET
    rows = [row for row in rows_of(name) if row["length"] == "2048"]
    sides = list(dict.fromkeys(row["contender"] for row in rows))
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        part = sums.setdefault(row["part"], dict.fromkeys(sides, 0.0))
        part[row["contender"]] += float(row["ms"])
    found = [
        [part, *(f"{by_side[side]:.1f}" if by_side[side] else "" for side in sides)]
        for part, by_side in sorted(sums.items(), key=lambda entry: -max(entry[1].values()))
    ]
    steps = {
        side: next(float(r["step_ms"]) for r in rows if r["contender"] == side) for side in sides
    }
    busy = {side: sum(part[side] for part in sums.values()) for side in sides}
    found.append(["all kernels", *(f"{busy[side]:.1f}" for side in sides)])
    found.append(["a step", *(f"{steps[side]:.1f}" for side in sides)])
    return markdown(["ms", *(f"`{side}`" for side in sides)], found)


def speed_mixtures() -> str:
    """Mixtures beside a dense model of the same active size: training, and a step of decoding."""
    name = f"{BENCH}-mixtures"
    if not (RESULTS / f"{name}.csv").exists():
        return NOT_YET
    rows = rows_of(name)
    found = []
    for side in dict.fromkeys(row["contender"].removesuffix(":fit") for row in rows):
        cells = [f"`{side}`", "", "", "", ""]
        for row in rows:
            if not row["median"] or row["contender"].removesuffix(":fit") != side:
                continue
            cells[1] = f"{int(row['parameters']) / 1e6:,.0f} M"
            if row["quantity"] == "training":
                cells[2] = f"{float(row['median']):,.0f}"
                cells[3] = f"{float(row['memory_bytes']) / 2**30:.1f}"
            elif row["quantity"] == "decode":
                cells[4] = three(row["median"])
        found.append(cells)
    return markdown(["", "parameters", "tokens/s of fit", "GiB", "ms a token"], found)


def speed_floors() -> str:
    """The operations that training needs and the bytes that decoding moves, and their times."""
    import torch

    import archzoo
    from archzoo.analysis.operations import decoding_bytes, peak_operations, training_operations

    peak = peak_operations("NVIDIA H100 80GB HBM3")
    assert peak is not None
    found = []
    for name in BASES:
        with torch.device("meta"):
            model = archzoo.create_model(name)
        cells = [f"`{name}`"]
        for length in LENGTHS_TRAINED:
            needed = training_operations(model, length)
            cells.append(f"{needed / 1e6:,.0f} M, {1e3 * 32_768 * needed / peak:.1f} ms")
        for batch, lengths in CONTEXTS:
            for length in lengths:
                moved = decoding_bytes(model.bfloat16(), batch, length)
                milliseconds = 1e3 * moved / BANDWIDTH
                said = f"{milliseconds:.2f} ms"
                cells.append(said if batch == 1 else f"{1e3 * batch / milliseconds:,.0f} tokens/s")
        found.append(cells)
    headings = ["", *(f"training, T {length:,}" for length in LENGTHS_TRAINED)]
    headings += [f"batch {b}, {n // 1024}k" for b, lengths in CONTEXTS for n in lengths]
    return markdown(headings, found)


# ---------------------------------------------------------------------------- ranks

APART = ("loss_apart", "gradients_apart")
WAYS = {
    "ddp": "DDP",
    "ddp_zero_1": "DDP with ZeRO-1",
    "fsdp2": "FSDP2",
    "fsdp2_blocks": "FSDP2 by blocks",
    "deepspeed_stage_1": "DeepSpeed stage 1",
    "deepspeed_stage_2": "DeepSpeed stage 2",
    "deepspeed_stage_3": "DeepSpeed stage 3",
}
COUNTS = {2: "two", 4: "four", 8: "eight"}


def way_of(row: Row) -> str:
    """How many processes train a model, and how."""
    if row["way"] == "one":
        return "one"
    count = int(row["processes"])
    shared = ", the tokens of one" if row.get("scaling") == "strong" else ""
    return f"{COUNTS.get(count, count)}, {WAYS[row['way']]}{shared}"


def measured_on(rows: list[Row]) -> str:
    """The line below a table that says where its rows are from."""
    one = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"\n\n{one['machine']}, torch {one['torch']}, triton {one['triton']}, commit {commits}: "
        f"`{one['command']}`"
    )


def ranks_speed() -> str:
    """`fit` on one GPU and on several."""
    rows = rows_of(f"{H200}-ranks-speed")
    found = [
        [
            way_of(row),
            f"`{row['model']}`",
            f"{int(row['time']):,}",
            f"{int(row['tokens_a_process']):,}",
            f"{int(row['tokens_per_second']):,}",
            row["times_one"],
            f"{int(row['peak_memory_mb']):,}",
        ]
        for row in rows
        if not row.get("failed")
    ]
    headings = ["GPUs", "model", "length", "tokens a GPU"]
    headings += ["tokens a second", "times one GPU", "MB a GPU"]
    return markdown(headings, found, 2) + measured_on(rows)


def ranks_compare() -> str:
    """`archzoo compare` of a run on each GPU, beside one run."""
    if not (RESULTS / f"{H200}-ranks-compare.csv").exists():
        return NOT_YET
    rows = rows_of(f"{H200}-ranks-compare")
    names = ("processes", "model", "seconds_one", "seconds_all", "ratio", "allowed")
    headings = ["runs", "model", "one run, s", "all at once, s", "ratio", "allowed"]
    found = [[f"`{row[n]}`" if n == "model" else row[n] for n in names] for row in rows]
    return markdown(headings, found, 2) + measured_on(rows)


def ranks_equal() -> str:
    """The largest distance of several processes to one, by way."""
    rows = rows_of(f"{H200}-ranks-equal")
    found = []
    for way in dict.fromkeys(map(way_of, rows)):
        alike = [row for row in rows if way_of(row) == way]
        models = ", ".join(f"`{row['model']}`" for row in alike)
        far = [f"{max(float(row[name]) for row in alike):.1e}" for name in APART]
        found.append([way, models, *far])
    headings = ["GPUs", "models", "loss", "gradients"]
    return markdown(headings, found, 2) + measured_on(rows)


def ranks_bytes() -> str:
    """Bytes of a parameter that a process holds after a step, of every machine measured on."""
    names = ("weights", "gradients", "state", "held", "alive", "formula", "allocated")
    tables = []
    for machine in (INTEL, H200):
        if not (RESULTS / f"{machine}-ranks-bytes.csv").exists():
            continue
        rows = rows_of(f"{machine}-ranks-bytes")
        given = [name for name in names if any(row.get(name) for row in rows)]
        found = [
            [way_of(row), f"`{row['model']}`", *(row.get(name) or "" for name in given)]
            for row in rows
        ]
        tables.append(markdown(["processes", "model", *given], found, 2) + measured_on(rows))
    return "\n\n".join(tables)


# ---------------------------------------------------------------------------- one bit


def measured(kind: str) -> list[Row]:
    """The rows of every machine that a benchmark has run on."""
    files = sorted(path.stem for path in RESULTS.glob(f"*-{kind}.csv"))
    return [row for name in files if "-claims-" not in name for row in rows_of(name)]


def onebit_product() -> str:
    """A token's Linear of 1 bit, over the dense one, by machine and width."""
    rows = measured("onebit")
    if not rows:
        return "Not measured yet: `python benchmarks/onebit.py product`."
    found = [
        [
            row["machine"],
            f"`{row['kind']}`",
            row["dtype"],
            f"{int(row['width']):,}",
            row["dense_us"],
            row["packed_us"],
            row["ratio"],
            row.get("cached_ratio") or "",
            row["bytes_ratio"],
        ]
        for row in rows
    ]
    headings = ["machine", "kind", "dtype", "width", "dense, us", "1 bit, us", "time", "in caches"]
    return markdown([*headings, "bytes"], found, 3)


def onebit_quality() -> str:
    """Bits, bytes and what is right, of dense and binary models."""
    rows = measured("onebit-quality")
    if not rows:
        return "Not measured yet: `python benchmarks/onebit.py quality`."
    found = []
    for model, latent in dict.fromkeys((row["model"], row["latent"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["latent"]) == (model, latent)]
        found.append(
            [
                model,
                latent,
                str(len(mine)),
                mine[0]["bits_a_weight"],
                f"{int(mine[0]['file_bytes']):,}",
                mean_and_spread(mine, "perplexity", 1, 4),
                mean_and_spread(mine, "exact_match", 100, 2),
            ]
        )
    headings = ["model", "latent weights begin as", "seeds", "bits a weight", "bytes of the file"]
    return markdown([*headings, "perplexity", "exact match, %"], found, 2) + measured_on(rows)


# ---------------------------------------------------------------------------- adapters


def adaptation_methods() -> str:
    """Every method of adaptation as its class says it, with its defaults on one preset."""
    import torch

    import archzoo
    from archzoo.parts import list_parts

    changed = {"linear": "matrices", "experts": "experts", "input": "input", "state": "state"}
    sources, found = [], []
    for name, cls in list_parts("adapter").items():
        torch.manual_seed(0)
        net = archzoo.adapt(archzoo.create_model("transformer_tiny", vocab_size=96), name)
        learn = sum(p.numel() for p in net.parameters() if p.requires_grad)
        source = re.search(r"arXiv\s+(\d{4}\.\d{5})", (cls.__doc__ or "").partition("Source:")[2])
        if source is None:
            raise SystemExit(f"error: the docstring of {name} has no source")
        sources.append(source[1])
        found.append([
            f"`{name}`",
            ", ".join(changed[kind] for kind in cls.kinds),
            ", ".join(f"`{target}`" for target in cls.default_targets),
            "nothing" if cls.identity_at_start else "something",
            "yes" if cls.mergeable else "no",
            f"[{source[1]}](https://arxiv.org/abs/{source[1]})",
            f"{learn:,}",
        ])  # fmt: skip
    headings = ["method", "changes", "targets by default", "before training", "merges", "source"]
    order = sorted(range(len(found)), key=lambda i: (found[i][4] != "yes", sources[i]))
    return markdown([*headings, "parameters"], [found[i] for i in order], len(headings))


def adaptation_costs() -> str:
    """A compiled step and a token with each method, over those of the base, by model."""
    rows = rows_of(f"{H200}-bfloat16-adapters")
    rows = [row for row in rows if row["compiled"] == "True"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    of = {(row["method"], row["model"]): row for row in rows}
    ratios = ("step_ratio", "unmerged_ratio", "merged_ratio")
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [of[method, model][ratio] for ratio in ratios for model in models]
        found.append([f"`{method}`", *(f"{float(cell):.2f}" if cell else "" for cell in cells)])
    titles = ("a step", "a token", "merged")
    headings = ["", *(f"{title}, `{model}`" for title in titles for model in models)]
    return markdown(headings, found) + measured_on(rows)


def adaptation_bytes() -> str:
    """What a token reads of weights with an adapter that stays beside them, over the base's."""
    import torch
    from adapters import bytes_read, recipe

    import archzoo

    found = []
    for preset in ("retnet_small", "transformer_small"):
        read = {}
        for name in (None, "MoLoRA", "MoV"):
            with torch.device("meta"):
                model = archzoo.create_model(preset)
                if name is not None:
                    model = archzoo.adapt(model, recipe(getattr(archzoo, name))[0])
            read[name] = bytes_read(model.to(torch.bfloat16).eval())
        ratios = [f"{read[name] / read[None]:.2f}" for name in ("MoLoRA", "MoV")]
        found.append([f"`{preset}`", f"{read[None] / 1e6:.1f} MB", *ratios])
    return markdown(["", "the base's weights", "with `MoLoRA`", "with `MoV`"], found)


NOT_YET = "*No rows yet.*"
TABLES: dict[str, Callable[[], str]] = {
    "addition_seeds": addition_seeds,
    "addition_batches": addition_batches,
    "addition_against": addition_against,
    "coverage": coverage,
    "abacus": abacus,
    "abacus_cpu": abacus_cpu,
    "rope_scaling": rope_scaling,
    "learning_rates": learning_rates,
    "retnet": lambda: compared("retnet", "retnet", "bits_per_byte"),
    "recall": recall,
    "adaptation": adaptation,
    "adaptation_arms": adaptation_arms,
    "preferences": lambda: preferences("preferences"),
    "preferences_arms": lambda: preferences_arms("preferences"),
    "preferences_score": lambda: preferences("preferences_score"),
    "preferences_score_arms": lambda: preferences_arms("preferences_score"),
    "onebit_claims": lambda: markdown(CLAIM_HEADINGS, claims_of("onebit"), 3),
    "onebit_arms": lambda: arms_of(
        "onebit", {"exact_match": EXACT, "loss": ("loss", 1, 4)}, "steps", "parameters"
    ),
    "drop_claims": lambda: markdown(CLAIM_HEADINGS, claims_of("merging/drop"), 3),
    "drop_grid": dropped,
    "merged_claims": lambda: markdown(CLAIM_HEADINGS, claims_of("merging/experts_merged"), 3),
    "merged_arms": lambda: arms_of("merging/experts_merged", OF_BOTH),
    "adaptation_methods": adaptation_methods,
    "adaptation_costs": adaptation_costs,
    "adaptation_bytes": adaptation_bytes,
    "filtered_attention": lambda: variants("filtered_attention", "plain", {}),
    "normalised_gate": lambda: variants("normalised_gate", "none", GATE),
    "adaptive_balance": lambda: variants(
        "adaptive_balance",
        "constant",
        {"train/metric/drop_rate/last": "3", "train/metric/coefficient/last": "4"},
    ),
    "moe_router": lambda: variants("moe_router", "linear", GATE),
    "same_runs": same_runs,
    "retention_kernels": kernels,
    "speed_training": speed_training,
    "speed_decoding": speed_decoding,
    "speed_parts": speed_parts,
    "speed_mixtures": speed_mixtures,
    "speed_floors": speed_floors,
    "ranks_speed": ranks_speed,
    "ranks_compare": ranks_compare,
    "ranks_equal": ranks_equal,
    "ranks_bytes": ranks_bytes,
    "onebit_product": onebit_product,
    "onebit_quality": onebit_quality,
}


def written(page: str) -> str:
    """A page with its tables as the rows have them."""

    def table(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise SystemExit(f"error: there is no table {found[1]!r}: {', '.join(TABLES)}")
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def figures() -> None:
    """Draw what has rows again."""
    import lengths
    import retention_kernels
    from rope_scaling import means_of

    from archzoo.analysis.extend import Reading, plot

    for name in LENGTHS:
        rows: list[dict[str, Any]] = []
        for row in rows_of(name):
            numbers = {c: float(v) for c, v in row.items() if c.startswith("digits_")}
            facts = {c: int(row[c]) for c in ("trained_digits", "parameters")}
            reach = int(row["coverage"]) if row["coverage"] else ""
            rows.append(row | numbers | facts | {"coverage": reach})
        asked = [int(c.removeprefix("digits_")) for c in rows[0] if c.startswith("digits_")]
        lengths.draw(rows, asked, RESULTS / f"{name}.png")
    name = f"{H200}-float32-claims-rope_scaling-lengths"
    rows = rows_of(name)
    kinds = {"scaling": str, "length": int} | dict.fromkeys(("factor", "ratio"), float)
    kinds |= dict.fromkeys(("window", "tail"), float)
    runs: dict[str, list[Reading]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(Reading(**{c: kinds[c](row[c]) for c in kinds}))
    readings = means_of(list(runs.values()))
    facts = (int(rows[0]["trained_length"]), int(rows[0]["tail_tokens"]))
    plot(readings, *facts, RESULTS / f"{name}.png")
    for name in (f"{H100}-bf16-retention-kernels", f"{H200}-bf16-retention-kernels"):
        rows = [
            row | {c: int(row[c]) for c in ("heads", "dk", "dv", "time")} for row in rows_of(name)
        ]
        retention_kernels.draw(rows, RESULTS / f"{name}.png")


def speed_figures() -> None:
    """Draw what `archzoo bench` measured of whole models again, and how runs scale over GPUs."""
    import ranks

    from archzoo.analysis.bench.measuring import QUANTITIES
    from archzoo.analysis.bench.showing import draw, lines_of, measures_of

    everything = [row for quantity in QUANTITIES for row in bench_rows(quantity)]
    for measure in measures_of(everything):
        rows = bench_rows(measure.quantity)
        if lines := lines_of(measure, rows):
            note = f"{rows[0]['machine']}, torch {rows[0]['torch']}, {rows[0]['dtype']}"
            draw(measure, lines, RESULTS / f"{BENCH}-{measure.name}.png", note)
    name = f"{H200}-ranks-speed"
    ranks.draw(rows_of(name), RESULTS / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    which = ("all", "speed")
    parser.add_argument("--figures", nargs="?", const="all", choices=which, help="draw them, too")
    given = parser.parse_args()
    if given.figures:  # before the pages, which link to those that there are
        speed_figures()
    if given.figures == "all":
        figures()
    other = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := written(text)) != text:
            other.append(page.name)
            if not given.check:
                page.write_text(new, encoding="utf-8")
    if given.check and other:
        raise SystemExit(f"error: not as the rows have it: {', '.join(other)}")
    print(f"{len(TABLES)} tables, {len(other)} pages written" if not given.check else "current")


if __name__ == "__main__":
    main()
