"""The rules of the interface as checks: `archzoo.check(MyMixer)` holds a class to all of them.

Each check is a function from a `Subject` (a class with its arguments and sizes) to one line that
says what was measured, and it raises `Violation` with what failed, by how much, and the rule. The
recurrent form is the reference for the others, since `step` defines a mixer. Values are compared
by relative RMS, ``|a - b| / |b|``, in float64 wherever precision is not the question, so that a
rule broken by a little is told from rounding.

The table of all checks and what runs them are here; beside them

- subject.py: what is checked, and at which sizes;
- measure.py: how, and how exactly;
- mixers.py, feedforward.py, positions.py, adapters.py: the checks of each slot;
- in_decoder.py: those that need a decoder around the part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from archzoo.contract import adapters, feedforward, in_decoder, mixers, positions
from archzoo.contract.measure import Violation, first_line, relative_error
from archzoo.contract.subject import SIZES, Subject

__all__ = [
    "CHECKS",
    "SIZES",
    "Check",
    "ContractError",
    "Finding",
    "Report",
    "Subject",
    "Violation",
    "check",
    "check_command",
    "examine",
    "relative_error",
    "run_check",
]

Check = Callable[[Subject], str]

MIXER_CHECKS: dict[str, Check] = {
    "interface": mixers.mixer_interface,
    "forms equal": mixers.mixer_forms,
    "reach": mixers.mixer_reach,
    "hand-offs": mixers.mixer_handoffs,
    "causal": mixers.mixer_causal,
    "documents": mixers.mixer_documents,
    "batch independence": mixers.mixer_batch,
    "state round trip": mixers.mixer_state,
    "fixed state": mixers.mixer_fixed_state,
    "gradients": mixers.mixer_gradients,
    "casts": mixers.mixer_casts,
    "32 heads": mixers.mixer_heads,
    "deterministic": mixers.mixer_repeats,
    "save and load": mixers.mixer_save,
    "devices": mixers.mixer_devices,
    "in a decoder": in_decoder.mixer_model,
    "activation checkpointing": in_decoder.checkpointing,
}

#: The checks of each slot, by the name they are reported under.
CHECKS: dict[str, dict[str, Check]] = {
    "convolution": MIXER_CHECKS,  # in a decoder it stands before one of the usual kind
    "mixer": MIXER_CHECKS,
    "feed_forward": {
        "interface": feedforward.feed_forward_interface,
        "each token alone": feedforward.feed_forward_tokens,
        "gradients": feedforward.feed_forward_gradients,
        "casts": feedforward.feed_forward_casts,
        "deterministic, save and load": feedforward.feed_forward_repeats,
        "activation checkpointing": in_decoder.checkpointing,
    },
    "router": {
        "interface": feedforward.router_interface,
        "each token alone": feedforward.router_tokens,
        "casts": feedforward.router_casts,
        "deterministic, save and load": feedforward.router_repeats,
        "after a step": feedforward.router_after_step,
        "in a mixture": feedforward.router_mixture,
    },
    "embedding": {
        "interface": positions.embedding_interface,
        "segments and documents": positions.embedding_segments,
        "training": positions.embedding_training,
        "deterministic, save and load": positions.embedding_repeats,
        "activation checkpointing": in_decoder.checkpointing,
    },
    "rotary": {
        "interface": positions.rotary_interface,
        "casts": positions.rotary_precision,
        "gradients": positions.rotary_gradients,
    },
    "bias": {
        "interface": positions.bias_interface,
        "casts": positions.bias_precision,
        "gradients": positions.bias_gradients,
    },
    "linear": {
        "interface": adapters.linear_interface,
        "gradients": adapters.linear_gradients,
        "in a decoder": adapters.linear_model,
    },
    "adapter": {
        "interface": adapters.adapter_interface,
        "identity at start": adapters.adapter_start,
        "gradients": adapters.adapter_gradients,
        "frozen base": adapters.adapter_frozen,
        "weight decay": adapters.adapter_decay,
        "forms equal": adapters.adapter_forms,
        "named blocks": adapters.adapter_blocks,
        "merged": adapters.adapter_merged,
        "save and load": adapters.adapter_saved,
        "copies": adapters.adapter_copied,
        "collapsed": adapters.adapter_collapsed,
        "casts": adapters.adapter_casts,
    },
}


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        name: Of the check.
        passed: Whether the rule holds.
        detail: What was measured, or what failed, by how much, and the rule.
    """

    name: str
    passed: bool
    detail: str


