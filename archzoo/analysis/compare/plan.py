"""Which runs a comparison takes: every arm by seed by learning rate, with all else equal.

Nothing is trained here. The settings of every arm are read as `archzoo fit` reads them, so that
what is wrong with one is said before anything runs; models are built without memory, to be counted;
and the first batches of every arm are made and compared.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.analysis.compare.arms import Arm, file_name, make_arms
from archzoo.analysis.compare.claims import Claim, read_claims
from archzoo.analysis.compare.places import memory_of
from archzoo.analysis.compare.prepared import PLACES, filled, prepare, read_prepared
from archzoo.analysis.listing import Row, row_of
from archzoo.checkpoint import save_pretrained
from archzoo.decoder import Decoder
from archzoo.freezing import Freezing
from archzoo.names import nearest
from archzoo.registry import check_size
from archzoo.tasks.stream import Task
from archzoo.training import settings as files
from archzoo.training.command import Resolved, resolve, usual_precision
from archzoo.training.comparison import MATCHED, learned_count

MAY_DIFFER = ("data", "tokens")
BATCHES = (0, 1, 2)  # of training, whose digests say that arms see the same
COPIES = 4  # of the weights in training: themselves, gradients, and AdamW's two means
# Options that a file's `compare` may give.
IN_FILE = (
    *("seeds", "learning_rates", "tune_seeds", "metric", "may_differ", "measure", "base"),
    *("reads", "prepare"),  # which no option gives
)
REWARDS = "model.reward_model"  # the setting that takes a run of RewardModel alone
STARTS = "model.weights"  # the setting by which an arm begins from its base
# What the command line says of how an arm is run, its base is run by, too.
OF_BASE = "base"  # behind the name of a metric: of the task that the base was trained on
OF_BASES = ("trainer.accelerator", "trainer.precision", "trainer.enable_progress_bar")
# The task's own metric: the first of these that it has.
USUAL = ("bits_per_byte", "exact_match", "loss")
# Within the names of what is better when higher.
HIGHER = ("exact_match", "accuracy", "reward", "score")


@dataclass(frozen=True, eq=False)
class Run:
    """One run: an arm with a learning rate and a seed, which is that of weights and data.

    Attributes:
        arm: Its name.
        rate: The learning rate's peak.
        seed: Of weights and data.
        key: A digest of all that the run depends on.
        name: Of its directory.
        settings: As a configuration file would hold them.
        reads: By setting, the run whose last checkpoint it is given, of the same seed; or by the
            part in braces of its `prepare`.
        is_base: Whether others read it.
        prepare: The command that makes what it starts from, as words.
    """

    arm: str
    rate: float
    seed: int
    key: str
    name: str
    settings: dict[str, Any]
    reads: dict[str, Run] = field(default_factory=dict)
    is_base: bool = False
    prepare: tuple[str, ...] = ()

    @property
    def base(self) -> Run | None:
        """The run whose weights this one starts from; None: it begins anew."""
        return self.reads.get(STARTS)

    def directory(self, output: Path) -> Path:
        """Where its files are: in the comparison's directory, or beside it, of a base.

        So comparisons that start from the same one, side by side in one directory, train it once.
        """
        return (output.parent / "bases" if self.is_base else output / "runs") / self.name

    def prepared(self, output: Path) -> Path:
        """Where what its command makes is written, for it to start from."""
        return output / "prepared" / self.name

    def preparing(self, output: Path) -> list[str]:
        """The command that makes it, of the checkpoints of what it reads."""
        given = {name: str(run.directory(output) / "last.ckpt") for name, run in self.reads.items()}
        words = filled(self.prepare, given, self.seed)
        return [*words, "--out", str(self.prepared(output))]


class ArmFacts(NamedTuple):
    """What is known of an arm before it runs.

    Attributes:
        name: Of the arm.
        sizes: Its model's parameters and state.
        steps: Optimizer steps of a run.
        tokens: Tokens that a run trains on.
        batches: A digest of its first batches, of training and of validation.
        differs: Its settings that are not the first arm's, as text.
        trainable: Parameters that are trained, at the end at least; the others are frozen.
    """

    name: str
    sizes: Row
    steps: int
    tokens: int
    batches: str
    differs: str
    trainable: int


class Plan(NamedTuple):
    """A comparison.

    Attributes:
        name: In titles.
        arms: What is known of each, by name, in order.
        rates: Learning rates of each arm; one alone: nothing is chosen.
        seeds: All of them.
        tune_seeds: Those that choose the learning rate.
        metric: What arms are compared by, without its part.
        measured: "last" or "best": which checkpoint is measured.
        precision: Of training, such as 32-true.
        claims: Written before.
        runs: By (arm, rate, seed).
        bases: The runs that are trained first, whose checkpoints others read.
        of_bases: What is known of each of them, by its name.
        metric_of_base: The usual one of the task of what arms begin from.
    """

    name: str
    arms: dict[str, ArmFacts]
    rates: dict[str, list[float]]
    seeds: list[int]
    tune_seeds: list[int]
    metric: str
    measured: str
    precision: str
    claims: list[Claim]
    runs: dict[tuple[str, float, int], Run]
    bases: list[Run]
    of_bases: dict[str, ArmFacts]
    metric_of_base: str

    def facts(self, run: Run) -> ArmFacts:
        """What is known of a run's arm, or of the base that it is."""
        return (self.of_bases if run.is_base else self.arms)[run.arm]

    @property
    def beside(self) -> list[str]:
        """What is shown beside the metric: what claims are about, and what is left of the base."""
        found = [claim.metric for claim in self.claims if claim.metric]
        if self.metric_of_base:
            found.append(f"{self.metric_of_base}/{OF_BASE}")
        return [name for name in dict.fromkeys(found) if name not in (self.metric, "loss")]

    @property
    def early(self) -> list[str]:
        """Of those, what validation gives after some steps, such as `loss@100`."""
        return [name for name in self.beside if "@" in name]

    @property
    def chooses(self) -> bool:
        """Whether learning rates are chosen."""
        return any(len(rates) > 1 for rates in self.rates.values())

    def first(self) -> list[Run]:
        """The runs that learning rates are chosen by; all of them where nothing is chosen."""
        seeds = self.tune_seeds if self.chooses else self.seeds
        return [
            self.runs[arm, rate, seed]
            for seed in seeds
            for place in range(max(map(len, self.rates.values())))
            for arm, rates in self.rates.items()
            for rate in rates[place : place + 1]
        ]

    def then(self, arm: str, rate: float) -> list[Run]:
        """The runs that an arm's figures come from, once its learning rate is chosen."""
        return [self.runs[arm, rate, seed] for seed in self.seeds]

    @property
    def lower(self) -> bool:
        """Whether a lower metric is better."""
        return not any(word in self.metric for word in HIGHER)


