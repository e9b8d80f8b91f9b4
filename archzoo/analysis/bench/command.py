"""The command `archzoo bench`."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from archzoo.analysis import evidence
from archzoo.analysis.bench.contenders import COMPILED, FIT, Contender, Precision, ZooContender
from archzoo.analysis.bench.measuring import KEY, QUANTITIES, Budget, Plan, Row, measure
from archzoo.analysis.bench.memory import free_memory
from archzoo.analysis.bench.peers import PEERS, Peer, Shape
from archzoo.analysis.bench.profile import KEY as PROFILE_KEY
from archzoo.analysis.bench.profile import profile_rows
from archzoo.analysis.bench.showing import (
    Line,
    crossover,
    draw,
    in_words,
    lines_of,
    measures_of,
    report_sections,
    shown,
    stops,
    table_of,
)
from archzoo.analysis.bench.sides import Process, Side, get_ready
from archzoo.analysis.bench.worker import zoo_contender
from archzoo.analysis.figures import pyplot
from archzoo.analysis.operations import peak_of
from archzoo.analysis.tables import Screen, show
from archzoo.analysis.window import outgrown
from archzoo.names import nearest
from archzoo.states import nbytes
from archzoo.trust import user_imports

# Bytes a parameter takes at the least: the weight, its gradient and AdamW's two moments.
TRAINED, LOADED = 16, 4


def bench_command(
    contenders: list[str],
    /,
    mixers: str | None = None,
    match: bool = True,
    training: bool = False,
    prefill: bool = False,
    decode: bool = False,
    batch: bool = False,
    state: bool = False,
    lengths: str | None = None,
    batches: str = "1,2,4,8,16,32,64",
    context: str = "1k",
    tokens: int | None = None,
    precision: Literal["auto", "float32", "bfloat16", "bf16-mixed"] = "auto",
    fit: bool = False,
    profile: bool = False,
    compile: bool = False,
    peers: str = "auto",
    rounds: int = 10,
    minutes: float = 10.0,
    device: str | None = None,
    threads: int | None = None,
    output: str = "runs/bench",
    report: str | None = None,
    again: bool = False,
) -> None:
    """Time models side by side: training, prefill and decoding against length.

    It writes OUTPUT.csv as it goes, prints a table of each quantity, says where one model becomes
    faster or smaller than another, and draws OUTPUT-QUANTITY.png. Every side has a process of its
    own, and they run in turn within each round; a value is the median over the rounds, with the
    10th and 90th percentile. A curve ends where memory or its time ends, and says so. Interrupted,
    it is continued by the same command. Without a choice of --training, --prefill, --decode,
    --batch and --state all five are measured.

    Args:
        contenders: Presets, with what is changed of each after colons: a mixer, a form (parallel,
            chunkwise, recurrent), an argument of the mixer or the model, compiled, or fit, which
            is archzoo fit itself; such as retnet_tiny, retnet_tiny:Attention, retnet_tiny:fit,
            retnet_tiny:chunk_size=128:chunkwise. Other projects' models are nanogpt, llama,
            llama:static, torchscale and fla.
        mixers: Each preset with each of these mixers, such as Retention,Attention.
        match: Where a mixer is changed, set the feed-forward's width so that the model holds as
            many parameters as its preset.
        training: Measure it: tokens/s, MFU on a GPU that is known, and peak memory.
        prefill: Reading a text, milliseconds.
        decode: Writing by archzoo.generate, milliseconds a token, against the tokens before.
        batch: The same, tokens/s against the batch.
        state: Its bytes.
        lengths: Tokens, such as 256,1k,16k. None: powers of 2 from 256, to 16k on a CPU and to
            128k on a GPU.
        batches: Rows at which decoding's throughput is measured.
        context: Tokens that came before, in that; several such as 1k,8k.
        tokens: Of a training step, as many rows as they make; one row where it is longer. None:
            2,048 on a CPU, 32,768 on a GPU.
        precision: Of all sides. auto: float32 on a CPU; on a GPU bf16-mixed in training and
            bfloat16 weights in all else.
        fit: Training of ours is archzoo fit itself, validation included in its memory.
        profile: Say, too, where the time of a step of it goes: OUTPUT-profile.csv.
        compile: Training runs under torch.compile, all sides.
        peers: Other projects' models that run too, at the shape of ours: all that are installed
            (auto), none, or a list such as nanogpt,llama,llama:static.
        rounds: At most; where time is short, 3.
        minutes: Time for all of it. Each quantity gets an equal part of what is left.
        device: Such as cpu or cuda. None: a GPU where there is one.
        threads: That a CPU computes with. None: torch's choice.
        output: Where files go, without their ending.
        report: An HTML file with tables and interactive plots.
        again: Measure anew what is measured already.

    Raises:
        ValueError: An unknown name, a number out of its range, or a model that cannot fit into
            the memory.
        OSError: The output cannot be written.
    """
    console = Screen(highlight=False)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = _check_device(device)
    if profile and not any(FIT in name.split(":")[1:] for name in contenders) and not fit:
        raise ValueError("profile is of archzoo fit: add --fit, or name a side PRESET:fit")
    if threads is not None:
        at_least_one("threads", threads)
        torch.set_num_threads(threads)
    for name, value in (("rounds", rounds), ("tokens", tokens)):
        if value is not None:
            at_least_one(name, value)
    if not (minutes > 0 and math.isfinite(minutes)):
        raise ValueError(f"minutes={minutes} must be more than 0")
    chosen = dict(zip(QUANTITIES, (training, prefill, decode, batch, state), strict=True))
    wanted = [name for name in QUANTITIES if chosen[name] or not any(chosen.values())]
    longest = 131_072 if on_gpu else 16_384
    steps = [256 * 2**n for n in range(20) if 256 * 2**n <= longest]
    sizes = steps if lengths is None else integers(lengths, "lengths")
    precisions = _precisions(precision, on_gpu)

    sides = _sides(contenders, mixers, match, peers, device, wanted, console)
    for way, asked in ((FIT, fit), (COMPILED, compile)):
        if asked:
            sides = _trained_by(way, sides, match, wanted)
    _check_asked(sides, wanted)
    plan = Plan(
        contenders=sides,
        quantities=wanted,
        lengths=sizes,
        batches=integers(batches, "batches"),
        contexts=integers(context, "context"),
        tokens=tokens or (32_768 if on_gpu else 2_048),
        rounds=rounds,
        precisions=precisions,
        free_memory=free_memory(device),
        tracks_peaks=on_gpu,
        peak=peak_of(device),
        vocab_size=min(_vocab_size(side) for side in sides),
    )
    for side in sides:
        _check_memory(side, plan, "GPU" if on_gpu else "machine")
    path = Path(f"{output}.csv")
    _check_output(path)
    if report is not None:
        from archzoo.analysis.report import check_report_path

        check_report_path(report)
    figures = _figures_wanted(console)

    show(_contenders_table(sides, plan), console)
    console.print(_matched(sides))
    rows: list[Row] = []
    known = _measured(path, device, again)
    get_ready()
    budget = Budget(60 * minutes)

    def start(contender: Contender) -> Side:
        spec: dict[str, Any] = {"name": contender.name, "match": match, "profiled": profile}
        if isinstance(contender, Peer):
            spec["shape"] = list(contender.shape)
        return Process(spec, device, threads, list(user_imports))

    try:
        with _progress(plan.points(), budget, console) as (tell, advance):
            for row, was_known in measure(plan, start, budget, known, tell):
                rows.append(row)
                if kernels := row.pop("kernels", None):
                    where = path.with_name(f"{path.stem}-profile.csv")
                    evidence.write_rows(
                        where, profile_rows(row, kernels), PROFILE_KEY, device=device
                    )
                if not was_known:
                    evidence.write_rows(path, [row], KEY, device=device)
                    console.print(_told(row), markup=False, soft_wrap=True)
                advance()
    except KeyboardInterrupt:
        held = f"{len(rows)} rows are in {path}" if rows else "nothing was measured yet"
        print(f"{held}; the same command continues", file=sys.stderr)
        raise
    kept = sum(1 for row in rows if "machine" in row)
    if kept:
        console.print(f"{kept} rows were measured before (--again measures them anew)")
    console.print()
    dtype = torch.bfloat16 if precisions[1] == "bfloat16" else torch.float32
    sentences = _show(rows, sides, dtype, console)
    print(f"wrote {path}" if path.exists() else "nothing was measured")
    facts = evidence.facts(device)
    note = f"{facts['machine']}, torch {facts['torch']}, {' and '.join(dict.fromkeys(precisions))}"
    for measured in measures_of(rows) if figures else ():
        if lines := lines_of(measured, rows):
            figure = Path(f"{output}-{measured.name}.png")
            draw(measured, lines, figure, note)
            print(f"drew {figure}")
    if report is not None:
        from archzoo.analysis.report import write_report

        settings = _settings(plan, device, threads, match)
        write_report(
            report,
            f"archzoo bench: {', '.join(side.name for side in sides)}",
            command=facts["command"],
            settings=settings,
            sections=report_sections(rows, sentences),
            facts={name: value for name, value in facts.items() if name != "command"},
        )


# ---------------------------------------------------------------------------- what is asked


def at_least_one(name: str, value: int) -> None:
    """Refuse a number below 1."""
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def integers(text: str, name: str) -> list[int]:
    """Numbers of a list such as ``256,1k,16k`` (k: 1,024), ascending, each once.

    Raises:
        ValueError: Something in it is no integer of at least 1.
    """
    found = set()
    for entry in str(text).replace(" ", "").strip("[]").split(","):
        digits, times = (entry[:-1], 1024) if entry[-1:] in ("k", "K") else (entry, 1)
        digits = digits.replace("_", "")
        if not digits.isdecimal() or not int(digits):
            raise ValueError(
                f"{name}={text}: {entry!r} is not an integer of at least 1; give them as 256,1k"
            )
        found.add(int(digits) * times)
    return sorted(found)


def _known(text: str, name: str, known: list[str]) -> list[str]:
    """The names of a list, each once, in its order."""
    found = [entry for entry in text.replace(" ", "").strip("[]").split(",") if entry]
    for entry in found:
        if entry not in known:
            raise ValueError(f"{name}={text}: there is no {entry!r}; {nearest(entry, known)}")
    if not found:
        raise ValueError(f"{name} is empty: there are {', '.join(known)}")
    return list(dict.fromkeys(found))


def _check_device(device: str) -> bool:
    """Whether it is a GPU."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device} is not a valid device: take cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device}: take cpu or cuda")
    there = torch.cuda.device_count() if found.type == "cuda" else 1
    if not there:
        raise ValueError(f"device={device}: there is no CUDA device here; take cpu")
    if (found.index or 0) >= there:
        one = f"there is one; take {found.type}"
        raise ValueError(
            f"device={device}: {one if there == 1 else f'there are {there}, from 0 on'}"
        )
    return found.type == "cuda"


