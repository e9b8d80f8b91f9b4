"""Generation: forms, batches, sampling, streaming, and the command."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from families import MICRO, micro
from hypothesis import given
from hypothesis import strategies as st
from overlapping import overlapping
from torch import Tensor

import archzoo
from archzoo.cli import main
from archzoo.decoder import Decoder
from archzoo.generation import (
    FormsDisagree,
    generate,
    generate_command,
    probabilities,
    sample,
    state_growth,
)
from archzoo.generation.chat import chat
from archzoo.generation.command import report
from archzoo.generation.until import Until
from archzoo.mixers.retention import Retention
from archzoo.tasks.tokenizers import CharacterTokenizer, Tokenizer, learn_bpe, learn_characters
from archzoo.tasks.writing import Writing

MODELS = [*MICRO, "hybrid"]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]


def make(name: str, **arguments: object) -> Decoder:
    """A micro model whose weights are large enough that contexts matter to what it writes."""
    torch.manual_seed(1)
    if name == "hybrid":
        name, arguments = "retnet_micro", {"pattern": ["Retention", "Attention"], **arguments}
    model = micro(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    return model.eval()


# ---------------------------------------------------------------------------- forms and batches


@pytest.mark.parametrize("name", MODELS)
def test_forms_write_the_same(name: str) -> None:
    model = make(name)
    recurrent = generate(model, PROMPTS, max_tokens=24)
    for form in ("parallel", "chunkwise"):
        recomputed = generate(model, PROMPTS, max_tokens=24, form=form)
        assert recomputed.tokens == recurrent.tokens
        assert recomputed.state_bytes == 0
    assert all(len(tokens) == 24 for tokens in recurrent.tokens)
    assert len({tuple(tokens) for tokens in recurrent.tokens}) == 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_of_a_batch_is_what_the_prompt_gets_alone(name: str, temperature: float) -> None:
    model = make(name)
    seed = 5 if temperature else None
    batch = generate(model, PROMPTS, max_tokens=16, temperature=temperature, seed=seed)
    for row, prompt in enumerate(PROMPTS):
        seed = 5 + row if temperature else None
        alone = generate(model, prompt, max_tokens=16, temperature=temperature, seed=seed)
        assert alone.tokens == [batch.tokens[row]]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_a_plain_pass(name: str) -> None:
    model = make(name)
    [tokens] = generate(model, [3, 1, 4], max_tokens=10).tokens
    with torch.no_grad():
        logits = model(torch.tensor([[3, 1, 4, *tokens]])).logits
    assert logits[0, 2:-1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_check_measures_the_difference(name: str, form: str, dtype: torch.dtype) -> None:
    written = generate(make(name).to(dtype), PROMPTS, max_tokens=12, form=form, check=True)
    assert written.largest_difference is not None
    assert 0 < written.largest_difference < (1e-4 if dtype == torch.float32 else 1e-12)
    assert generate(make(name), PROMPTS, max_tokens=2).largest_difference is None


class WrongStep(Retention):
    """Its recurrent form forgets a little more than the parallel one does."""

    def step(self, x: Tensor, state: dict[str, Tensor], context: archzoo.Context) -> object:
        return super().step(x, {"memory": state["memory"] * 0.99}, context)


def test_check_finds_a_wrong_form() -> None:
    model = make("retnet_micro", mixer=WrongStep)
    with pytest.raises(
        FormsDisagree, match=r"differ by \d\.\de-0[1-3] .*1e-04 is allowed in float32"
    ):
        generate(model, PROMPTS, max_tokens=12, check=True)


def test_the_model_keeps_its_mode() -> None:
    model = make("retnet_micro", dropout=0.5)
    expected = generate(model, PROMPTS, max_tokens=8).tokens
    model.train()
    assert generate(model, PROMPTS, max_tokens=8).tokens == expected
    assert model.training
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(model, PROMPTS, max_tokens=8)
    assert model.training


@pytest.mark.parametrize("name", MODELS)
def test_exact_match_says_what_greedy_generation_does(name: str) -> None:
    """One teacher-forced pass over rows of different lengths, against decoding each problem."""
    from archzoo.tasks import Addition, exact_match

    task = Addition(digits=3, batch_size=24)
    model = make(name, vocab_size=task.vocab_size)
    batch = task.train_dataloader().batch(0)
    tokens, labels = batch["tokens"], batch["labels"]
    asked = [row.nonzero()[:, 0].tolist() for row in labels != -100]
    prompts = [tokens[row, : places[0] + 1].tolist() for row, places in enumerate(asked)]
    longest = max(map(len, asked))
    found = generate(model, prompts, max_tokens=longest).tokens
    # What the model answers becomes the right answer, but for one token in two rows of three.
    for row, places in enumerate(asked):
        answer = found[row][: len(places)]
        if row % 3:
            answer[-1 if row % 3 == 1 else 0] ^= 1
        labels[row, places] = torch.tensor(answer)
        tokens[row, places[1:]] = torch.tensor(answer[:-1], dtype=torch.int64)
    with torch.no_grad():
        logits = model(tokens, documents=batch["documents"]).logits
    expected = [row % 3 == 0 for row in range(24)]
    assert exact_match(logits, labels).tolist() == expected


# ---------------------------------------------------------------------------- state


def test_state_bytes() -> None:
    retnet, transformer = make("retnet_micro"), make("transformer_micro")
    sizes = [generate(retnet, [1], max_tokens=n).state_bytes for n in (1, 10, 100)]
    assert len(set(sizes)) == 1
    assert state_growth(retnet) == 0
    # 2 layers of 32 float32 channels, for keys and for values.
    assert state_growth(transformer) == 2 * 2 * 32 * 4
    sizes = [generate(transformer, [1], max_tokens=n).state_bytes for n in (10, 100)]
    assert sizes[1] - sizes[0] == 90 * state_growth(transformer)


# ---------------------------------------------------------------------------- ends


def test_stop_token_ends_a_row_and_only_that_row() -> None:
    model = make("retnet_micro")
    free = generate(model, PROMPTS, max_tokens=20)
    stop = free.tokens[1][4]
    calls: list[tuple[int, int | None]] = []
    found = generate(
        model,
        PROMPTS,
        max_tokens=20,
        stop_token=stop,
        on_token=lambda row, token, text: calls.append((row, token)),
    )
    for row, tokens in enumerate(free.tokens):
        expected = list(itertools.takewhile(lambda token: token != stop, tokens))
        assert found.tokens[row] == expected
        assert found.stopped[row] == (stop in tokens)
        assert [token for r, token in calls if r == row] == [*expected, None]
    assert found.stopped[1]
    assert not any(free.stopped)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("form", ["recurrent", "parallel"])
@pytest.mark.parametrize("name", MODELS)
def test_the_others_continue_as_alone(name: str, form: str, temperature: float) -> None:
    """Rows end one by one; what each gets is what it gets alone, draws included."""
    model = make(name)
    given = {"max_tokens": 20, "temperature": temperature, "form": form}
    free = generate(model, PROMPTS, seed=3 if temperature else None, **given).tokens
    stop = free[1][4]
    found = generate(
        model, PROMPTS, seed=3 if temperature else None, stop_token=stop, check=True, **given
    )
    for row, tokens in enumerate(free):
        assert found.tokens[row] == list(itertools.takewhile(lambda t: t != stop, tokens))


def test_a_row_that_has_ended_counts_no_further() -> None:
    """A table of positions is long enough for each row, and is left by the longest one alone."""
    embedding = {"class_path": "LearnedPositions", "init_args": {"longest": 12}}
    model = make("transformer_micro", embedding=embedding)
    long, short = [1, 2, 3, 4, 5, 6, 7, 8, 9], [3]
    [first] = generate(model, long, max_tokens=3).tokens
    [other] = generate(model, short, max_tokens=9).tokens
    stop = first[1]
    expected = list(itertools.takewhile(lambda token: token != stop, other))
    assert len(expected) == 9, "choose other prompts: this one ends too soon"
    for form in ("recurrent", "parallel"):
        found = generate(model, [long, short], max_tokens=9, stop_token=stop, form=form, check=True)
        assert found.tokens == [first[:1], expected]
        assert found.stopped == [True, False]
        assert (found.state_bytes > 0) == (form == "recurrent")


def test_state_of_rows_that_have_ended_is_counted() -> None:
    model = make("retnet_micro")
    free = generate(model, PROMPTS, max_tokens=20)
    found = generate(model, PROMPTS, max_tokens=20, stop_token=free.tokens[1][4])
    assert found.state_bytes == free.state_bytes


def test_nothing_is_computed_once_all_rows_have_ended() -> None:
    model = make("retnet_micro")
    [tokens] = generate(model, [1, 2], max_tokens=3).tokens
    passes: list[object] = []
    model.register_forward_pre_hook(lambda *call: passes.append(call))
    generate(model, [1, 2], max_tokens=50, stop_token=tokens[0])
    assert len(passes) == 1


# ---------------------------------------------------------------------------- sampling


def naive_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    weights = [2.718281828459045 ** (x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[:top_k]
    if top_p is not None:
        total, mass, few = sum(weights[token] for token in kept), 0.0, []
        for token in kept:
            few.append(token)
            mass += weights[token] / total
            if mass >= top_p:
                break
        kept = few
    total = sum(weights[token] for token in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(weights))]


@given(
    logits=st.lists(st.integers(-4, 4), min_size=1, max_size=9),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 0.99),
)
def test_probabilities_against_a_naive_reference(
    logits: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    # Equal logits are the rule here, so that ties are tried; masses that hit top_p exactly would
    # be decided by rounding, so the logits are separated a little.
    values = [x + 0.01 * place for place, x in enumerate(logits)]
    expected = naive_probabilities(values, temperature, top_k, top_p)
    found = probabilities(
        torch.tensor([values] * 2, dtype=torch.float64), temperature, top_k, top_p
    )
    assert found[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(found[0], found[1])


def test_ties_go_to_the_lower_token() -> None:
    found = probabilities(torch.zeros(1, 5000), top_k=2)[0]
    assert found[:2].tolist() == [0.5, 0.5]
    assert found[2:].sum() == 0


def test_draw_inverts_the_cumulated_distribution() -> None:
    probability = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).double()
    for uniform, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1 - 2**-53, 3)]:
        assert sample(probability, torch.tensor([uniform]).double()).tolist() == [token]
    # Rounding up to the total must not give a token of no probability.
    assert sample(probability, torch.ones(1).double()).tolist() == [3]


def test_samples_follow_the_probabilities() -> None:
    model = make("transformer_micro")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2]])).logits[:, -1]
    expected = probabilities(logits, 8.0, top_k=5)[0]
    rows = 4000
    found = generate(model, [[1, 2]] * rows, max_tokens=1, temperature=8.0, top_k=5, seed=0)
    counts = torch.bincount(torch.tensor(found.tokens)[:, 0], minlength=64) / rows
    # Five standard deviations of a frequency.
    assert (counts - expected).abs().max() < 5 * (0.25 / rows) ** 0.5
    assert counts[expected == 0].sum() == 0


def test_seeds_reproduce() -> None:
    model = make("retnet_micro")

    def sample(seed: int | None) -> list[list[int]]:
        return generate(model, [[1], [1]], max_tokens=12, temperature=2.0, seed=seed).tokens

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    assert sample(3)[0] != sample(3)[1]
    assert sample(3)[1] == sample(4)[0]
    torch.manual_seed(0)
    first = sample(None)
    assert sample(None) != first
    torch.manual_seed(0)
    assert sample(None) == first


def test_a_cold_sample_is_greedy() -> None:
    model = make("retnet_micro")
    greedy = generate(model, PROMPTS, max_tokens=8).tokens
    assert generate(model, PROMPTS, max_tokens=8, temperature=9.0, top_k=1).tokens == greedy
    assert generate(model, PROMPTS, max_tokens=8, temperature=9.0, top_p=1e-6).tokens == greedy


# ---------------------------------------------------------------------------- text

TEXT = "Die Wörter fließen, 言葉が流れる, 🙂🙃 and so on. " * 4


def tokenizers() -> list[Tokenizer]:
    return [CharacterTokenizer("".join(sorted(set(TEXT)))), learn_bpe([TEXT], 300)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=["characters", "bpe"])
def test_streamed_text_is_the_text(tokenizer: Tokenizer) -> None:
    model = make("retnet_micro", vocab_size=tokenizer.vocab_size)
    segments: dict[int, list[str]] = {0: [], 1: []}
    ended: list[int] = []

    def on_token(row: int, token: int | None, text: str) -> None:
        assert row not in ended
        segments[row].append(text)
        if token is None:
            ended.append(row)

    written = generate(
        model,
        ["Die 言葉", "🙂"],
        max_tokens=60,
        temperature=2.0,
        seed=0,
        tokenizer=tokenizer,
        on_token=on_token,
    )
    assert written.texts is not None
    for row, text in enumerate(written.texts):
        assert "".join(segments[row]) == text
        assert len(text) > 3
        assert tokenizer.decode(written.tokens[row]) == text
    assert sorted(ended) == [0, 1]


def test_a_character_may_begin_in_the_prompt() -> None:
    tokenizer = learn_bpe(["a"], 256)  # bytes only
    *first, last = tokenizer.encode("a🙂")
    model = make("retnet_micro", vocab_size=256)
    always(model, last)
    written = generate(model, first, max_tokens=1, tokenizer=tokenizer)
    assert written.tokens == [[last]]
    assert written.texts == ["🙂"]


def always(model: Decoder, token: int) -> None:
    """Make a token the most likely one everywhere: the last norm's output becomes all ones."""
    model.norm = torch.nn.LayerNorm(model.dim, elementwise_affine=True)
    torch.nn.init.zeros_(model.norm.weight)
    torch.nn.init.ones_(model.norm.bias)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.ones_(model.head.weight[token : token + 1])


