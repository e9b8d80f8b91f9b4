"""Torch's random generators, which dropout uses: saved, restored, one a rank."""

from __future__ import annotations

from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """The states of this process's generators."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def gather_random_states(mine: dict[str, Any], ranks: int) -> dict[str, Any]:
    """`random_state` of the first rank, and under "others" a list of the other ranks'."""
    if ranks == 1:
        return mine
    states: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(states, mine)
    return {**states[0], "others": states[1:]}


def bring_back_random_state(gathered: dict[str, Any] | None, rank: int) -> None:
    """Restore the generators of a saved run; a rank that it did not have gets one of its own.

    Args:
        gathered: Of `gather_random_states`, as a checkpoint holds it; None: the run begins.
        rank: This process's.
    """
    states = [gathered, *gathered.get("others", ())] if gathered else []
    if states:
        _set_random_state(states[rank if rank < len(states) else 0])
    if rank >= max(len(states), 1):
        _fork_random(rank)


def _set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` saw them, on the devices that are here."""
    torch.set_rng_state(state["cpu"].cpu())
    cuda = state.get("cuda", [])
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([entry.cpu() for entry in cuda])


def _fork_random(rank: int) -> None:
    """Let a rank draw numbers of its own: a function of the first rank's to come, and of `rank`.

    All ranks come here with equal generators, having made equal weights.
    """
    torch.manual_seed(int(torch.randint(2**62, ())) + rank)
