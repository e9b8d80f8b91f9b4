"""Muon for the matrices of a decoder, AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.adapters.attach import adapter_modules
from archzoo.decay import decaying
from archzoo.decoder import Decoder
from archzoo.linear import Linear


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) beside AdamW.

    A matrix W of gradient G moves by torch's own `torch.optim.Muon`::

        M <- momentum M + (1 - momentum) G
        W <- (1 - lr weight_decay) W - lr scale NS(G + momentum (M - G))

    where NS makes all singular values about 1 by Newton-Schulz iterations in bfloat16. What is one
    matrix to the model and what is one in memory differ: the named blocks of a `Linear` (`query`,
    `key` and `value` of attention) and the experts of a stack are orthogonalised each by itself.
    ``match_rms_adamw`` scales by ``0.2 sqrt(max(rows, columns))``, for which Muon takes AdamW's
    learning rate and decay (Liu et al., arXiv 2502.16982, section 2.2).

    Args:
        groups: As `muon_groups` gives them: those with `blocks` move by Muon, the others by AdamW.
        lr: Of both.
        betas: Of AdamW.
        momentum: Of Muon.
        nesterov: Whether Muon looks ahead, as written above; else NS(M).
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: "match_rms_adamw", or "original": scale by sqrt(max(1, rows / columns)),
            for learning rates about ten times as high.
        fused: Of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        fused: bool | None = None,
    ) -> None:
        anything = [nn.Parameter(torch.empty(0))]
        #: What moves the others; it is lent this optimizer's groups and state at every step.
        self._adamw = torch.optim.AdamW(anything, lr=lr, betas=betas, fused=fused)
        options: dict[str, Any] = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        matrix = nn.Parameter(torch.empty(1, 1))
        torch.optim.Muon([matrix], **options)  # refuses odd ones now
        super().__init__(groups, self._adamw.defaults | options | {"blocks": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both.

        Args:
            closure: Computes loss and gradients first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.param_groups = [g for g in self.param_groups if g["blocks"] is None]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["blocks"] is not None:
                self._orthogonalised(group)
        return loss

    def _orthogonalised(self, group: dict[str, Any]) -> None:
        """Muon's step of one group: torch's, of views into its parameters."""
        views: list[nn.Parameter] = []
        momenta: list[Tensor] = []
        for parameter, sizes in zip(group["params"], group["blocks"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momenta += _matrices(state["momentum_buffer"], sizes)
            gradients = _matrices(parameter.grad, sizes)
            for part, gradient in zip(_matrices(parameter.data, sizes), gradients, strict=True):
                views.append(nn.Parameter(part))
                views[-1].grad = gradient
        if not views:
            return
        options = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")
        muon = torch.optim.Muon(views, **{name: group[name] for name in options})
        for view, momentum in zip(views, momenta, strict=True):
            muon.state[view]["momentum_buffer"] = momentum
        muon.step()


def _matrices(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    """The matrices in a weight (rows, columns) or a stack of them: views, a block of rows each."""
    stack = tensor.unbind() if tensor.dim() == 3 else [tensor]
    return [block for matrix in stack for block in matrix.split_with_sizes(sizes)]


def muon_groups(decoder: Decoder, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`decay_groups` in which the matrices that Muon moves stand apart.

    They are the weights of the blocks' `Linear` and `torch.nn.Linear`. Embeddings, head, adapters,
    norms, vectors and whatever no Linear holds are left to AdamW: what Muon rests on, that an
    update's spectral norm is what counts, is said of maps from vectors to vectors.

    Args:
        decoder: Whose parameters.
        groups: As `decay_groups` gives them.

    Returns:
        Groups in a fixed order; of those with `blocks`, that is for each parameter the rows of each
        of its blocks.
    """
    left = {id(p) for _, adapter in adapter_modules(decoder) for p in adapter.parameters()}
    left |= {id(decoder.head.weight)}
    matrices = {id(parameter) for parameter in decaying(decoder)} - left
    blocks: dict[int, list[int]] = {}
    for module in decoder.modules():
        if isinstance(module, Linear):
            blocks[id(module.weight)] = list(module.blocks.values())
        elif isinstance(module, nn.Linear):
            blocks[id(module.weight)] = [module.out_features]
    moved = matrices & blocks.keys()
    found = []
    for group in groups:
        mine = [parameter for parameter in group["params"] if id(parameter) in moved]
        rest = [parameter for parameter in group["params"] if id(parameter) not in moved]
        if mine:
            found.append(group | {"params": mine, "blocks": [blocks[id(p)] for p in mine]})
        if rest:
            found.append(group | {"params": rest})
    return found
