"""Wrong inputs of a decoder, each answered by one line: the value, the rule, the way out.

What would be wrong in silence is checked before a call, without waiting for a device. What
ends in an error anyway is looked at only then, so that a right input pays nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from archzoo.states import State

if TYPE_CHECKING:
    from archzoo.decoder import Decoder

#: The label of an unlabelled position, as in torch.nn.functional.cross_entropy.
IGNORED = -100


def check_tokens(tokens: Any) -> Tensor:
    """Tokens (batch, time) as int64.

    Raises:
        ValueError: No tensor, another shape, or other numbers than whole ones.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"tokens are a {type(tokens).__name__}: a decoder takes a tensor, torch.tensor([[...]])"
        )
    if tokens.dim() != 2 or not tokens.shape[1] or not tokens.shape[0]:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}: a decoder takes (batch, time), batch >= 1 "
            "and time >= 1"
        )
    if not _whole(tokens):
        raise ValueError(f"tokens are {_name(tokens.dtype)}: they are integers, torch.int64")
    return tokens.long()


def check_beside(tokens: Tensor, **given: Any) -> None:
    """Documents, examples and positions: integers where the tokens live, or None.

    Raises:
        ValueError: Anything else. Their shapes are checked where the context is made.
    """
    for name, numbers in given.items():
        if numbers is None:
            continue
        if not isinstance(numbers, Tensor):
            raise ValueError(
                f"{name} are a {type(numbers).__name__}: give a tensor of integers, one for "
                "every token"
            )
        if not _whole(numbers):
            mask = "; for a mask of tokens, torch.where(mask, 0, -1)" if name == "documents" else ""
            raise ValueError(f"{name} are {_name(numbers.dtype)}: give integers, torch.int64{mask}")
        if numbers.device != tokens.device:
            raise ValueError(
                f"{name} are on {numbers.device}, the tokens on {tokens.device}: move one to the "
                "other, such as by .to(tokens.device)"
            )


def check_state(state: Any, batch_size: int, blocks: int) -> None:
    """The outside of a state; what the parts keep in it is theirs.

    Args:
        state: Whatever was given.
        batch_size: Rows of the tokens.
        blocks: States of blocks that the decoder keeps: one for each run of each.

    Raises:
        ValueError: Not a state of a decoder, or one of another batch or depth.
    """
    if isinstance(state, tuple) and hasattr(state, "logits"):
        raise ValueError("the state is a whole output: give its .state")
    if not isinstance(state, dict) or not {"place", "embedding", "blocks"} <= state.keys():
        raise ValueError(
            f"the state is a {type(state).__name__} that no decoder made: begin with "
            "model.init_state(batch_size), and continue with the state that a call returned"
        )
    rows = len(state["place"]["positions"])
    if rows != batch_size:
        raise ValueError(f"the state holds {rows} rows, the tokens {batch_size}")
    if len(state["blocks"]) != blocks:
        raise ValueError(
            f"the state holds {len(state['blocks'])} blocks, and this model runs {blocks}: it is "
            "another model's"
        )


def explain(
    decoder: Decoder, tokens: Tensor, state: State | None, positions: Tensor | None
) -> str | None:
    """What is wrong with the input of a call that has failed, in one line; None: nothing here.

    Values are read on the CPU only: on another device reading them could fail, too.

    Args:
        decoder: That failed.
        tokens: (batch, time) int64.
        state: As it was given.
        positions: As they were given.
    """
    if decoder.device != tokens.device:
        return (
            f"tokens are on {tokens.device}, the model on {decoder.device}: move one to the other, "
            "such as by .to(device)"
        )
    if tokens.device.type == "cpu":
        try:
            low, high = (int(number) for number in tokens.aminmax())
            before = -1 if positions is None else int(positions.min())
        except RuntimeError:  # under a transform there are no values
            return None
        known = decoder.vocab_size
        if low < 0 or high >= known:
            wrong = low if low < 0 else high
            return (
                f"token {wrong} is not one of the model's 0 to {known - 1}: tokenize with the "
                "model's own tokenizer, or build it with a larger vocab_size"
            )
        if positions is not None and before < 0:
            return f"position {before} is not valid: positions are 0 or more"
    if state is None:
        return None
    begun = decoder.init_state(tokens.shape[0], device="meta")
    differs = _difference(begun, state, tokens.device, "state")
    if differs is None:
        return None
    return f"{differs}: it is another model's, or was made before this one was cast or moved"


def _difference(wanted: Any, given: Any, device: torch.device, where: str) -> str | None:
    """Where a state differs in structure from one that begins, in words; None: it does not."""
    if isinstance(wanted, dict):
        if not isinstance(given, dict) or not wanted.keys() <= given.keys():
            held = ", ".join(given) if isinstance(given, dict) else type(given).__name__
            return f"the {where} holds {held or 'nothing'} where this model has {', '.join(wanted)}"
        entries: Any = [(key, value, given[key]) for key, value in wanted.items()]
    elif isinstance(wanted, list | tuple):
        if not isinstance(given, list | tuple) or len(wanted) != len(given):
            return f"the {where} is not a list of {len(wanted)}"
        entries = [(index, *pair) for index, pair in enumerate(zip(wanted, given, strict=True))]
    elif isinstance(wanted, Tensor):
        if not isinstance(given, Tensor):
            return f"the {where} is a {type(given).__name__}, not a tensor"
        # A cache begins with a buffer of length 0, and grows along that axis.
        same = len(wanted.shape) == len(given.shape) and all(
            ours in (0, theirs) for ours, theirs in zip(wanted.shape, given.shape, strict=True)
        )
        if not same:
            return f"the {where} has shape {tuple(given.shape)}, here {tuple(wanted.shape)}"
        for ours, theirs in ((wanted.dtype, given.dtype), (device, given.device)):
            if ours != theirs:
                return f"the {where} is {theirs}, here {ours}"
        return None
    else:
        return None
    for key, ours, theirs in entries:
        inside = f"{where}'s {key}" if where == "state" else f"{where} {key}"
        found = _difference(ours, theirs, device, inside)
        if found is not None:
            return found
    return None


def _whole(numbers: Tensor) -> bool:
    dtype = numbers.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