def _precisions(precision: str, on_gpu: bool) -> tuple[Precision, Precision]:
    """Of training, and of all else, which knows no mixture."""
    half = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        precision = "bf16-mixed" if half else "float32"
    if precision == "bf16-mixed":
        return "bf16-mixed", "bfloat16"
    return ("bfloat16", "bfloat16") if precision == "bfloat16" else ("float32", "float32")


def _sides(
    names: list[str],
    mixers: str | None,
    match: bool,
    peers: str,
    device: str,
    wanted: list[str],
    console: Screen,
) -> list[Contender]:
    """What the names stand for, each once, and the peers behind them."""
    found: dict[str, Contender | None] = {}
    for name in names:
        if name.partition(":")[0] in PEERS:
            found[name] = None  # once the shape is known
            continue
        if mixers is None:
            found[name] = zoo_contender(name, match)
            continue
        preset, *changes = name.split(":")
        for mixer in filter(None, mixers.replace(" ", "").strip("[]").split(",")):
            full = ":".join([preset, mixer, *changes])
            found[full] = zoo_contender(full, match)
    if not found:
        raise ValueError(f"mixers={mixers} names none: give some, such as Retention,Attention")
    ours = [side for side in found.values() if isinstance(side, ZooContender)]
    if not ours:
        raise ValueError(f"{', '.join(names)}: name a preset too, whose shape the others take")
    for name in [name for name, side in found.items() if side is None]:
        kind = PEERS[name.partition(":")[0]]
        why = kind.missing(device) or _no_shape(_beside(kind, ours))
        if why:
            raise ValueError(f"{name}: {why}")
        found[name] = _peer(name, ours)
    asked = list(PEERS) if peers == "auto" else []
    if peers == "auto" and torch.device(device).type == "cuda":
        asked.insert(asked.index("llama") + 1, "llama:static")
    if peers not in ("auto", "none"):
        asked = peers.replace(" ", "").strip("[]").split(",")
        _known(",".join(name.partition(":")[0] for name in asked), "peers", list(PEERS))
    for name in asked:
        kind = PEERS[name.partition(":")[0]]
        why = kind.missing(device) or _no_shape(_beside(kind, ours))
        if not why and not any((other.partition(":")[0] == name) for other in found):
            peer = _peer(name, ours)
            if set(wanted) - set(peer.without):
                found[name] = peer
            else:
                why = peer.without[wanted[0]]
        if why:
            console.print(f"skipping {name}: {why}", markup=False, soft_wrap=True)
    return [side for side in found.values() if side is not None]


