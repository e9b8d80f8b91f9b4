"""Documents and positions of a text's tokens, and the context that every part is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.numerics import constant, of_this_call
from archzoo.states import State


class Context(NamedTuple):
    """What a part may know of the tokens beside their vectors; every field is (batch, time).

    Attributes:
        documents: int64, which document of its row a token belongs to, counted from 0 over all
            segments of the text, whatever numbers the caller gave; -1 is padding.
        positions: int64, counted from 0 within the document, or as the caller gives them; behind
            a prompt or a prefix they count on from its tokens.
        valid: bool, not padding.
        starts: bool, the first token of its document.
        examples: int64 or None, the task's example numbers, when it gives them.
        packed: False says that no row holds padding or a second document, in this call or before
            it, so masks may be skipped. A plain bool: reading it never waits for a device.
        start: What a document of this layer starts from, a state of one row, where an adapter
            says it; else None: from `Mixer.init_state`. Where nothing is packed the state that
            a mixer is given holds it already.
    """

    documents: Tensor
    positions: Tensor
    valid: Tensor
    starts: Tensor
    examples: Tensor | None = None
    packed: bool = False
    start: State | None = None

    def segment(self, begin: int, end: int) -> Context:
        """The same for the tokens begin..end-1."""
        return Context(
            self.documents[:, begin:end],
            self.positions[:, begin:end],
            self.valid[:, begin:end],
            self.starts[:, begin:end],
            None if self.examples is None else self.examples[:, begin:end],
            self.packed,
            self.start,
        )

    def piece(self, begin: int, end: int) -> Context:
        """Deprecated name of `segment`."""
        return self.segment(begin, end)


def since_start(context: Context) -> tuple[Tensor, Tensor]:
    """How far each token is into a document that began in this call.

    Returns:
        (batch, time): the document's tokens so far, this one counted, padding not; and bool,
        whether it began in this call and the token is part of it.
    """
    count = context.valid.cumsum(dim=1)
    index = torch.arange(count.shape[1], device=count.device)
    start = torch.where(context.starts, index, -1).cummax(dim=1).values
    return count - count.gather(1, start.clamp(min=0)) + 1, start >= 0


def init_cursor(
    batch_size: int, device: torch.device | str | None = None, first: int = 0
) -> dict[str, Any]:
    """The cursor before the first token: no document yet (-1), nothing packed.

    Args:
        batch_size: Rows.
        device: Where the tensors live.
        first: The position of a document's first token.
    """
    before = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
    return {
        "documents": before,
        "begun": torch.zeros_like(before),
        "positions": before + first,
        "packed": False,
    }


init_place = init_cursor  #: Deprecated name.


def make_context(
    batch_size: int,
    time: int,
    *,
    documents: Tensor | None = None,
    examples: Tensor | None = None,
    positions: Tensor | None = None,
    cursor: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    first: int = 0,
) -> tuple[Context, dict[str, Any]]:
    """Build the context of a segment of text, and the cursor at its end.

    Args:
        batch_size: Rows.
        time: Tokens in each row of this segment.
        documents: (batch, time) ints, -1 for padding; a token whose number is not that of the
            token before it begins a document. None: each row continues the document it is in
            (or is one whole document, where nothing came before).
        examples: (batch, time) ints of the task, or None.
        positions: (batch, time) ints, 0 or more, instead of counted ones; a segment without any
            counts on from the last. None: counted within the document.
        cursor: Where the segment before this one ended: the caller's number of each row's last
            document, how many have begun, and the position of the last token, as `init_cursor`
            and this function return it. None: nothing came before.
        device: Where the tensors live.
        first: The position of a document's first token; given positions are shifted by it.

    Returns:
        The context, and the cursor after the segment.

    Raises:
        ValueError: Documents, examples or positions of another shape than (batch, time).
    """
    entries = {"documents": documents, "examples": examples, "positions": positions}
    for name, given in entries.items():
        if given is not None and given.shape != (batch_size, time):
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, the tokens {(batch_size, time)}: "
                "give one number for every token"
            )
    if documents is None and (cursor is None or not cursor["packed"]):
        # One document a row, and its number is 0: nothing to compute but positions.
        zero = constant((0,), device, torch.int64).expand(batch_size, time)
        valid = constant((True,), device, torch.bool).expand(batch_size, time)
        if time > 1 or cursor is None:
            begin = first if cursor is None else 0
            counted = torch.arange(begin, begin + time, device=device).expand(batch_size, time)
            if cursor is not None:
                counted = counted + (cursor["positions"][:, None] + 1)
        else:
            counted = cursor["positions"].view(batch_size, 1) + 1
        positions = of_this_call(counted if positions is None else _copied(positions, first))
        context = Context(zero, positions, valid, counted == first, examples)
        after = {
            "documents": zero.select(1, 0),
            "begun": constant((1,), device, torch.int64).expand(batch_size),
            "positions": positions.select(1, -1),
            "packed": False,
        }
        return context, after

    index = torch.arange(time, device=device)
    cursor = cursor or init_cursor(batch_size, device, first)
    if documents is None:  # each row continues its last document
        documents = cursor["documents"].clamp(min=0)[:, None].expand(batch_size, time)
    documents = documents.to(torch.int64)
    valid = documents >= 0
    # The token before a token, skipping padding: a document continues after padding between calls.
    last_valid = torch.where(valid, index, -1).cummax(dim=1).values
    before = F.pad(last_valid[:, :-1], (1, 0), value=-1)
    previous = documents.gather(1, before.clamp(min=0))
    previous = torch.where(before >= 0, previous, cursor["documents"][:, None])
    starts = valid & (documents != previous)
    # Position within the document: tokens since its start, where that lies in this segment (index
    # of the last start so far; -1: none), else counted on from the cursor.
    count = valid.cumsum(dim=1)
    last_start = torch.where(starts, index, -1).cummax(dim=1).values
    if positions is None:
        within = count - count.gather(1, last_start.clamp(min=0))
        continued = cursor["positions"][:, None] + count
        positions = torch.where(last_start >= 0, within + first, continued)
    elif first:
        positions = positions.long() + first
    positions = of_this_call(positions.long() * valid)
    begun = cursor["begun"][:, None] + starts.cumsum(dim=1)
    # The new cursor: the last token that is not padding; a segment of padding moves nothing.
    last = last_valid[:, -1]
    seen, at = last >= 0, last.clamp(min=0)[:, None]
    cursor = {
        "documents": torch.where(seen, documents.gather(1, at)[:, 0], cursor["documents"]),
        "begun": begun[:, -1].clone(),  # a view would keep all counts alive
        "positions": torch.where(seen, positions.gather(1, at)[:, 0], cursor["positions"]),
        "packed": True,
    }
    runs = torch.where(valid, begun - 1, -1)
    return Context(runs, positions, valid, starts, examples, True), cursor


def _copied(given: Tensor, first: int) -> Tensor:
    """A caller's (batch, time) ints as int64 that the caller cannot change; one row stays one."""
    rows = given[:1] if given.stride(0) == 0 else given
    rows = rows.to(torch.int64, copy=True)
    return (rows + first if first else rows).expand(given.shape)
