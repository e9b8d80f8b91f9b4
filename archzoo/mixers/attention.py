"""Causal softmax attention with grouped queries, and its cache."""

from __future__ import annotations

import functools
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from archzoo.block import Bias, Mixer, Rotary
from archzoo.derivatives import differentiated_again, plain_gradients, transformed
from archzoo.documents import Context
from archzoo.kernels import cache_attention as kernels
from archzoo.kernels import rotation
from archzoo.kernels.launching import fused
from archzoo.linear import Linear
from archzoo.numerics import head_size, merge_heads, split_heads
from archzoo.positions.rotary import RotaryEmbedding
from archzoo.states import State, fork

# On a CPU two plain products read a long cache faster than torch's fused attention does with one
# query: 4 heads of 64 channels took 63 against 58 us at 1,024 tokens, 440 against 487 at 4,096.
LONG_CACHE = 4_096  # tokens

# What the KV cache holds of every token, and the axis of tokens.
CACHED = {"keys": 2, "values": 2, "positions": 1, "documents": 1}

# Torch's own choice for one query on a GPU is cuDNN, which plans anew for every number of keys:
# 45 ms a step of 12 layers, where reading 16,000 keys takes 0.2.
# So it does for every length of a prompt: 80 ms of 12 layers, which its faster products of a text
# shorter than this do not give back.
PLANNED_FROM = 8_192  # keys
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(Mixer):
    """``y_n = sum_{m <= n} softmax_m(q_n . k_m / sqrt(head_dim)) v_m``, each head alone.

    Grouped queries: kv_heads keys and values serve heads queries. A token sees the tokens of its
    own document only. The state is the KV cache, in preallocated buffers.

    Source: Vaswani et al., arXiv 1706.03762, section 3.2; grouped queries: Ainslie et al.,
    arXiv 2305.13245, section 2.2.

    Args:
        dim: Width of x.
        heads: Query heads.
        kv_heads: Key and value heads; it divides heads. None: as many as heads.
    """

    handles_documents = True

    def __init__(self, dim: int, heads: int, *, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_size(dim, heads)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"kv_heads={kv_heads} does not divide heads={heads}")
        # One matrix for q, k and v, in this order: at small sizes three would cost more in calls.
        keys = self.kv_heads * self.head_dim
        self.widths = [dim + keys, keys]  # of q and k, and of v
        blocks = {"query": dim, "key": keys, "value": keys}
        self.query_key_value = Linear(dim, blocks)
        self.query_key_value.heads = {"query": heads, "key": self.kv_heads, "value": self.kv_heads}
        self.output = Linear(dim, {"output": dim}, residual_projection=True)
        self.rotary: Rotary = RotaryEmbedding(self.head_dim)
        self.bias: Bias | None = None

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty KV cache with buffers for `capacity` tokens; they double when they are full.

        Returns:
            keys, values: (batch, kv_heads, capacity, head_dim), of which the first `length` hold
            tokens; positions, documents: (batch, capacity) int64, there once something needs them
            (a bias; padding or a second document).
        """
        shape = (batch_size, self.kv_heads, capacity or 0, self.head_dim)
        buffer = torch.zeros(shape, device=device, dtype=dtype or self.output.dtype)
        return {"length": 0, "keys": buffer, "values": buffer.clone()}

    def start_state(
        self,
        batch_size: int,
        start: State | None = None,
        *,
        capacity: int | None = None,
        **options: Any,
    ) -> State:
        """A KV cache that holds the keys and values of a start in front, which every query sees.

        Args:
            batch_size: Rows.
            start: keys and values (1, kv_heads, tokens, head_dim), and whatever else.
            capacity: Tokens to come, beside those.
            **options: As for `init_state`.

        Returns:
            As `init_state`; with a start also prefix, uint8 (batch, its tokens), whose shape alone
            matters: a number would not be checked where a state is read from a file.
        """
        if not start:
            return super().start_state(batch_size, start, capacity=capacity, **options)
        length = start["keys"].shape[2]
        marks = torch.zeros((1, length), dtype=torch.uint8, device=start["keys"].device)
        start = start | {"length": length, "prefix": marks}
        state = super().start_state(batch_size, start, **options)
        for name, axis in CACHED.items():
            if name in state and capacity:
                room = (0, 0) * (state[name].dim() - 1 - axis) + (0, capacity)
                state[name] = F.pad(state[name], room)
        return state

    def copy_state(self, state: State, spare: int = 0) -> State:
        """The KV cache in buffers for its tokens and `spare` more."""
        length = int(state["length"])  # of a fixed state it waits for the device
        rest = {n: v for n, v in state.items() if n not in CACHED and n != "arrivals"}
        after = fork(rest) | {"length": length}
        for name, axis in CACHED.items():
            if name in state:
                shape = list(state[name].shape)
                shape[axis] = length + spare
                after[name] = state[name].new_zeros(shape)
                after[name].narrow(axis, 0, length).copy_(state[name].narrow(axis, 0, length))
        return after

    def fixed_state(self, state: State) -> State:
        """The KV cache with its length on the device: a step writes into its buffers, in place.

        Past their capacity nothing may be appended. Where documents are there, they are kept from
        the first step on.

        Args:
            state: Of a capacity for the tokens to come; it is consumed.

        Returns:
            As `init_state`, length a 0-dim int64; and beside a kernel its counters, arrivals.
        """
        if isinstance(state["length"], Tensor):
            return state
        keys = state["keys"]
        batch, _, capacity, _ = keys.shape
        after = state | {"length": torch.tensor(state["length"], device=keys.device)}
        if self.bias is not None and "positions" not in state:
            after["positions"] = torch.zeros(
                (batch, capacity), dtype=torch.int64, device=keys.device
            )
        if kernels.runs_beside(keys):
            after["arrivals"] = kernels.make_arrivals(
                batch, self.heads, state["length"], keys.device
            )
        return after

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """One token against the KV cache."""
        y, after = self.parallel(x, state, context)
        assert after is not None  # one was given
        return y, after

    def chunkwise(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """The same as `parallel`: attention has no shorter way."""
        return self.parallel(x, state, context)

    def parallel(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """X (batch, time, dim) against itself and whatever the state holds."""
        matrix, heads = self.query_key_value, (self.heads, self.kv_heads)
        rotates = state is None and self.one_table()
        if rotates and fused(x) and isinstance(matrix, Linear):  # peft puts another in its place
            weight = matrix.weight_of_call(x)
            if weight is not None:
                table = self.rotary.table(context.positions, torch.float32)  # type: ignore[operator]
                parts = rotation.split_product(x, weight, table, *heads)
                return self.attend_rotated(*parts, None, context)
        projected = matrix(x)
        if rotates and rotation.available(projected):
            table = self.rotary.table(context.positions, torch.float32)  # type: ignore[operator]
            parts = rotation.split_rotated(projected, table, *heads)
            return self.attend_rotated(*parts, None, context)
        qk, v = projected.split_with_sizes(self.widths, -1)
        return self.attend(qk, v, state, context)

    def one_table(self) -> bool:
        """Whether one table describes the rotation, of all channels: `archzoo.kernels.rotation`."""
        rotary: Any = self.rotary
        return hasattr(rotary, "table") and 2 * len(rotary.frequencies) == self.head_dim

    def attend(
        self, qk: Tensor, v: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """`parallel` from the projections on.

        Args:
            qk: (batch, time, (heads + kv_heads) * head_dim), queries and keys side by side.
            v: (batch, time, kv_heads * head_dim).
            state: The cache, or None.
            context: Of the same tokens.
        """
        if state is not None and kernels.may_run(state["keys"]) and self.fits_kernel(qk, v, state):
            return self.attend_by_kernel(qk, v, state, context)
        q, k = self.rotary.both(
            split_heads(qk, self.heads + self.kv_heads), self.heads, context.positions
        )
        return self.attend_rotated(q, k, split_heads(v, self.kv_heads), state, context)

    def attend_rotated(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """`attend` from the rotation on.

        Args:
            q: (batch, time, heads, head_dim).
            k: (batch, time, kv_heads, head_dim).
            v: Shaped like k.
            state: The cache, or None.
            context: Of the same tokens.
        """
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (batch, heads, time, head_dim)

        positions = context.positions if self.bias is not None else None
        documents = context.documents if context.packed else None
        length, prefix = None, 0
        if state is not None:
            state = extend(state, k, v, positions, documents)
            prefix = prefix_of(state)
            k, v, stop = state["keys"], state["values"], state["length"]
            if isinstance(stop, Tensor):  # how many are there decides the mask, not the shapes
                length, stop = stop - prefix if prefix else stop, None
            else:
                k, v = k.narrow(2, 0, stop), v.narrow(2, 0, stop)
            positions = state["positions"][:, prefix:stop] if positions is not None else None
            documents = state["documents"][:, prefix:stop] if documents is not None else None

        # A mask of one's own, from before there were fixed states, takes no length.
        fixed = () if length is None else (length,)
        text = k[:, :, prefix:] if prefix else k
        mask, causal = self.mask(q, text, context, positions, documents, *fixed)
        if prefix:
            mask, causal = self.mask_behind_prefix(q, k, mask, causal, context, prefix)
        once = q.shape[2] == 1 and k.shape[2] >= LONG_CACHE and mask is None
        if once and q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
            y = attend_once(q, k, v)
        elif state is not None and q.is_cuda and k.shape[2] < PLANNED_FROM and not transformed():
            with sdpa_kernel(WITHOUT_PLANS):
                y = attend_all(q, k, v, mask, causal)
        else:
            y = attend_all(q, k, v, mask, causal)
        return self.output(merge_heads(y.transpose(1, 2))), state

    def fits_kernel(self, qk: Tensor, v: Tensor, state: State) -> bool:
        """Whether `attend_by_kernel` takes this call: one token, no bias.

        Args:
            qk: As for `attend`.
            v: The same.
            state: The cache.
        """
        if qk.shape[1] != 1 or self.bias is not None:
            return False
        fixed = isinstance(state["length"], Tensor)
        # Without counters of its own it would take its stream's, which no compiler follows.
        if "arrivals" not in state and (fixed or torch.compiler.is_compiling()):
            return False
        q, k, v = self.of_one_token(qk, v)
        return kernels.available(q, k, v, state["keys"], state["values"])

    def of_one_token(self, qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k and v of one token, (batch, heads or kv_heads, head_dim)."""
        q, k = split_heads(qk, self.heads + self.kv_heads)[:, 0].split_with_sizes(
            (self.heads, self.kv_heads), 1
        )
        return q, k, split_heads(v, self.kv_heads)[:, 0]

    def attend_by_kernel(
        self, qk: Tensor, v: Tensor, state: State, context: Context
    ) -> tuple[Tensor, State]:
        """`attend` of one token in one launch: `archzoo.kernels.cache_attention`.

        Args:
            qk: (batch, 1, (heads + kv_heads) * head_dim).
            v: (batch, 1, kv_heads * head_dim).
            state: The cache.
            context: Of the same token.
        """
        documents = context.documents if context.packed else None
        q, k, values = self.of_one_token(qk, v)
        rotary: Any = self.rotary
        table = None
        if hasattr(rotary, "table"):
            table = rotary.table(context.positions, torch.float32)
        else:
            q, k = rotary.both(
                split_heads(qk, self.heads + self.kv_heads), self.heads, context.positions
            )
            q, k = q[:, 0], k[:, 0]
        length, after = state["length"], state
        if isinstance(length, Tensor):
            expect_documents(state, documents)
            arrivals = state["arrivals"]
        else:
            after = state | {"length": length + 1}
            for name, new in (("keys", k), ("values", values), ("documents", documents)):
                if new is not None:
                    after[name] = enlarged(state, name, new, 1)
            arrivals = kernels.arrivals_here(q, length)
            length = torch.empty((), dtype=torch.int64, device=q.device)
        if documents is not None and (prefix := prefix_of(state)):  # which every document sees
            after["documents"][:, :prefix] = documents
        y = kernels.attend_cache(
            q,
            k,
            values,
            after["keys"],
            after["values"],
            length,
            arrivals,
            table=table,
            documents=after["documents"] if documents is not None else None,
            document=documents,
        )
        return self.output(y.view(len(y), 1, -1)), after

    def prefix_shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys and values that every document sees before its own: (kv_heads, 0, head_dim)."""
        shape = (self.kv_heads, 0, self.head_dim)
        return {"keys": shape, "values": shape}

    def mask_behind_prefix(
        self,
        q: Tensor,
        k: Tensor,
        mask: Any,
        causal: bool,
        context: Context,
        prefix: int,
    ) -> tuple[Any, bool]:
        """The mask of the text's keys with columns for a prefix before them, which all queries see.

        Its keys are not rotated (Li and Liang, arXiv 2101.00190); for a bias they are the
        positions from 0 on.

        Args:
            q: (batch, heads, queries, head_dim).
            k: (batch, kv_heads, keys, head_dim), the prefix's first.
            mask: As `mask` gives it for the keys of the text.
            causal: The same.
            context: Of the queries.
            prefix: Keys of it.
        """
        queries, keys = q.shape[2], k.shape[2]
        if mask is None and not causal:  # one query, which sees all
            return None, False
        if not isinstance(mask, Tensor) or mask.dim() < 4:  # causal, as is all that is before it
            if self.takes_segment(q):
                from torch.nn.attention.bias import causal_lower_right

                return causal_lower_right(queries, keys), False
            seen = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=q.device)
            return seen.tril(keys - queries), False
        if self.bias is None:
            seen = mask.new_ones((*mask.shape[:3], prefix))
        else:
            before = torch.arange(prefix, device=q.device)[None]
            seen = self.bias(context.positions, before).to(q.dtype)
            seen = seen.expand(mask.shape[0], *seen.shape[1:])
        return torch.cat([seen, mask], dim=3), False

    def mask(
        self,
        q: Tensor,
        k: Tensor,
        context: Context,
        key_positions: Tensor | None,
        key_documents: Tensor | None,
        length: Tensor | None = None,
    ) -> tuple[Tensor | None, bool]:
        """What `scaled_dot_product_attention` needs: a mask, or None and whether it is causal.

        The mask is bool (batch or 1, 1, queries, keys), or with a bias float
        (batch or 1, heads, queries, keys). On a GPU that of a later segment of a text is torch's
        `causal_lower_right`, which its kernels know without reading one.

        Args:
            q: (batch, heads, queries, head_dim).
            k: (batch, kv_heads, keys, head_dim), those of the queries last.
            context: Of the queries.
            key_positions: (batch, keys) int, for a bias; None: there is none.
            key_documents: (batch, keys) int; None: one document a row, without padding.
            length: 0-dim int, of the keys that are there. None: all are.
        """
        queries, keys = q.shape[2], k.shape[2]
        all_there = length is None and (queries == 1 or queries == keys)
        if self.bias is None and key_documents is None and all_there:
            causal = True if queries > 1 else False  # noqa: SIM210  # no compiler's symbol
            return None, causal
        if key_documents is None and length is None and self.takes_segment(q):
            from torch.nn.attention.bias import causal_lower_right  # which loads torch's compiler

            return causal_lower_right(queries, keys), False
        if length is None:  # query i is at key keys - queries + i
            seen = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=q.device)
            seen = seen.tril(keys - queries)
        else:
            before = length - torch.arange(queries, 0, -1, device=q.device)
            seen = torch.arange(keys, device=q.device) <= before[:, None]
            seen = seen[None, None]
        if key_documents is not None:
            same = context.documents[:, :, None] == key_documents[:, None, :]
            seen = seen & rearrange(same, "b q k -> b 1 q k")
        if self.bias is None:
            return seen, False
        bias = self.bias(context.positions, key_positions).to(q.dtype)
        return bias.masked_fill(~seen, float("-inf")), False

    def takes_segment(self, q: Tensor) -> bool:
        """Whether torch's kernels take later queries of a causal text without a mask in memory."""
        plain = self.bias is None and not torch.is_grad_enabled()
        return plain and q.is_cuda and not (torch.compiler.is_compiling() or transformed())