def _beside(kind: type[Peer], ours: Sequence[ZooContender]) -> ZooContender:
    """The model of ours that a peer stands beside: of the same mixer, else the first."""

    def is_like(side: ZooContender) -> bool:
        return str(side.config["mixer"]["class_path"]).rpartition(".")[2] == kind.like

    return next((side for side in ours if is_like(side)), ours[0])


def _peer(name: str, ours: Sequence[ZooContender]) -> Peer:
    kind = PEERS[name.partition(":")[0]]
    shape = _shape(_beside(kind, ours))
    assert shape is not None
    return kind(name, shape)


def _shape(side: ZooContender) -> Shape | None:
    with torch.device("meta"):
        return Shape.of(side.make())


def _no_shape(side: ZooContender) -> str | None:
    if _shape(side) is not None:
        return None
    return f"{side.name} has no dense feed-forward whose width it could take"


def _trained_by(
    way: str, sides: list[Contender], match: bool, wanted: list[str]
) -> list[Contender]:
    """Each side for training in a way, and as it is for all else; who has that way already stays.

    Args:
        way: Compiled, or by `archzoo fit`, which is for ours alone.
        sides: As they were named.
        match: Whether parameters are matched.
        wanted: Quantities.
    """
    found: list[Contender] = []
    for side in sides:
        of_ours = isinstance(side, ZooContender)
        if side.compiled or side.trains or (way == FIT and (not of_ours or side.form)):  # type: ignore[attr-defined]
            found.append(side)
            continue
        name = f"{side.name}:{way}"
        if "training" not in side.without and "training" in wanted:
            found.append(_named(name, side, match))
        if set(wanted) - {"training", *side.without}:
            side.without["training"] = f"it is trained by {name}"
            found.append(side)
    return found


