"""What generating keeps of a batch: how its rows are read, and what is written to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archzoo.decoder import Decoder, Output
from archzoo.generation.conversation import Conversation, extended, start_conversation
from archzoo.generation.prompts import pad_left
from archzoo.generation.until import Until
from archzoo.states import State, nbytes, reorder
from archzoo.tasks.writing import Writing

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

#: Called as on_token(row, token, text) for each new token, text being what is now certain of the
#: row's text; and once as on_token(row, None, rest) when the row has ended.
OnToken = Callable[[int, int | None, str], None]


# A GPU reads prompts in segments, so that a long one takes the activations of one alone: large
# enough to keep the GPU busy, and of a row no shorter than its kernels like.
SEGMENT = 16_384  # tokens of all rows
LEAST_SEGMENT = 1_024  # tokens of a row


def segment_length(model: Decoder, rows: int) -> int | None:
    """Tokens of a row that a prompt's pass takes at once; None: all, as on a CPU.

    Args:
        model: That reads.
        rows: Of the batch.
    """
    if model.device.type != "cuda":
        return None
    return max(SEGMENT // rows, LEAST_SEGMENT)


class StateReader:
    """Reads a text segment by segment and keeps the state (such as a KV cache) between them.

    Args:
        model: That reads, in evaluation mode.
        capacity: Tokens that will be read.
        conversation: What was read before; it stays as it is.
        segment: Tokens of a row that the prompt's pass takes at once. None: `segment_length`.
    """

    def __init__(
        self,
        model: Decoder,
        capacity: int,
        conversation: Conversation | None = None,
        segment: int | None = None,
    ) -> None:
        self.model, self.capacity, self.segment = model, capacity, segment
        self.state: State | None = None
        self.logits: Tensor | None = None  # of each row's last token
        self.ended_bytes = 0  # of the state of rows that have ended
        self.begun = False
        if conversation is not None:
            self.state = model.copy_state(conversation.state, spare=capacity)
            self.logits = conversation.logits

    def read(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """Tokens and documents (batch, time): the next segment. Logits (batch, vocab_size)."""
        time = tokens.shape[1]
        if not time:  # nothing more is read
            assert self.logits is not None  # `check_conversation`
            self.begun = True
            return self.logits
        if self.begun:
            return self._read(tokens, documents, "recurrent")
        self.begun = True
        positions = self.model.embedding.prompt_positions(tokens, documents)
        length = self.segment or segment_length(self.model, len(tokens)) or time
        for begin in range(0, time, length):  # the prompt, in one pass where it is short
            here = slice(begin, begin + length)
            logits = self._read(
                tokens[:, here],
                None if documents is None else documents[:, here],
                None,
                None if positions is None else positions[:, here],
            )
        return logits

    def _read(
        self,
        tokens: Tensor,
        documents: Tensor | None,
        form: str | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if self.state is None:
            self.state = self.model.init_state(tokens.shape[0], capacity=self.capacity)
        elif documents is not None:  # each row continues its document
            current = self.state["place"]["documents"].clamp(min=0)[:, None]
            documents = torch.where(documents < 0, documents, current)
        output: Output = self.model(
            tokens, self.state, documents, form=form, logits_to_keep=1, positions=positions
        )
        self.state, before, logits = output.state, self.logits, output.logits[:, 0]
        if documents is not None and before is not None:  # rows of padding alone
            logits = torch.where((documents < 0).all(dim=1, keepdim=True), before, logits)
        self.logits = logits
        return logits

    def keep(self, rows: Tensor) -> None:
        """Continue with some of the rows, (kept,) int64."""
        before = nbytes(self.state)
        self.state = reorder(self.state, rows)
        self.logits = None if self.logits is None else self.logits[rows]
        self.ended_bytes += before - nbytes(self.state)


class TextReader:
    """Reads the whole text again with each segment.

    Args:
        model: That reads, in evaluation mode.
        form: "parallel" or "chunkwise".
    """

    def __init__(self, model: Decoder, form: str) -> None:
        self.model, self.form = model, form
        self.segments: list[Tensor] = []
        self.documents: Tensor | None = None
        self.positions: Tensor | None = None

    def read(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """As `StateReader.read`."""
        if not self.segments:
            self.documents = documents
            self.positions = self.model.embedding.prompt_positions(tokens, documents)
        else:
            if self.documents is not None:  # a row continues its document, which is 0
                self.documents = torch.cat([self.documents, torch.zeros_like(tokens)], dim=1)
            if self.positions is not None:  # and counts on
                self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], dim=1)
        self.segments.append(tokens)
        tokens = torch.cat(self.segments, dim=1)
        output: Output = self.model(
            tokens,
            None,
            self.documents,
            form=self.form,
            logits_to_keep=1,
            positions=self.positions,
        )
        return output.logits[:, 0]

    def keep(self, rows: Tensor) -> None:
        """As `StateReader.keep`."""
        self.segments = [segment[rows] for segment in self.segments]
        self.documents = None if self.documents is None else self.documents[rows]
        self.positions = None if self.positions is None else self.positions[rows]


def read_tokens(
    model: Decoder, rows: list[list[int]], conversation: Conversation | None = None
) -> Conversation:
    """What was read before, and these tokens after it, in one pass.

    Args:
        model: Any decoder; it works in evaluation mode, and is left in the mode it was in.
        rows: The tokens, a list for each row, of any lengths.
        conversation: What was read before; it stays as it is. None: nothing.
    """
    begun = conversation or start_conversation(model.init_state(len(rows)), model)
    with model.evaluating(), torch.inference_mode():
        tokens, documents = pad_left(rows, model.device)
        reader = StateReader(model, tokens.shape[1], conversation)
        logits = reader.read(tokens, documents)
    some = torch.tensor([bool(row) for row in rows], device=model.device)
    return extended(begun, rows)._replace(
        state=model.copy_state(reader.state or begun.state),
        logits=logits.clone(),
        stopped=begun.stopped & ~some,
    )


class RowWriter:
    """The new tokens of one row, and their text as it becomes certain.

    Args:
        row: Its number.
        prompt: The tokens before, as many as are known.
        tokenizer: Of the text, or None.
        on_token: Told of each token.
        writing: How the model's task writes numbers.
        continues: The text will be continued: bytes of a character are kept for then.
        until: Strings that end the text, before which it stops.
    """

    def __init__(
        self,
        row: int,
        prompt: list[int],
        tokenizer: Tokenizer | None,
        on_token: OnToken | None,
        writing: Writing,
        continues: bool,
        until: Sequence[str] = (),
    ) -> None:
        self.row, self.on_token, self.continues = row, on_token, continues
        self.until = Until(until)
        self.tokens: list[int] = []
        self.written: list[str] = []
        self.draws = 0
        self.ended = self.stopped = False
        self.decoder = self.reader = None
        if tokenizer is not None:
            from archzoo.tasks.tokenizers import StreamDecoder

            self.decoder = StreamDecoder(tokenizer)
            # Decoders may write a subword differently at the beginning of a text, and a character
            # may begin in the prompt: the last of its tokens go first.
            for token in prompt[-16:]:
                self.decoder.push(token)
            self.reader = writing.reader(tokenizer.decode(prompt))

    @property
    def text(self) -> str:
        """What is certain of it."""
        return "".join(self.written)

    def write(self, token: int, stop_token: int | None) -> None:
        """The next token, or the one that ends the row."""
        if self.ended:
            return
        self.draws += 1
        if token == stop_token:
            self.stopped = True
            self.end()
            return
        self.tokens.append(token)
        text = self.reader.push(self.decoder.push(token)) if self.decoder and self.reader else ""
        self._tell(token, self.until.push(text))
        if self.until.found:
            self.stopped = True
            self.end()

    def end(self) -> None:
        """No more tokens come."""
        if not self.ended:
            self.ended, text = True, ""
            if self.decoder and self.reader:
                # Bytes of a character come with the rest of it, when the text is continued.
                rest = "" if self.continues and not self.stopped else self.decoder.finish()
                text = self.reader.push(rest) + self.reader.finish()
            text = self.until.push(text) + self.until.finish()
            self.stopped |= self.until.found
            self._tell(None, text)

    def _tell(self, token: int | None, text: str) -> None:
        self.written.append(text)
        if self.on_token is not None:
            self.on_token(self.row, token, text)