def test_the_tokenizers_stop_token_stops() -> None:
    tokenizer = CharacterTokenizer("abc", special=True)
    model = make("retnet_micro", vocab_size=tokenizer.vocab_size)
    assert tokenizer.stop_token is not None
    always(model, tokenizer.stop_token)
    written = generate(model, "a", max_tokens=9, tokenizer=tokenizer)
    assert written.texts == [""]
    assert written.stopped == [True]


@pytest.mark.parametrize("rows", [[[1, 2, 3]], [1, 2, 3], [[1, 2], [3, 4]]])
def test_arrays_of_tokens_are_prompts(rows: list[int]) -> None:
    model = make("retnet_micro")
    wanted = generate(model, rows, max_tokens=3).tokens
    for array in (torch.tensor(rows), np.array(rows), tuple(rows)):
        assert generate(model, array, max_tokens=3).tokens == wanted  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": 5}, "prompts=5: give a text, tokens, or a list of texts or of tokens"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [5, 64]]}, "token 64 in prompt 1 is not one of the model's 0 to 63"),
        ({"prompts": [[1], [1.5, 2.0]]}, r"prompt 1 is \[1.5, 2.0\]: a prompt is text, or a list"),
        ({"prompts": torch.tensor([1.0, 2.0])}, "prompt 0 is 1.0: a prompt is text, or a list"),
        ({"prompts": [-1]}, "token -1 in prompt 0"),
        ({"prompts": "text"}, "needs a tokenizer"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"form": "backwards"}, "form 'backwards' is not one of parallel, chunkwise, recurrent"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": float("inf")}, "temperature=inf must be 0 .* or more, and finite"),
        ({"temperature": 1.0, "seed": 2**64}, r"seed=18446744073709551616 is too large: row r"),
        ({"temperature": 1.0, "seed": 1.5}, "seed=1.5 must be an integer"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k=2.5 must be an integer"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be an integer"),
        ({"stop_token": 64}, "stop_token=64 is not one of the model's tokens, 0 to 63"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 must lie in"),
        ({"top_k": 3}, "give a temperature"),
        (
            {"prompts": "ab?", "tokenizer": CharacterTokenizer("abc")},
            r"character '\?' .* at position 2",
        ),
        (
            {"prompts": "a", "tokenizer": CharacterTokenizer("".join(map(chr, range(65))))},
            "the tokenizer has 65 tokens and the model knows 64",
        ),
    ],
)
def test_bad_input_gets_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        generate(make("retnet_micro"), **({"prompts": [1], "max_tokens": 2} | arguments))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "model"
    tokenizer = CharacterTokenizer("0123456789+=", special=True)
    model = make("retnet_micro", vocab_size=tokenizer.vocab_size)
    task = {"class_path": "archzoo.tasks.arithmetic.Addition", "init_args": {"reverse": True}}
    archzoo.save_pretrained(path, model, tokenizer, task)
    return path


