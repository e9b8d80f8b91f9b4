"""Multi-scale retention: attention whose weights decay with distance, and a recurrent network.

With q, k rotated and k scaled by key_dim^-0.5, each head with its own decay gamma computes::

    S_n = gamma S_{n-1} + k_n^T v_n                       the state, (key_dim, value_dim)
    o_n = q_n S_n / sqrt(s_n),   s_n = sum_{j=0..n} gamma^j
    y_n = (silu(x_n Wg) * concat_heads norm(o_n)) Wo

Source: Sun et al., Retentive Network, arXiv 2307.08621, section 2. The normaliser here depends on
the position alone. The paper also divides by the row sum of the scores, which the recurrent form
cannot know; the norm after it removes that factor, all but its epsilon, so omitting it is what
makes the three forms one function.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Mixer, Rotary
from archzoo.derivatives import exporting, transformed
from archzoo.documents import Context, since_start
from archzoo.kernels import retention as kernels
from archzoo.kernels import retention_layer as layer_kernels
from archzoo.kernels.retention.reference import Decays, decays, inverse_root_sum, retain
from archzoo.linear import Linear
from archzoo.norm import rms_norm
from archzoo.numerics import (
    KeepsFloat32,
    at_least_float32,
    cast,
    constant,
    head_size,
    merge_heads,
    once_per_call,
    split_heads,
    without_autocast,
)
from archzoo.positions.rotary import RetentionRotation
from archzoo.states import State

# On a CPU at width 128, 4 heads, a training step in one chunk against chunks of 64 took 32 against
# 35 ms at 128 tokens, and 53 against 46 at 256: archzoo bench retnet_tiny:parallel
# retnet_tiny:chunkwise --training --lengths 64,128,256,512 --tokens 1.
PARALLEL_UP_TO = 128  # tokens


def log_decays(decay: str | float, heads: int) -> tuple[float, ...]:
    """The log of each head's gamma, in float64.

    ``default``: gamma_h = 1 - 2^(-5 - h), arXiv 2307.08621, eq. 8. ``paper_lm``: 1 - gamma runs
    from 1/32 to 1/512 evenly in the logarithm, as the paper's language models have it. A number:
    that gamma for every head. log1p keeps gamma below 1 at any head; in float32
    log(1 - 2^(-5-h)) is exactly 0 from head 20 on.

    Raises:
        ValueError: An unknown schedule, or a gamma outside (0, 1].
    """
    if decay == "default":
        return tuple(math.log1p(-(2.0 ** (-5 - head))) for head in range(heads))
    if decay == "paper_lm":
        begin, end = math.log(1 / 32), math.log(1 / 512)
        steps = max(heads - 1, 1)
        rates = (math.exp(begin + (end - begin) * head / steps) for head in range(heads))
        return tuple(math.log1p(-rate) for rate in rates)
    try:
        gamma = float(decay)
    except ValueError:
        raise ValueError(
            f"decay={decay!r} is not a valid schedule: take default, paper_lm, learnable, or a "
            "number"
        ) from None
    if not 0 < gamma <= 1:
        raise ValueError(f"decay={gamma} must lie in (0, 1]: each token scales the past by it")
    return (math.log(gamma),) * heads


class Retention(KeepsFloat32, Mixer):
    """Multi-scale retention in parallel, chunkwise and recurrent form.

    ``S_n = gamma S_{n-1} + k_n^T v_n``, ``o_n = q_n S_n / sqrt(s_n)``,
    ``y_n = (silu(x_n Wg) * concat_heads norm(o_n)) Wo``; see the top of this file. Parameters:
    2 d^2 for q and k, 3 value_factor d^2 for v, gate and output. State: the float32 S,
    (batch, heads, key_dim, value_dim), whatever the length of the text.

    Source: Sun et al., Retentive Network, arXiv 2307.08621, sections 2.1 to 2.3.

    Args:
        dim: Width of x.
        heads: Heads, each with its own decay.
        value_factor: Width of the values over dim; heads must divide the width that results.
        decay: "default" (1 - 2^(-5-h)), "paper_lm" (1/32 to 1/512 evenly in the logarithm),
            "learnable" (begins as default), or one gamma for all heads, such as 1 or 0.9921875.
        gate: Multiply by silu(x Wg) before the output projection.
        head_norm: Of each head's output: "rms", "group" (mean and variance), or "none".
        norm_eps: The head norm's epsilon.
        chunk_size: Tokens a chunk in the chunkwise form.
    """

    handles_documents = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        value_factor: float = 2.0,
        decay: float | str = "default",
        gate: bool = True,
        head_norm: Literal["rms", "group", "none"] = "rms",
        norm_eps: float = 1e-6,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_size(dim, heads)
        value_width = round(dim * value_factor)
        if value_width < 1 or value_width % heads:
            raise ValueError(
                f"value_factor={value_factor} makes values {value_width} wide, which heads="
                f"{heads} does not divide: take a multiple of {heads / dim:g}"
            )
        if norm_eps < 0:
            raise ValueError(f"norm_eps={norm_eps} must be at least 0")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1 token")
        if head_norm not in ("rms", "group", "none"):
            raise ValueError(f"head_norm={head_norm!r} is none of rms, group, none")
        self.value_dim = value_width // heads
        self.head_norm, self.norm_eps, self.chunk_size = head_norm, norm_eps, chunk_size
        # One matrix for q, k, v and the gate, in this order.
        self.widths = [2 * dim, value_width] + [value_width] * gate
        blocks = {"query": dim, "key": dim, "value": value_width}
        self.query_key_value_gate = Linear(dim, blocks | ({"gate": value_width} if gate else {}))
        self.query_key_value_gate.heads = dict.fromkeys(self.query_key_value_gate.blocks, heads)
        self.output = Linear(value_width, {"output": dim}, residual_projection=True)
        self.rotary: Rotary = RetentionRotation(self.head_dim)

        self.learnable = decay == "learnable"
        self.fixed_log_decay = log_decays("default" if self.learnable else decay, heads)
        self.fixed_decay = tuple(math.exp(value) for value in self.fixed_log_decay)
        if self.learnable:  # log gamma = -exp(rate) stays below 0 wherever training takes it
            dtype = at_least_float32(torch.get_default_dtype())
            self.decay_rate = nn.Parameter(torch.empty(heads, dtype=dtype))
            self.float32_names = ("decay_rate",)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """A learnable decay starts as the default one."""
        if self.learnable:
            rates = [math.log(-value) for value in self.fixed_log_decay]
            with torch.no_grad():
                self.decay_rate.copy_(torch.tensor(rates, dtype=torch.float64))

    def log_decay(self, like: Tensor) -> Tensor:
        """Log gamma, (heads,) on the device of `like`, float32 (float64 for float64)."""
        dtype = at_least_float32(like.dtype)
        if self.learnable:
            return -self.decay_rate.to(dtype).exp()
        return constant(self.fixed_log_decay, like.device, dtype)

    def gamma(self, log_decay: Tensor) -> Tensor:
        """Each head's gamma, (heads, 1, 1)."""
        if self.learnable:
            return log_decay.exp()[:, None, None]
        return constant(self.fixed_decay, log_decay.device, log_decay.dtype).view(-1, 1, 1)

    def normaliser(self, log_decay: Tensor, context: Context) -> Tensor:
        """1 / sqrt(s_n) for q to be multiplied by, (batch or 1, time, heads, 1)."""

        def compute() -> Tensor:
            return inverse_root_sum(log_decay, context.positions)[..., None]

        if self.learnable:
            return compute()
        key = ("normaliser", self.fixed_log_decay, log_decay.dtype)
        return once_per_call(context.positions, key, compute)

    def decays(self, log_decay: Tensor, context: Context) -> Decays:
        """The decay mask of a whole segment and its borders, normalised: `Decays` of one chunk.

        They are 0 from padding and to it.
        """
        time = context.positions.shape[1]
        normaliser = self.normaliser(log_decay, context)
        return decays(log_decay, context, 0, time, 1, self.head_dim**-0.5, normaliser)

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """S = 0: {"memory": (batch, heads, key_dim, value_dim)}, float32 at least."""
        shape = (batch_size, self.heads, self.head_dim, self.value_dim)
        dtype = at_least_float32(dtype or self.output.dtype)
        return {"memory": torch.zeros(shape, device=device, dtype=dtype)}

    def choose_form(self, x: Tensor, state: State | None) -> str:
        """Recurrent for one token, parallel for few, chunkwise for many and on a GPU."""
        if x.shape[1] == 1 and state is not None:
            return "recurrent"
        if exporting():  # for any length, of torch's own operations
            return "parallel"
        few = x.shape[1] <= PARALLEL_UP_TO and x.device.type == "cpu"
        return "parallel" if few else "chunkwise"

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q and k side by side (batch, time, 2 heads, key_dim), v, and the gate's input or None."""
        return self.split(self.query_key_value_gate(x))

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The parts of the one matrix's result, see `project`."""
        qk, v, *gate = torch.split_with_sizes(projected, self.widths, dim=-1)
        qk, v = split_heads(qk, 2 * self.heads), split_heads(v, self.heads)
        return qk, v, gate[0] if gate else None

    def unpack(
        self, x: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `project` gives, and the S of a state (None without one)."""
        return *self.project(x), None if state is None else state["memory"]

    def rotated(self, qk: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Q and k (batch, time, heads, key_dim), rotated, of the two side by side."""
        return self.rotary.both(qk, self.heads, context.positions)

    def widen(
        self, qk: Tensor, v: Tensor, context: Context, dtype: torch.dtype, *, masked: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k, v (batch, time, heads, size) in the dtype of sums over time.

        q and k come rotated, not scaled.

        Args:
            qk: (batch, time, 2 heads, key_dim), q and k side by side.
            v: (batch, time, heads, value_dim).
            context: Of the same tokens.
            dtype: Of sums over time.
            masked: Whether k and v are to be 0 at padding; the decays of `decays` are.
        """
        q, k = self.rotated(cast(qk, dtype), context)
        v = cast(v, dtype)
        if context.packed and masked:
            valid = context.valid[:, :, None, None]
            k, v = k * valid, v * valid
        return q, k, v

    def finish(
        self, o: Tensor, gate: Tensor | None, memory: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Any]:
        """Head norm, gate, output projection: o (batch, time, heads, value_dim) to y; and S packed.

        The opposite of `unpack`.

        Args:
            o: (batch, time, heads, value_dim).
            gate: (batch, time, heads * value_dim), before its SiLU; None: there is none.
            memory: S after the last token; None: it is not kept.
            dtype: Of y.
        """
        # At padding o is exactly 0, and with eps 0 the norm would make NaN of it, which the next
        # layer's sums would spread. 1e-24 is lost beside anything else, and its root survives
        # being cubed in a backward pass.
        eps = max(self.norm_eps, 1e-24)
        if self.head_norm == "rms":
            o = rms_norm(o, eps=eps)
        elif self.head_norm == "group":
            o = F.layer_norm(o, (self.value_dim,), eps=eps)
        y = cast(merge_heads(o), dtype)
        y = self.output(y if gate is None else F.silu(gate) * y)
        return y, None if memory is None else {"memory": memory}

    def prefix_shapes(self) -> dict[str, tuple[int, ...]]:
        """The S that every document starts from: (heads, key_dim, value_dim)."""
        return {"memory": (self.heads, self.head_dim, self.value_dim)}

    def from_prefix(
        self, qk: Tensor, o: Tensor, memory: Tensor | None, log_decay: Tensor, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """Add what an S_0 gives documents that begin in packed rows, whatever computed the rest.

        Retention is linear in its state, so from S_0 instead of 0 it is
        ``o_n + gamma^n q_n S_0 / sqrt(s_n)`` and ``S_n + gamma^n S_0``, n counted from 1. Where
        nothing is packed S is S_0 before the first token, and no more is to be done.

        Args:
            qk: (batch, time, 2 heads, key_dim), q and k side by side.
            o: (batch, time, heads, value_dim), of documents that began from 0.
            memory: S after the last token, likewise; None: it is not kept.
            log_decay: log gamma of each head.
            context: Of the same tokens.
        """
        if not (context.start and context.packed):
            return o, memory
        initial = context.start["memory"][0].to(log_decay.dtype)
        count, begun = since_start(context)
        with without_autocast(o.device):
            decay = (count[..., None] * log_decay).exp() * begun[..., None]  # (batch, time, heads)
            q, _ = self.rotated(cast(qk, log_decay.dtype), context)
            q = q * self.normaliser(log_decay, context)
            q = q * (decay * context.valid[..., None])[..., None]
            o = o + torch.einsum("bthk,hkv->bthv", q, initial).to(o.dtype)
            if memory is not None:
                memory = memory + decay[:, -1, :, None, None] * initial
        return o, memory

    def parallel(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """``o = ((Q K^T) * D) V``: O(time^2) work, (heads, time, time) memory.

        D, the decay mask, holds k's scale and o's normaliser. What a state brings along is added,
        decayed until each token.
        """
        qk, v, gate, memory = self.unpack(x, state)
        log_decay = self.log_decay(x)
        with without_autocast(x.device):
            q, k, v = self.widen(qk, v, context, log_decay.dtype, masked=False)
            q, k, v = (y.transpose(1, 2).contiguous() for y in (q, k, v))
            D = self.decays(log_decay, context)
            o = ((q @ k.mT) * D.intra) @ v
            if memory is not None:
                o = o + (q * D.initial) @ memory
                memory = memory * D.across + (k * D.final).mT @ v
        o = o.transpose(1, 2).contiguous()
        o, memory = self.from_prefix(qk, o, memory, log_decay, context)
        return self.finish(o, gate, memory, x.dtype)

    def fits_one_kernel(self, projected: Tensor, log_decay: Tensor) -> bool:
        """Whether `in_one` computes this layer of this text."""
        plain = self.head_norm == "rms" and len(self.widths) == 3
        rotary: Any = self.rotary
        if not plain or not hasattr(rotary, "table"):  # which one table does not describe
            return False
        if 2 * len(rotary.frequencies) != self.head_dim:  # some channels are not rotated
            return False
        return layer_kernels.available(projected, log_decay, self.heads, self.head_dim)

    def in_one(
        self, projected: Tensor, log_decay: Tensor, context: Context, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """All between the two matrices: `archzoo.kernels.retention_layer`; and S after it.

        Args:
            projected: What the first matrix gives, (batch, time, sum of widths).
            log_decay: log gamma of each head.
            context: Of the same tokens.
            memory: S before them; None: 0, and it is not kept.
        """
        rotary: Any = self.rotary
        packed = context.packed  # else positions are 0, 1, 2, ..., or count on from the state's
        given = (
            projected,
            rotary.table(context.positions, torch.float32),
            log_decay,
            context.positions if packed or memory is not None else None,
            context.starts if packed else None,
            context.valid if packed else None,
        )
        how: Any = {"heads": self.heads, "key_width": self.head_dim}
        how["eps"] = max(self.norm_eps, 1e-24)
        if memory is None:
            return layer_kernels.gated_retention(*given, **how), None
        return layer_kernels.gated_retention_from(memory, *given, **how)

    def chunkwise(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """Time in chunks: O(time * (chunk_size + key_dim)) work a channel.

        By a kernel where there is one for these tensors, see `archzoo.kernels.retention`, else by
        its reference implementation.
        """
        log_decay = self.log_decay(x)
        scale = self.head_dim**-0.5
        projected = self.query_key_value_gate(x)
        memory = None if state is None else state["memory"]
        # The kernels hand on a state without gradients.
        reads = memory is None or not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        adds = context.start and context.packed  # to o before the norm: `from_prefix`
        if reads and not adds and self.fits_one_kernel(projected, log_decay):
            y, memory = self.in_one(projected, log_decay, context, memory)
            return self.output(y), None if memory is None else {"memory": memory}
        qk, v, gate = self.split(projected)
        if kernels.available(qk, qk, v, log_decay):
            q, k = self.rotated(qk, context)
            counted = memory is not None or context.packed  # else positions are 0, 1, 2, ...
            o, memory = kernels.retention(
                q,
                k * scale,
                v,
                log_decay,
                memory,
                context.positions if counted else None,
                context.starts if context.packed else None,
                context.valid if context.packed else None,
            )
            o, memory = self.from_prefix(qk, o, memory, log_decay, context)
            return self.finish(o, gate, memory, x.dtype)
        with without_autocast(x.device):
            q, k, v = self.widen(qk, v, context, log_decay.dtype)
            q = q * self.normaliser(log_decay, context)
            how = {"scale": scale, "chunk_size": self.chunk_size}
            o, memory = retain(q, k, v, log_decay, memory, context, **how)
        o, memory = self.from_prefix(qk, o, memory, log_decay, context)
        return self.finish(o, gate, memory, x.dtype)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """One token: decay the state, add k^T v, read it with q."""
        qk, v, gate, memory = self.unpack(x, state)
        assert memory is not None, "the recurrent form needs a state"
        log_decay = self.log_decay(x)
        starts = context.starts if context.packed else None
        if starts is not None and context.start:  # from where no reset is needed
            first = context.start["memory"].to(memory.dtype)
            memory, starts = torch.where(starts[:, :, None, None], first, memory), None
        if not torch.is_grad_enabled() and kernels.available(qk, qk, v):
            q, k = self.rotated(qk, context)
            seen = (starts, context.valid if context.packed else None)
            o, memory = kernels.retention_step(
                q, k * self.head_dim**-0.5, v, log_decay, memory, context.positions, *seen
            )
            return self.finish(o, gate, memory, x.dtype)
        batch, heads = x.shape[0], self.heads
        with without_autocast(x.device):
            q, k, v = self.widen(qk, v, context, log_decay.dtype)
            q = q * self.normaliser(log_decay, context)
            # With one token these are views; transposing would take twice the calls.
            k, v = k.view(batch, heads, -1, 1), v.view(batch, heads, 1, -1)
            gamma = self.gamma(log_decay)
            if context.packed:  # a new document forgets the past; padding lets nothing decay
                valid = context.valid[:, :, None, None]
                kept = gamma if starts is None else gamma * ~starts[:, :, None, None]
                gamma = torch.where(valid, kept, 1.0)
            if torch.is_grad_enabled() or transformed():
                memory = torch.addcmul(memory * gamma, k, v, value=self.head_dim**-0.5)
            else:
                memory.mul_(gamma).addcmul_(k, v, value=self.head_dim**-0.5)
            o = torch.bmm(q.view(batch * heads, 1, -1), memory.flatten(0, 1))
            o = o.view(batch, 1, heads, -1)
        return self.finish(o, gate, memory, x.dtype)
