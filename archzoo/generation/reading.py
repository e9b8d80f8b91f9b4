"""Long documents, read into a state segment by segment in memory that does not grow.

A file is read as a stream: some thousand characters, cut where the tokenizer cuts anyway, so that
the tokens are those of the whole text; then the next. After a segment the state can be saved, with
the bytes that were read so far, and reading resumes from there. Where a segment ends depends on the
text alone, so an interruption changes no bit of the state.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch

from archzoo.checkpoint.archives import check_regular
from archzoo.checkpoint.digest import weights_digest
from archzoo.compiled import uncompiled
from archzoo.decoder import Decoder
from archzoo.generation.conversation import Conversation, extended, start_conversation
from archzoo.generation.state_files import StateLayout, leaves_of, read_state, write_state
from archzoo.states import nbytes
from archzoo.tasks.writing import Writing, writing_of
from archzoo.trust import shown

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

SEGMENT = 16_384  # characters
TOKENS = 1_024  # at most in one call of the model; more are not faster on a CPU, and take memory
BEFORE, AFTER = 64, 256  # characters around a segment, which show how the tokenizer joins them
TRIES = 64  # places to cut a segment at


class Reading(NamedTuple):
    """How far a document has been read.

    Attributes:
        tokens: Read so far, of this document.
        done: Bytes read so far.
        size: Bytes of the file.
        resumed: Bytes that an earlier call had read.
        saved: Bytes that the state in the file has read.
    """

    tokens: int
    done: int
    size: int
    resumed: int
    saved: int


def read_document(
    model: Decoder,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    state: str | os.PathLike[str] | None = None,
    conversation: Conversation | None = None,
    segment: int = SEGMENT,
    save_every: float = 10.0,
    on_segment: Callable[[Reading], None] | None = None,
) -> Conversation:
    """Read a text file into a state, to write on from it or to ask about it.

    The tokens are those of the whole text, encoded at once: a segment is cut only where encoding
    further text changes nothing before the cut. With a model whose state does not grow (retention)
    the memory does not depend on the length of the file.

    Args:
        model: Any decoder. It works in evaluation mode, and is left in the mode it was in.
        path: Of a UTF-8 text.
        tokenizer: The model's.
        state: A file to save the state to while reading and at the end. If it is there from an
            earlier call with the same document, reading resumes from it. None: nothing is saved.
        conversation: To read on from, one row; it stays as it is. None: an empty state.
        segment: Characters at a time.
        save_every: Seconds between saves.
        on_segment: Called after each segment with a `Reading`.

    Raises:
        FileNotFoundError: There is no such document.
        ValueError: It is empty or not UTF-8, a character has no token, it has changed since it
            was read in part, or the state is of something else.
        OSError: The state cannot be written.
    """
    path, layout = Path(path), StateLayout(model)
    if segment < 2 * AFTER:
        raise ValueError(f"segment={segment} must be at least {2 * AFTER} characters")
    model = uncompiled(model)
    if not path.exists():
        raise FileNotFoundError(f"there is no text at {path}: give the path of a UTF-8 file")
    check_regular(path)
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path} is empty: there is nothing to read")
    if conversation is not None and conversation.batch_size != 1:
        raise ValueError(
            f"the conversation has {conversation.batch_size} rows, and a document is read into "
            "one: pick one with archzoo.reorder"
        )
    begin = None if conversation is None else weights_digest(leaves_of(conversation))
    fixed = {"size": size, "segment": segment, "begin": begin}
    held = conversation or start_conversation(model.init_state(1), model)
    held = held._replace(state=model.copy_state(held.state))
    first = int(held.read[0])
    offset, read = 0, hashlib.sha256()
    if state is not None and Path(state).exists():
        held, document = read_state(state, layout)
        offset = _resumed(Path(state), path, document, fixed)
        _digest_until(path, offset, read)
        if document is None or document.get("digest") != read.hexdigest():
            raise ValueError(
                f"{path} has changed since {state} was saved: remove that file to read it anew"
            )
    resumed = saved = offset
    parts = segments(path, offset, tokenizer, writing_of(model.task), segment)
    last = time.monotonic()
    with model.evaluating():
        for text, tokens in parts:
            with torch.inference_mode(), model.weights_held():
                held = _read_tokens(model, held, tokens)
            content = text.encode()
            offset += len(content)
            read.update(content)
            now = time.monotonic()
            if state is not None and (offset == size or now - last >= save_every):
                about = fixed | {"offset": offset, "digest": read.hexdigest()}
                write_state(state, held, layout, about)
                last, saved = time.monotonic(), offset
            if on_segment is not None:
                on_segment(Reading(int(held.read[0]) - first, offset, size, resumed, saved))
    if offset != size:
        raise ValueError(f"{path} has changed while it was read: read it again")
    return held._replace(
        state=model.copy_state(held.state),
        logits=None if held.logits is None else held.logits.clone(),
    )


def _read_tokens(model: Decoder, held: Conversation, tokens: list[int]) -> Conversation:
    """The conversation after more tokens of its one row."""
    if not tokens:  # of blanks alone, which some tokenizers omit
        return held
    model.embedding.check_prompts([tokens])
    row = torch.tensor([tokens], device=model.device)
    if model.embedding.prompt_positions(row[:, :TOKENS]) is not None:
        raise ValueError(
            f"{type(model.embedding).__name__} reads positions off a whole problem: a document "
            "has none, so give problems as prompts"
        )
    state: Any = held.state
    logits = held.logits
    for part in row.split(TOKENS, dim=1):
        output = model(part, state, logits_to_keep=1)
        state, logits = output.state, output.logits[:, 0]
    after = extended(held, [tokens])
    return after._replace(state=state, logits=logits, stopped=torch.zeros_like(held.stopped))


# ---------------------------------------------------------------------------- resuming


def _resumed(
    state: Path, path: Path, document: dict[str, Any] | None, fixed: dict[str, Any]
) -> int:
    """The byte from which reading resumes."""
    if not isinstance(document, dict):
        raise ValueError(
            f"{state} is there already, and not the state of a document: give another name, or "
            "give it as the conversation to read on from"
        )
    for name, value in fixed.items():
        if document.get(name) != value:
            what = {"size": "another file", "begin": "a text after another conversation"}
            raise ValueError(
                f"{state} holds {what.get(name, 'a reading with another ' + name)}, and not "
                f"{path} as it is now: give another name, or remove it"
            )
    offset = document.get("offset")
    if type(offset) is not int or not 0 <= offset <= fixed["size"]:
        raise ValueError(f"{state} is not valid: it has read {shown(offset)} bytes of {path}")
    return offset


def _digest_until(path: Path, offset: int, digest: Any) -> None:
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(2**20, offset))):
            digest.update(block)
            offset -= len(block)


# ---------------------------------------------------------------------------- segments


def segments(
    path: Path, offset: int, tokenizer: Tokenizer, writing: Writing, length: int
) -> Iterator[tuple[str, list[int]]]:
    """The segments of a file from a byte on, each with its tokens.

    Args:
        path: Of the file.
        offset: Where a segment begins.
        tokenizer: Of the text.
        writing: How the model's task writes numbers.
        length: Of a segment, in characters.
    """

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer.encode_many([writing.write(text)])[0].tolist()
        return tokens

    from archzoo.tasks.tokenizers import CharacterTokenizer

    each = isinstance(tokenizer, CharacterTokenizer) and writing.is_plain
    with open(path, "rb") as file:
        file.seek(max(0, offset - 4 * BEFORE))
        before = file.read(min(offset, 4 * BEFORE)).decode(errors="ignore")
        stream = _Characters(file, path, offset)
        while text := stream.ahead(length + AFTER):
            try:
                if each:
                    cut = min(length, len(text))
                    tokens = encode(text[:cut])
                else:
                    cut, tokens = _cut(encode, before, text, length)
            except ValueError as error:
                raise ValueError(f"{path}, from byte {stream.offset}: {error}") from None
            yield text[:cut], tokens
            before = (before + text[:cut])[-BEFORE:]
            stream.skip(cut)


def _cut(
    encode: Callable[[str], list[int]], before: str, text: str, length: int
) -> tuple[int, list[int]]:
    """Where a segment ends, in characters, and its tokens, which are those of the whole text.

    It is encoded behind the words before it, since some tokenizers treat the beginning of a text
    differently; and it ends where text that follows leaves its tokens as they are.

    Args:
        encode: A text's tokens.
        before: The text just before.
        text: The segment, and what follows it: `AFTER` characters, or less at the end.
        length: The most characters of a segment.
    """
    anchor, skipped = _anchor(encode, before, text)

    def tokens_until(end: int) -> list[int] | None:
        tokens = encode(anchor + text[:end])
        if end < len(text) and encode(anchor + text[: end + AFTER])[: len(tokens)] != tokens:
            return None
        return tokens[skipped:]

    if len(text) <= length:
        return len(text), tokens_until(len(text)) or []
    # Before blanks, which begin the next word; where there are none, anywhere.
    ends = [found.start() for found in re.finditer(r"(?<=\S)\s", text[length // 2 : length + 1])]
    places = [length // 2 + end for end in reversed(ends)][:TRIES]
    for place in [*places, *range(length, length - TRIES, -1)]:
        tokens = tokens_until(place)
        if tokens is not None:
            return place, tokens
    raise ValueError(
        f"the tokenizer joins text across every place where {length:,} characters could be cut: "
        "read with a larger segment"
    )


def _anchor(encode: Callable[[str], list[int]], before: str, text: str) -> tuple[str, int]:
    """Words before a segment that keep their tokens when it follows, and how many they are.

    Args:
        encode: A text's tokens.
        before: The text before the segment.
        text: Of the segment, and more.
    """
    before = before[-BEFORE:]
    word = re.search(r"(?<=\S)\s", before)
    starts = [word.start()] if word else []
    for start in [*starts, *range(max(0, len(before) - BEFORE), len(before), 4)]:
        tokens = encode(before[start:])
        if encode(before[start:] + text[:AFTER])[: len(tokens)] == tokens:
            return before[start:], len(tokens)
    return "", 0


class _Characters:
    """A file's characters from a byte on, as many at a time as are asked for.

    Args:
        file: Open for reading bytes, at the byte.
        path: Of it, for messages.
        offset: The byte.
    """

    def __init__(self, file: BinaryIO, path: Path, offset: int) -> None:
        self.file, self.path, self.offset = file, path, offset
        self._text, self._bytes, self._ended = "", b"", False
        file.seek(offset)

    def ahead(self, count: int) -> str:
        """The next characters, that many, or all that are left."""
        while len(self._text) < count and not self._ended:
            block = self.file.read(2**16)
            self._ended = not block
            content = self._bytes + block
            try:
                text, self._bytes = content.decode(), b""
            except UnicodeDecodeError as error:
                # A character whose last bytes are still to come is at the end and incomplete.
                if self._ended or error.end < len(content) or len(content) - error.start > 3:
                    at = self.offset + len(self._text.encode()) + error.start
                    raise ValueError(
                        f"{self.path} is not UTF-8 text: byte 0x{content[error.start]:02x} at "
                        f"offset {at}; convert the file to UTF-8"
                    ) from None
                text, self._bytes = content[: error.start].decode(), content[error.start :]
            self._text += text
        return self._text[:count]

    def skip(self, count: int) -> None:
        """They have been read."""
        self.offset += len(self._text[:count].encode())
        self._text = self._text[count:]


# ---------------------------------------------------------------------------- the command


def read_command(
    checkpoint: str,
    file: str,
    state: str | None = None,
    after: str | None = None,
    segment: int = SEGMENT,
    save_every: float = 10.0,
    device: str | None = None,
) -> int:
    """Read a long text into a state, at constant memory, from which `archzoo generate` continues.

    The state is saved while it is read. Interrupted at any moment, the same command resumes from
    what was saved, and ends with the same state, bit for bit.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
        file: A UTF-8 text of any length.
        state: The file that the state is saved to [the text's name and .state, here].
        after: A state to read it after, of --save_state or of this command.
        segment: Characters at a time.
        save_every: Seconds between saves.
        device: Such as cpu or cuda. None: a GPU where there is one.

    Raises:
        FileNotFoundError: The checkpoint, the text or the state does not exist.
        ValueError: The checkpoint or the state cannot be used, or the text cannot be read.
        OSError: The state cannot be written.
    """
    from archzoo.checkpoint import check_tokenizer, load

    target = Path(f"{Path(file).name}.state") if state is None else Path(state)
    check_regular(file)
    model, tokenizer, _ = load(checkpoint, device or "auto")
    tokenizer = check_tokenizer(tokenizer, checkpoint)
    begin = None if after is None else read_state(after, StateLayout(model))[0]
    shown = ShowReading(Path(file).name)
    try:
        with shown:
            held = read_document(
                model,
                file,
                tokenizer,
                state=target,
                conversation=begin,
                segment=segment,
                save_every=save_every,
                on_segment=shown,
            )
    except KeyboardInterrupt:
        saved = shown.last.saved if shown.last else 0
        print(f"interrupted: {saved:,} bytes are in {target}, and the same command resumes there")
        return 130
    print(f"{file}: {shown.summary()}")
    print(
        f"{target}: the state after {int(held.read[0]):,} tokens, {nbytes(held.state):,} bytes; "
        f"archzoo generate {checkpoint} PROMPT --state {target} continues it"
    )
    return 0


class ShowReading:
    """Shows how far a document has been read: a bar in a terminal, else a line every ten seconds.

    Args:
        name: Of the document.
    """

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.name, self.terminal = name, console.is_terminal
        self.last: Reading | None = None
        self.begun = self.said = time.monotonic()
        self.progress = Progress(
            TextColumn("reading {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %, {task.fields[tokens]:,} tokens,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not self.terminal,
            transient=True,
        )
        self.task = self.progress.add_task(name, total=None, tokens=0)

    def __enter__(self) -> ShowReading:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, reading: Reading) -> None:
        """After a segment."""
        self.last, now = reading, time.monotonic()
        self.progress.update(
            self.task,
            total=reading.size - reading.resumed,
            completed=reading.done - reading.resumed,
            tokens=reading.tokens,
        )
        if not self.terminal and now - self.said >= 10:
            self.said = now
            left = (now - self.begun) * (reading.size - reading.done)
            left /= reading.done - reading.resumed
            print(
                f"{self.name}: {100 * reading.done / reading.size:.0f} %, "
                f"{reading.tokens:,} tokens, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def summary(self) -> str:
        """What was read, and how fast."""
        if self.last is None:
            return "had been read"
        seconds = time.monotonic() - self.begun
        done = self.last.done - self.last.resumed
        text = f"{self.last.tokens:,} tokens, {done / 1e6 / seconds:.2f} MB a second"
        return text + (f", resumed at byte {self.last.resumed:,}" if self.last.resumed else "")
