"""Vectors before the text of every document: where they go, and where the text is afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo.documents import Context
from archzoo.numerics import of_this_call


def insert_prompts(x: Tensor, context: Context, prompt: Tensor) -> tuple[Tensor, Context, Tensor]:
    """Put a prompt before each document that begins in this call.

    A document that continues from the call before has its prompt already. Either way the text's
    positions count on from the prompt's.

    Args:
        x: (batch, time, dim), the text's vectors.
        context: Of the same tokens.
        prompt: (tokens, dim).

    Returns:
        x and context with the prompts, (batch, longer, ...), padded at the end where rows begin
        fewer documents than others; and where the text's tokens are, (batch, time) int64.
    """
    batch, time, dim = x.shape
    length = len(prompt)
    begun = context.starts.cumsum(dim=1)
    most = int(begun[:, -1].max())
    where = torch.arange(time, device=x.device) + length * begun
    positions = context.positions + length * context.valid
    if not most:
        return x, context._replace(positions=of_this_call(positions)), where
    longer = time + length * most
    rows, columns = context.starts.nonzero(as_tuple=True)
    first = where[rows, columns, None] - length + torch.arange(length, device=x.device)
    rows = rows[:, None]

    def spread(text: Tensor, fill: float, prompts: Tensor) -> Tensor:
        """(batch, time, ...) to (batch, longer, ...), with each document's prompt before it."""
        made = text.new_full((batch, longer, *text.shape[2:]), fill)
        made = made.scatter(
            1, where.view(*where.shape, *(1,) * (text.dim() - 2)).expand_as(text), text
        )
        return made.index_put((rows, first), prompts.to(text.dtype))

    starts = torch.zeros_like(first, dtype=torch.bool)
    starts[:, 0] = True
    documents = context.documents[rows[:, 0], columns, None].expand_as(first)
    examples = context.examples
    if examples is not None:
        examples = spread(examples, 0, examples[rows[:, 0], columns, None].expand_as(first))
    same = not context.packed and bool((begun[:, -1] == most).all())
    inserted = Context(
        spread(context.documents, -1, documents),
        of_this_call(spread(positions, 0, torch.arange(length, device=x.device).expand_as(first))),
        spread(context.valid, False, torch.ones_like(starts)),
        spread(torch.zeros_like(context.starts), False, starts),
        examples,
        not same,
    )
    return spread(x, 0.0, prompt.expand(len(first), length, dim)), inserted, where
