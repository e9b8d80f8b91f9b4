"""What Linears of 1 bit a weight share: signs, scales that come from a matrix, packed storage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.derivatives import followed
from archzoo.kernels import one_bit
from archzoo.linear import Linear
from archzoo.numerics import autocast_dtype, cast, for_float64

StraightThrough = Literal["tanh", "clip"]
OTHERS = ("weight", "bias")  # parameters that are no scales
LATENT_SIGNS = 0.01  # times the signs: where OneBit's own code starts the latent weights


def svid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sign-value-independent decomposition: ``W ~ Sign(W) * (h g^T)``.

    h g^T is the best approximation of |W| of rank 1: its leading singular vectors, which can be
    taken without a negative entry (Perron and Frobenius), each times the root of the singular
    value. They are found by power iteration in float64.

    Source: Xu et al., OneBit, arXiv 2402.11295, section 3.2.

    Args:
        weight: W, (..., o, i).

    Returns:
        h (..., o) and g (..., i), of W's dtype.
    """
    wide = for_float64(weight.detach()).double().abs()
    g = torch.ones_like(wide[..., 0, :])
    h = wide.sum(dim=-1)
    for _ in range(1000):
        h = F.normalize((wide @ g[..., None])[..., 0], dim=-1)
        found = (h[..., None, :] @ wide)[..., 0, :]
        still = (found - g).abs().amax() <= 1e-14 * found.abs().amax()
        g = found
        if still:
            break
    value = g.norm(dim=-1, keepdim=True)  # the singular value
    root = value.sqrt()
    g = torch.where(value > 0, g / root, 0.0)
    return (h * root).to(weight), g.to(weight)


