"""Vectors before a text: what stands before what, and where."""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo.documents import Context, make_context
from archzoo.numerics import of_this_call


def prepend_prompt(
    x: Tensor, context: Context, prompt: Tensor, first: int
) -> tuple[Tensor, Context]:
    """Put a prompt before the texts of rows of one document each, without padding.

    Nothing waits for a device: where the text is afterwards does not depend on values.

    Args:
        x: (batch, time, dim), the text's vectors.
        context: Of the same tokens, whose positions count on from the prompt's.
        prompt: (tokens, dim).
        first: The position of its first vector.

    Returns:
        x and the context of both, (batch, tokens + time, ...).
    """
    batch, time, _ = x.shape
    length = len(prompt)
    x = torch.cat([prompt.to(x.dtype).expand(batch, -1, -1), x], dim=1)
    whole, _ = make_context(batch, length + time, device=x.device, first=first)
    before, examples = whole.positions[:, :length], context.examples
    whole = whole._replace(
        positions=of_this_call(torch.cat([before, context.positions], dim=1)), start=context.start
    )
    if examples is not None:
        whole = whole._replace(
            examples=torch.cat([examples[:, :1].expand(-1, length), examples], dim=1)
        )
    return x, whole
