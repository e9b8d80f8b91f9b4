"""What is checked of embeddings, rotary methods and biases."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from archzoo import block as interface
from archzoo.contract.measure import (
    Violation,
    context_of,
    expect_buffers_survive,
    expect_live_weights,
    expect_same,
    expect_true_gradient,
    expect_untouched,
    gradients_of,
    relative_error,
    reloaded,
    tensors_of,
)
from archzoo.contract.subject import BATCH, Subject
from archzoo.numerics import TOLERANCES


def embedding_interface(subject: Subject) -> str:
    """Vectors of the table's dtype; state None for None; weight is the table of words."""
    part = subject.make(torch.float32).eval()
    vocab_size = subject.sizes["vocab_size"]
    tokens = subject.tokens(BATCH, 7, vocab_size)
    context, _ = context_of(tokens)
    x, state = part(tokens, None, context)
    if x.shape != (BATCH, 7, subject.dim) or x.dtype != torch.float32:
        raise Violation(f"x is {tuple(x.shape)} {x.dtype}, must be (batch, time, dim) of the table")
    if state is not None:
        raise Violation("state None must come back as None")
    if part.weight.shape != (vocab_size, subject.dim):
        raise Violation(f"weight has shape {tuple(part.weight.shape)}, must be (vocab_size, dim)")
    if not gradients_of(x.sum(), [part.weight])[0].abs().max():
        raise Violation("no gradient reaches weight")
    _, state = part(tokens, part.init_state(BATCH), context)
    if state is None:
        raise Violation("a state goes in, so a state must come back")
    for leaf in tensors_of(state):
        if leaf.shape[0] != BATCH:
            raise Violation(f"a state's tensor has shape {tuple(leaf.shape)}: the batch is axis 0")
    return "x of the table's dtype; None for None; weight is the table"


def embedding_segments(subject: Subject) -> str:
    """Causal, row by row, the same in segments, and each document as alone: bit for bit."""
    part = subject.make().eval()
    vocab_size = subject.sizes["vocab_size"]
    tokens = subject.tokens(BATCH, 40, vocab_size)

    def run(tokens: Tensor, ends: Sequence[int], documents: Tensor | None = None) -> Tensor:
        state, cursor = part.init_state(len(tokens)), interface.init_cursor(len(tokens))
        outputs = []
        for begin, end in itertools.pairwise([0, *ends]):
            segment = None if documents is None else documents[:, begin:end]
            context, cursor = context_of(tokens[:, begin:end], segment, cursor)
            context = part.assign_positions(context)
            x, state = part(tokens[:, begin:end], state, context)
            state = interface.map_state(torch.clone, state)
            at = context.positions.to(x.dtype)[..., None].expand(len(tokens), -1, 1)
            outputs.append(torch.cat([x, at], dim=-1))  # where it places tokens is part of it
            if not x.isfinite().all():
                raise Violation("x is not finite; at padding it must be, too")
        return torch.cat(outputs, dim=1)

    with torch.no_grad():
        whole = run(tokens, [40])
        stateless = part(tokens, None, part.assign_positions(context_of(tokens)[0]))[0]
        if not torch.equal(stateless, whole[..., :-1]):
            raise Violation("without a state it gives other numbers than from an empty one")
        cuts = sorted(subject.random.sample(range(1, 40), k=3))
        for name, got, want in (
            (f"in segments that end at {cuts}", run(tokens, [*cuts, 40]), whole),
            ("token by token", run(tokens, range(1, 41)), whole),
            ("without its future", run(tokens[:, :20], [20]), whole[:, :20]),
            ("one row alone", run(tokens[1:2], [40]), whole[1:2]),
        ):
            if not torch.equal(got, want):
                raise Violation(f"{name} against the whole: {relative_error(got, want):.1e}")
        documents = torch.tensor([[-1] * 4 + [0] * 9 + [1] * 20 + [-1] * 7] * BATCH)
        for ends in ([40], [*cuts, 40]):
            packed = run(tokens, ends, documents)
            for begin, end in ((4, 13), (13, 33)):
                if not torch.equal(packed[:, begin:end], run(tokens[:, begin:end], [end - begin])):
                    raise Violation("a packed document must get what it gets alone")
    return "bit for bit"


