"""A product with changes of low rank beside it, without a pass over y of its own.

``y = x W^T + b``, and to some rows of it ``s (x A^T) B^T`` is added, of a mixture
``s (g * x A^T) B^T``, whose gates g = softmax(x R^T) each multiply what one expert's rows of A
give. Written with torch's own operations each change is a tensor that is made, put into its place
and added, and x gets its gradient from as many products as there are changes, each added to the
others. Here all A and R are one matrix, each B's product goes into its rows of y, and the gradient
of x is one product into another: with a change of rank 8 on all blocks of a small model, a step
whose base is frozen took 1.26 times as long on a CPU, and takes 1.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import differentiated_again, followed, plain_gradients
from archzoo.kernels import low_rank as kernels
from archzoo.numerics import at_least_float32, cast


class Change(NamedTuple):
    """``scale * second @ first`` beside some rows of a weight; with a router a mixture of such.

    Attributes:
        begin: The first of the rows.
        first: (rank, columns), of a mixture the experts' one after another.
        second: (rows, rank).
        scale: Of both.
        router: (experts, columns), whose gates the experts' parts of x A^T are multiplied with.
        top_k: Experts of a token; the others' gates are 0. None: all.
    """

    begin: int
    first: Tensor
    second: Tensor
    scale: float
    router: Tensor | None = None
    top_k: int | None = None


class _Group(NamedTuple):
    """Changes in a row that are gated alike, or not at all.

    Attributes:
        number: How many changes.
        width: Columns of x A^T of all of them.
        experts: Of each. 0: no mixture.
        top_k: As `Change`'s.
    """

    number: int
    width: int
    experts: int
    top_k: int | None


class _Kept(NamedTuple):
    """One group of mixtures as few tokens need it, in as few operations as there can be.

    Attributes:
        sizes: Rows of y, in order: of a change, or between two.
        places: Of each change, which of them are its.
        seconds: Every B, transposed and contiguous.
        scale: Of all.
    """

    sizes: list[int]
    places: list[int]
    seconds: list[Tensor]
    scale: float


class Packed(NamedTuple):
    """Changes put together for `changed_product`.

    Attributes:
        first: Every A, and below them every R.
        seconds: Every B.
        ranks: Columns of each B.
        places: Of each the first row and the scale.
        groups: In order.
        kept: For few tokens, where there is a shorter way.
    """

    first: Tensor
    seconds: list[Tensor]
    ranks: list[int]
    places: list[tuple[int, float]]
    groups: list[_Group]
    kept: _Kept | None = None


def pack(changes: Sequence[Change], *, rows: int | None = None) -> Packed:
    """Put changes together.

    Args:
        changes: At least one; some may be of the same rows.
        rows: Of the weight, for many products of few tokens each: B lies in memory as a token's
            product reads it fastest, column by column. None: for one product.
    """
    firsts = [change.first for change in changes]
    firsts += [change.router for change in changes if change.router is not None]
    groups: list[_Group] = []
    for change in changes:
        experts = 0 if change.router is None else len(change.router)
        rank = len(change.first)
        last = groups[-1] if groups else None
        if last and (last.width // last.number, *last[2:]) == (rank, experts, change.top_k):
            groups[-1] = last._replace(number=last.number + 1, width=last.width + rank)
        else:
            groups.append(_Group(1, rank, experts, change.top_k))
    seconds = [change.second for change in changes]
    if rows is not None:
        seconds = [second.t().contiguous().t() for second in seconds]
    places = [(change.begin, change.scale) for change in changes]
    return Packed(
        firsts[0] if len(firsts) == 1 else torch.cat(firsts),
        seconds,
        [len(change.first) for change in changes],
        places,
        groups,
        None if rows is None else _keep(seconds, places, groups, rows),
    )


def _keep(
    seconds: list[Tensor], places: list[tuple[int, float]], groups: list[_Group], rows: int
) -> _Kept | None:
    """What `pack` keeps of mixtures that are alike, in the order of their rows; else None."""
    if len(groups) > 1 or not groups[0].experts or len({scale for _, scale in places}) > 1:
        return None
    sizes: list[int] = []
    own, end = [], 0
    for (begin, _), second in zip(places, seconds, strict=True):
        if begin < end:
            return None
        if begin > end:
            sizes.append(begin - end)
        own.append(len(sizes))
        sizes.append(len(second))
        end = begin + len(second)
    if rows > end:
        sizes.append(rows - end)
    return _Kept(sizes, own, [second.t() for second in seconds], places[0][1])


def softmax_of(logits: Tensor, top_k: int | None) -> Tensor:
    """Gates (..., experts), at least in float32; with top_k of the k largest logits alone."""
    if top_k is not None:
        best = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    return torch.softmax(logits, -1, dtype=at_least_float32(logits.dtype))


def changed_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[Change] | Packed
) -> Tensor:
    """``x W^T + b`` with changes: (..., columns) to (..., rows), all of one dtype.

    Args:
        x: (..., columns).
        weight: (rows, columns).
        bias: (rows,), or None.
        changes: At least one, or what `pack` has made of them.
    """
    first, seconds, *rest, _ = changes if isinstance(changes, Packed) else pack(changes)
    flat = x.flatten(0, -2) if x.dim() != 2 else x
    if followed():
        y = _plain(flat, weight, bias, first, rest, *seconds)
    elif torch.is_grad_enabled():
        y = _Changed.apply(flat, weight, bias, first, rest, *seconds)
    else:
        y = _in_place(flat, weight, bias, first, rest, seconds)[0]
    return y.view(*x.shape[:-1], y.shape[-1])


def cheaper_merged(
    x: Tensor, weight: Tensor, changes: Sequence[Change], dtype: torch.dtype
) -> bool:
    """Whether a GPU trains changes of x W^T faster as part of one matrix, `merged`.

    That costs the gradient of all of W, ``2 tokens rows columns`` operations. Beside the product x,
    y and the gradients of both are read or written twice each. By an H200's 650 TFLOP/s and 3 TB/s
    the first is less where ``rows columns`` is at most 800 times ``rows + columns``. It also takes
    passes over W, which only many tokens are worth.

    Args:
        x: (..., columns).
        weight: (rows, columns).
        changes: Of it.
        dtype: Of the product.
    """
    narrow = dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32
    if not (x.is_cuda and narrow):  # only where W is rounded anyway
        return False
    if not torch.is_grad_enabled() or any(change.router is not None for change in changes):
        return False
    rows, columns = weight.shape
    tokens = x.numel() // columns
    return tokens >= 4 * max(rows, columns) and rows * columns <= 800 * (rows + columns)


def merged(weight: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """``W + sum s B A``, (rows, columns), rounded once: as W itself is where it is trained.

    Args:
        weight: W.
        changes: Without routers, in the weight's dtype.
        dtype: Of the result.
    """
    begins, firsts, seconds, scales, *_ = zip(*changes, strict=True)
    return kernels.merged(weight, firsts, seconds, begins, scales, dtype)


def rounded(changes: Sequence[Change], dtype: torch.dtype) -> list[Change]:
    """The same in another dtype."""
    return [
        change._replace(
            first=change.first.to(dtype),
            second=change.second.to(dtype),
            router=None if change.router is None else change.router.to(dtype),
        )
        for change in changes
    ]


def _gated(
    hidden: Tensor, groups: list[_Group]
) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
    """``x A^T`` with its gates, (tokens, ranks), of the product with all A and R.

    Returns:
        It, and of each group that has gates: what they multiply, (tokens, all its experts, rank of
        an expert), and they themselves, (tokens, changes, experts).
    """
    if not any(group.experts for group in groups):
        return hidden, [None for _ in groups]
    tokens, begin, at = len(hidden), 0, sum(group.width for group in groups)
    parts, kept = [], []
    for group in groups:
        part = hidden[:, begin : begin + group.width]
        begin += group.width
        pair = None
        if group.experts:
            number = group.number * group.experts
            logits = hidden[:, at : at + number].view(tokens, group.number, group.experts)
            at += number
            gates = softmax_of(logits, group.top_k)
            pair = part.view(tokens, number, group.width // number), gates
            each = cast(gates, hidden.dtype).view(tokens, number, 1)
            part = (pair[0] * each).view(tokens, group.width)
        parts.append(part)
        kept.append(pair)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), kept


def _slopes(
    inner: Tensor, groups: list[_Group], kept: list[tuple[Tensor, Tensor] | None]
) -> Tensor:
    """The gradient of the product with all A and R, from that of what `_gated` makes of it."""
    if not any(group.experts for group in groups):
        return inner
    parts, of_logits = [], []
    widths = [group.width for group in groups]
    for part, pair in zip(inner.split_with_sizes(widths, 1), kept, strict=True):
        if pair is not None:
            hidden, gates = pair
            slope = part.view(hidden.shape)
            of_gates = (slope * hidden).sum(-1, dtype=gates.dtype).view(gates.shape) * gates
            of_gates = of_gates - gates * of_gates.sum(-1, keepdim=True)
            of_logits.append(cast(of_gates.flatten(1), slope.dtype))
            part = (slope * cast(gates, slope.dtype).view(*hidden.shape[:2], 1)).flatten(1)
        parts.append(part)
    return torch.cat([*parts, *of_logits], dim=1)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor,
    rest: Any,
    *seconds: Tensor,
) -> Tensor:
    """The same of torch's own operations; a compiler makes two products and a sum of it."""
    ranks, places, groups = rest
    rows, y = weight.shape[0], F.linear(x, weight, bias)
    hidden, kept = _gated(F.linear(x, first), groups)
    if any(pair is not None for pair in kept):  # many columns: each B multiplies its own
        parts = hidden.split_with_sizes(ranks, 1)
        for (begin, scale), second, part in zip(places, seconds, parts, strict=True):
            change = F.linear(part, second) * scale
            y = y + F.pad(change, (begin, rows - begin - len(second)))
        return y
    columns = []
    for (begin, scale), second in zip(places, seconds, strict=True):
        columns.append(F.pad(second * scale, (0, 0, begin, rows - begin - len(second))))
    return y + F.linear(hidden, torch.cat(columns, dim=1))


