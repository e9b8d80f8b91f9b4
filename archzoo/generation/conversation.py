"""What a text that is being read and written needs to be continued later, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.decoder import Decoder
from archzoo.generation.prompts import Prompts, listed
from archzoo.states import State

TAIL = 256  # tokens of a text's end, from which streaming and numbers written backwards continue


class Conversation(NamedTuple):
    """The state of texts and what continuing them takes; a pytree, batch first, like a state.

    So `archzoo.fork` copies it, `archzoo.reorder` picks rows of it, and `archzoo.save_state`
    writes it to a file. Every token that was read or written is in the state, but no stop token.

    Attributes:
        state: Of the decoder: what `Decoder.init_state` begins and calls hand back.
        logits: (batch, vocab_size) after the last token of each row; None: not known, and a
            token must be read before one can be written.
        read: (batch,) int64, tokens of each row so far, read and written.
        drawn: (batch,) int64, tokens that were drawn for each row: with the same seed the next
            is drawn as if there had been no pause.
        stopped: (batch,) bool, rows that ended by the stop token; reading more reopens one.
        tail: (batch, 256) int64, the last tokens of each row, -1 before its first.
    """

    state: State
    logits: Tensor | None
    read: Tensor
    drawn: Tensor
    stopped: Tensor
    tail: Tensor

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.read)


def start_conversation(state: State, model: Decoder, logits: Tensor | None = None) -> Conversation:
    """A conversation of a decoder's state; what was read is taken from its positions.

    Args:
        state: From `Decoder.init_state`, or what a call handed back.
        model: Whose state it is: its prefixes and prompts take positions that no text has.
        logits: (batch, vocab_size) of the last tokens, if they are known.
    """
    if not isinstance(state, dict) or "place" not in state:
        raise ValueError(
            f"the state is a {type(state).__name__}: give one of model.init_state(batch_size), "
            "what a call handed back, or a Conversation"
        )
    positions = state["place"]["positions"]
    none = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
    return Conversation(
        state=state,
        logits=logits,
        read=positions + 1 - model.positions_before_text(),
        drawn=none,
        stopped=none.bool(),
        tail=none[:, None].expand(-1, TAIL) - 1,
    )


def extended(conversation: Conversation, rows: Sequence[Sequence[int]]) -> Conversation:
    """The same after more tokens of each row, but for its state and logits.

    Args:
        conversation: Before them.
        rows: The tokens, a list for each row, none where it is empty.
    """
    device = conversation.read.device
    counts = torch.tensor([len(row) for row in rows], device=device)
    recent: list[Any] = [
        torch.cat([tail, torch.tensor(row, dtype=torch.int64, device=device)])[-TAIL:]
        for tail, row in zip(conversation.tail, rows, strict=True)
    ]
    return conversation._replace(read=conversation.read + counts, tail=torch.stack(recent))


def tails(conversation: Conversation) -> list[list[int]]:
    """The last tokens of each row, at most 256."""
    rows: list[list[int]] = conversation.tail.tolist()
    return [[token for token in row if token >= 0] for row in rows]


def check_conversation(conversation: Any, model: Decoder, rows: Sequence[Sequence[int]]) -> None:
    """Refuse what cannot be continued.

    Args:
        conversation: Whatever was given.
        model: That continues it.
        rows: What each row shall read first, nothing where it is empty.

    Raises:
        ValueError: It is not a conversation, has other rows, or begins with nothing.
    """
    if not isinstance(conversation, Conversation):
        raise ValueError(
            f"the conversation is a {type(conversation).__name__}: give one of "
            "archzoo.generate(..., keep_state=True), archzoo.load_state or archzoo.read_document"
        )
    if conversation.batch_size != len(rows):
        raise ValueError(
            f"the conversation has {conversation.batch_size} rows and there are {len(rows)} "
            "prompts: give one for each row, empty where it reads nothing more"
        )
    if conversation.logits is None and not all(rows):
        raise ValueError(
            "the state was saved without the logits of its last token, so each row must read a "
            "prompt before it is continued"
        )
    if conversation.logits is not None and conversation.logits.shape[1] != model.vocab_size:
        raise ValueError(
            f"the conversation is of {conversation.logits.shape[1]} tokens and the model knows "
            f"{model.vocab_size}: it is another model's"
        )


def prompts_of(prompts: Prompts | None, conversation: Conversation | None) -> Prompts:
    """The prompts, or an empty one for each row of a conversation.

    Raises:
        ValueError: There is neither, or something else.
    """
    if prompts is not None:
        return listed(prompts)
    if conversation is None:
        raise ValueError("there is no prompt: give at least one, or a conversation to continue")
    return [[]] * conversation.batch_size
