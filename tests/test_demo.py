"""The demo: what it decodes and measures, and how the terminal shows it."""

from __future__ import annotations

import io
import itertools
import re
import socket
import sys
from html import escape
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import archzoo
from archzoo.block import Mixer
from archzoo.cli import main
from archzoo.demo import page
from archzoo.demo.command import CONFIG, RUNS
from archzoo.demo.decoding import (
    PROMPT_LIMIT,
    Side,
    at_contexts,
    compare_forms,
    condensed,
    decode,
    load_sides,
    note_on_tokenizers,
    state_size,
)
from archzoo.demo.memory import differ_by_layer, heads_by_layer, weights
from archzoo.demo.terminal import show, sparkline
from archzoo.demo.web import Answers, Stopping, asked_for, free_port
from archzoo.generation import generate, state_growth
from archzoo.shipped import configuration
from archzoo.tasks.tokenizers import CharacterTokenizer, learn_bpe

ROOT = Path(__file__).parent.parent
TOKENIZER = CharacterTokenizer("\n abcdefghijklmnopqrstuvwxyz.:,!?")
NAMES = ("retnet_micro", "transformer_micro")


def side(name: str, **arguments: object) -> Side:
    torch.manual_seed(1)
    model = archzoo.create_model(name, vocab_size=TOKENIZER.vocab_size, **arguments)
    return Side(name, model.eval(), TOKENIZER)


@pytest.fixture(scope="module")
def sides() -> list[Side]:
    return [side(name) for name in NAMES]