class BinaryLinear(Linear):
    """``y = ((x * before) Sign(W)^T) * after + b``: a class says what the two scales are.

    Each block of rows is a matrix of its own, with its own scales of x. In training W is a latent
    matrix of floats, whose signs alone are used (0 counts as positive, as it is packed), and a
    straight-through estimator takes the place of the sign's derivative, which is 0::

        tanh   dL/dW = dL/dSign * (1.001 - tanh(W)^2)      (OneBit)
        clip   dL/dW = dL/dSign where |W| < 1, else 0      (BinaryMoS)

    Packed there is no W: the signs lie in a buffer ``signs``, 1 bit each, in the order of
    `archzoo.kernels.one_bit`, and stay as they are; all else can be trained.

    Args:
        in_features: Width of x.
        blocks: Names and rows, as of `Linear`.
        straight_through: "tanh" or "clip".
        packed: Keep the signs alone, 1 bit each.
        stack: As of `Linear`.
        bias: The same.
        residual_projection: The same.
    """

    #: Latent weights are no scales of their own: only their signs count, which decay cannot change,
    #: while it moves them to where a step flips them. Scales it would shrink.
    decays = False
    #: (..., out_features, ceil(in_features / 8)) uint8, where it is packed.
    signs: Tensor

    def __init__(
        self,
        in_features: int,
        blocks: Mapping[str, int],
        *,
        straight_through: StraightThrough,
        packed: bool,
        stack: int | None,
        bias: bool,
        residual_projection: bool,
    ) -> None:
        if straight_through not in ("tanh", "clip"):
            raise ValueError(f"straight_through={straight_through!r} is neither tanh nor clip")
        super().__init__(
            in_features, blocks, stack=stack, bias=bias, residual_projection=residual_projection
        )
        self.straight_through, self.packed = straight_through, packed
        self._held_signs: Tensor | None = None
        self._parts: tuple[Tensor, list[list[Tensor]]] | None = None  # what `_parts_of` has made
        leading = () if stack is None else (stack,)
        self._add_scales(leading)
        if packed:
            self.keeps_init = True
            shape = (*leading, self.out_features, -(-in_features // 8))
            drawn = torch.randint(256, shape, dtype=torch.uint8)
            del self.weight
            self.register_parameter("weight", None)
            self.register_buffer("signs", drawn)
            self.packed_weights = self.out_features * in_features * (stack or 1)
        self.weight_drawn()

    # ------------------------------------------------------------------------ of each class

    @abstractmethod
    def _add_scales(self, leading: tuple[int, ...]) -> None:
        """Make the parameters of the scales.

        Args:
            leading: (stack,) or ().
        """

    @abstractmethod
    def _start_scales(self, after: Tensor, before: Tensor) -> None:
        """Set them, so that y is that of ``Sign(W) * (after before^T)`` for each block.

        Args:
            after: (..., out_features).
            before: (..., blocks, in_features).
        """

    @abstractmethod
    def _scales(
        self, x: Tensor, index: int | None, block: int, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """The scales of x and of y, for one block.

        Args:
            x: (..., in_features).
            index: Of a stack's matrix, or None.
            block: Its number.
            rows: Its rows.

        Returns:
            Of x: (in_features,) or x's shape; of y: (rows,) or (..., rows).
        """

    @abstractmethod
    def _mean_scales(self) -> tuple[Tensor, Tensor]:
        """Scales that no token decides: (..., out_features) and (..., blocks, in_features)."""

    @abstractmethod
    def _scale(self) -> Tensor:
        """One of the parameters of the scales."""

    def _finish(self, y: Tensor) -> Tensor:
        """What becomes of a block's y, (..., rows)."""
        return y

    @abstractmethod
    def _packed_product(
        self, x: Tensor, signs: Tensor, index: int | None, block: int, rows: slice
    ) -> Tensor:
        """A block's y without gradients, `_finish` included.

        Args:
            x: As for `_scales`, and so are the others.
            signs: The block's, packed.
            index: The same.
            block: The same.
            rows: The same.
        """

    # ------------------------------------------------------------------------ starting

    def weight_drawn(self) -> None:
        """Start the scales by the decomposition of the weight, block by block: see `svid`."""
        if self.packed:
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            scale = self.in_features**-0.25
            self._start_scales(*(torch.full_like(s, scale) for s in self._mean_scales()))
        elif not self.weight.is_meta:
            self.start_from(self.weight)

    @torch.no_grad()
    def start_from(self, weight: Tensor, latent: Literal["weights", "signs"] = "weights") -> None:
        """Begin as the binary form of a matrix: its signs, and scales by `svid`.

        Args:
            weight: Of this one's shape.
            latent: Where the latent weights start: "weights", the matrix itself, or "signs",
                .01 times its signs, as OneBit's own code has it.
        """
        pairs = [svid(part) for part in weight.split_with_sizes(list(self.blocks.values()), -2)]
        after: Tensor = torch.cat([h for h, _ in pairs], dim=-1)
        self._start_scales(after, torch.stack([g for _, g in pairs], dim=-2))
        if self.packed:
            self.signs.copy_(one_bit.pack(weight < 0))
            self._parts = None
        elif latent == "signs":
            self.weight.copy_(torch.where(weight < 0, -LATENT_SIGNS, LATENT_SIGNS))
        elif weight is not self.weight:
            self.weight.copy_(weight)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # Signs that were made in inference mode count no versions, by which words are known.
        self._parts = None

    def bits(self) -> int:
        """What it takes on disk and in memory where the signs are packed, but for the bias."""
        scales = sum(p.numel() * p.itemsize for n, p in self.named_parameters() if n not in OTHERS)
        signs = self.out_features * -(-self.in_features // 8) * (self.stack or 1)
        return 8 * (signs + scales)

    def packed_state(self) -> dict[str, Tensor]:
        """Its tensors by name, as the same class with ``packed=True`` has them."""
        held = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        signs = one_bit.pack(held.pop("weight") < 0)
        return {"signs": signs, **held}

    # ------------------------------------------------------------------------ computing

    @property
    def dtype(self) -> torch.dtype:
        return self._scale().dtype

    @property
    def device(self) -> torch.device:
        return self._scale().device

    @property
    def is_one_matrix(self) -> bool:  # type: ignore[override]
        """Packed it must be called, or it would be unpacked whole."""
        return not self.packed

    def _signs(self) -> Tensor:
        """1 and -1, with the straight-through estimator: (..., out_features, in_features)."""
        if self.packed:
            return one_bit.unpack(self.signs, self.in_features, self.dtype)
        weight: Tensor = self.weight
        one = torch.ones((), dtype=weight.dtype, device=weight.device)
        signs = torch.where(weight.detach() < 0, -one, one)
        if not (weight.requires_grad and torch.is_grad_enabled()) and not followed():
            return signs
        # A function of that derivative, whose value is taken away again: signs + 0.
        if self.straight_through == "tanh":
            surrogate = weight.tanh() + 0.001 * weight
        else:
            surrogate = F.hardtanh(weight)
        return signs + (surrogate - surrogate.detach())

    def base_weight(self) -> Tensor:
        """``Sign(W) * (after before^T)``, where no token decides over the scales: without them."""
        after, before = self._mean_scales()
        sizes = torch.tensor(list(self.blocks.values()), device=before.device)
        each = before.repeat_interleave(sizes, dim=-2, output_size=self.out_features)
        return self._signs() * each * after[..., None]

    def product(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """``y`` without adapters, of all rows or of those of some blocks."""
        if self.stack is None:
            return self._one(x, None, rows)
        return torch.stack([self._one(x, index, rows) for index in range(self.stack)])

    def product_of(self, x: Tensor, index: int) -> Tensor:
        return self._one(x, index, None)

    def _one(self, x: Tensor, index: int | None, rows: slice | None) -> Tensor:
        quick = self._quick_signs(x)
        packed = None if quick is None else self._parts_of(quick)[index or 0]
        bias: Tensor | None = self.bias
        if packed is None:
            signs = self._signs() if index is None else self._signs()[index]
        if index is not None:
            bias = bias if bias is None else bias[index]
        parts = []
        begin = 0
        for block, size in enumerate(self.blocks.values()):
            own = slice(begin, begin + size)
            begin += size
            if rows is not None and not (rows.start <= own.start and own.stop <= rows.stop):
                continue
            if packed is None:
                before, after = self._scales(x, index, block, own)
                y = F.linear(x * cast(before, x.dtype), signs[own])
                y = y * cast(after, y.dtype)
                y = cast(self._finish(y), y.dtype)
            else:
                y = self._packed_product(x, packed[block], index, block, own)
            parts.append(y if bias is None else y + cast(bias[own], y.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _parts_of(self, packed: Tensor) -> list[list[Tensor]]:
        """Packed signs by the matrices of a stack and their blocks: the same views each time.

        Beside a view a kernel keeps the words that it reads.
        """
        if self._parts is None or self._parts[0] is not packed:
            matrices = [packed] if self.stack is None else list(packed.unbind())
            sizes = list(self.blocks.values())
            self._parts = packed, [list(matrix.split(sizes)) for matrix in matrices]
        return self._parts[1]

    def _quick_signs(self, x: Tensor) -> Tensor | None:
        """The packed signs, where a product with them is to be had."""
        if torch.is_grad_enabled() or followed() or autocast_dtype(x.device) is not None:
            return None
        if self.packed:
            return self.signs if x.dtype == self.dtype else None
        return self._held_signs

    def _hold(self) -> None:
        """The signs are packed once, too, where a product reads them so."""
        super()._hold()
        if not self.packed and self._held_signs is None and one_bit.available(self.weight):
            self._held_signs = one_bit.pack(self.weight.detach() < 0)

    def _let_go(self) -> None:
        super()._let_go()
        if not self.packed:
            self._held_signs = self._parts = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of packed signs, too: those of a copy would not be views any more.

        They count their versions apart then, and words that are kept beside them would stay when
        other signs are loaded.
        """
        return {**super().__getstate__(), "_held_signs": None, "_parts": None}
