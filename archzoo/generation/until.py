"""Where a text ends besides its stop token: before the first of several strings."""

from __future__ import annotations

from collections.abc import Sequence


class Until:
    """Streamed text up to the first of several strings, which is not part of it.

    What may be the beginning of one of them waits until more text comes.

    Args:
        strings: That end the text; none of them is empty.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.strings, self.waiting, self.found = strings, "", False

    def push(self, text: str) -> str:
        """Takes more text, returns what is now certain, maybe nothing."""
        if self.found or not self.strings:
            return "" if self.found else text
        text = self.waiting + text
        begins = [place for string in self.strings if (place := text.find(string)) >= 0]
        if begins:
            self.found, self.waiting = True, ""
            return text[: min(begins)]
        certain = len(text)
        for string in self.strings:
            longest = min(len(string) - 1, len(text))
            for size in range(longest, 0, -1):
                if string.startswith(text[-size:]):
                    certain = min(certain, len(text) - size)
                    break
        self.waiting = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The rest, when nothing more comes."""
        rest, self.waiting = self.waiting, ""
        return rest


def check_until(until: Sequence[str], *, has_tokenizer: bool, keeps_state: bool) -> None:
    """Refuse strings that a text cannot be searched for.

    Args:
        until: As `generate` takes it.
        has_tokenizer: There is text at all.
        keeps_state: The text will be continued.

    Raises:
        ValueError: A single string, an empty one, no tokenizer, or a state that is kept.
    """
    if isinstance(until, str):
        raise ValueError(f"until={until!r} is one string: give a list of them, [{until!r}]")
    if not until:
        return
    if not all(until):
        raise ValueError("until holds an empty string, which every text contains: remove it")
    if not has_tokenizer:
        raise ValueError("until names strings of a text: give the tokenizer, too")
    if keeps_state:
        raise ValueError(
            "until ends a text within what was read already, and keep_state continues after it: "
            "take one of them"
        )