TURNED = Writing(reverse=True, reverse_answer=True)


def written_by(model: Decoder, tokenizer: Tokenizer | None, prompt: str) -> str:
    """What follows a prompt, both as the task writes them."""
    assert tokenizer is not None
    tokens = tokenizer.encode(prompt)
    stop = tokenizer.stop_token
    return tokenizer.decode(generate(model, tokens, max_tokens=12, stop_token=stop).tokens[0])


def test_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = archzoo.from_pretrained(checkpoint)
    raw = written_by(model, tokenizer, "21+543=")
    generate_command(str(checkpoint), ["12+345="], max_tokens=12, check=True)
    text, _, report = capsys.readouterr().out.partition("\n\n")
    assert text == "12+345=" + TURNED.read(raw, "21+543=")
    lines = report.splitlines()
    assert re.fullmatch(r"12 tokens, \d+\.\d\d ms per token, the prompt \d+\.\d ms", lines[0])
    state = model.init_state(1)
    assert lines[1] == f"state {archzoo.block.nbytes(state):,} bytes, the same at any length"
    assert lines[2].startswith("recurrent and recomputed logits agree to ")


def test_command_says_what_capturing_took(checkpoint: Path) -> None:
    model, tokenizer = archzoo.from_pretrained(checkpoint)
    written = [
        generate(model, ["12+345="], max_tokens=12, tokenizer=tokenizer, graph=graph)
        for graph in (False, True)  # the same steps, called where there is no GPU
    ]
    assert written[0].texts == written[1].texts
    said = [report(model, entry) for entry in written]
    assert "the graph" not in said[0]
    assert re.search(r"the prompt \d+\.\d ms, the graph \d+\.\d ms\n", said[1])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--device cpu", "--graph needs an NVIDIA GPU, and the device is cpu: omit it"),
        ("--check", "--graph replays a step: omit it, or --beams, --check and --form"),
        ("--form parallel", "--graph replays a step"),
        ("--beams 2", "--graph replays a step"),
    ],
)
def test_command_refuses_a_graph_where_none_is_captured(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], asked: str, said: str
) -> None:
    capsys.readouterr()
    assert main(["generate", str(checkpoint), "1+1=", "--graph", "true", *asked.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_command_with_several_prompts(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["12+345=", "9+9="]
    expected = []
    for prompt in prompts:
        generate_command(str(checkpoint), [prompt], max_tokens=8)
        expected.append(capsys.readouterr().out.splitlines()[0])
    generate_command(str(checkpoint), prompts, max_tokens=8, form="parallel")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == expected
    assert lines[-1] == "no state: all was recomputed at every token"


def test_command_stops_where_it_is_told(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = archzoo.from_pretrained(checkpoint)
    raw = written_by(model, tokenizer, "1+1=")
    generate_command(str(checkpoint), ["1+1="], max_tokens=12, stop=raw[3])
    line = capsys.readouterr().out.splitlines()[0]
    assert line == "1+1=" + TURNED.read(raw.partition(raw[3])[0], "1+1=")
    with pytest.raises(ValueError, match="stop='12' is 2 tokens: it must be exactly one"):
        generate_command(str(checkpoint), ["1+1="], stop="12")


def test_command_refuses_characters_that_are_not_known(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"character 'x' .* at position 1") as error:
        generate_command(str(checkpoint), ["1x1="])
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------- strings that end


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_a_string_ends_a_row_and_only_that_row(kind: str, graph: bool) -> None:
    """Whatever subwords it comes in, and each row gets what it would get alone."""
    text = "to be or not to be, that is the question: 三国 or not. " * 8
    tokenizer: Tokenizer = (
        CharacterTokenizer("".join(sorted(set(text))))
        if kind == "characters"
        else learn_bpe([text], 280)
    )
    model = make("retnet_micro", vocab_size=tokenizer.vocab_size)
    prompts = ["to be", "or", "that is the question"]
    free = generate(model, prompts, max_tokens=30, tokenizer=tokenizer)
    assert free.texts is not None
    until = [free.texts[0][7:10], free.texts[2][11:13]]
    found = generate(model, prompts, max_tokens=30, tokenizer=tokenizer, until=until, graph=graph)
    wanted = [
        written[: min((p for s in until if (p := written.find(s)) >= 0), default=len(written))]
        for written in free.texts
    ]
    assert found.texts == wanted
    assert wanted[0] != free.texts[0] and found.stopped[0]
    for ours, theirs, stopped in zip(found.tokens, free.tokens, found.stopped, strict=True):
        assert ours == theirs[: len(ours)] and stopped == (len(ours) < 30)


def test_no_beginning_of_the_string_that_ends_a_text_is_streamed() -> None:
    tokenizer = CharacterTokenizer("abc")
    model = make("retnet_micro", vocab_size=3)
    free = generate(model, ["ab"], max_tokens=20, tokenizer=tokenizer)
    assert free.texts is not None
    until = [free.texts[0][4:9]]
    calls: list[str] = []
    found = generate(
        model,
        ["ab"],
        max_tokens=20,
        tokenizer=tokenizer,
        until=until,
        on_token=lambda row, token, text: calls.append(text),
    )
    assert found.texts == ["".join(calls)] == [free.texts[0].partition(until[0])[0]]
    assert found.stopped == [True]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_before_the_string_that_is_complete_first(
    text: str, strings: list[str]
) -> None:
    wanted = text
    for end in range(len(text) + 1):
        if begins := [place for s in strings if (place := text[:end].find(s)) >= 0]:
            wanted = text[: min(begins)]
            break
    until = Until(strings)
    assert "".join([*map(until.push, text), until.finish()]) == wanted
    assert until.found == any(string in text for string in strings)


@pytest.mark.parametrize(
    ("until", "arguments", "message"),
    [
        ("stop", {}, r"one string: give a list of them, \['stop'\]"),
        (["a", ""], {}, "holds an empty string"),
        (["a"], {"tokenizer": None}, "give the tokenizer"),
        (["a"], {"keep_state": True}, "keep_state continues after it"),
    ],
)
def test_strings_that_end_no_text_are_refused(
    until: list[str], arguments: dict[str, object], message: str
) -> None:
    tokenizer = CharacterTokenizer("abc")
    model = make("retnet_micro", vocab_size=3)
    given = {"tokenizer": tokenizer, **arguments}
    with pytest.raises(ValueError, match=message):
        generate(model, [1, 2], max_tokens=5, until=until, **given)


def test_a_conversation_in_the_terminal(tmp_path, monkeypatch, capsys):
    """Lines one by one leave the state that the whole text leaves, and problems begin anew."""
    text = "To be, or not to be?\nThat is the question.\n"
    tokenizer = learn_characters([text])
    model = archzoo.create_model("retnet_micro", vocab_size=tokenizer.vocab_size).eval()
    shown = []
    options = {"max_tokens": 5, "temperature": 0.0}
    left = chat(
        model,
        tokenizer,
        lines=iter(["To be", "", "@", "not"]),
        write=shown.append,
        **options,
    )
    whole, conversation = [], None
    for prompt in ("To be", "", "\nnot"):
        found = generate(
            model,
            [prompt],
            tokenizer=tokenizer,
            conversation=conversation,
            keep_state=True,
            **options,
        )
        conversation = found.conversation
        whole.append(found.texts[0] + "\n")
    assert "".join(shown) == "".join(whole)
    assert torch.equal(left.logits, conversation.logits) and left.read == conversation.read
    assert "error: " in capsys.readouterr().err  # of the character that it does not know
    anew = chat(model, tokenizer, lines=iter(["To be", "/new", "not"]), **options)
    assert anew.read.item() == 3 + 5


def test_chat_is_a_flag(tmp_path, monkeypatch, capsys):
    from test_training import addition, make_trainer

    from archzoo.training.module import LanguageModel

    make_trainer(tmp_path, max_steps=1).fit(LanguageModel("retnet_micro"), addition())
    path = str(tmp_path / "last.ckpt")
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("12+3=\n\n1+2=\n"))
    kept = str(tmp_path / "state")
    assert main(["generate", path, "--chat", "--max_tokens", "4", "--save_state", kept]) == 0
    said = capsys.readouterr()
    assert not said.err and len(said.out.splitlines()) == 4, said  # three answers, and the state
    for arguments, message in (
        (["1+1=", "--chat"], "leave the prompt out"),
        (["--chat", "--beams", "2"], "leave out --beams"),
        ([], "give a text, or --chat"),
    ):
        assert main(["generate", path, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main(["generate", path, "--max_tokens", "4", "1+1=", "2+2="]) == 0  # where they stood
    assert "2+2=" in capsys.readouterr().out


def test_texts_that_overlap_are_written_in_evaluation_mode_and_leave_the_mode_before():
    """Of two threads the one that began first ends first; the model is being trained."""
    net = archzoo.create_model("retnet_micro", vocab_size=20, dropout=0.9, init_std=0.5).train()
    want = archzoo.generate(net, [[1, 2]], max_tokens=8).tokens
    found = []

    def write(wait):
        written = archzoo.generate(net, [[1, 2]], max_tokens=8, on_token=lambda *_: wait())
        found.append(written.tokens)

    overlapping(write)
    assert found == [want, want]
    assert net.training and all(module.training for module in net.modules())