def embedding_training(subject: Subject) -> str:
    """What training draws depends on the example alone, not on what lies beside it."""
    part = subject.make().train()
    vocab_size = subject.sizes["vocab_size"]
    tokens = subject.tokens(BATCH, 20, vocab_size)
    before = tokens.clone()
    examples = torch.tensor([[5] * 12 + [6] * 8, [2**40] * 20, [7] * 20])

    def run(
        rows: slice, begin: int = 0, end: int = 20, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        some = tokens[rows, begin:end]
        context, _ = interface.make_context(
            *some.shape, documents=documents, examples=examples[rows, begin:end]
        )
        context = part.assign_positions(context)
        return part(some, None, context)[0], context.positions

    everything = slice(None)
    packed = torch.tensor([[0] * 12 + [1] * 8, [0] * 20, [0] * 20])
    with torch.no_grad():
        want = run(everything, documents=packed)
        expect_untouched(tokens, before, "tokens")
        for what, got, same in (
            ("a second call", run(everything, documents=packed), want),
            ("one row alone", run(slice(1, 2)), tuple(t[1:2] for t in want)),
            ("a document alone", run(slice(0, 1), 12, 20), tuple(t[:1, 12:] for t in want)),
        ):
            if not all(torch.equal(a, b) for a, b in zip(got, same, strict=True)):
                raise Violation(
                    f"training: {what} gives other numbers: draw by Context.examples, as "
                    "archzoo.embeddings.counter_random does, never by a generator"
                )
    return "bit for bit: alone, in a batch and packed"


def embedding_repeats(subject: Subject) -> str:
    """Saved and loaded, and called again, it gives the same bits; a cast rounds weights only."""
    expect_buffers_survive(subject.make(torch.float32))
    part = subject.make().eval()
    fresh = reloaded(part, subject.make()).eval()
    tokens = subject.tokens(2, 9, subject.sizes["vocab_size"])
    context, _ = context_of(tokens)
    with torch.no_grad():
        want = part(tokens, None, context)[0]
        for name, other in (("a second call", part), ("a reloaded one", fresh)):
            if not torch.equal(other(tokens, None, context)[0], want):
                raise Violation(f"{name} gives other numbers")
        half = part.bfloat16()(tokens, None, context)[0]
        error = expect_same(half, want, TOLERANCES[torch.bfloat16], "bfloat16 against float64")
    return f"bit for bit; bfloat16 {error:.0e}"


# ---------------------------------------------------------------------------- rotary, bias


def rotary_interface(subject: Subject) -> str:
    """Shapes and dtypes stay; tokens, rows and heads are rotated each for itself."""
    part = subject.make()
    size = subject.sizes["head_dim"]
    positions = torch.arange(40).expand(BATCH, 40)
    q, k = subject.draw(BATCH, 40, 4, size), subject.draw(BATCH, 40, 2, size)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        turned = part(q.to(dtype), k.to(dtype), positions, positions)
        for got, given in zip(turned, (q, k), strict=True):
            if got.shape != given.shape or got.dtype != dtype:
                raise Violation(f"{tuple(got.shape)} {got.dtype} from {tuple(given.shape)} {dtype}")
    before = q.clone(), k.clone()
    want_q, want_k = part(q, k, positions, positions)
    expect_untouched(q, before[0], "q")
    expect_untouched(k, before[1], "k")
    offset = positions.clone()
    offset[1] += 7
    q_at, k_at = part(q, k, positions.contiguous(), offset)
    slices = part(q[:, 9:10, 1:2], k[:, 9:10, 1:2], positions[:, 9:10], positions[:, 9:10])
    both_q, both_k = part.both(torch.cat([q, k], dim=2), 4, positions)
    worst = 0.0
    for what, got, want in (
        ("positions of one row expanded, and of all rows", q_at, want_q),
        ("q by `both` against `forward`", both_q, want_q),
        ("k by `both` against `forward`", both_k, want_k),
        ("rows at the same positions beside a row at others", k_at[::2], want_k[::2]),
        ("k by its own positions", k_at[1:2], part(q, k, offset, offset)[1][1:2]),
        ("one token and head alone", slices[0], want_q[:, 9:10, 1:2]),
        ("one token and head alone", slices[1], want_k[:, 9:10, 1:2]),
    ):
        worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
    return f"float64 {worst:.0e}"


def rotary_precision(subject: Subject) -> str:
    """No cast reaches the positions: far out, half precision rounds q and k alone."""
    part = subject.make(torch.float32)
    expect_buffers_survive(part)
    furthest = getattr(part, "furthest", 65_535)  # xPos alone cannot count on: its keys grow
    positions = torch.tensor([[0, 1, 255, 256, 257, 2_047, 4_001, furthest]])
    size = subject.sizes["head_dim"]
    q = subject.draw(1, 8, 2, size, dtype=torch.bfloat16)
    want, _ = part(q.double(), q.double(), positions, positions)
    got, _ = part.bfloat16()(q, q, positions, positions)
    error = expect_same(
        got, want, TOLERANCES[torch.bfloat16], f"bfloat16 against float64, to {furthest:,}"
    )
    got, _ = part(q.float(), q.float(), positions, positions)
    what = f"float32 against float64, to position {furthest:,}"
    expect_same(got, want, TOLERANCES[torch.float32], what)
    return f"bfloat16 {error:.0e} as far as position {furthest:,}"


def rotary_gradients(subject: Subject) -> str:
    """Autograd gives the derivative."""
    part = subject.make()
    positions = torch.arange(6).expand(2, 6)
    x = subject.draw(2, 6, 2, subject.sizes["head_dim"])
    error = expect_true_gradient(
        lambda x: torch.cat(part(x, 2 * x, positions, positions)), part, x, subject
    )
    return f"against a finite difference {error:.0e}"


def bias_interface(subject: Subject) -> str:
    """(batch or 1, heads, queries, keys); each pair of positions for itself; finite far out."""
    part = subject.make()
    heads = subject.sizes["heads"]
    keys = torch.arange(30).expand(BATCH, 30)
    whole = part(keys, keys)
    if whole.shape not in {(BATCH, heads, 30, 30), (1, heads, 30, 30)}:
        raise Violation(f"shape {tuple(whole.shape)}, must be (batch or 1, heads, queries, keys)")
    slice_ = part(keys[:, 20:23], keys[:, :23])
    causal = torch.ones(3, 23, dtype=torch.bool).tril(20)
    what = "a slice against the whole"
    error = expect_same(slice_[..., causal], whole[:, :, 20:23, :23][..., causal], 1e-12, what)
    rows = keys.clone()
    rows[1] += 5
    separate = part(rows, rows).expand(BATCH, -1, -1, -1)
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    what = "rows at the same positions beside a row at others"
    want = whole.expand(BATCH, -1, -1, -1)
    got = separate[::2][..., causal]
    error = max(error, expect_same(got, want[::2][..., causal], 1e-12, what))
    far = torch.tensor([[65_535]])
    if not part(far, torch.tensor([[0, 65_535]])).isfinite().all():
        raise Violation("not finite at position 65,535")
    expect_buffers_survive(subject.make(torch.float32))
    return f"float64 {error:.0e}"


def bias_precision(subject: Subject) -> str:
    """No cast reaches the positions: far out, half precision rounds weights alone."""
    part = subject.make(torch.float32).bfloat16()
    full = copy.deepcopy(part).double()
    worst = 0.0
    for begin in (0, 4_000, 65_000):
        positions = begin + torch.arange(30)[None]
        causal = torch.ones(30, 30, dtype=torch.bool).tril()
        with torch.no_grad():
            got, want = part(positions, positions), full(positions, positions)
        what = f"bfloat16 against float64 at position {begin:,}"
        error = expect_same(got[..., causal], want[..., causal], TOLERANCES[torch.bfloat16], what)
        worst = max(worst, error)
    return f"bfloat16 {worst:.0e} as far as position 65,000"


def bias_gradients(subject: Subject) -> str:
    """Every weight has a finite gradient, at distance 0 and at keys to come too."""
    part = subject.make()
    positions = torch.arange(200)[None]
    weights = subject.draw(1, subject.sizes["heads"], 200, 200)
    expect_live_weights(part, (part(positions, positions) * weights).sum())
    return "finite, and for every weight"
