"""ZeRO's first stage: each rank keeps a part of the optimizer's state. Takes a while to import."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

# What a group of Muon says of each of its parameters, a list as long as they are many.
OF_EACH = ("blocks",)


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """ZeRO-1 (Rajbhandari et al., arXiv 1910.02054, section 5.1), torch's.

    Each parameter belongs to one rank, which alone keeps its state and moves it, and then sends it
    to the others. In float32 a rank holds ``4 + 4 + 8 / ranks`` bytes of a parameter: weight,
    gradient, AdamW's two means. Whole parameters are shared out, the largest first, to whom has
    least, so the parts are nearly equal where no parameter is larger than a part.

    It takes groups that say something of each of their parameters, as Muon's do. A checkpoint
    holds the state whole, as it would be of one process, and any number of ranks takes it up.

    Args:
        groups: Of parameters, each contiguous, all of one dtype and learning now or later.
        optimizer_class: That moves them.
        **arguments: Of that class.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        **arguments: Any,
    ) -> None:
        super().__init__(groups, optimizer_class, **arguments)

    def _partition_param_group(
        self, param_group: dict[str, Any], params_per_rank: list[list[nn.Parameter]]
    ) -> None:
        super()._partition_param_group(param_group, params_per_rank)  # type: ignore[misc]
        for name in OF_EACH:
            said = param_group.get(name)
            if said is None:
                continue
            of = {id(p): entry for p, entry in zip(param_group["params"], said, strict=True)}
            cache: list[list[dict[str, Any]]] = self._partition_parameters_cache  # type: ignore[attr-defined]
            for parts in cache:
                parts[-1][name] = [of[id(parameter)] for parameter in parts[-1]["params"]]

    @staticmethod
    def _sync_param_groups(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
        for given, mine in zip(source, target, strict=True):
            kept = ["params", *(name for name in OF_EACH if given.get(name) is not None)]
            mine.update({name: value for name, value in given.items() if name not in kept})

    def state_dict(self) -> dict[str, Any]:
        """The whole state, on the rank that `consolidate_state_dict` has just sent it to."""
        whole = super().state_dict()
        # All ranks' would stay in the first one's memory.
        self._all_state_dicts: list[dict[str, Any]] = []
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up this rank's part of a whole state.

        Torch's keeps that part twice, and puts counters of steps where fused kernels look for none.

        Args:
            state_dict: As one process, or `state_dict`, has it.

        Raises:
            ValueError: It is of other groups.
        """
        groups = state_dict["param_groups"]
        sizes = [[len(group["params"]) for group in of] for of in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the optimizer's groups hold {sizes[1]} parameters, not {sizes[0]}")
        number = {
            id(parameter): n
            for theirs, mine in zip(groups, self.param_groups, strict=True)
            for n, parameter in zip(theirs["params"], mine["params"], strict=True)
        }
        parts = []
        for theirs, mine in zip(groups, self.optim.param_groups, strict=True):
            said = {name: mine[name] for name in OF_EACH if name in mine}
            parts.append(theirs | said | {"params": [number[id(p)] for p in mine["params"]]})
        held = [n for part in parts for n in part["params"] if n in state_dict["state"]]
        state = {n: state_dict["state"][n] for n in held}
        self.optim.load_state_dict({"state": state, "param_groups": parts})
        self._sync_param_groups(groups, self.param_groups)