def numbers(value: Any, option: str, kind: type) -> list[Any]:
    """The numbers of an option: ``0,1,2``, ``[0, 1, 2]`` or a list from a file.

    Args:
        value: What is given.
        option: For messages, such as --seeds.
        kind: int or float.

    Raises:
        ValueError: One is not a number of that kind, or is given twice.
    """
    entries = value.strip("[] ").split(",") if isinstance(value, str) else value
    entries = entries if isinstance(entries, list | tuple) else [entries]
    if not entries:
        raise ValueError(f"{option} names none: give one at least, or omit it")
    found = []
    for entry in entries:
        what = "an integer" if kind is int else "a number"
        try:
            if isinstance(entry, bool) or (kind is int and isinstance(entry, float)):
                raise ValueError
            number = kind(entry)
        except (TypeError, ValueError):
            raise ValueError(
                f"{option}: {str(entry).strip()!r} is not {what}; write {option} "
                + ("0,1,2" if kind is int else "1e-3,2e-3")
            ) from None
        if kind is float and not 0 < number < math.inf:
            raise ValueError(f"{option}: {number} must be above 0")
        if number in found:
            raise ValueError(f"{option}: {number} is given twice")
        found.append(number)
    return found


def make_plan(
    config: str | None,
    content: dict[str, Any],
    settings: dict[str, str],
    options: dict[str, Any],
    at_once: int,
) -> Plan:
    """Read the settings of all arms, and make sure that they may be compared.

    Args:
        config: The configuration file; None: the command line says all.
        content: What it holds.
        settings: The command line's, by their full names.
        options: The command's, by name; None where the file or the default decides.
        at_once: Runs that share a device.

    Raises:
        ValueError: Something is wrong with an option, an arm, or what arms differ in.
    """
    whose = config or "the command line"
    of_file = _of_file(content, whose)
    chosen = {name: options.get(name) for name in IN_FILE}
    chosen = {n: of_file.get(n) if value is None else value for n, value in chosen.items()}
    given_arms = content.get("arms")
    if given_arms is not None and not isinstance(given_arms, dict):
        raise ValueError(f"{whose}: arms is {given_arms!r}, and not settings by the arms' names")
    picked = options.get("arms")
    picked = [name.strip() for name in picked.split(",")] if picked else None
    arms = make_arms(given_arms, picked, settings, whose)
    names = list(map(str, given_arms or {}))
    claims = read_claims(content.get("claim"), names, whose)
    claims = [claim for claim in claims if _is_compared(claim, picked or names)]
    seeds, tune_seeds = (
        None if chosen[name] is None else numbers(chosen[name], f"--{name}", int)
        for name in ("seeds", "tune_seeds")
    )
    rates_of = _rates(chosen["learning_rates"], arms, names, whose)
    by_file = options.get("base") is None
    read = _files_of_bases(chosen["base"], chosen["reads"], by_file, config, names, whose)
    for setting in settings:  # which say themselves what is read
        read.pop(setting, None)
    made = read_prepared(chosen["prepare"], names, whose)
    if STARTS in settings:  # and what is started from
        made = {}
    files_of_made = _files_of_prepared(made, config, whose)
    bases: dict[str, Base] = {}
    with tempfile.TemporaryDirectory() as place:
        for path in dict.fromkeys(path for by_arm in read.values() for path in by_arm.values()):
            _resolve_bases(path, settings, Path(place), bases)
        for path, base_arm in dict.fromkeys(files_of_made.values()):
            _resolve_bases(path, settings, Path(place), bases, arm=base_arm)
        found: dict[str, Resolved] = {}
        prepared: dict[str, tuple[str, ...]] = {}
        reads: dict[str, dict[str, str]] = {}
        for arm in arms:
            says = (given_arms or {}).get(arm.of_file) or {}  # itself, what it reads
            prepared[arm.name] = words = () if STARTS in says else made.get(arm.of_file, ())
            reads[arm.name] = {
                setting: by_arm[key].stem
                for setting, by_arm in read.items()
                for key in ([arm.of_file] if arm.of_file in by_arm else [""])
                if key in by_arm and setting not in says and not (words and setting == STARTS)
            }
            for part in PLACES.findall(" ".join(words)):
                if part in files_of_made:
                    reads[arm.name][part] = name_of_base(*files_of_made[part])
            found[arm.name] = _resolve(arm, config, reads[arm.name], Path(place), words)
    facts = dict(_facts(found, _allowed(chosen["may_differ"])))
    of_bases = dict(_facts_of_bases(bases))
    for name, entry in found.items():
        _check_reads(f"arm {name}", entry.task, reads[name], bases)
    for name, base in bases.items():
        _check_reads(f"base {name}", base.resolved.task, base.reads, bases)
    first = next(iter(found.values()))
    seeds = seeds or [int(first.settings["seed_everything"] or 0)]
    for seed in seeds:
        if not 0 <= seed < 2**32:  # what NumPy's generators take
            raise ValueError(f"--seeds: {seed} must be from 0 to {2**32 - 1}")
    for seed in tune_seeds or []:
        if seed not in seeds:
            raise ValueError(f"--tune_seeds: {seed} is none of the seeds {_listed(seeds)}")
    measured = chosen["measure"] or "last"
    if measured not in ("last", "best"):
        raise ValueError(f"--measure {measured} is neither last nor best")
    metric = _metric(chosen["metric"], [*found.values()], whose)
    interval = first.settings["trainer"]["val_check_interval"]
    for claim in claims:
        _check_metric(
            claim.metric, found.values(), bases, next(iter(facts.values())), interval, whose
        )
    rates_of = {
        name: rates_of.get(name) or [float(entry.settings["model"]["learning_rate"])]
        for name, entry in found.items()
    }
    precision = _precision(first.settings)
    _check_hardware(found, facts, at_once)
    runs_of_bases: dict[tuple[str, int], Run] = {}
    for seed in seeds:
        for name, base in bases.items():  # each after those that it reads
            of_base = {setting: runs_of_bases[read, seed] for setting, read in base.reads.items()}
            own, named = base.resolved.settings, _named(base.resolved)
            rate = float(own["model"]["learning_rate"])
            runs_of_bases[name, seed] = _run(name, own, named, rate, seed, of_base, is_base=True)
    runs = {}
    for name, entry in found.items():
        named = _named(entry)
        for rate in rates_of[name]:
            for seed in seeds:
                of_arm = {s: runs_of_bases[base_name, seed] for s, base_name in reads[name].items()}
                runs[name, rate, seed] = _run(
                    name, entry.settings, named, rate, seed, of_arm, prepared=prepared[name]
                )
    return Plan(
        name=Path(config).stem if config else "compare",
        arms=facts,
        rates=rates_of,
        seeds=seeds,
        tune_seeds=tune_seeds or seeds,
        metric=metric,
        measured=measured,
        precision=precision,
        claims=claims,
        runs=runs,
        bases=list(runs_of_bases.values()),
        of_bases=of_bases,
        metric_of_base=next(
            (
                _metric(None, [bases[read[STARTS]].resolved], "")
                for read in reads.values()
                if STARTS in read
            ),
            "",
        ),
    )