def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention by torch's fastest kernel, or plainly where it has no derivative.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim), kv_heads dividing heads.
        v: As k.
        mask: Of `Attention.mask`, bool or float; None: none.
        causal: Query i sees the keys up to i.

    Returns:
        (batch, heads, queries, head_dim).
    """
    if transformed():
        return attend_plainly(q, k, v, mask, causal)
    grouped = k.shape[1] != q.shape[1]
    ours = q.device.type == "cpu" and torch.is_grad_enabled() and q.dtype == k.dtype == v.dtype
    if ours and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")):
        # Whether torch would take its kernel, which has one derivative; the others have all.
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, scale=None, enable_gqa=grouped)
        if choice == SDPBackend.FLASH_ATTENTION.value:
            fused: Tensor = _Attend.apply(q, k, v, mask, causal)
            return fused
    if q.is_cuda and q.shape[2] == 1 and not torch.compiler.is_compiling():
        return attend_without_plans(q, k, v, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def attend_without_plans(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query by torch's kernels that take any number of keys as they come.

    The queries of one key head count as queries at several places: so no key is copied for them.

    Args:
        q: (batch, heads, 1, head_dim).
        k: (batch, kv_heads, keys, head_dim), kv_heads dividing heads.
        v: As k.
        mask: Of `Attention.mask`, bool or float; None: none.

    Returns:
        (batch, heads, 1, head_dim).
    """
    batch, heads, _, size = q.shape
    kv_heads = k.shape[1]
    folded = q.reshape(batch, kv_heads, heads // kv_heads, size)
    if mask is not None:
        mask = mask.expand(-1, heads, -1, -1).reshape(len(mask), *folded.shape[1:3], -1)
    with sdpa_kernel(WITHOUT_PLANS):
        y = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    return y.reshape(q.shape)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`attend_all` of operations that have all derivatives.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim).
        v: Shaped like k.
        mask: As `Attention.mask` gives it.
        causal: The same.
    """
    queries, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    q = rearrange(q * q.shape[-1] ** -0.5, "b (h g) q d -> b h g q d", g=group)
    scores = rearrange(q @ k[:, :, None].mT, "b h g q k -> b (h g) q k")
    if causal:
        mask = torch.ones((queries, keys), dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = rearrange(scores.softmax(dim=-1), "b (h g) q k -> b h g q k", g=group)
    return rearrange(weights @ v[:, :, None], "b h g q d -> b (h g) q d")


class _Attend(torch.autograd.Function):
    """Torch's kernel for CPUs, as `F.scaled_dot_product_attention` calls it, with a second one."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        added = mask
        if mask is not None and mask.dtype == torch.bool:
            added = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        y: Tensor
        y, kept = _FORWARD(q, k, v, 0.0, causal, attn_mask=added)
        ctx.save_for_backward(q, k, v, added, y, kept)
        ctx.causal = causal
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, y, kept = ctx.saved_tensors
        if differentiated_again():
            compute = functools.partial(attend_plainly, causal=ctx.causal)
            return *plain_gradients(compute, (q, k, v, mask), (grad,)), None
        grads = _BACKWARD(grad, q, k, v, y, kept, 0.0, ctx.causal, attn_mask=mask)
        return *grads, None, None


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query to all keys by two products.

    Args:
        q: (batch, heads, 1, head_dim).
        k: (batch, kv_heads, keys, head_dim), kv_heads dividing heads.
        v: As k.

    Returns:
        (batch, heads, 1, head_dim).
    """
    group = q.shape[1] // k.shape[1]
    q = rearrange(q * q.shape[-1] ** -0.5, "b (h g) 1 d -> (b h) g d", g=group)
    scores = torch.bmm(q, k.flatten(0, 1).mT)
    y = torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1))
    return rearrange(y, "(b h) g d -> b (h g) 1 d", h=k.shape[1])


def extend(
    state: State, k: Tensor, v: Tensor, positions: Tensor | None, documents: Tensor | None
) -> State:
    """Append k and v (batch, kv_heads, time, head_dim) to the KV cache.

    Where gradients are off they are written into its buffers, and the given state is consumed;
    where they are on, new tensors are made, since the old ones may be needed by a backward pass.
    The buffers and the length of a fixed state are always written into.

    Args:
        state: The KV cache.
        k: (batch, kv_heads, time, head_dim), already rotated.
        v: Shaped like k.
        positions: (batch, time) int, to be kept too; None: no bias reads them.
        documents: (batch, time) int, to be kept too; None: no padding, one document a row.
    """
    length, time = state["length"], k.shape[2]
    fresh = {"keys": k, "values": v}
    if positions is not None:
        fresh["positions"] = positions
    if documents is not None:
        fresh["documents"] = documents
    if isinstance(length, Tensor):
        expect_documents(state, documents)
        index = length + torch.arange(time, device=k.device)
        for name, new in fresh.items():
            state[name].index_copy_(CACHED[name], index, new.to(state[name].dtype))
        length.add_(time)
        if "arrivals" in state:
            state["arrivals"][..., 1] += time
        return state
    kept = torch.is_grad_enabled() or transformed()
    after = dict(state)
    after["length"] = length + time
    for name, new in fresh.items():
        axis, buffer = CACHED[name], state.get(name)
        if buffer is None or (length + time > buffer.shape[axis] and not kept):
            buffer = enlarged(state, name, new, 0 if kept else time)
        if kept:
            old = buffer.narrow(axis, 0, length)
            after[name] = torch.cat([old, new.to(buffer.dtype)], dim=axis)
        else:
            buffer.narrow(axis, length, time).copy_(new)
            after[name] = buffer
    return after


def enlarged(state: State, name: str, new: Tensor, time: int) -> Tensor:
    """A buffer of the cache with capacity for `time` more tokens: twice as large, if it must be.

    Args:
        state: Not fixed.
        name: Of the buffer.
        new: What will be written of the tokens.
        time: Tokens to come.
    """
    length, axis, buffer = state["length"], CACHED[name], state.get(name)
    if buffer is None:  # the first padding: everything before belongs to document 0
        buffer = new.new_zeros((new.shape[0], state["keys"].shape[2]))
    if length + time <= buffer.shape[axis]:
        found: Tensor = buffer
        return found
    shape = list(buffer.shape)
    shape[axis] = max(length + time, 2 * buffer.shape[axis])
    larger: Tensor = buffer.new_zeros(shape)
    larger.narrow(axis, 0, length).copy_(buffer.narrow(axis, 0, length))
    return larger


def prefix_of(state: State) -> int:
    """How many keys of a cache are a prefix's."""
    length: int = state["prefix"].shape[1] if "prefix" in state else 0
    return length


def expect_documents(state: State, documents: Tensor | None) -> None:
    """Refuse documents that begin in a fixed state: it has no tensor for them."""
    if documents is not None and "documents" not in state:
        raise ValueError(
            "this fixed state was made of rows without padding and of one document each, and has "
            "no tensor for others: give it no documents, or call copy_state first"
        )