def _named(name: str, side: Contender, match: bool) -> Contender:
    """A side by another name, of the same kind."""
    if isinstance(side, Peer):
        return type(side)(name, side.shape)
    return zoo_contender(name, match)


def _check_asked(sides: list[Contender], wanted: list[str]) -> None:
    """Refuse a side of which nothing can be measured."""
    for side in sides:
        if not set(wanted) - set(side.without):
            raise ValueError(
                f"{side.name} cannot be asked for {', '.join(wanted)}: {side.without[wanted[0]]}"
            )


def _vocab_size(side: Contender) -> int:
    sizes: int = side.shape.vocab_size if isinstance(side, Peer) else side.vocab_size  # type: ignore[attr-defined]
    return sizes


def _check_memory(side: Contender, plan: Plan, where: str) -> None:
    """Refuse, before anything is built, a model that cannot fit."""
    if not isinstance(side, ZooContender):
        return
    trained = "training" in plan.quantities and "training" not in side.without
    needed = side.count * (TRAINED if trained else LOADED)
    if needed > plan.free_memory:
        what = "weights, gradients and AdamW's moments" if trained else "weights"
        raise ValueError(
            f"{side.name}: {what} of {side.count:,} parameters take {needed / 2**30:,.1f} GiB, and "
            f"this {where} has {plan.free_memory / 2**30:,.1f} GiB of memory free"
        )


