"""MoRA: a change of high rank from one small square matrix, without parameters around it."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from archzoo.adapters import Adapter, Target
from archzoo.adapters.lora import check_rank
from archzoo.names import nearest
from archzoo.numerics import constant

Kind = Literal["rotation", "sharing"]
Grouping = Literal["cyclic", "contiguous"]
BASE = 10_000.0  # of the rotation's frequencies


class MoRA(Adapter):
    """``y = W x + D(M C(x))``, M square (size, size), C and D fixed; of each block alone.

    ``size = floor(sqrt((rows + columns) rank) + 1/2)``: M holds about as many parameters as LoRA of
    that rank, rank * (rows + columns), and the change has rank ``size`` or more instead of `rank`.
    M starts at 0, so nothing changes before the first step. There is no alpha. C compresses x to
    the width of M and D spreads what M gives over the rows, in one of two ways.

    ``kind="sharing"``, for large ranks: C sums the inputs of each of ``size`` groups, D gives each
    output of M to a group of rows. Cyclic groups take every size-th (column j is in the group
    j mod size; where the columns do not fill the last round, the first ones are read again, as in
    the paper), contiguous groups lie side by side. The change has rank ``size``.

    ``kind="rotation"``, for small ranks: x is cut into n = ceil(columns / size) segments, of an
    even size; segment g is rotated by RoPE of position g (theta_j = 10000^(-2j / size), halves
    paired), M is applied to each, and the results side by side are cut or repeated to the rows.
    The change is block-diagonal and of rank up to the matrix's own. Where the rows end before the
    last segment, as in a `down` projection, whole segments of x would be left unread; such a target
    shares instead, in cyclic groups. So does one that has a single segment, which nothing rotates.

    Where ``size`` exceeds the rows or the columns, M is cut to them: more would read the same
    inputs twice, or give outputs that no row takes.

    The code that the authors released leaves inputs unread in the case above, fails to merge a
    rotation where the size reaches the columns, rounds the angles to float32, and saves M twice.
    Its types are here: 1 is sharing; 2 contiguous inputs and outputs; 3 contiguous inputs; 4
    contiguous outputs; 6 rotation.

    Parameters: size^2 for a block, and for each expert of a stack.

    Merging adds D M C to W, which is exact.

    Source: Jiang et al., arXiv 2405.12130, section 4, equations 6 (sharing) and 9 (rotation).

    Args:
        target: What it changes.
        targets: Names of blocks, or regular expressions that match a whole path such as
            ``blocks.0.mixer.query_key_value.query``. None: query and value.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        rank: Of the LoRA that has as many parameters.
        kind: "rotation" or "sharing".
        inputs: How sharing groups the columns: "cyclic" or "contiguous".
        outputs: How sharing groups the rows: "cyclic" or "contiguous".

    Raises:
        ValueError: A rank below 1 or above the matrix's, an unknown kind or grouping, or a grouping
            given to a rotation.
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
        rank: int = 8,
        kind: Kind = "rotation",
        inputs: Grouping = "cyclic",
        outputs: Grouping = "cyclic",
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        *stack, rows, columns = target.shape
        check_rank(self, target, rank)
        check_known("kind", kind, Kind)
        check_known("inputs", inputs, Grouping)
        check_known("outputs", outputs, Grouping)
        if kind == "rotation" and (inputs, outputs) != ("cyclic", "cyclic"):
            raise ValueError(
                f"inputs={inputs!r} and outputs={outputs!r} group what kind='sharing' shares; a "
                "rotation has no groups: set kind='sharing' or omit them"
            )
        size = math.floor(math.sqrt((rows + columns) * rank) + 0.5)
        even = size // 2 * 2
        segments = math.ceil(columns / even) if even else 1
        read = segments > 1 and (segments - 1) * even < rows  # the last one reaches a row
        self.rotates = kind == "rotation" and read
        if self.rotates:
            size = even
        self.rows, self.columns = rows, columns
        self.inputs, self.outputs = inputs, outputs
        self.matrix = nn.Parameter(torch.empty(*stack, min(size, rows), min(size, columns)))
        angles = [
            g * BASE ** (-2 * j / size)
            for g in range(segments if self.rotates else 0)
            for j in range(size // 2)
        ]
        self.cosines = tuple(math.cos(angle) for angle in angles)
        self.sines = tuple(math.sin(angle) for angle in angles)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """M zero."""
        nn.init.zeros_(self.matrix)

    def extra_repr(self) -> str:
        how = "rotation" if self.rotates else f"sharing, {self.inputs} to {self.outputs}"
        return f"{how}, M {tuple(self.matrix.shape)}"

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """``D(M C(x))``, (..., rows); of a stack (experts, rows of x, rows)."""
        matrix: Tensor = self.matrix
        x = x.to(matrix.dtype)
        if self.rotates:
            turned = self._rotate(_segments(x, matrix.shape[-1]))
            # A stack's matrices stand before the rows of x and their segments.
            matrix = matrix if matrix.dim() == 2 else matrix[:, None]
            return _spread((turned @ matrix.mT).flatten(-2), self.rows, "cyclic")
        summed = _summed(x, matrix.shape[-1], self.inputs)
        return _spread(summed @ matrix.mT, self.rows, self.outputs)

    def delta(self, weight: Tensor) -> Tensor:
        """``D M C``, of the weight's shape."""
        matrix, size = self.matrix, self.matrix.shape[-1]
        if self.rotates:
            count = math.ceil(self.columns / size)
            blocks = self._rotate(matrix[..., None, :].expand(*matrix.shape[:-1], count, size), -1)
            blocks = blocks.transpose(-2, -3)[..., None, :]  # (..., count, size, 1, size)
            apart = torch.eye(count, device=matrix.device, dtype=matrix.dtype)[:, None, :, None]
            change = (blocks * apart).flatten(-2).flatten(-3, -2)
            change = _folded(change, self.columns)
            return _spread(change.mT, self.rows, "cyclic").mT
        if self.inputs == "cyclic":
            rounds = math.ceil(self.columns / size)
            change = _folded(_spread(matrix, rounds * size, "cyclic"), self.columns)
        else:
            change = _spread(matrix, self.columns, "contiguous")
        return _spread(change.mT, self.rows, self.outputs).mT

    def _rotate(self, x: Tensor, direction: int = 1) -> Tensor:
        """Segments (..., count, size), each turned by the angles of its position, or back."""
        first, second = x.chunk(2, -1)
        shape = x.shape[-2], x.shape[-1] // 2
        cos = constant(self.cosines, x.device, x.dtype).view(shape)
        sin = constant(self.sines, x.device, x.dtype).view(shape) * direction
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def check_known(name: str, value: str, known: object) -> None:
    """Refuse a value that is not one of a Literal's, naming the nearest.

    Args:
        name: Of the argument.
        value: Given.
        known: The Literal.

    Raises:
        ValueError: It is none of them.
    """
    names = list(get_args(known))
    if value not in names:
        raise ValueError(f"{name}={value!r} is not valid; {nearest(str(value), names)}")


def _segments(x: Tensor, size: int) -> Tensor:
    """(..., columns) to (..., count, size): the last one is filled with the first columns again."""
    columns = x.shape[-1]
    count = math.ceil(columns / size)
    if count * size > columns:
        x = torch.cat([x, x[..., : count * size - columns]], dim=-1)
    segments: Tensor = x.unflatten(-1, (count, size))
    return segments


def _folded(change: Tensor, columns: int) -> Tensor:
    """What `_segments` reads again, added to its first place: (..., count * size) to columns."""
    again = change.shape[-1] - columns
    if not again:
        return change
    first = change[..., :again] + change[..., columns:]
    return torch.cat([first, change[..., again:columns]], dim=-1)


def _summed(x: Tensor, size: int, grouping: Grouping) -> Tensor:
    """(..., columns) to (..., size): the sum of each group."""
    if grouping == "cyclic":
        return _segments(x, size).sum(-2)
    least, longer = divmod(x.shape[-1], size)
    cut = longer * (least + 1)
    long = x[..., :cut].unflatten(-1, (longer, least + 1)).sum(-1)
    return torch.cat([long, x[..., cut:].unflatten(-1, (size - longer, least)).sum(-1)], dim=-1)


def _spread(z: Tensor, count: int, grouping: Grouping) -> Tensor:
    """(..., size) to (..., count): each entry to its group, the last ones cut off if too many."""
    size = z.shape[-1]
    if grouping == "cyclic":
        return torch.cat([z] * math.ceil(count / size), dim=-1)[..., :count]
    least, longer = divmod(count, size)
    long = z[..., :longer].repeat_interleave(least + 1, -1)
    return torch.cat([long, z[..., longer:].repeat_interleave(least, -1)], dim=-1)