def _listed(entries: list[Any]) -> str:
    return ", ".join(map(str, entries))


def _allowed(given: Any) -> list[str]:
    entries = given.split(",") if isinstance(given, str) else given or []
    entries = entries if isinstance(entries, list | tuple) else [entries]
    names = [str(entry).strip() for entry in entries]
    for name in names:
        if name not in MAY_DIFFER:
            raise ValueError(f"--may_differ {name}: it takes {' and '.join(MAY_DIFFER)}")
    return names


def _rates(given: Any, arms: list[Arm], names: list[str], whose: str) -> dict[str, list[float]]:
    """The learning rates to choose from, by the arm: the same of all, or each arm's own."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        rates = numbers(given, "--learning_rates", float)
        return {arm.name: rates for arm in arms}
    found = {}
    for name, entries in given.items():
        if name not in names:
            raise ValueError(
                f"{whose}: learning_rates: no arm is called {name!r}; {_near(name, names)}"
            )
        found[name] = numbers(entries, f"learning_rates.{name}", float)
    for arm in arms:
        if arm.of_file not in found:
            raise ValueError(f"{whose}: learning_rates names none for the arm {arm.of_file}")
    return {arm.name: found[arm.of_file] for arm in arms}


def _is_compared(claim: Claim, picked: list[str]) -> bool:
    """Whether a claim is about two of the arms that are taken."""
    control = claim.control or next(iter(picked), None)
    there = all(name is None or name in picked for name in (claim.arm, claim.control))
    return there and (claim.arm is None or claim.arm != control)


def _of_file(content: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """What a file's `compare` says, by its names.

    Args:
        content: What the file holds.
        whose: For messages: its name.

    Raises:
        ValueError: It is no settings by name, has one of another name, or one of another kind.
    """
    given = content.get("compare")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{whose}: compare is {given!r}: it takes options by name, as seeds: [0]")
    for name, value in given.items():
        if name not in IN_FILE:
            raise ValueError(f"{whose}: compare has no {name!r}; {nearest(str(name), [*IN_FILE])}")
        if name in ("metric", "measure") and not isinstance(value, str | None):
            raise ValueError(f"{whose}: compare: {name} is {value!r}: it takes one name")
    return given


def _near(name: Any, names: list[str]) -> str:
    return nearest(str(name), names) if names else "it has none"


# ---------------------------------------------------------------------------- bases


class Base(NamedTuple):
    """What is trained before arms are.

    Attributes:
        path: Of its configuration file.
        resolved: Its settings, model and task.
        reads: By setting, the name of the base whose last checkpoint it is given.
    """

    path: Path
    resolved: Resolved
    reads: dict[str, str]


def _files_of_bases(
    base: Any, reads: Any, by_file: bool, config: str | None, names: list[str], whose: str
) -> dict[str, dict[str, Path]]:
    """By setting, the files of what is trained first, by the arm that reads it; "": every arm.

    Args:
        base: A file's name, or a file's name for each of some arms: what they begin from.
        reads: By setting, the same: what else they are given.
        by_file: Whether the configuration file says `base`: its names are relative to itself.
        config: That file.
        names: Of its arms.
        whose: For messages: its name.
    """
    if reads is not None and not isinstance(reads, dict):
        raise ValueError(
            f"{whose}: reads is {reads!r}: it takes configuration files by setting, such as "
            "model.reward_model: reward.yaml"
        )
    beside = Path(config).parent if config else Path()
    found: dict[str, dict[str, Path]] = {}
    starts = {} if base is None else {STARTS: base}
    for setting, given in (starts | (reads or {})).items():
        if not str(setting).startswith("model."):
            raise ValueError(f"{whose}: reads: {setting!r} is not a setting of the model")
        what = "base" if setting == STARTS else f"reads: {setting}"
        above = Path() if setting == STARTS and not by_file else beside
        entries = given if isinstance(given, dict) else {"": given}
        for name, file in entries.items():
            if name and name not in names:
                raise ValueError(
                    f"{whose}: {what}: no arm is called {name!r}; {_near(name, names)}"
                )
            if not isinstance(file, str):
                raise ValueError(
                    f"{whose}: {what} is {file!r}: it takes the name of a configuration file"
                )
        found[setting] = {str(name): above / file for name, file in entries.items()}
    return found


def _files_of_prepared(
    made: Mapping[str, tuple[str, ...]], config: str | None, whose: str
) -> dict[str, tuple[Path, str]]:
    """By what stands in braces, the file of what is trained first, and which of its arms."""
    beside = Path(config).parent if config else Path()
    found = {}
    for words in made.values():
        for part in PLACES.findall(" ".join(words)):
            if part == "{seed}":
                continue
            file, _, arm = part[1:-1].partition(":")
            if not file.endswith((".yaml", ".yml")):
                raise ValueError(
                    f"{whose}: prepare: {part} is neither {{seed}} nor a configuration file, such "
                    "as {base.yaml}, or {base.yaml:arm} for one of its arms"
                )
            found[part] = beside / file, arm
    return found


def name_of_base(path: Path, arm: str) -> str:
    """What is trained by a file, or by one of its arms, is called this."""
    return f"{path.stem}_{arm}" if arm else path.stem


def _resolve_bases(
    path: Path,
    settings: dict[str, str],
    place: Path,
    found: dict[str, Base],
    above: tuple[Path, ...] = (),
    arm: str = "",
) -> None:
    """Add a base to those that are found, after those that its own `compare` names.

    Args:
        path: Of its configuration file.
        settings: The command line's, by their full names.
        place: The directory under which models are written.
        found: The bases so far, by name, each after those that it reads.
        above: The files that have led here.
        arm: Which of the file's arms it is; "": the file as it is.
    """
    name, whole = name_of_base(path, arm), path.resolve()
    if whole in above:
        raise ValueError(f"base {path}: it begins from itself, by `compare` of {above[-1].name}")
    if name in found:
        if found[name].path.resolve() != whole:
            raise ValueError(
                f"the bases {found[name].path} and {path} have one name, and need two: rename one"
            )
        return
    of_file = _of_file(files.read(path), str(path))
    own = _files_of_bases(of_file.get("base"), of_file.get("reads"), True, str(path), [], str(path))
    if of_file.get("prepare") is not None:
        raise ValueError(f"base {path}: a base prepares nothing: let it begin from a base itself")
    wanted = {setting: by_arm[""] for setting, by_arm in own.items()}
    for below in wanted.values():
        _resolve_bases(below, settings, place, found, (*above, whole))
    reads = {setting: below.stem for setting, below in wanted.items()}
    found[name] = Base(path, resolve_base(path, settings, place / name, reads, arm), reads)


def resolve_base(
    path: Path,
    settings: dict[str, str],
    place: Path,
    reads: Mapping[str, str] | None = None,
    arm: str = "",
) -> Resolved:
    """The settings of a base, and its model as it begins, written where arms can be read from it.

    So what is wrong with an arm is said before its base is trained.

    Args:
        path: Of its configuration file.
        settings: The command line's, by their full names: those that say how runs are run.
        place: The directory that its model is written to, as of `archzoo.save_pretrained`.
        reads: By setting, the name of the base that it is given; its model lies beside `place`.
        arm: Which of the file's arms it is; "": the file as it is.

    Raises:
        ValueError: Something is wrong with a setting; the message names the file.
    """
    given = [word for n in OF_BASES if n in settings for word in (f"--{n}", settings[n])]
    given += _given(reads or {}, place.parent)
    try:
        chosen = ["--arm", arm] if arm else []
        found = resolve(["--config", str(path), *chosen, *given])
        _check_trainer("base", found)
        found.task.prepare()
        decoder = found.model.decoder or _built(found)
        found.model.check_beside(decoder, found.task, (reads or {}).keys())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"base {path}: {error}") from None
    _name_bases(found.settings, reads or {})
    save_pretrained(place, decoder, found.task.tokenizer, found.task.config())
    return found


def _given(reads: Mapping[str, str], place: Path) -> list[str]:
    """What is read, as options: the models as they begin."""
    return [
        word
        for setting, name in reads.items()
        if not PLACES.match(setting)
        for word in (f"--{setting}", str(place / name))
    ]


def _name_bases(settings: dict[str, Any], reads: Mapping[str, str]) -> None:
    """Say in settings which bases are read, whose place is known when they are trained."""
    for setting, name in reads.items():
        if PLACES.match(setting):  # `prepare` reads it, and no setting
            continue
        *sections, last = setting.split(".")
        within = settings
        for section in sections:
            within = within[section]
        within[last] = f"those of the base {name}" if setting == STARTS else f"the base {name}"


def _check_reads(
    whose: str, task: Task, reads: Mapping[str, str], bases: Mapping[str, Base]
) -> None:
    """Refuse bases of another vocabulary, and a reward model that is none."""
    for setting, base in reads.items():
        objective = bases[base].resolved.settings.get("objective")
        if setting == REWARDS and objective != "RewardModel":
            raise ValueError(
                f"{whose}: its {REWARDS} is the base {base}, which has objective={objective}: name "
                "a file of objective: RewardModel"
            )
        if task.tokenizer.files() != bases[base].resolved.task.tokenizer.files():
            raise ValueError(
                f"{whose}: its base {base} is trained with another vocabulary than its task's: "
                + task.other_vocabulary
            )


def _resolve(
    arm: Arm,
    config: str | None,
    reads: Mapping[str, str],
    place: Path,
    words: tuple[str, ...] = (),
) -> Resolved:
    """An arm, which reads bases by the names that `reads` has by setting.

    What a command prepares for it is made here of the models as they begin, so that what is wrong
    with the command is said before anything is trained.
    """
    start = ["--config", config] if config else []
    given = _given(reads, place)
    try:
        if words:
            made = place / "prepared" / file_name(arm.name)
            models = {name: str(place / base) for name, base in reads.items()}
            prepare([*filled(words, models, 0), "--out", str(made)])
            given += [f"--{STARTS}", str(made)]
        found = resolve([*start, *given, *arm.arguments])
        found.model.check_beside(_decoder(found), found.task, reads.keys())
    except (FileNotFoundError, ValueError) as error:
        said = str(error).replace(f"{place}/", "the base ")
        raise ValueError(f"arm {arm.name}: {said}") from None
    _name_bases(found.settings, reads)
    found.settings["stopping_threshold"] = None  # an arm that learns faster is not cut
    if words:
        found.settings["model"]["weights"] = f"made by archzoo {' '.join(words)}"
    _check_trainer(f"arm {arm.name}", found)
    return found


def _check_trainer(whose: str, found: Resolved) -> None:
    trainer = found.settings["trainer"]
    if str(trainer["devices"]) not in ("auto", "1") or trainer["num_nodes"] != 1:
        raise ValueError(
            f"{whose}: trainer.devices={trainer['devices']}: a run of compare takes one "
            "device; --at_once says how many runs share it"
        )
    if trainer["fast_dev_run"]:
        raise ValueError("trainer.fast_dev_run tries one run out, with archzoo fit")


# ---------------------------------------------------------------------------- what arms are


def _facts(found: dict[str, Resolved], allowed: list[str]) -> Iterator[tuple[str, ArmFacts]]:
    """What is known of each arm; refuses those that see other data or more of it."""
    first: tuple[str, Resolved, ArmFacts] | None = None
    for name, resolved in found.items():
        try:
            entry = _facts_of(name, resolved)
        except ValueError as error:
            raise ValueError(f"arm {name}: {error}") from None
        tokens, batches = entry.tokens, entry.batches
        differs = [] if first is None else _differences(first[1].settings, resolved.settings)
        entry = entry._replace(differs="; ".join(differs))
        if first is None:
            first = name, resolved, entry
        of_data = [text for text in differs if text.startswith("data.")]
        if "data" not in allowed and (of_data or batches != first[2].batches):
            what = ", ".join(of_data) or "their first batches are not the same"
            raise ValueError(
                f"the arms {first[0]} and {name} differ in data ({what}): what one is better at is "
                "no longer the model's; --may_differ data compares them anyway"
            )
        if not allowed and tokens != first[2].tokens:
            raise ValueError(
                f"the arms {first[0]} and {name} train on {first[2].tokens:,} and {tokens:,} "
                "tokens; --may_differ tokens compares them anyway"
            )
        yield name, entry


def _facts_of_bases(bases: Mapping[str, Base]) -> Iterator[tuple[str, ArmFacts]]:
    """What is known of each base by itself."""
    for name, base in bases.items():
        try:
            yield name, _facts_of(name, base.resolved)
        except ValueError as error:
            raise ValueError(f"base {name}: {error}") from None


def _facts_of(name: str, resolved: Resolved) -> ArmFacts:
    """What is known of one arm, or of a base, by itself."""
    decoder = _decoder(resolved)
    steps, accumulated = _steps(resolved), resolved.settings["trainer"]["accumulate_grad_batches"]
    resolved.model.check_task(resolved.task, accumulated)
    return ArmFacts(
        name=name,
        sizes=row_of(name, dict(decoder.config)),
        steps=steps,
        tokens=steps * accumulated * resolved.task.batch_size * resolved.task.context_length,
        batches=digest(resolved.task),
        differs="",
        trainable=_trainable(decoder, resolved),
    )


def _trainable(decoder: Decoder, resolved: Resolved) -> int:
    """Parameters that are trained at the end, when all that joins on the way is there."""
    freeze, unfreeze, every = resolved.model.frozen.values()
    if freeze or unfreeze or every is not None:
        freezing = Freezing(decoder, freeze or (), unfreeze or (), every)
        freezing.apply(decoder, len(freezing.stages) - 1)
    return learned_count(decoder)


def _decoder(resolved: Resolved) -> Decoder:
    """An arm's decoder: what it starts from, or one that is built without memory.

    Raises:
        ValueError: It would not fit into this machine's memory, or its parts do not fit together.
    """
    task, module = resolved.task, resolved.model
    task.prepare()
    if module.decoder is None:  # it is asked for again
        with torch.device("meta"):
            module.decoder = _built(resolved)
    check_size(module.decoder.config)
    module.decoder.bind(task, training=True)
    return module.decoder


def _built(resolved: Resolved) -> Decoder:
    """The decoder that the settings describe, for the vocabulary of its task."""
    model, task = resolved.model, resolved.task
    model.architecture["vocab_size"] = task.vocab_size
    if model.architecture.get("context_length") is None:
        model.architecture["context_length"] = task.context_length
    return model.build()


def _named(resolved: Resolved) -> dict[str, Any]:
    """What settings only name: a preset's sizes, and the text that a path leads to."""
    config = dict(_decoder(resolved).config)
    return {"decoder": config, "fingerprint": resolved.task.fingerprint()}


