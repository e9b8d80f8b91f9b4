"""A tokenizer as the files that `AutoTokenizer` reads, with a token to pad with."""

from __future__ import annotations

import json
from typing import Any

from archzoo.export.unigram import unigram_file
from archzoo.tasks.tokenizers import PAD, SentencePieceTokenizer, Tokenizer

#: The byte that no text in UTF-8 holds, as byte-level BPE and sentencepiece write it.
UNUSED = ("\u00ff", "<0xFF>")


def tokenizer_files(
    tokenizer: Tokenizer, longest: int | None, free: int | None = None
) -> tuple[dict[str, bytes], int | None]:
    """What `AutoTokenizer` reads, and the token that the model may take for padding.

    It pads with the tokenizer's own token for it; else with the one of a byte that is in no text,
    by the name <pad>; else with one behind the vocabulary, if the model takes it; else with an
    ordinary one, which only the attention mask can tell from text.

    Args:
        tokenizer: To write.
        longest: Tokens of the longest text in training.
        free: A token that is in no text and that the model takes; None: there is none.

    Raises:
        ValueError: A sentencepiece model that is no `tokenizer.json`.
    """
    content = _content(tokenizer)
    names = _names(content)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    if longest:
        config["model_max_length"] = longest
    pad = tokenizer.pad_token
    if pad is None or pad not in names:
        unused = next((t for t, name in names.items() if name in UNUSED), None)
        pad = free if unused is None or not _rename(content, unused) else unused
        if pad is not None:
            content["added_tokens"] = [*(content.get("added_tokens") or []), _special(pad)]
            names[pad] = PAD
    if tokenizer.stop_token in names:
        config["eos_token"] = names[tokenizer.stop_token]
    # Without a mask transformers takes this token for padding, so it must not be one of a text.
    known = pad
    if pad is None:
        pad = tokenizer.single("\n") if _knows(tokenizer, "\n") else min(names)
    config["pad_token"] = names[pad]  # type: ignore[index]
    files = {"tokenizer.json": _json(content), "tokenizer_config.json": _json(config)}
    return files, known


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """Of the `tokenizer.json`."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            return unigram_file(tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{error}: export with --without_tokenizer, and encode with sentencepiece"
            ) from None
    content: dict[str, Any] = json.loads(tokenizer.files()["tokenizer.json"])
    return content


def _names(content: dict[str, Any]) -> dict[int, str]:
    """Each token's name in the file."""
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, dict):
        names = {token: name for name, token in vocabulary.items()}
    else:  # a unigram model's names and scores
        names = {token: name for token, (name, _) in enumerate(vocabulary)}
    return names | {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}


def _rename(content: dict[str, Any], token: int) -> bool:
    """Call the token of the unused byte <pad>; False: the file has no bytes, or merges this one."""
    model = content["model"]
    if model["type"] == "Unigram":
        if not model.get("byte_fallback"):
            return False
        model["vocab"][token][0] = PAD
        return True
    byte = UNUSED[0]
    steps = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    merged = any(byte in part for merge in model.get("merges") or [] for part in merge)
    if model["type"] != "BPE" or "ByteLevel" not in steps or merged or byte not in model["vocab"]:
        return False
    model["vocab"] = {PAD if n == byte else n: t for n, t in model["vocab"].items()}
    return True


def _special(token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": PAD, **flags, "special": True}


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return tokenizer.single(text) is not None
    except ValueError:
        return False


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