def _in_place(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor,
    rest: Any,
    seconds: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor] | None]]:
    """`_plain` in place, and what its backward pass needs."""
    ranks, places, groups = rest
    y = F.linear(x, weight, bias)
    gated, kept = _gated(F.linear(x, first), groups)
    parts = gated.split_with_sizes(ranks, 1)
    for (begin, scale), second, part in zip(places, seconds, parts, strict=True):
        y.narrow(1, begin, len(second)).addmm_(part, second.t(), alpha=scale)
    return y, gated, kept


def kept_product(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
    """`changed_product` of what is packed, without gradients, compilers and transforms.

    Of mixtures that are alike it is as few operations as can be: in the midst of a model's weights,
    which leave nothing in the caches, each costs a CPU several times what it costs alone.

    Args:
        x: As `changed_product`'s, and so are the next two.
        weight: The same.
        bias: The same.
        packed: By `pack`.
    """
    kept = packed.kept
    if kept is None:
        return changed_product(x, weight, bias, packed)
    (group,) = packed.groups
    y, hidden = F.linear(x, weight, bias), F.linear(x, packed.first)
    number = group.number * group.experts
    gated, logits = hidden.view(-1, group.width + number).split_with_sizes((group.width, number), 1)
    gates = softmax_of(logits.view(-1, group.number, group.experts), group.top_k)
    each = gated.view(-1, number, group.width // number)
    each.mul_(cast(gates, x.dtype).view(-1, number, 1))
    rows = y.view(-1, y.shape[-1]).split_with_sizes(kept.sizes, 1)
    parts = gated.split_with_sizes(packed.ranks, 1)
    for place, part, second in zip(kept.places, parts, kept.seconds, strict=True):
        rows[place].addmm_(part, second, alpha=kept.scale)
    return y


class _Changed(torch.autograd.Function):
    """`_plain` in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor,
        rest: Any,
        *seconds: Tensor,
    ) -> Tensor:
        y, gated, kept = _in_place(x, weight, bias, first, rest, seconds)
        flat = [tensor for pair in kept if pair is not None for tensor in pair]
        ctx.save_for_backward(x, weight, bias, first, gated, *seconds, *flat)
        ctx.rest, ctx.kept = rest, [pair is not None for pair in kept]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ranks, places, groups = ctx.rest
        x, weight, bias, first, gated, *others = ctx.saved_tensors
        seconds, flat = others[: len(ranks)], iter(others[len(ranks) :])
        if differentiated_again():

            def compute(x: Any, weight: Any, bias: Any, first: Any, *seconds: Any) -> Tensor:
                return _plain(x, weight, bias, first, ctx.rest, *seconds)

            found = plain_gradients(compute, (x, weight, bias, first, *seconds), (grad,))
            return *found[:4], None, *found[4:]
        needs_x, needs_weight, needs_bias, needs_first, _, *needs = ctx.needs_input_grad
        scaled = [scale for _, scale in places]
        spans = zip(places, seconds, strict=True)
        slopes = [grad.narrow(1, begin, len(second)) for (begin, _), second in spans]
        of_x = of_first = None
        if needs_x or needs_first:
            each = zip(slopes, seconds, scaled, strict=True)
            inner = torch.cat([(slope @ second).mul_(scale) for slope, second, scale in each], 1)
            kept = [(next(flat), next(flat)) if gates else None for gates in ctx.kept]
            inner = _slopes(inner, groups, kept)
            if needs_x:
                of_x = (grad @ weight).addmm_(inner, first)
            if needs_first:
                of_first = inner.t() @ x
        parts = gated.split_with_sizes(ranks, 1)
        of_seconds = [  # the longer matrix is read along its rows
            (part.t() @ slope).mul_(scale).t() if need else None
            for slope, part, scale, need in zip(slopes, parts, scaled, needs, strict=True)
        ]
        of_weight = grad.t() @ x if needs_weight else None
        of_bias = grad.sum(0) if needs_bias else None
        return of_x, of_weight, of_bias, of_first, None, *of_seconds
