"""The rows that digits read, in one kernel; the reference is in `archzoo.embeddings.abacus`.

In PyTorch they take some forty small integer operations, half of them the hash that draws a shift.
On a GPU each is as long as its launch, and together they were 2 to 4 % of a training step.

Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo.derivatives import followed
from archzoo.documents import Context
from archzoo.kernels.launching import launch, power_of_2, run_beside


def available(tokens: Tensor) -> bool:
    """Whether the kernel runs where the tokens lie; compilers fuse the plain form themselves."""
    return not followed() and tokens.numel() > 0 and run_beside(tokens)


def shifted_rows(
    tokens: Tensor,
    kinds: Tensor,
    context: Context,
    *,
    coupled: bool,
    last: int,
    key: int,
    bound: int,
    examples: Tensor | None,
) -> Tensor:
    """The row of each token of a text that begins here.

    Args:
        tokens: (batch, time) int64.
        kinds: (vocab_size,) int8, what each token is: 2 a digit, 1 an operator, 0 anything else.
        context: Of the same tokens.
        coupled: Operators on row 1, digits from row 2 on.
        last: The last row; digits past it read it.
        key: Of the shifts, as `archzoo.embeddings.counter_random.key_of` makes it.
        bound: Shifts are drawn from 0 .. bound - 1.
        examples: (batch, time) int64, by which they are drawn. None: nothing is shifted.

    Returns:
        (batch, time) int64.
    """
    batch, time = tokens.shape
    numbers = tokens if examples is None else examples
    rows = torch.empty((batch, time), dtype=torch.int64, device=tokens.device)
    launch(
        "archzoo.kernels.digits.triton", "rows_kernel", (batch,),
        (tokens, kinds.contiguous(), context.valid, context.starts, numbers, rows),
        time, *tokens.stride(), *context.valid.stride(), *context.starts.stride(),
        *numbers.stride(), key, bound, last,
        COUPLED=coupled, SHIFTED=examples is not None,
        BLOCK=min(max(power_of_2(time), 32), 256), num_warps=1,
    )  # fmt: skip
    return rows
