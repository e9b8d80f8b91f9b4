"""`archzoo compare`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from archzoo import shipped
from archzoo.analysis.compare.places import Slot, gpus, slots
from archzoo.analysis.compare.plan import Plan, make_plan, matched
from archzoo.analysis.compare.processes import starter
from archzoo.analysis.compare.progress import Show, clock, show_status, write_plan
from archzoo.analysis.compare.runner import Runner
from archzoo.analysis.compare.tables import (
    Results,
    collect,
    notes,
    shown,
    verdicts,
    write,
    write_html,
)
from archzoo.analysis.evidence import command_line
from archzoo.analysis.report import check_report_path
from archzoo.analysis.tables import Screen, show
from archzoo.training import settings as files
from archzoo.training.directory import Lock
from archzoo.training.ending import SIGNALS, Ended


def compare_command(
    config: str | None = None,
    /,
    seeds: str | None = None,
    learning_rates: str | None = None,
    tune_seeds: str | None = None,
    arms: str | None = None,
    may_differ: str | None = None,
    metric: str | None = None,
    measure: Literal["last", "best"] | None = None,
    base: str | None = None,
    at_once: int = 1,
    minutes: float | None = None,
    output: str | None = None,
    status: str | None = None,
    report: str | None = None,
    **settings: str,
) -> int:
    """Train arms that differ in one thing, with several seeds, and say which is better.

    archzoo compare configs/text.yaml --model.mixer Retention,Attention --model.match parameters
    --seeds 0,1,2 --learning_rates 1e-3,2e-3,4e-3

    Every setting of `archzoo fit` is taken (--model.X, --data.X, --trainer.X, --checkpoint.X), and
    one whose value lists several between commas makes an arm of each; commas within brackets,
    braces or quotes belong to the value. Several such settings, and the `arms` of the file, make
    the product. Every arm is trained with every seed, which is that of weights and data, and every
    learning rate, on the same batches in the same order. The learning rate of an arm is the one
    with the best mean on validation data; what is compared is measured on the test part, with that
    rate only, from the last checkpoint.

    A `stopping_threshold` is for the bases alone: it ends no run that is compared.

    The same command continues what was interrupted, however it was. The directory holds runs.csv (a
    row a run), table.csv and table.md (a row an arm), curves.png, and the runs.

    A file may hold what the options say under `compare:`, by their names, and under `claim:` what
    is claimed: arm, control, metric, paper (the effect that it reports), sign, margin, relative
    (effects are fractions of the control's) and rule (difference, equivalence or non_inferiority).
    The verdict is printed. There `learning_rates` may be lists by the
    arms' names, and `base` files by the arms' names, relative to the file. A claim's metric may be
    one of validation after some steps (loss@100), or of the task that the base was trained on
    (exact_match/base): what is left of it. `prepare` says by the arms' names how what an arm begins
    from is made, by archzoo binarise, merge or upcycle: `merge {x.yaml:plus} {x.yaml:minus} --base
    {base.yaml}`, whose files, or one of a file's arms, are trained first, and {seed} is the run's.

    Args:
        config: A configuration file, as of archzoo fit.
        seeds: Such as 0,1,2; default: the file's seed alone.
        learning_rates: Peaks to choose from, such as 1e-3,2e-3; default: each arm's own.
        tune_seeds: Those of the seeds that choose the learning rate; the others are trained with
            the chosen one only, which is cheaper. Default: all seeds.
        arms: Those of the file's arms that are compared, such as plain,filtered. Default: all.
        may_differ: data, tokens or data,tokens: what arms may differ in beside their model.
        metric: What arms are compared by, such as loss; default: bits_per_byte, else exact_match,
            else loss.
        measure: Which checkpoint is measured; default: last. The best one was chosen on validation
            data.
        base: A configuration file of what is trained first, once for each seed: every arm starts
            from its last checkpoint of the same seed, and is tested on its task, too. It lies in
            the directory bases beside this comparison's, where others find it.
        at_once: Runs side by side on every GPU, or on the processor, whose cores they share. So
            several GPUs train a run each by default; CUDA_VISIBLE_DEVICES says which of them.
        minutes: After these, runs are saved and ended; the same command continues them.
        output: The comparison's directory; default: runs/compare/NAME, of the file's name.
        status: The directory of a comparison, running or not: how far it is; nothing is trained.
        report: An HTML file of tables and curves that is written, too.
        **settings: Of archzoo fit.

    Raises:
        ValueError: What is wrong with an option, an arm or a setting.
        Ended: A signal ended it; all runs are saved.
    """
    if status is not None:
        show_status(Path(status))
        return 0
    if config is None and not settings:
        raise ValueError("compare needs a configuration: archzoo compare configs/text.yaml ...")
    if config is not None:
        config = str(shipped.configuration(config))
    if at_once < 1:
        raise ValueError(f"at_once={at_once} must be at least 1")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes={minutes} must be above 0")
    if report is not None:
        check_report_path(report)
    content = files.read(Path(config)) if config else {}
    options = {
        "seeds": seeds,
        "learning_rates": learning_rates,
        "tune_seeds": tune_seeds,
        "arms": arms,
        "may_differ": may_differ,
        "metric": metric,
        "measure": measure,
        "base": base,
    }
    with SIGNALS:
        plan = make_plan(config, content, settings, options, at_once)
        directory = Path(output) if output else Path("runs", "compare", plan.name)
        return _compare(plan, directory, at_once, minutes, report)


def _compare(
    plan: Plan, directory: Path, at_once: int, minutes: float | None, report: str | None
) -> int:
    try:
        lock = Lock(directory, "--output")
    except OSError as error:
        raise OSError(f"--output {directory} cannot be written: {error.strerror}") from None
    try:
        write_plan(plan, directory, command_line())
        any_run = next(iter(plan.runs.values()))
        accelerator = any_run.settings["trainer"]["accelerator"]
        places = slots(accelerator, at_once)
        _announce(plan, places, directory)
        SIGNALS.gentle = True
        with Show(plan, directory, len(places)) as display:
            start = starter(on_gpu=bool(gpus(accelerator)))
            runner = Runner(plan, directory, places, minutes, display.tell, start)
            display.runner = runner
            whole = runner.run()
        results = collect(plan, directory, runner.chosen)
        if any(arm.rows for arm in results.arms):
            _say(results, directory, report)
        if SIGNALS.received:
            print(f"all runs are saved; to continue:\n  {command_line()}", flush=True)
            raise Ended(SIGNALS.received)
        if not whole and not runner.failed:
            print(f"{clock(60 * (minutes or 0))} are over, all runs are saved; to continue:")
            print(f"  {command_line()}")
        if runner.failed:
            count = len(plan.runs) + len(plan.bases)
            raise ValueError(
                f"{len(runner.failed)} of {count} runs failed, see {directory / 'logs'}; the same "
                "command tries them again"
            )
        return 0
    finally:
        SIGNALS.gentle = False
        lock.release()


def _announce(plan: Plan, places: list[Slot], directory: Path) -> None:
    """What is about to be trained, and whether the arms compare."""
    control, *others = plan.arms.values()
    runs = len(plan.first())
    seeds = ", ".join(map(str, plan.seeds))
    devices = ", ".join(dict.fromkeys(slot.name for slot in places))
    threads = places[0].environment["OMP_NUM_THREADS"]
    print(
        f"{plan.name}: {len(plan.arms)} arms, seeds {seeds}, {runs} runs"
        + (" to choose learning rates by" if plan.chooses else "")
        + f" of {control.steps:,} steps, {control.tokens:,} tokens; {len(places)} at once "
        f"on {devices}, {threads} threads each; {directory}"
    )
    for base in plan.of_bases.values():
        print(
            f"  base {base.name}: {base.sizes.parameters:,} parameters, {base.steps:,} steps for "
            f"each seed, first; in {directory.parent / 'bases'}"
        )
    count = control.sizes.parameters
    some = f", of which {control.trainable:,} are trained" if control.trainable < count else ""
    print(f"  {control.name}: {count:,} parameters{some}")
    for arm in others:
        print(f"  {arm.name}: {matched(arm, control)}")
    if not plan.bases and any("NOT matched" in matched(arm, control) for arm in others):
        print("  (--model.match parameters matches a swapped part by the feed-forward's width)")


def _say(results: Results, directory: Path, report: str | None) -> None:
    """Show what was found, and write it down."""
    console = Screen(highlight=False)
    print()
    for table in shown(results):
        show(table, console)
        console.print()
    for note in notes(results):
        print(note)
    for verdict in verdicts(results):
        print(f"claim: {verdict.text}")
    paths = write(results, directory)
    print(f"{directory} holds runs.csv, {', '.join(path.name for path in paths)}")
    if report is not None:
        write_html(results, directory, Path(report), command_line())
