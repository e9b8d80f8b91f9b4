"""Distillation: a student learns what a teacher says, and what it says layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from archzoo.checkpoint import check_finite, load, weights_digest
from archzoo.decoder import Decoder
from archzoo.numerics import at_least_float32
from archzoo.tasks.stream import Batch, Task
from archzoo.training.losses import CHUNK

Form = Literal["OneBit", "BinaryMoS"]


@dataclass(frozen=True)
class Distil:
    """The loss of a student beside a teacher, which stays as it is and is not saved with it.

    With T and S for teacher and student, B rows of N tokens in all (padding left out), and h_l the
    vectors before block l + 1, h_0 after the embedding, h_L after the last norm::

        L = logits * 1/B sum over tokens of KL(T || S) + hidden * H + labels * cross-entropy

        OneBit      H = sum_(l=0)^(L-1) mean over tokens of |h_T/|h_T| - h_S/|h_S||^2
        BinaryMoS   H = sum_(l=1)^L mean over tokens and channels of (h_T - h_S)^2

    The divergence is divided by the rows alone, as in both papers' code, so it grows with the
    length of the texts. A slice of a step counts by its labelled tokens, as everything else.

    Source: Xu et al., OneBit, arXiv 2402.11295, section 3.4; Jo et al., BinaryMoS, arXiv
    2406.12311, section 3.3; weights as in their code.

    Args:
        teacher: A run's directory, a .ckpt file, or a directory of `archzoo.save_pretrained`, of
            the student's vocabulary and, unless hidden is 0, of its width and depth.
        form: Of H: "OneBit" or "BinaryMoS".
        logits: Weight of the divergence. None: the form's, .01 and 1.
        hidden: Weight of H. None: the form's, 1 and 10.
        labels: Weight of the cross-entropy with the labels.
    """

    teacher: str
    form: Form = "OneBit"
    logits: float | None = None
    hidden: float | None = None
    labels: float = 0.0


WEIGHTS = {"OneBit": (0.01, 1.0), "BinaryMoS": (1.0, 10.0)}  # of logits and hidden


def as_distil(given: Any) -> Distil | None:
    """The settings from plain data, or as they are; None: there is no teacher.

    Raises:
        ValueError: They hold something else.
    """
    if given is None:
        return None
    if isinstance(given, dict):
        odd = sorted(set(given) - set(Distil.__dataclass_fields__))
        if odd or not isinstance(given.get("teacher"), str):
            what = f"it has no setting {odd[0]!r}" if odd else "teacher is missing: a checkpoint"
            raise ValueError(f"distil: {what}")
        given = Distil(**given)
    if not isinstance(given, Distil):
        raise ValueError(f"distil={given!r} is not valid: it takes teacher, form and weights")
    if given.form not in WEIGHTS:
        raise ValueError(f"distil.form={given.form!r} is not one of {', '.join(WEIGHTS)}")
    for name in ("logits", "hidden", "labels"):
        weight = getattr(given, name)
        if weight is not None and not 0 <= weight < float("inf"):
            raise ValueError(f"distil.{name}={weight} must be at least 0, and finite")
    if not any(weights_of(given)):
        raise ValueError("distil: all weights are 0, so nothing would be learnt")
    return given


def weights_of(settings: Distil) -> tuple[float, float, float]:
    """Of logits, hidden and labels."""
    logits, hidden = WEIGHTS[settings.form]
    logits = logits if settings.logits is None else settings.logits
    hidden = hidden if settings.hidden is None else settings.hidden
    return logits, hidden, settings.labels


class Terms(NamedTuple):
    """The parts of the loss, scalars: the sum of the divergence, and H."""

    divergence: Tensor
    hidden: Tensor


class Teacher:
    """A frozen model in evaluation mode; no module, so that nothing saves, moves or trains it.

    Args:
        settings: Where it lies.
        student: The model that learns.
        task: On which, or None.

    Raises:
        ValueError: It is of another vocabulary, or of another width or depth.
    """

    def __init__(self, settings: Distil, student: Decoder, task: Task | None) -> None:
        found = load(settings.teacher, "cpu")
        self.model = found.model.requires_grad_(False)
        check_finite(self.model.state_dict(), settings.teacher)
        whose = f"distil.teacher={settings.teacher!r}"
        if self.model.vocab_size != student.vocab_size:
            raise ValueError(
                f"{whose} knows {self.model.vocab_size} tokens and the student "
                f"{student.vocab_size}: a teacher has the student's vocabulary"
            )
        theirs = None if found.tokenizer is None else found.tokenizer.files()
        if task is not None and theirs not in (None, task.tokenizer.files()):
            raise ValueError(f"{whose} was trained with another vocabulary than this task's")
        sizes = [(m.dim, m.depth, m.loops) for m in (self.model, student)]
        if weights_of(settings)[1] and sizes[0] != sizes[1]:
            raise ValueError(
                f"{whose} has (dim, depth, loops)={sizes[0]} and the student {sizes[1]}: their "
                "layers do not pair; set distil.hidden to 0"
            )
        self.settings = settings
        #: Of its weights, by which a resumed run knows it again.
        self.digest = weights_digest(self.model.state_dict())

    def terms(self, x: Tensor, before: Sequence[Tensor], head: nn.Linear, batch: Batch) -> Terms:
        """The parts of the loss for a batch.

        Args:
            x: The student's vectors before its head, (batch, time, dim).
            before: Those before each of its blocks.
            head: The student's.
            batch: What both have read.
        """
        if "continues" in batch:
            raise ValueError(
                "distillation reads whole texts: set carry_state to false, so that no state goes "
                "from window to window"
            )
        self.model.to(x.device)
        with torch.no_grad(), vectors_before_blocks(self.model) as theirs:
            theirs_x, _, _ = self.model.hidden(
                batch["tokens"],
                documents=batch.get("documents"),
                examples=batch.get("examples"),
                positions=batch.get("positions"),
            )
        documents = batch.get("documents")
        valid = torch.ones_like(batch["tokens"]) if documents is None else documents >= 0
        logits, hidden, _ = weights_of(self.settings)
        kl = x.new_zeros(())
        if logits:
            kl = divergence(theirs_x, x, self.model.head, head, valid)
        distance = x.new_zeros(())
        if hidden:
            pair = [*theirs, theirs_x], [*before, x]
            distance = hidden_distance(self.settings.form, *pair, valid)
        return Terms(kl, distance)

    def total(self, terms: Terms, labelled: Tensor, rows: int, labels_loss: Any) -> Tensor:
        """The loss of a slice, times its labelled tokens.

        Args:
            terms: As `terms` gives them.
            labelled: How many tokens are.
            rows: Of the batch.
            labels_loss: The sum of the cross-entropy, or 0.
        """
        logits, hidden, labels = weights_of(self.settings)
        mean = logits * terms.divergence / rows + hidden * terms.hidden
        total: Tensor = labelled * mean + labels * labels_loss
        return total

    @property
    def takes_labels(self) -> bool:
        """Whether the cross-entropy is part of the loss."""
        return weights_of(self.settings)[2] > 0


def plain(settings: Distil | None) -> dict[str, Any] | None:
    """As plain data."""
    return None if settings is None else asdict(settings)


@contextmanager
def vectors_before_blocks(decoder: Decoder) -> Iterator[list[Tensor]]:
    """Within it, what each block is given in a call, in order: (batch, time, dim) each."""
    seen: list[Tensor] = []

    def see(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given[0])

    hooks = [block.register_forward_pre_hook(see) for block in decoder.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def hidden_distance(
    form: Form, teacher: Sequence[Tensor], student: Sequence[Tensor], valid: Tensor
) -> Tensor:
    """H of `Distil`, a scalar.

    Args:
        form: "OneBit" or "BinaryMoS".
        teacher: h_0 to h_L, (batch, time, dim) each.
        student: The same.
        valid: (batch, time), 0 at padding.
    """
    count = valid.sum().clamp(min=1)
    pairs = list(zip(teacher, student, strict=True))
    parts = []
    for theirs, mine in pairs[:-1] if form == "OneBit" else pairs[1:]:
        wide = at_least_float32(mine.dtype)
        theirs, mine = theirs[:, -valid.shape[1] :].to(wide), mine[:, -valid.shape[1] :].to(wide)
        if form == "OneBit":
            each = (F.normalize(theirs, dim=-1) - F.normalize(mine, dim=-1)).square().sum(dim=-1)
        else:
            each = (theirs - mine).square().mean(dim=-1)
        parts.append((each * valid).sum() / count)
    return torch.stack(parts).sum()


def divergence(
    teacher: Tensor,
    student: Tensor,
    teacher_head: nn.Linear,
    student_head: nn.Linear,
    valid: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """The sum over tokens of KL(T || S), a scalar; logits are made again in the backward pass.

    Args:
        teacher: (batch, time, dim), before the head.
        student: The same.
        teacher_head: To logits.
        student_head: The same.
        valid: (batch, time), 0 at padding.
        chunk: Logits of each to hold at once.
    """
    rows = max(chunk // student_head.out_features, 1)
    flat = (teacher.flatten(0, 1), student.flatten(0, 1), valid.flatten())
    if len(flat[0]) <= rows:
        return _divergence(*flat, teacher_head, student_head)
    parts = [
        checkpoint(_divergence, *some, teacher_head, student_head, use_reentrant=False)
        for some in zip(*(tensor.split(rows) for tensor in flat), strict=True)
    ]
    return torch.stack(parts).sum()


def _divergence(
    teacher: Tensor, student: Tensor, valid: Tensor, teacher_head: nn.Linear, head: nn.Linear
) -> Tensor:
    with torch.no_grad():
        logits = teacher_head(teacher)
        want = logits.to(at_least_float32(logits.dtype)).log_softmax(dim=-1)
    logits = head(student)
    found = logits.to(at_least_float32(logits.dtype)).log_softmax(dim=-1)
    each = F.kl_div(found, want, reduction="none", log_target=True).sum(dim=-1)
    return (each * valid).sum()