def _check_output(path: Path) -> None:
    """Refuse a place that cannot be written, or holds another table, before anything is measured.

    Args:
        path: Of the table.
    """
    if path.name == ".csv":
        raise ValueError(
            f"--output {str(path)[:-4] or repr('')} names no file: give a name without its ending, "
            f"such as {path.parent / 'bench'}"
        )
    if path.is_dir():
        raise OSError(f"{path} cannot be written: it is a directory; --output names it")
    probe = path.with_name(f".{path.name}.probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}; --output names it") from None
    if path.exists():
        try:
            with path.open(newline="") as file:
                columns = next(csv.reader(file), [*KEY])
        except (UnicodeDecodeError, csv.Error):
            columns = []
        if not {*KEY} <= {*columns}:
            raise ValueError(
                f"{path} is no table of archzoo bench, and would be written over: name another "
                "--output"
            )


def _figures_wanted(console: Screen) -> bool:
    try:
        pyplot()
    except ValueError as error:
        console.print(f"without figures: {error}", markup=False, soft_wrap=True)
        return False
    return True


def _settings(plan: Plan, device: str, threads: int | None, match: bool) -> dict[str, Any]:
    names = {side.name: side.facts() for side in plan.contenders}
    return {
        "contenders": names,
        "quantities": plan.quantities,
        "lengths": plan.lengths,
        "batches": plan.batches,
        "context of the batches": plan.contexts,
        "tokens of a training step": plan.tokens,
        "rounds at most": plan.rounds,
        "precision of training": plan.precisions[0],
        "precision of all else": plan.precisions[1],
        "device": device,
        "threads": threads or torch.get_num_threads(),
        "parameters matched": match,
    }


def _measured(path: Path, device: str, again: bool) -> Callable[[Row], Row | None]:
    """Looks up rows that are measured already: by the same machine, versions and commit.

    A curve that its time ended, or an error, is tried again.
    """
    facts = evidence.facts(device)
    same = [column for column in KEY if column in facts] + ["commit"]
    own = [column for column in KEY if column not in facts]
    found: dict[tuple[str, ...], Row] = {}
    for row in evidence.read_rows(path) if not again else ():
        retried = (row.get("stopped") or "memory").partition(":")[0] != "memory"
        if not retried and all(row.get(column) == facts[column] for column in same):
            found[tuple(str(row.get(column)) for column in own)] = dict(row)
    return lambda identity: found.get(tuple(str(identity[column]) for column in own))


# ---------------------------------------------------------------------------- what is shown


def _contenders_table(sides: list[Contender], plan: Plan) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("contender")
    table.add_column("parameters", justify="right")
    for heading in ("form", "training", "else"):
        table.add_column(heading)
    for side in sides:
        count = f"{side.count:,}" if isinstance(side, ZooContender) else ""
        form = getattr(side, "form", None) or ("its own" if isinstance(side, Peer) else "chosen")
        training = plan.precisions[0] + (", compiled" if side.compiled else "")
        training += ", archzoo fit" if side.trains else ""
        numbers = ["" if "training" in side.without else training, plan.precisions[1]]
        if not set(plan.quantities) - {"training", *side.without}:
            numbers[1] = ""
        table.add_row(side.name, count, form, *numbers)
    return table


def _matched(sides: list[Contender]) -> str:
    counts = [side.count for side in sides if isinstance(side, ZooContender)]
    if len(counts) < 2:
        return ""
    apart = max(counts) / min(counts) - 1
    if apart <= 0.01:
        return f"parameters matched: they differ by {apart:.1%} at most"
    return f"parameters NOT matched: they differ by {apart:.0%}"


def _told(row: Row) -> str:
    """A row as it comes, on a line."""
    axis = f"{row['batch']:>8,} rows  " if row["quantity"] == "batch" else f"{row['length']:>8,}"
    head = f"{row['quantity']:>9}{axis}  {row['contender']}"
    if row.get("stopped"):
        return f"{head}: stops, {row['stopped']}"
    low, high = shown(row["low"]), shown(row["high"])
    spread = f" ({low} to {high})" if low != high else ""
    if row.get("mfu"):
        spread += f", MFU {row['mfu']:.1%}"
    memory = row.get("memory_bytes")
    peak = f", {memory / 2**30:.3g} GiB at most" if memory else ""
    return f"{head}: {shown(row['median'])} {row['unit']}{spread}{peak}"