def _steps(resolved: Resolved) -> int:
    """Optimizer steps of a run, as Lightning counts them."""
    trainer, batches = resolved.settings["trainer"], len(resolved.task.train_dataloader())
    limit = trainer["limit_train_batches"]
    if isinstance(limit, int) and not isinstance(limit, bool):
        batches = min(batches, limit)
    elif isinstance(limit, float):
        batches = int(batches * limit)
    most = trainer["max_steps"] if trainer["max_steps"] is not None else -1
    epochs = trainer["max_epochs"]
    if most < 0 and epochs in (None, -1):
        raise ValueError("trainer.max_steps or trainer.max_epochs must say where a run ends")
    ends = [most] if most >= 0 else []
    if epochs not in (None, -1):
        ends.append(epochs * -(-batches // trainer["accumulate_grad_batches"]))
    if min(ends) < 1:
        raise ValueError("trainer.max_steps and trainer.max_epochs leave no step to train")
    return int(min(ends))


def digest(task: Task) -> str:
    """A digest of a task's first batches: arms with the same one see the same, in the same order.

    Args:
        task: Of one arm, prepared.
    """
    found = hashlib.sha256()
    training, validation = task.train_dataloader(), task.evaluation_loader("validation")
    last = len(validation) - 1
    for loader, wanted in ((training, BATCHES), (validation, sorted({0, last} - {-1}))):
        for number in wanted:
            batch: dict[str, Tensor] = loader.batch(number)
            for name in sorted(batch):
                tensor = batch[name].contiguous()
                found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:12]


def _differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The settings in which two arms differ, each as `name=value` of the other."""
    ours, theirs = dict(_flat(first)), dict(_flat(other))
    return [
        f"{name}={theirs.get(name)}"
        for name in dict.fromkeys([*theirs, *ours])
        if ours.get(name) != theirs.get(name) and name != "name"
    ]


def _flat(settings: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its full name, without what stands for the form of a class."""
    if not isinstance(settings, dict):
        yield above, settings
        return
    for name, value in settings.items():
        short = above if name == "init_args" else f"{above}.{name}".lstrip(".")
        yield from _flat(value, short.removesuffix(".class_path"))


def matched(arm: ArmFacts, control: ArmFacts) -> str:
    """One line: an arm's parameters against another's, and whether they match.

    Of those that are trained, where one of them trains only some: an adapter's.
    """
    some = any(entry.trainable < entry.sizes.parameters for entry in (arm, control))
    ours, theirs = (entry.trainable if some else entry.sizes.parameters for entry in (arm, control))
    difference = ours / theirs - 1 if theirs else math.inf
    verdict = "matched" if abs(difference) <= MATCHED else "NOT matched"
    what = "trained parameters" if some else "parameters"
    return f"{ours:,} {what} against {theirs:,}, {difference:+.1%}: {verdict}"


def _measured(arms: Iterable[Resolved]) -> list[str]:
    """What evaluating them gives, each once: of their own problems, and of further ones."""
    known: list[str] = []
    for arm in arms:
        extra = arm.task.extra_evaluations("test")
        known += arm.model.measures(arm.task)
        known += [f"{metric}/{name}" for name in extra for metric in arm.task.extra_metrics]
        known += ["exact_match/ood"] if any(isinstance(name, int) for name in extra) else []
    return list(dict.fromkeys(known))


def _metric(given: str | None, arms: Sequence[Resolved], whose: str) -> str:
    """What arms are compared by."""
    if given is None:
        known = _measured(arms[:1])
        return next(name for name in USUAL if name in known)
    known = _measured(arms)
    name = given.rpartition("test/")[2].removeprefix("validation/")
    if name not in known:
        raise ValueError(f"--metric {given}: {whose} does not measure it; {nearest(name, known)}")
    return name


def _check_metric(
    given: str | None,
    arms: Iterable[Resolved],
    bases: Mapping[str, Base],
    arm: ArmFacts,
    interval: Any,
    whose: str,
) -> None:
    """Refuse a claim's metric that no run has.

    Beside those of the test part it may be one of validation after some steps (`loss@100`), or one
    of the base's own task (`exact_match/base`).
    """
    if given is None:
        return
    name, at, step = given.partition("@")
    if at and not (step.isdigit() and 0 < int(step) <= arm.steps):
        raise ValueError(f"{whose}: claim: {given}: give a step up to {arm.steps}, as loss@100")
    if at and isinstance(interval, int) and int(step) % interval:
        raise ValueError(
            f"{whose}: claim: {given}: validation runs every {interval} steps; give a multiple"
        )
    known = _measured(arms)
    if not at:
        tasks = [base.resolved.task for base in bases.values()]
        known += [f"{name}/{OF_BASE}" for task in tasks for name in ("loss", *task.metrics)]
    if name not in known:
        raise ValueError(f"{whose}: claim: no run measures {given}; {nearest(name, known)}")


# ---------------------------------------------------------------------------- runs


def _precision(settings: dict[str, Any]) -> str:
    trainer = settings["trainer"]
    return str(trainer["precision"] or usual_precision(dict(trainer)) or "32-true")


def _run(
    arm: str,
    of_arm: dict[str, Any],
    named: dict[str, Any],
    rate: float,
    seed: int,
    reads: dict[str, Run],
    is_base: bool = False,
    prepared: tuple[str, ...] = (),
) -> Run:
    settings = copy.deepcopy(of_arm)
    settings["model"]["learning_rate"] = rate

    def depends(what: Callable[[Run], str]) -> dict[str, Any]:
        others = {setting: what(run) for setting, run in reads.items()}
        base = others.pop(STARTS, None)
        return named | ({"base": base} if base else {}) | ({"reads": others} if others else {})

    common = _digest(settings, depends(lambda run: run.name.rpartition("_")[0]))
    settings["seed_everything"] = seed
    data = settings["data"]
    if "seed" in (data.get("init_args") or {}):
        data["init_args"]["seed"] = seed
    # It ends in the seed: what comes before is the same for all seeds of an arm.
    name = f"{file_name(arm)}_lr{rate:g}_{common[:6]}_{seed}"
    key = _digest(settings, depends(lambda run: run.key))
    return Run(arm, rate, seed, key, name, settings | {"name": name}, reads, is_base, prepared)


def _digest(settings: dict[str, Any], named: dict[str, Any]) -> str:
    """A digest of all that a run's figures depend on."""
    depends = copy.deepcopy(settings)
    for name in ("name", "resume"):
        depends.pop(name)
    for name in ("default_root_dir", "enable_progress_bar"):
        depends["trainer"].pop(name)
    (depends["data"].get("init_args") or {}).pop("cache_dir", None)
    depends["trainer"]["precision"] = _precision(settings)
    text = json.dumps(depends | named, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_hardware(found: dict[str, Resolved], facts: dict[str, ArmFacts], at_once: int) -> None:
    """Refuse models of which `at_once` do not fit into the memory of what they run on.

    Weights, gradients and AdamW's means alone are counted: activations come on top.
    """
    name, largest = max(facts.items(), key=lambda item: item[1].sizes.parameters)
    count = largest.sizes.parameters
    needed = COPIES * 4 * count * at_once
    memory, whose = memory_of(found[name].settings["trainer"]["accelerator"])
    if needed > memory:
        runs = "a run takes" if at_once == 1 else f"{at_once} runs at once take"
        raise ValueError(
            f"arm {name}: {runs} {needed / 1e9:,.1f} GB for {count:,} parameters, their gradients "
            f"and AdamW's means, and {whose} has {memory / 1e9:,.1f} GB"
        )
