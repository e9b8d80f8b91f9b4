"""Beam search: greedy with one beam, exhaustive with all, and a prompt alone as in a batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_state_files import PROMPTS, make, same

import archzoo
from archzoo.cli import main
from archzoo.decoder import Decoder
from archzoo.generation import beam_search, generate
from archzoo.tasks.tokenizers import CharacterTokenizer


def log_probabilities(model: Decoder, prompt: list[int], texts: list[list[int]]) -> list[float]:
    """Of texts after a prompt, from one pass over all those of a length."""
    found: dict[tuple[int, ...], float] = {}
    for length in {len(text) for text in texts}:
        same_length = torch.tensor([text for text in texts if len(text) == length])
        rows = torch.cat([torch.tensor([prompt]).expand(len(same_length), -1), same_length], dim=1)
        with torch.no_grad():
            chances = model(rows).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
        sums = chances.gather(2, same_length[..., None]).sum((1, 2))
        found |= zip(map(tuple, same_length.tolist()), sums.tolist(), strict=True)
    return [found[tuple(text)] for text in texts]


@pytest.mark.parametrize("length_power", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["retnet_micro", "pattern", "convolution"])
def test_as_many_beams_as_texts_search_them_all(kind: str, length_power: float) -> None:
    model, stop, longest = make(kind, torch.float64, vocab_size=4), 3, 3
    with torch.no_grad():
        model.head.weight /= 8  # no text is all but certain
    texts = [
        [*words, stop] if len(words) < longest else list(words)
        for length in range(longest + 1)
        for words in itertools.product(range(3), repeat=length)
    ]
    texts += [[*words, stop] for words in itertools.product(range(3), repeat=longest - 1)]
    texts = [list(text) for text in {tuple(text) for text in texts}]
    for prompt in ([1, 2, 0], [0]):
        scored = dict(zip(map(tuple, texts), log_probabilities(model, prompt, texts), strict=True))
        ranked = sorted(scored, key=lambda t: scored[t] / len(t) ** length_power, reverse=True)
        found = beam_search(
            model,
            prompt,
            beams=len(texts),
            max_tokens=longest,
            stop_token=stop,
            length_power=length_power,
        )
        assert len(found.tokens[0]) == len(texts)
        for text, tokens, stopped, log_p, score in zip(
            ranked,
            found.tokens[0],
            found.stopped[0],
            found.log_probabilities[0],
            found.scores[0],
            strict=True,
        ):
            assert [*tokens, *[stop] * stopped] == list(text)
            assert log_p == pytest.approx(scored[text], abs=1e-10)
            assert score == pytest.approx(scored[text] / len(text) ** length_power, abs=1e-10)


def naive(model: Decoder, prompt: list[int], beams: int, longest: int, stop: int) -> Any:
    """The same search of one prompt by whole passes over every text."""
    going: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(longest):
        texts = [[*tokens, token] for _, tokens in going for token in range(model.vocab_size)]
        further = zip(log_probabilities(model, prompt, texts), texts, strict=True)
        best = sorted(further, key=lambda pair: -pair[0])[: beams - len(ended)]
        ended += [pair for pair in best if pair[1][-1] == stop]
        going = [pair for pair in best if pair[1][-1] != stop]
        if not going:
            break
    ended += going
    return [tokens for _, tokens in sorted(ended, key=lambda p: -p[0] / len(p[1]))]


@pytest.mark.parametrize("kind", ["retnet_micro", "transformer_micro", "pattern"])
def test_a_few_beams_are_those_of_a_plain_search(kind: str) -> None:
    model = make(kind, torch.float64, vocab_size=8)
    with torch.no_grad():
        model.head.weight /= 4
    prompts = [[1, 2, 3, 4], [5], [7, 6]]
    together = beam_search(model, prompts, beams=3, max_tokens=5, stop_token=2)
    for row, prompt in enumerate(prompts):
        wanted = naive(model, prompt, 3, 5, 2)
        alone = beam_search(model, prompt, beams=3, max_tokens=5, stop_token=2)
        for found, index in ((together, row), (alone, 0)):
            pairs = zip(found.tokens[index], found.stopped[index], strict=True)
            assert [[*tokens, *[2] * stopped] for tokens, stopped in pairs] == wanted
    assert any(map(any, together.stopped)) and not all(map(all, together.stopped))


@pytest.mark.parametrize("kind", ["retnet_micro", "pattern", "abacus digits"])
def test_one_beam_is_greedy(kind: str) -> None:
    model = make(kind)
    stop = generate(model, PROMPTS, max_tokens=9).tokens[1][4]
    greedy = generate(model, PROMPTS, max_tokens=9, stop_token=stop)
    found = beam_search(model, PROMPTS, beams=1, max_tokens=9, stop_token=stop)
    assert [[tokens] for tokens in greedy.tokens] == found.tokens
    assert [[stopped] for stopped in greedy.stopped] == found.stopped
    with torch.no_grad():  # all logits are equal, and the first token is taken
        model.head.weight.zero_()
    assert beam_search(model, [1], beams=1, max_tokens=2).tokens == [[[0, 0]]]
    assert beam_search(model, [1], beams=2, max_tokens=1).tokens == [[[0], [1]]]


def test_a_search_continues_a_conversation() -> None:
    model = make("pattern", torch.float64)
    held = generate(model, PROMPTS, max_tokens=3, keep_state=True)
    assert held.conversation is not None
    before = archzoo.fork(held.conversation)
    texts = [a + b for a, b in zip(PROMPTS, held.tokens, strict=True)]
    wanted = beam_search(model, texts, beams=3, max_tokens=4)
    found = beam_search(model, conversation=held.conversation, beams=3, max_tokens=4)
    assert found.tokens == wanted.tokens
    assert same(before, held.conversation), "it stays as it is"
    stopped = held.conversation._replace(stopped=torch.tensor([True, False, True]))
    found = beam_search(model, [[], [], [4]], conversation=stopped, beams=3, max_tokens=4)
    assert found.tokens[:2] == [[[]], wanted.tokens[1]] and found.stopped[0] == [True]
    assert len(found.tokens[2]) == 3


def test_what_cannot_be_searched_is_said() -> None:
    model = make()
    for given, match in (
        ({"beams": 0}, "beams=0 must lie in 1 to 1,024"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"length_power": float("nan")}, "length_power=nan must be at least 0"),
        ({"prompts": None}, "there is no prompt"),
        ({"prompts": []}, "there is no prompt"),
    ):
        arguments: Any = {"prompts": [1], "max_tokens": 2, **given}
        with pytest.raises(ValueError, match=match):
            beam_search(model, **arguments)
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        beam_search(model, [1], max_tokens=2)


def test_the_command_writes_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = CharacterTokenizer("abcdefgh")
    model = make(vocab_size=8)
    archzoo.save_pretrained("model", model, tokenizer)
    command = ["generate", "model", "--beams", "4", "--max_tokens", "5"]
    assert main([*command, "abc", "d"]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = beam_search(model, ["abc", "d"], beams=4, max_tokens=5, tokenizer=tokenizer)
    assert found.texts is not None
    for line, prompt, texts, scores in zip(
        printed, ("abc", "d"), found.texts, found.scores, strict=False
    ):
        assert line == prompt + texts[0] and scores[0] == max(scores)
    assert "4 beams" in "".join(printed)
    assert main([*command, "abc", "--save_state", "state"]) == 0
    assert "state: the state after 8 tokens" in capsys.readouterr().out
    held = archzoo.load_state("state", model)
    wanted = generate(model, "abc" + found.texts[0][0], tokenizer=tokenizer, max_tokens=3)
    assert generate(model, conversation=held, max_tokens=3).tokens == wanted.tokens
    for more, match in (
        (["--temperature", "1"], "beams=4 takes the most probable texts and draws none"),
        (["--form", "parallel"], "beams=4 is for the recurrent form, without check"),
    ):
        assert main([*command, "abc", *more]) == 1
        assert match in capsys.readouterr().err
