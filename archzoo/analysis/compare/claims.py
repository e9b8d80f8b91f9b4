"""What a comparison says of a claim that was written down before it was run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from archzoo.analysis.compare.statistics import paired, seeds_needed
from archzoo.names import nearest

RULES = ("difference", "equivalence", "non_inferiority")
KEYS = ("arm", "control", "metric", "paper", "sign", "margin", "rule", "relative")
SHARE = 1 / 3  # of the paper's effect: an interval within it refutes the paper's
# Within the names of metrics whose differences are in their own unit, and no fractions of the
# control's: it may be 0 or below.
OWN_UNIT = ("exact_match", "accuracy", "reward", "score", "kl")


def is_relative(metric: str) -> bool:
    """Whether differences of a metric are fractions of the control's."""
    return not any(word in metric for word in OWN_UNIT)


class Claim(NamedTuple):
    """One claim: an arm against its control in one metric.

    Effects are relative to the control (-0.035: 3.5 % less), and in the metric's own unit where
    higher is better (0.02: two points of exact match) and of a divergence, in nats; unless
    `relative` says otherwise.

    Attributes:
        arm: Which arm it is about. None: every arm but the control.
        control: The arm that it is compared with. None: the first.
        metric: Of the test part, such as bits_per_byte; of validation after some steps (loss@100),
            or of the base's own task (exact_match/base). None: the comparison's.
        paper: The effect that the paper reports. None: it names no size.
        sign: -1: the arm's metric is lower than the control's; 1: it is higher.
        margin: Within it an effect counts as none. None: a third of the paper's.
        rule: "difference", "equivalence" or "non_inferiority".
        relative: Whether effects are fractions of the control's. None: as above.
    """

    arm: str | None
    control: str | None
    metric: str | None
    paper: float | None
    sign: int
    margin: float | None
    rule: str
    relative: bool | None = None

    def is_relative(self, metric: str) -> bool:
        """Whether its effects on a metric are fractions of the control's."""
        return is_relative(metric) if self.relative is None else self.relative


class Verdict(NamedTuple):
    """What the rule makes of the runs.

    Attributes:
        claim: Which one.
        arm: Of which arm.
        control: Against which.
        verdict: "holds", "holds in size", "refuted" or "undecided".
        text: One line with the numbers.
    """

    claim: Claim
    arm: str
    control: str
    verdict: Literal["holds", "holds in size", "refuted", "undecided"]
    text: str


def read_claims(given: Any, arms: list[str], whose: str) -> list[Claim]:
    """The claims of a configuration's `claim`: a mapping, or a list of them.

    Args:
        given: What the file holds; None: no claim.
        arms: The arms' names.
        whose: For messages: the file's name.

    Raises:
        ValueError: A key, an arm or a number is wrong; the message names it.
    """
    if given is None:
        return []
    entries = given if isinstance(given, list) else [given]
    return [_claim(entry, arms, f"{whose}: claim") for entry in entries]


def _claim(entry: Any, arms: list[str], whose: str) -> Claim:
    if not isinstance(entry, dict):
        raise ValueError(f"{whose} is {entry!r}: it takes {', '.join(KEYS)}")
    for name in entry:
        if name not in KEYS:
            raise ValueError(f"{whose} has no {name!r}; {nearest(str(name), list(KEYS))}")
    for name in ("arm", "control"):
        if entry.get(name) is not None and entry[name] not in arms:
            raise ValueError(f"{whose}: {name} {entry[name]!r}: the arms are {', '.join(arms)}")
    numbers = {}
    for name in ("paper", "margin", "sign"):
        value = numbers[name] = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{whose}: {name}={value!r} is not a number")
    relative = entry.get("relative")
    if relative not in (None, True, False):
        raise ValueError(f"{whose}: relative={relative!r} is neither true nor false")
    rule = entry.get("rule", "difference")
    if rule not in RULES:
        raise ValueError(f"{whose}: rule={rule!r} is none of {', '.join(RULES)}")
    paper, margin, sign = numbers["paper"], numbers["margin"], numbers["sign"]
    if sign is None:
        sign = 0 if not paper else 1 if paper > 0 else -1
    if sign not in (-1, 0, 1) or (not sign and rule != "equivalence"):
        raise ValueError(f"{whose}: sign={sign} must be -1 (lower) or 1 (higher than the control)")
    if margin is None and paper is not None:
        margin = abs(paper) * SHARE
    if rule != "difference" and not margin:
        raise ValueError(f"{whose}: {rule} needs a margin, within which an effect is none")
    arm, control, metric = (entry.get(name) for name in ("arm", "control", "metric"))
    return Claim(arm, control, metric, paper, sign, margin, rule, relative)


