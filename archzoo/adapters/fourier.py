"""FourierFT: a change of each weight that a few learned frequencies make."""

from __future__ import annotations

import functools
import math
import random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archzoo.adapters import Adapter, Target
from archzoo.adapters.lora import scale_of
from archzoo.adapters.mora import check_known
from archzoo.numerics import at_least_float32, constant

Draw = Literal["half", "all"]


class FourierFT(Adapter):
    """``W + alpha Re(IDFT2(F))``, F (rows, columns) zero but for n learned entries, of each block.

    ``dW[u, v] = alpha / (rows columns) sum_k c_k cos(2 pi (u a_k / rows + v b_k / columns))``. The
    entries (a_k, b_k) are drawn once, from a seed, and are the same in all targets of one shape;
    the adapter's file holds them, so that it depends on no generator. Only the coefficients c
    learn. They start at 0, so nothing changes before the first step; the paper draws them from
    N(0, 1), which changes little at its widths and ruins a small model.

    Parameters: n for a block, and for each expert of a stack; by default as many as LoRA of rank 1.

    The entries (a, b) and (-a, -b) have the same cosine, because c is real. Drawn from all rows
    times columns, as in the paper, some coefficients therefore learn the same twice, and even n =
    rows times columns reaches only the even changes, dW[u, v] = dW[-u, -v], half of all. So one of
    each pair is drawn here, and n coefficients span n dimensions; ``draw="all"`` is the paper's.

    A step of size s in each coefficient moves W by alpha s sqrt(n / (2 rows columns)), as a
    Frobenius norm. The default alpha of sqrt(rows columns), that of the orthonormal transform,
    keeps this the same when the matrix grows. The paper's 300 is 0.07 times it at width 4096, with
    learning rates to match. Take about ten times LoRA's here: an adder of width 64 learned another
    sign at 0.06 to 0.2, and hardly anything at 0.002.

    The authors' code adds dW to W when called, but when merged its transpose and 300 instead of
    alpha, so that merging changes the model; and it takes square matrices alone. peft computes in
    float32 always and saves no entries. Here dW is the formula's, merged or not, in float64 too.

    Merging adds dW to W. A call makes dW by FFTs over half of the spectrum, for real matrices need
    no more: on a CPU 1.7 times as fast as `torch.fft.ifft2` at 512 x 512, and 14 times as fast as
    the products with 1,000 cosines.

    Source: Gao et al., arXiv 2405.03003, section 3, equations 2 to 4.

    Args:
        target: What it changes.
        targets: Names of blocks, or regular expressions that match a whole path such as
            ``blocks.0.mixer.query_key_value.query``. None: query and value.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        frequencies: n, how many entries are learned. None: rows + columns, or all that there are.
        alpha: Over rows times columns, the scale of the change. None: sqrt(rows times columns).
        seed: Of the entries.
        draw: "half": one of each pair with equal cosines; "all": from all, as in the paper.

    Raises:
        ValueError: Fewer frequencies than 1 or more than there are, an alpha of 0, or an unknown
            draw.
    """

    kinds = ("linear", "experts")
    default_targets = ("query", "value")
    mergeable = True

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        frequencies: int | None = None,
        alpha: float | None = None,
        seed: int = 2024,
        draw: Draw = "half",
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        check_known("draw", draw, Draw)
        *stack, rows, columns = target.shape
        there = rows * columns if draw == "all" else _count(rows, columns)
        if frequencies is None:
            frequencies = min(rows + columns, there)
        if not 1 <= frequencies <= there:
            raise ValueError(
                f"FourierFT: frequencies={frequencies} must be at least 1 and at most {there} for "
                f"{target.path}, of {rows} rows and {columns} columns: take "
                f"{'fewer' if frequencies > 0 else 'more'}"
            )
        self.rows, self.columns = rows, columns
        self.alpha = scale_of(math.sqrt(rows * columns) if alpha is None else alpha, 1, False)
        # A real matrix is known by the first half of its spectrum's columns. The other half repeats
        # them, but for the columns b that are -b: so an entry counts twice, or once in those.
        self.weights = tuple(
            self.alpha / (1 if b in (0, columns / 2) else 2) for b in range(columns // 2 + 1)
        )
        self.drawn = (rows, columns, frequencies, seed, draw)
        self.coefficients = nn.Parameter(torch.empty(*stack, frequencies))
        self.entries: Tensor
        self.register_buffer("entries", torch.empty(2, frequencies, dtype=torch.long))
        self.shared: FourierFT | None = None  # whose entries it takes: see `connect`
        self.reset_parameters()

    @classmethod
    def connect(cls, adapters: list[Adapter]) -> None:
        """Targets of one shape share the entries, which the first of them keeps."""
        first: dict[tuple[object, ...], FourierFT] = {}
        for adapter in adapters:
            assert isinstance(adapter, FourierFT)
            owner = first.setdefault(adapter.drawn, adapter)
            if owner is not adapter:
                del adapter.entries
                adapter.refer("shared", owner)

    def reset_parameters(self) -> None:
        """The coefficients zero; the entries as the seed draws them."""
        nn.init.zeros_(self.coefficients)
        if self.shared is None:
            drawn = torch.tensor(_drawn(*self.drawn), device=self.entries.device)
            self.entries.copy_(self._in_half(drawn.T))

    def start(self, weight: Tensor) -> None:
        """The coefficients zero; the entries stay."""
        nn.init.zeros_(self.coefficients)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A file's entries may be those of another drawing, and of the whole spectrum."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.shared is None:
            self.entries.copy_(self._in_half(self.entries))

    def _in_half(self, entries: Tensor) -> Tensor:
        """Entries (a, b), or (-a, -b) which has the same cosine: b is at most columns // 2."""
        a, b = entries[0] % self.rows, entries[1] % self.columns
        beyond = b > self.columns // 2
        return torch.stack(
            [torch.where(beyond, -a % self.rows, a), torch.where(beyond, self.columns - b, b)]
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.coefficients.shape)} of {self.rows} x {self.columns}"

    def delta(self, weight: Tensor) -> Tensor:
        """``alpha Re(IDFT2(F))``, of the weight's shape and dtype."""
        entries = self.entries if self.shared is None else self.shared.entries
        half = len(self.weights)
        c = self.coefficients.to(at_least_float32(self.coefficients.dtype))
        flat = c.new_zeros(*c.shape[:-1], self.rows * half)
        spectrum = flat.index_add(-1, entries[0] * half + entries[1], c)
        spectrum = spectrum.unflatten(-1, (self.rows, half)) * constant(
            self.weights, c.device, c.dtype
        )
        over_rows = torch.fft.ifft(spectrum, dim=-2)
        change: Tensor = torch.fft.irfft(over_rows, n=self.columns, dim=-1)
        return change.to(weight.dtype)


def _count(rows: int, columns: int) -> int:
    """How many entries have cosines of their own: the dimension of the even matrices."""
    single = 1 if columns % 2 else 2  # columns b that are -b
    return single * (rows // 2 + 1) + (columns // 2 + 1 - single) * rows


@functools.lru_cache(maxsize=64)
def _drawn(
    rows: int, columns: int, frequencies: int, seed: int, draw: Draw
) -> tuple[tuple[int, int], ...]:
    """The entries (a, b), each at most once."""
    if draw == "all":
        picked = random.Random(seed).sample(range(rows * columns), frequencies)
        return tuple(divmod(index, columns) for index in picked)
    own = [0] if columns % 2 else [0, columns // 2]  # the columns b that are -b: a or -a
    per_column, found = rows // 2 + 1, []
    for index in random.Random(seed).sample(range(_count(rows, columns)), frequencies):
        if index < len(own) * per_column:
            found.append((index % per_column, own[index // per_column]))
        else:
            b, a = divmod(index - len(own) * per_column, rows)
            found.append((a, b + 1))
    return tuple(found)