class Report(list[Finding]):
    """The findings about one part, in the order of the checks.

    Args:
        subject: The part, as it is shown.
        findings: One for each check.
    """

    def __init__(self, subject: str, findings: Sequence[Finding]) -> None:
        super().__init__(findings)
        self.subject = subject

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """The findings of broken rules."""
        return [finding for finding in self if not finding.passed]

    def show(self) -> None:
        """Print the findings as a table."""
        from rich.table import Table
        from rich.text import Text

        from archzoo.analysis.tables import Screen

        table = Table(title=f"{self.subject} against the interface", title_justify="left")
        table.add_column("rule")
        table.add_column("")
        table.add_column("what was found", overflow="fold")
        for name, passed, detail in self:
            mark = Text("holds", "green") if passed else Text("BROKEN", "bold red")
            table.add_row(name, mark, Text(detail))
        Screen().print(table)


class ContractError(AssertionError):
    """A part breaks rules of the interface; `report` holds all findings.

    Args:
        report: The findings.
    """

    def __init__(self, report: Report) -> None:
        lines = [f"\n  {finding.name}: {finding.detail}" for finding in report.failures]
        super().__init__(
            f"{report.subject} breaks {len(lines)} of {len(report)} rules:{''.join(lines)}"
        )
        self.report = report


def run_check(part: Any, name: str, *, seed: int = 0, **arguments: Any) -> Finding:
    """One check of a part, by its name; each has random numbers of its own from the seed.

    Args:
        part: As for `check`.
        name: Of the check, among those of the part's slot.
        seed: Of what it draws.
        **arguments: Of the part's constructor.
    """
    subject = Subject(part, arguments, seed)
    try:
        return Finding(name, True, CHECKS[subject.slot][name](subject))
    except Violation as violation:
        return Finding(name, False, str(violation))
    except Exception as error:  # a stranger's class may raise anything, and that is a finding
        return Finding(name, False, _raised(error))


def _raised(error: Exception) -> str:
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    code = frame.tb_frame.f_code if frame else None
    where = f" in {os.path.basename(code.co_filename)}:{frame.tb_lineno}" if code and frame else ""
    return f"raised {type(error).__name__}{where}: {first_line(error)}"


def examine(part: Any, *, seed: int = 0, **arguments: Any) -> Report:
    """All checks of a part, in order; nothing is printed or raised.

    Args:
        part: As for `check`.
        seed: Of what the checks draw.
        **arguments: Of the part's constructor.
    """
    subject = Subject(part, arguments, seed)
    try:
        if SIZES[subject.slot]:  # others are built by their checks
            subject.make()
    except Exception as error:  # no rule can be checked, so it is reported once
        detail = _raised(error)
        if isinstance(error, TypeError):
            call = f"{subject.part.__name__}({', '.join(SIZES[subject.slot])})"
            caller = "a mixture" if subject.slot == "router" else "the decoder"
            detail += f": {caller} calls {call}, and gives all else by name (init_args)"
        return Report(str(subject), [Finding("interface", False, detail)])
    names = CHECKS[subject.slot]
    return Report(str(subject), [run_check(part, n, seed=seed, **arguments) for n in names])


def check(part: Any, *, seed: int = 0, show: bool = True, **arguments: Any) -> Report:
    """Check that a part implements the interface: ``archzoo.check(MyMixer, kernel=3)``.

    Args:
        part: A class that inherits from one of the interface's (`Mixer`, `FeedForward`,
            `Router`, `Embedding`, `Rotary`, `Bias`), a partial of one, or its name.
        seed: Of weights, inputs, lengths and cuts.
        show: Print the findings as a table.
        **arguments: The part's own arguments, and sizes (dim, heads, ...) other than `SIZES`.

    Returns:
        The findings, one for each rule.

    Raises:
        ContractError: A rule is broken; the message names each, and by how much.
        ValueError: `part` is not a valid part.
    """
    report = examine(part, seed=seed, **arguments)
    if show:
        report.show()
    if not report.passed:
        raise ContractError(report)
    return report


def check_command(path: str, *, init_args: dict[str, Any] | None = None, seed: int = 0) -> int:
    """Check that a class implements the interface, rule by rule; exit status 1 if one is broken.

    Args:
        path: module.Class, which may live in a file of the current directory; or a part's name.
        init_args: The class's own arguments, and sizes (dim, heads, ...) other than the usual
            small ones: --init_args.heads 2.
        seed: Of weights, inputs, lengths and cuts.

    Raises:
        ValueError: No such class, or one that is not a valid part.
    """
    report = examine(path, seed=seed, **(init_args or {}))
    report.show()
    return 0 if report.passed else 1