@pytest.fixture(scope="module")
def checkpoints(sides: list[Side], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("models")
    for entry in sides:
        archzoo.save_pretrained(place / entry.name, entry.model, entry.tokenizer)
    return [str(place / entry.name) for entry in sides]


# ---------------------------------------------------------------------------- decoding


def test_each_model_writes_what_it_writes_alone(sides: list[Side]) -> None:
    events = list(decode(sides, "to be", max_tokens=30, seed=3))
    for number, entry in enumerate(sides):
        mine = [event for event in events if event.side == number]
        alone = generate(
            entry.model, "to be", max_tokens=30, temperature=0.8, seed=3, tokenizer=TOKENIZER
        )
        assert [event.token for event in mine] == [*alone.tokens[0], None]
        assert ["".join(event.text for event in mine)] == alone.texts
        assert all(event.milliseconds > 0 for event in mine[:-1])
    assert [event.side for event in events[:4]] == [0, 1, 0, 1], "a token in turn"


def test_retention_keeps_its_state_and_attention_adds_to_it(sides: list[Side]) -> None:
    events = list(decode(sides, "to be", max_tokens=20))
    retention, attention = ([e for e in events if e.side == number] for number in (0, 1))
    assert len({event.state_bytes for event in retention}) == 1
    growth = state_growth(sides[1].model)
    for index, event in enumerate(attention[:-1]):
        assert event.context == len("to be") + index
        assert event.state_bytes == attention[0].state_bytes + index * growth
    # What the cache itself takes for so many tokens, when it has no more than these.
    assert attention[3].state_bytes == state_size(sides[1].model, attention[3].context)


def test_positions_that_a_bias_needs_are_counted() -> None:
    entry = side("transformer_micro", bias="ALiBi", rotary="none")
    sizes = [event.state_bytes for event in decode([entry], "to be", max_tokens=10)]
    growth = {after - before for before, after in itertools.pairwise(sizes[:-1])}
    more = 8 * entry.model.depth  # an int64 a token and layer
    assert growth == {int(state_growth(entry.model)) + more}


def test_numbers_are_written_as_people_do() -> None:
    tokenizer = CharacterTokenizer("0123456789+=", special=True)
    model = archzoo.create_model("retnet_micro", vocab_size=tokenizer.vocab_size).eval()
    model.task = {"class_path": "Addition", "init_args": {"reverse": True}}
    events = list(decode([Side("sums", model, tokenizer)], "17+25=", max_tokens=8))
    alone = generate(model, "17+25=", max_tokens=8, temperature=0.8, seed=0, tokenizer=tokenizer)
    assert ["".join(event.text for event in events)] == alone.texts


def test_who_asks_for_events_may_train_between_two(sides: list[Side]) -> None:
    for _ in decode(sides, "to be", max_tokens=2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_contexts_are_measured_in_one_reading(sides: list[Side]) -> None:
    contexts = [1, 20, 600]
    for number, entry in enumerate(sides):
        found = list(at_contexts(entry, contexts, steps=3))
        assert [point.context for point in found] == contexts
        assert all(point.milliseconds > 0 for point in found)
        sizes = [point.state_bytes for point in found]
        assert sizes == [state_size(entry.model, context) for context in contexts]
        assert (len(set(sizes)) == 1) == (number == 0)
    with pytest.raises(ValueError, match="must ascend"):
        list(at_contexts(sides[0], [20, 10]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_three_forms_write_the_same(sides: list[Side], temperature: float) -> None:
    for entry in sides:
        found = compare_forms(entry, "to be", max_tokens=20, temperature=temperature)
        assert list(found.texts) == ["parallel", "chunkwise", "recurrent"]
        assert len(set(found.texts.values())) == 1 and len(found.texts["parallel"]) > 5
        assert found.same and found.relative <= found.allowed and found.largest < 1e-3


class NoStep(archzoo.Attention):
    """Attention that knows no recurrent form."""

    step = Mixer.step


def test_a_model_without_a_recurrent_form_is_refused(tmp_path: Path) -> None:
    entry = side("transformer_micro", mixer=NoStep)
    archzoo.save_pretrained(tmp_path / "model", entry.model, TOKENIZER)
    with pytest.raises(ValueError, match=r"has no recurrent form.*NoStep needs step"):
        load_sides([str(tmp_path / "model")])


def test_other_tokenizers_are_noted(sides: list[Side]) -> None:
    other = learn_bpe(["to be or not to be"], 300)
    model = archzoo.create_model("transformer_micro", vocab_size=other.vocab_size)
    pair = [sides[0], Side("other", model.eval(), other)]
    assert note_on_tokenizers(sides) is None
    note = note_on_tokenizers(pair)
    assert note is not None and f"{other.vocab_size} tokens" in note
    assert written(pair, console()).endswith(note + "\n")


# ---------------------------------------------------------------------------- the terminal


def console(width: int = 100, terminal: bool = False, encoding: str = "utf-8") -> Console:
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    kind = {"force_terminal": terminal, "width": width, "height": 24, "legacy_windows": False}
    return Console(file=raw, highlight=False, **kind)


def written(pair: list[Side], screen: Console, prompt: str = "to be", tokens: int = 40) -> str:
    show(pair, prompt, decode(pair, prompt, max_tokens=tokens), screen)
    screen.file.seek(0)
    return screen.file.read()


def test_a_file_gets_the_end_as_plain_text(sides: list[Side]) -> None:
    text = written(sides, console(), tokens=200)
    assert "\x1b" not in text and "│" not in text
    for entry in sides:
        alone = generate(
            entry.model, "to be", max_tokens=200, temperature=0.8, seed=0, tokenizer=TOKENIZER
        )
        assert f"to be{alone.texts[0]}\n" in text, "whole, on the lines that the model wrote"
    assert len(re.findall(r"^ms a token +\d+\.\d\d +[▁▂▃▄▅▆▇█]{40}$", text, re.M)) == 2
    assert len(re.findall(r"^state bytes +[\d,]+ +[▁▂▃▄▅▆▇█]{40}$", text, re.M)) == 2
    assert "bytes, the same at every token" in text and "512 more with every token" in text
    size = state_size(sides[0].model, 1)
    outgrown = next(n for n in range(5, 200) if state_size(sides[1].model, n) > size)
    assert f"transformer_micro's state is the larger one from {outgrown} tokens on" in text


@pytest.mark.parametrize("width", [24, 50, 100])
def test_panels_fit_the_terminal(sides: list[Side], width: int) -> None:
    text = written(sides, console(width, terminal=True))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    end = text[: text.rindex("╯") + 1].splitlines()
    assert max(map(len, end)) == width
    assert ("│ │" in text or "││" in text) == (width == 100), "beside each other where they fit"


def test_it_is_drawn_while_tokens_come(sides: list[Side]) -> None:
    screen = console(terminal=True)
    seen = []

    def events():
        for event in decode(sides, "to be", max_tokens=3):
            yield event
            seen.append(screen.file.tell())

    show(sides, "to be", events(), screen)
    assert seen[0] > 0, "the first token is drawn before the second is asked for"


def test_a_terminal_without_colour_or_unicode_is_obeyed(
    sides: list[Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = written(sides, console(terminal=True))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text)
    unknown = CharacterTokenizer("abé")
    model = archzoo.create_model("retnet_micro", vocab_size=3).eval()
    text = written([Side("it", model, unknown)], console(encoding="ascii"), prompt="é")
    assert text.isascii() and "\n?" in text
    assert written(sides, console(encoding="ascii")).isascii()
    assert written(sides, console(terminal=True, encoding="ascii")).isascii()


def test_what_a_model_writes_is_not_obeyed_by_the_terminal() -> None:
    tokenizer = CharacterTokenizer("\x1b]0;a\x07")
    model = archzoo.create_model("retnet_micro", vocab_size=tokenizer.vocab_size)
    text = written([Side("it", model.eval(), tokenizer)], console(), prompt="a", tokens=50)
    assert "\x1b" not in text and "\x07" not in text and "\ufffd" in text


def test_an_interruption_shows_what_there_is(sides: list[Side]) -> None:
    screen = console()

    def events():
        for index, event in enumerate(decode(sides, "to be", max_tokens=10)):
            if index == 6:
                raise KeyboardInterrupt
            yield event

    with pytest.raises(KeyboardInterrupt):
        show(sides, "to be", events(), screen)
    screen.file.seek(0)
    assert "retnet_micro: 3 tokens" in screen.file.read()


def test_lines_are_drawn_to_one_scale() -> None:
    assert sparkline([0, 4, 8, 100], 8) == "▁▅██"
    assert sparkline([0.0, 0.0], 0) == "▁▁"
    assert sparkline([0, 8], 8, plain=True) == "_#"
    assert condensed([5, 1, 1, 1, 9, 1], 2) == [1, 1], "a median a column"
    assert condensed([1, 2], 5) == [1, 2]


# ---------------------------------------------------------------------------- the page


def test_memory_fades_with_the_distance_by_half_lives(sides: list[Side]) -> None:
    [heads, _] = heads_by_layer(sides[0].model)
    held = weights(heads[0].gamma, 200)
    assert held[-1] == 1 and held[-1 - 22] == pytest.approx(0.5, abs=0.02)
    html = page.memory(sides[0], ["ab", "c", *"d" * 198], heads)
    assert "half-life 22 tokens" in html and "1 % after 145" in html and html.count("<b>head") == 2
    text = re.sub("<[^>]*>", "", html[html.index("az-text") :])
    assert "abc" + "d" * 198 in text, "the whole text, whatever its shades"
    opacity = [float(value) for value in re.findall(r"8, 145, 178, ([\d.]+)", html)]
    assert opacity[0] < 0.05 and max(opacity) == 0.55
    html = page.memory(sides[0], ["x"] * 700, heads)
    assert "… 100 tokens before …" in html


def test_heads_that_keep_all_are_shown_once(sides: list[Side]) -> None:
    html = page.memory(sides[1], ["a"], heads_by_layer(sides[1].model)[0])
    assert html.count("az-head") == 1 and "keeps every token" in html
    forever = side("retnet_micro", mixer={"class_path": "Retention", "init_args": {"decay": 1}})
    assert "never forgets" in page.memory(forever, ["a"], heads_by_layer(forever.model)[0])
    assert not differ_by_layer(heads_by_layer(sides[0].model))
    hybrid = side("retnet_micro", pattern=["Retention", "Attention"])
    assert differ_by_layer(heads_by_layer(hybrid.model))


def test_the_page_escapes_what_is_not_its_own() -> None:
    hostile = "<script>alert(1)</script>"
    tokenizer = CharacterTokenizer("".join(sorted(set(hostile))))
    model = archzoo.create_model("retnet_micro", vocab_size=tokenizer.vocab_size).eval()
    answers = Answers([Side(hostile, model, tokenizer)])
    shown = [*list(answers.generate(hostile, 9, 0.8, 0, 0, Stopping()))[-1][:-1]]
    shown += [*answers.compare(hostile, 0.8, 0), answers.contexts(64)]
    shown += [page.error(hostile), page.message(hostile)]
    assert not any("<script" in part for part in shown)
    assert sum("&lt;script&gt;" in part for part in shown) >= 6


def test_the_page_is_answered_as_the_terminal(sides: list[Side]) -> None:
    answers = Answers(sides)
    frames = list(answers.generate("to be", 5, 0.8, 3, 0, Stopping()))
    status, first, second, memory, _, chunks = frames[-1]
    expected = [
        "".join(e.text for e in decode(sides, "to be", max_tokens=5, seed=3) if e.side == n)
        for n in (0, 1)
    ]
    assert ["".join(entry) for entry in chunks] == [f"to be{text}" for text in expected]
    assert f"<b>{escape(expected[0])}</b>" in first and "5 tokens written" in second
    assert "512 more with every token" in status and "half-life" in memory
    assert answers.memories(chunks, 1)[0] == memory
    assert answers.memories([], 0) == ["", ""]


def test_the_page_stops_between_two_tokens(sides: list[Side]) -> None:
    stopping, answers = Stopping(), Answers(sides)
    frames = answers.generate("to be", 2000, 0.8, 3, 0, stopping)
    next(frames)
    answers.stop(stopping)
    assert "tokens, state" in list(frames)[-1][0]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (("", 5, 0.8, 0), "the prompt is empty"),
        ((None, 5, 0.8, 0), "the prompt is empty"),
        (("a" * 2001, 5, 0.8, 0), "at most 2,000"),
        (("TO", 5, 0.8, 0), "character &#x27;T&#x27;"),
        (("to", 2001, 0.8, 0), "2001 must lie in 1 .. 2,000"),
        (("to", 5, float("nan"), 0), "temperature=nan"),
        (("to", 5, 0.8, -1), "seed=-1 must lie in"),
        (("to", "x", 0.8, 0), "invalid literal"),
    ],
)
def test_what_the_page_is_asked_is_checked_here(
    sides: list[Side], given: tuple[object, ...], error: str
) -> None:
    """Whoever sends requests by hand is not held back by what the page's fields allow."""
    [frame] = Answers(sides).generate(*given, 0, Stopping())
    assert error in frame[0] and "az-error" in frame[0]
    assert len(frame) == 6


def test_contexts_are_measured_once_and_drawn(sides: list[Side]) -> None:
    answers = Answers(sides)
    assert answers.contexts(100).count("not measured yet") == 2
    assert f"{state_size(sides[1].model, 100):,} bytes" in answers.contexts(100)
    html = list(answers.measure(100))[-1]
    assert "not measured" not in html and html.count("<svg") == 2
    assert len(list(answers.measure(100))) == 1, "known already"
    assert [set(known) for known in answers.measured] == [{100}, {100}]
    assert "after 16,384 tokens" in answers.contexts(10**9)
    assert answers.lengths[0] == 64 and answers.lengths[-1] == 16_384


def test_only_what_the_page_asks_for_is_served() -> None:
    for path in ("/", "/config", "/assets/a.js", "/theme.css", "/gradio_api/queue/join"):
        assert asked_for(path), path
    for path in (
        "/gradio_api/upload",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api",
        "/file=/etc/passwd",
        "/gradio_api/run/predict",
        "/monitoring",
        "//gradio_api/upload",
    ):
        assert not asked_for(path), path


def test_an_address_that_cannot_be_used_gets_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port={port} cannot be listened on \(address alr"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(ValueError, match="cannot be listened on"):
        free_port("192.0.2.1", 0)  # an address of documentation, no machine's
    with pytest.raises(ValueError, match="must lie in 0"):
        free_port("127.0.0.1", 70_000)


def test_without_gradio_the_page_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--web"]) == 1
    assert "pip install 'archzoo[demo]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the command


def test_the_command_shows_one_model_or_two(
    checkpoints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (checkpoints[:1], checkpoints):
        assert main(["demo", *given, "--prompt", "to be", "--max_tokens", "4"]) == 0
        out = capsys.readouterr().out
        assert [name in out for name in NAMES] == [True, len(given) == 2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "TO"], "character 'T' (U+0054) at position 0 is not one of"),
        (["--prompt", "a" * (PROMPT_LIMIT + 1)], "2,001 characters: the demo takes at most 2,000"),
        (["--prompt", "\udcff"], "is not valid UTF-8"),
        (["--max_tokens", "0"], "max_tokens=0 must lie in 1"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["--train"], "it takes no checkpoint"),
        (["--device", "nowhere"], "cannot be used here"),
    ],
)
def test_bad_input_gets_one_line(
    checkpoints: list[str],
    arguments: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", *checkpoints, "--prompt", "to be", *arguments]) == 1
    captured = capsys.readouterr()
    assert error in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_missing_models_name_the_command_that_trains_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1
    assert "archzoo demo --train" in capsys.readouterr().err
    assert main(["demo", str(tmp_path / "gone")]) == 1
    assert "there is no checkpoint at" in capsys.readouterr().err


def test_train_makes_the_models_that_are_shown(
    checkpoints: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `fit` does with the arms, tests/test_configs.py shows."""
    stem, arms = Path(CONFIG).stem, yaml.safe_load((ROOT / CONFIG).read_text())["arms"]
    assert [f"runs/{stem}_{arm}" for arm in arms] == list(RUNS)
    monkeypatch.chdir(tmp_path)  # which holds no configuration: the package does
    assert configuration(CONFIG).samefile(ROOT / CONFIG)
    called = []

    def run(command: str, arguments: list[str]) -> int:
        called.append([command, *arguments])
        return 130 if len(called) == 3 else 0

    monkeypatch.setattr("archzoo.training.command.run", run)
    monkeypatch.setattr("archzoo.demo.command.trained_models", lambda: checkpoints)
    assert main(["demo", "--train", "--prompt", "to be", "--max_tokens", "3"]) == 0
    assert called == [["fit", CONFIG, "--arm", arm, "--resume", "auto"] for arm in arms]
    assert "retnet_micro: 3 tokens" in capsys.readouterr().out
    assert main(["demo", "--train", "--prompt", "to be"]) == 130, "an interruption ends it"
    assert len(called) == 3