def judge(
    claim: Claim, values: Mapping[str, Mapping[int, float]], *, relative: bool
) -> list[Verdict]:
    """The verdicts of a claim, one for each arm that it is about.

    With the 95 % interval of the paired difference to the control over the seeds:

    * ``refuted``: the interval lies wholly on the other side of 0, or wholly within the margin,
      which is a third of the paper's effect where none is given;
    * ``holds in size``: it lies wholly on the paper's side of 0, and contains the paper's effect;
    * ``holds``: it lies wholly on the paper's side of 0;
    * ``undecided``: anything else, with the seeds that it would take.

    By the rule "equivalence" a claim holds where the interval lies wholly within the margin, and is
    refuted where it lies wholly outside. By "non_inferiority" it holds where the interval is
    nowhere worse than by the margin (lower than -margin for a sign of 1, higher than it for -1),
    and is refuted where it is everywhere.

    Args:
        claim: Which one.
        values: The metric of every arm by seed, in the order of the arms.
        relative: Whether effects are fractions of the control's mean.
    """
    control = claim.control or next(iter(values))
    arms = [claim.arm] if claim.arm else [arm for arm in values if arm != control]
    return [_judge(claim, arm, control, values, relative) for arm in arms]


def _judge(
    claim: Claim,
    arm: str,
    control: str,
    values: Mapping[str, Mapping[int, float]],
    relative: bool,
) -> Verdict:
    found = paired(values.get(arm, {}), values.get(control, {}))
    if found is None:
        text = f"{arm} against {control}: undecided: they share no whole run of a seed"
        return Verdict(claim, arm, control, "undecided", text)
    difference = found.relative() if relative else found
    unit, scale = (" %", 100) if relative else ("", 1)

    def show(number: float) -> str:
        return f"{number * scale:+.3g}{unit}"

    about = f"{arm} against {control}{f', {claim.metric}' if claim.metric else ''}: "
    size = "" if claim.paper is None else f"; the paper {show(claim.paper)}"
    if difference.low is None or difference.high is None:
        text = f"{about}undecided at 1 seed: {show(difference.mean)}, an anecdote{size}"
        return Verdict(claim, arm, control, "undecided", text)
    verdict = _verdict(claim, difference.low, difference.high)
    interval = f"({show(difference.low)} to {show(difference.high)}, {difference.seeds} seeds)"
    word: str = verdict
    if verdict == "undecided":
        word = f"undecided at {difference.seeds} seeds"
    text = f"{about}{word}: {show(difference.mean)} {interval}{size}"
    if verdict == "undecided" and difference.spread is not None:
        effect = claim.paper or difference.mean
        if claim.rule == "equivalence":
            effect = claim.margin or 0.0
        elif claim.rule == "non_inferiority":  # how far it is from the margin
            effect = difference.mean + claim.sign * (claim.margin or 0.0)
        needed = seeds_needed(difference.spread, effect or 0.0)
        text += f"; {needed:,} seeds would decide" if needed else "; no number of seeds would"
    return Verdict(claim, arm, control, verdict, text)


def _verdict(
    claim: Claim, low: float, high: float
) -> Literal["holds", "holds in size", "refuted", "undecided"]:
    margin = claim.margin or 0.0
    within = margin > 0 and -margin <= low and high <= margin
    if claim.rule == "equivalence":
        outside = low > margin or high < -margin
        return "holds" if within else "refuted" if outside else "undecided"
    if claim.rule == "non_inferiority":
        worst, best = (-low, -high) if claim.sign > 0 else (high, low)
        return "holds" if worst <= margin else "refuted" if best > margin else "undecided"
    ours, theirs = (low > 0, high < 0) if claim.sign > 0 else (high < 0, low > 0)
    if theirs or within:
        return "refuted"
    if not ours:
        return "undecided"
    in_size = claim.paper is not None and low <= claim.paper <= high
    return "holds in size" if in_size else "holds"