@contextmanager
def _progress(
    total: int, budget: Budget, console: Screen
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """On a terminal a bar, with what is measured and the time left; gives what tells and advances.

    A row that is measured is a line of its own, so elsewhere nothing more is needed.
    """
    if not console.is_terminal:
        yield lambda words: None, lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Left(budget))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda words: progress.update(task, description=words),
            lambda: progress.advance(task),
        )


class _Left(TextColumn):
    """The time left, which the budget bounds."""

    def __init__(self, budget: Budget) -> None:
        super().__init__("")
        self.budget = budget

    def render(self, task: Any) -> Any:
        from rich.text import Text

        left = self.budget.left()
        if task.completed and task.elapsed:
            left = min(left, task.elapsed / task.completed * (task.total - task.completed) * 2)
        return Text(f"at most {time.strftime('%M:%S', time.gmtime(left))} left")


def _show(
    rows: list[Row], sides: list[Contender], dtype: torch.dtype, console: Screen
) -> dict[str, list[str]]:
    """Print tables and sentences; the sentences by the measure's name."""
    sentences: dict[str, list[str]] = {}
    for measured in measures_of(rows):
        lines = lines_of(measured, rows)
        if not lines:
            continue
        show(table_of(measured, lines), console)
        words = in_words(measured, lines)
        if measured.name == "state":
            words += _window(lines, sides, dtype)
        words += stops(lines, measured)
        for sentence in words:
            console.print(f"  {sentence}", markup=False, soft_wrap=True)
        console.print()
        sentences[measured.name] = words
    return sentences


def _window(lines: Sequence[Line], sides: list[Contender], dtype: torch.dtype) -> list[str]:
    """The length at which a cache outgrows a state: as measured, and as predicted."""
    by_name = {side.name: side for side in sides if isinstance(side, ZooContender)}
    found = []
    steady = [line for line in lines if len(line.x) > 1 and len(set(line.y)) == 1]
    growing = [line for line in lines if len(line.x) > 1 and line.y[-1] > line.y[0]]
    for state in steady:
        size = f"{state.name}'s state of {state.y[0]:,.0f} bytes"
        for cache in growing:
            seen = crossover(state, cache, False)
            if seen is None:
                continue
            low, high = (f"{length:,.0f}" for length in seen.sizes)
            said = f"{cache.name}'s cache outgrows {size} "
            if seen.at:
                said += f"at {seen.at[-1]:,.0f} tokens (measured)"
            elif seen.first == state.name:
                said += f"before {low} tokens (measured)"
            else:
                said = f"{cache.name}'s cache does not outgrow {size} up to {high} tokens"
            if state.name in by_name and cache.name in by_name:
                at = cache_outgrows(by_name[state.name], by_name[cache.name], dtype)
                said += f"; by their sizes at {at:,.0f}" if at else ""
            found.append(said)
        if state.name in by_name:
            with torch.device("meta"):
                length = outgrown(by_name[state.name].make().to(dtype))
            if length is not None:
                found.append(
                    f"{size}: the cache of attention at its shape is predicted to take more from "
                    f"{length:,} tokens on (archzoo show --window)"
                )
    return found


def cache_outgrows(
    state: ZooContender, cache: ZooContender, dtype: torch.dtype = torch.float32
) -> float | None:
    """Tokens at which a model's cache takes as many bytes as another's state, by their sizes.

    Args:
        state: Whose state has one size.
        cache: Whose state grows; None comes of one that does not.
        dtype: Of activations.
    """

    def weigh(side: ZooContender, capacity: int) -> int:
        with torch.device("meta"):
            return nbytes(side.make().init_state(1, capacity=capacity, dtype=dtype))

    empty, full = weigh(cache, 0), weigh(cache, 1_024)
    if full <= empty:
        return None
    return (weigh(state, 0) - empty) * 1_024 / (full - empty)
