"""`archzoo bench`: its sides, its rounds within a budget, and what it says of what it found."""

import csv
import math
import mmap
import subprocess
from types import SimpleNamespace

import pytest
import torch

import archzoo
from archzoo.analysis import evidence
from archzoo.analysis.bench import command, contenders, fitting
from archzoo.analysis.bench.contenders import ZooContender
from archzoo.analysis.bench.fitting import FitContender, random_text
from archzoo.analysis.bench.measuring import Budget, Plan, foreseen, in_turns, measure
from archzoo.analysis.bench.memory import begin_peak, grown, resident_peak
from archzoo.analysis.bench.peers import FlashLinearAttention, Llama, Nano, Shape, Torchscale
from archzoo.analysis.bench.profile import kernels_of, part_of, profile_rows
from archzoo.analysis.bench.showing import (
    MEASURES,
    Line,
    crossover,
    draw,
    in_words,
    lines_of,
    measures_of,
    report_sections,
    rounded,
    stops,
)
from archzoo.analysis.bench.sides import Process, Stopped
from archzoo.analysis.bench.worker import Bench, answer_to, contender_of
from archzoo.analysis.operations import training_operations
from archzoo.cli import main
from archzoo.states import map_state, nbytes

TRAINING, STATE = MEASURES[0], MEASURES[-1]
DECODE = next(measure for measure in MEASURES if measure.name == "decode")
MEMORY = next(measure for measure in MEASURES if measure.name == "decode-memory")
SIZES = {"length": 8, "batch": 2, "vocab_size": 64}


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeSide:
    """A side whose calls take what a law says, by a clock of ours.

    Args:
        clock: Whose time passes.
        law: Seconds a call at a length and batch, or an exception.
        memory: Bytes at a length.
        said: What it was asked is added.
    """

    def __init__(self, clock, law, memory=lambda length: 1, said=None):
        self.clock, self.law, self.memory, self.said = clock, law, memory, said
        self.length = self.batch = 0

    def ask(self, do, timeout, **request):
        if self.said is not None:
            self.said.append((do, request.get("length", self.length)))
        if do == "build":
            return {"parameters": 5}
        if do == "peak":
            return {"memory_bytes": self.memory(self.length)}
        if do == "prepare":
            self.length, self.batch = request["length"], request["batch"]
            seconds, calls = self.law(self.length, self.batch), 2
            if request["quantity"] == "state":
                return {"seconds": 0.0, "state_bytes": int(1000 * seconds)}
        else:
            seconds, calls = self.law(self.length, self.batch), request["repeat"]
        if seconds * calls > timeout:
            self.clock.now += timeout
            raise Stopped("time", "no answer")
        self.clock.now += seconds * calls
        return {"seconds": seconds}

    def close(self):
        if self.said is not None:
            self.said.append(("close", self.length))


class Named(ZooContender):
    """A contender that is never built."""

    def __init__(self, name, without=None):
        self.name, self.without = name, without or {}

    def settings(self):
        return "same"


def plan_of(*contenders, **changed):
    settings = {
        "contenders": list(contenders),
        "quantities": ["prefill"],
        "lengths": [16, 32, 64, 128],
        "batches": [1, 2],
        "contexts": [8],
        "tokens": 32,
        "rounds": 5,
        "precisions": ("float32", "float32"),
        "free_memory": 10**9,
        "tracks_peaks": False,
    }
    return Plan(**settings | changed)


def measured(plan, laws, seconds=1e6, **more):
    clock = Clock()
    sides = {name: FakeSide(clock, law, **more) for name, law in laws.items()}
    budget = Budget(seconds, clock)
    return [row for row, _ in measure(plan, lambda side: sides[side.name], budget)], clock


# ---------------------------------------------------------------------------- rounds


def test_sides_run_in_turn_and_a_row_is_the_median_of_the_rounds():
    said = []
    taken = iter([9, 9, 3, 1, 2, 5, 4])
    clock = Clock()
    sides = {"a": FakeSide(clock, lambda *_: 1.0), "b": FakeSide(clock, lambda *_: next(taken))}
    for name, side in sides.items():
        side.said = said
        side.name = name
    plan = plan_of(Named("a"), Named("b"), lengths=[16], rounds=5)
    next(taken)
    rows = [row for row, _ in measure(plan, lambda c: sides[c.name], Budget(1e6, clock))]
    assert [entry[0] for entry in said[-12:-2]] == ["run"] * 10
    assert rows[1]["median"] == 3000 and rows[1]["rounds"] == 5
    assert rows[1]["low"] == pytest.approx(1400) and rows[1]["high"] == pytest.approx(4600)
    assert rows[0]["median"] == rows[0]["low"] == 1000


def test_throughput_counts_the_tokens_of_a_step():
    plan = plan_of(Named("a"), quantities=["training", "batch"], lengths=[16, 64])
    rows, _ = measured(plan, {"a": lambda length, batch: 0.5})
    told = [(row["quantity"], row["length"], row["batch"], row["median"]) for row in rows]
    assert told == [
        ("training", 16, 2, 64.0),  # 32 tokens in two rows
        ("training", 64, 1, 128.0),  # one row is longer than that
        ("batch", 8, 1, 2.0),
        ("batch", 8, 2, 4.0),
    ]


def test_a_size_that_is_trained_has_a_process_of_its_own_where_it_says_the_peak():
    said = []
    plan = plan_of(Named("a"), quantities=["training"], lengths=[16, 32], rounds=1)
    rows, _ = measured(plan, {"a": lambda *_: 1.0}, said=said, memory=lambda length: 7 * length)
    assert [row["memory_bytes"] for row in rows] == [112, 224]
    assert [do for do, _ in said if do in ("build", "close")] == ["build", "close"] * 2
    said.clear()
    measured(plan_of(Named("a"), lengths=[16, 32]), {"a": lambda *_: 1.0}, said=said)
    assert [do for do, _ in said if do in ("build", "close")] == ["build", "close"]


def test_a_curve_stops_where_its_time_ends_and_the_others_go_on():
    slow = {"a": lambda length, _: 0.01 * length, "b": lambda length, _: 0.4 * length}
    rows, clock = measured(plan_of(Named("a"), Named("b")), slow, seconds=200)
    values = {(row["contender"], row["length"]): row for row in rows}
    assert clock.now <= 200 + 1
    assert "median" in values["a", 128]
    stopped = [row for row in rows if row.get("stopped")]
    assert [row["contender"] for row in stopped] == ["b"]
    assert stopped[0]["stopped"].startswith("time: about")
    assert "median" not in stopped[0]


def test_fewer_rounds_are_made_where_time_is_short_but_three():
    rows, _ = measured(plan_of(Named("a"), rounds=100), {"a": lambda *_: 1.0}, seconds=60)
    assert rows[0]["rounds"] < 20 and all(row["rounds"] >= 3 for row in rows if "rounds" in row)


def test_a_curve_stops_before_a_size_that_memory_does_not_hold():
    plan = plan_of(Named("a"), quantities=["training"], free_memory=16 * 64**2 * 2)
    rows, _ = measured(plan, {"a": lambda *_: 1.0}, memory=lambda length: 16 * length**2)
    assert [row["length"] for row in rows] == [16, 32, 64, 128]
    assert rows[-1]["stopped"].startswith("memory: about 0.0 GiB are needed")
    assert "memory_bytes" in rows[-2] and not rows[-2].get("stopped")


def test_an_error_of_a_side_is_its_own():
    def broken(length, _):
        if length > 16:
            raise Stopped("error", "positions end at 16")
        return 1.0

    rows, _ = measured(plan_of(Named("a"), Named("b")), {"a": broken, "b": lambda *_: 1.0})
    assert [row["length"] for row in rows if row["contender"] == "b"] == [16, 32, 64, 128]
    assert [row["stopped"] for row in rows if row.get("stopped")] == ["error: positions end at 16"]


def test_quantities_share_the_time():
    plan = plan_of(Named("a"), quantities=["prefill", "decode"], rounds=1000, lengths=[16])
    rows, clock = measured(plan, {"a": lambda *_: 1.0}, seconds=100)
    assert rows[0]["rounds"] == pytest.approx(rows[1]["rounds"], abs=4)
    assert clock.now == pytest.approx(100, abs=3)


def test_rows_that_are_known_are_kept():
    plan = plan_of(Named("a"), Named("b"), lengths=[16, 32])
    old = {"median": 3, "seconds": "0.003", "stopped": ""}
    clock = Clock()
    asked = []

    def known(identity):
        return old if identity["contender"] == "a" and identity["length"] == 16 else None

    def start(contender):
        asked.append(contender.name)
        return FakeSide(clock, lambda *_: 1.0)

    found = list(measure(plan, start, Budget(1e6, clock), known))
    assert [was for _, was in found] == [True, False, False, False]
    assert found[0][0] is old and asked == ["b", "a"]


def test_a_contender_is_not_asked_for_what_it_has_not():
    plan = plan_of(Named("a", {"decode": "why"}), quantities=["prefill", "decode"], lengths=[16])
    rows, _ = measured(plan, {"a": lambda *_: 1.0})
    assert [row["quantity"] for row in rows] == ["prefill"] and plan.points() == 1


def test_what_is_foreseen():
    assert foreseen([], 8) is None
    assert foreseen([(4, 10)], 8) == 20
    assert foreseen([(2, 10), (4, 40)], 8) == pytest.approx(160)
    assert foreseen([(2, 10), (4, 10)], 8) == 10
    assert foreseen([(2, 10), (4, 1000)], 8) == pytest.approx(4000)  # no steeper than a square


# ---------------------------------------------------------------------------- sides


def test_names_of_contenders():
    plain = ZooContender("retnet_micro")
    assert plain.without == {} and plain.form is None
    chunked = ZooContender("retnet_micro:chunk_size=16:chunkwise")
    assert chunked.form == "chunkwise" and set(chunked.without) == {"decode", "batch", "state"}
    assert chunked.config["mixer"]["init_args"]["chunk_size"] == 16
    assert chunked.count == plain.count
    swapped = ZooContender("retnet_tiny:Attention")
    assert swapped.config["mixer"]["class_path"].endswith("Attention")
    assert abs(swapped.count / ZooContender("retnet_tiny").count - 1) < 0.01
    assert ZooContender("retnet_tiny:Attention", match=False).count < 0.95 * swapped.count
    assert ZooContender("retnet_micro:depth=3").config["depth"] == 3
    assert set(ZooContender("retnet_micro:compiled").without) >= {"prefill", "decode"}
    names = {c.settings() for c in (plain, chunked, swapped)}
    assert len(names) == 3 and plain.settings() == ZooContender("retnet_micro").settings()
    with pytest.raises(ValueError, match="nearest: chunkwise"):
        ZooContender("retnet_micro:chunkwize")
    with pytest.raises(ValueError, match="nearest: retnet_micro"):
        ZooContender("retnet_mikro")


@pytest.mark.parametrize("name", ["retnet_micro", "transformer_micro", "yuan_micro"])
@pytest.mark.parametrize("quantity", ["training", "prefill", "decode", "batch"])
def test_a_side_does_each_quantity(name, quantity):
    bench = Bench(ZooContender(name), "cpu", Clock())
    bench.contender.build("cpu", "float32", quantity == "training")
    before = {k: p.detach().clone() for k, p in bench.contender.model.named_parameters()}
    bench.prepare(quantity, **SIZES)
    assert bench.run(3)["seconds"] >= 0  # of decoding by a clock of its own
    changed = any(
        not torch.equal(before[k], p) for k, p in bench.contender.model.named_parameters()
    )
    assert changed == (quantity == "training")


def test_every_turn_of_decoding_step_by_step_begins_after_the_same_tokens():
    lengths = []

    class StepByStep(ZooContender):
        writes = False

        def decode_step(self, token, state):
            lengths.append(state["blocks"][0]["length"])
            assert state["blocks"][0]["keys"].shape[:3] == (2, 2, 25)  # its room was made once
            return self.model(token, state).state

        def rewound(self, state, length):
            return map_state(lambda leaf: leaf, state)

    bench = Bench(StepByStep("transformer_micro"), "cpu", Clock())
    bench.contender.build("cpu", "float32", False)
    bench.prepare("batch", **SIZES)
    for _ in range(3):
        lengths.clear()
        bench.run(4)
        assert lengths == [8, 9, 10, 11, 12]  # the first is not timed


@pytest.mark.parametrize("name", ["retnet_micro", "transformer_micro"])
def test_what_is_written_follows_the_tokens_in_every_row(name):
    contender = ZooContender(name)
    contender.build("cpu", "float32", False)
    tokens = torch.randint(64, (1, 8))
    with torch.inference_mode():
        texts = contender.texts(tokens, 3)
    alone = archzoo.generate(contender.model, tokens[0].tolist(), max_tokens=5).tokens
    for _ in range(2):  # the texts stay as they are
        assert archzoo.generate(contender.model, **texts, max_tokens=5).tokens == 3 * alone
    contender.device = torch.device("cuda")  # where every row reads it
    prompts = contender.texts(tokens, 3)
    assert archzoo.generate(contender.model, **prompts, max_tokens=5).tokens == 3 * alone


def test_steps_are_timed_by_generate(monkeypatch):
    asked = []

    def generate(model, max_tokens, **texts):
        asked.append((max_tokens, texts))
        return SimpleNamespace(milliseconds_per_token=2.0)

    monkeypatch.setattr(contenders, "generate", generate)
    contender = ZooContender("retnet_micro")
    contender.model = None
    assert contender.decoding_seconds({"prompts": [[1]]}, 20) == pytest.approx(2e-3)
    assert asked == [(22, {"prompts": [[1]]})]


def test_training_takes_the_loss_of_fit_and_compiles_what_fit_compiles(monkeypatch):
    contender = ZooContender("retnet_micro:compiled")
    compiled = []
    monkeypatch.setattr(archzoo.Decoder, "compile", lambda self: compiled.append(self))
    contender.build("cpu", "float32", True)
    assert compiled == [contender.model]
    tokens = torch.randint(64, (2, 9))
    logits = contender.model(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(contender.loss(tokens), expected)
    called = []
    monkeypatch.setattr(
        contenders, "total_loss", lambda x, head, labels: called.append(head) or x.sum()
    )
    contender.loss(tokens)
    assert called == [contender.model.head]


def test_state_bytes_are_those_of_the_state_without_room_for_more():
    for name in ("retnet_micro", "transformer_micro"):
        bench = Bench(ZooContender(name), "cpu", Clock())
        bench.contender.build("cpu", "float32", False)
        found = bench.prepare("state", length=8, batch=1, vocab_size=64)["state_bytes"]
        assert found == nbytes(bench.contender.model.init_state(1, capacity=8))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "memory"),
        (RuntimeError("another\nthing"), "error"),
    ],
)
def test_what_stops_a_side_is_told(error, kind):
    bench = Bench(ZooContender("retnet_micro"), "cpu")

    def fail(repeat):
        raise error

    bench.run = fail
    answer = answer_to(bench, {"do": "run", "repeat": 1})
    assert answer["stopped"] == kind and "\n" not in answer["why"]


def test_a_process_has_its_own_memory_and_its_end_is_told():
    side = Process({"name": "retnet_micro", "match": True}, "cpu", 1, [])
    try:
        assert side.ask("build", 60, precision="float32", training=True)["parameters"] == 29_856
        assert side.ask("prepare", 60, quantity="training", **SIZES)["seconds"] > 0
        assert 0 < side.ask("peak", 60)["memory_bytes"] < 2**30
        with pytest.raises(Stopped, match=r"error: .*no_such"):
            side.ask("no_such", 60)
        assert side._said.exists()
        side._process.kill()
        with pytest.raises(Stopped, match="memory: its process was killed"):
            side.ask("run", 60, repeat=1)
    finally:
        side.close()


def test_a_process_whose_command_is_gone_leaves_no_file():
    side = Process({"name": "retnet_micro", "match": True}, "cpu", 1, [])
    try:
        side.ask("build", 60, precision="float32", training=False)
        side._answers.close()  # as where the command was killed
        side._process.join(60)
        assert side._process.exitcode == 0 and not side._said.exists()
    finally:
        side.close()


def test_peak_memory_grows_by_what_is_held():
    before = begin_peak()
    # From the system: what earlier tests have freed, a tensor could take without any growth.
    with mmap.mmap(-1, 64 * 2**20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    assert resident_peak() - before > 60 * 2**20


# ---------------------------------------------------------------------------- peers


def test_peers_take_the_shape_of_ours_or_say_why_not(monkeypatch):
    with torch.device("meta"):
        shape = Shape.of(ZooContender("retnet_tiny").make())
        assert shape == (128, 4, 4, 176, 256, False)
        assert Shape.of(ZooContender("yuan_micro").make()) is None
    assert FlashLinearAttention.missing("cpu") == "flash-linear-attention needs a CUDA device"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Llama.missing("cpu") == "transformers is not installed (pip install 'archzoo[peers]')"
    assert Torchscale("torchscale", shape).chunk_size == 512
    assert Torchscale("torchscale:parallel", shape).chunk_size is None
    peer = contender_of({"name": "torchscale:chunk_size=64", "shape": list(shape)})
    assert peer.chunk_size == 64 and "decode" in peer.without
    with pytest.raises(ValueError, match="has no option 'chunk'; nearest: chunk_size"):
        Torchscale("torchscale:chunk=3", shape)


# ---------------------------------------------------------------------------- what is said


def line(name, x, y, stopped=None):
    return Line(name, list(x), list(y), list(y), list(y), stopped)


def test_crossovers_are_straight_in_the_logarithms():
    x = [256, 512, 1024, 2048]
    a, b = line("a", x, [1, 1, 1, 1]), line("b", x, [t / 700 for t in x])
    seen = crossover(a, b, False)
    assert (seen.first, seen.second) == ("a", "b")
    assert seen.at == [pytest.approx(700)] and seen.times[1] == pytest.approx(2048 / 700)
    assert seen.values == ((1, 256 / 700), (1, 2048 / 700)) and seen.unclear == []
    [words] = in_words(DECODE, [a, b])
    assert words.startswith(
        "a is faster than b from 700 tokens on (at 256 1 against 0.366, at 2,048 "
    )
    [words] = in_words(TRAINING, [a, b])
    assert words.startswith(
        "b is faster than a from 700 tokens on (at 256 0.366 against 1"
    )  # more is better


def test_spreads_that_overlap_are_said():
    a = line("a", [1, 2], [1, 1])._replace(low=[0.5, 0.9], high=[2, 1.1])
    b = line("b", [1, 2], [1.5, 3])
    [words] = in_words(DECODE, [a, b])
    assert words.endswith("no crossover in this range; their spreads overlap at 1")
    b = line("b", [1, 2], [1.5, 0.95])
    [words] = in_words(DECODE, [a, b])
    assert words == "a and b: their spreads overlap from 2 tokens on, of 1 to 2 tokens"
    b = line("b", [1, 2], [2, 0.95])
    wide = a._replace(low=[1, 0.9], high=[1, 1.1])
    [words] = in_words(DECODE, [wide, b])
    assert words.endswith("on, of 1 to 2 tokens; a is faster before")
    [words] = in_words(DECODE, [a, line("b", [1, 2], [1.5, 1.05])])
    assert words == "a and b: their spreads overlap at every size, of 1 to 2 tokens"


def test_no_crossover_is_said():
    a, b = line("a", [1, 2, 4], [1, 1, 1]), line("b", [1, 2], [2, 3])
    [words] = in_words(DECODE, [a, b])
    assert words == (
        "a is faster than b at every size measured, 1 to 2 tokens, by 2 to 3 times: no crossover "
        "in this range"
    )
    assert in_words(DECODE, [a, line("c", [8], [1])]) == ["a and c: not measured at the same sizes"]
    assert in_words(DECODE, [a, line("c", [1, 2], [1, 1])]) == [
        "a and c are equal at all of 1 to 2 tokens"
    ]


def test_several_crossovers_and_equal_values():
    x = [1, 2, 4, 8]
    a, b = line("a", x, [1, 2, 1, 2]), line("b", x, [2, 1, 2, 1])
    assert len(crossover(a, b, False).at) == 3
    assert ", the last of 3 crossings (" in in_words(DECODE, [a, b])[0]
    touching = line("c", x, [2, 2, 0.5, 1])
    assert crossover(a, touching, False).at == [2]
    assert crossover(line("d", x, [1, 1, 1, 1]), line("e", x, [2, 1, 2, 2]), False).at == []
    assert rounded(1934) == "1,900" and rounded(45.6) == "46" and rounded(3.4) == "3"


def test_lines_of_rows_and_where_they_stop():
    rows = [
        {"quantity": "decode", "contender": "a", "length": "32", "batch": 1, "median": "2",
         "low": 1, "high": 3, "stopped": ""},
        {"quantity": "decode", "contender": "a", "length": 16, "batch": 1, "median": 1, "low": 1,
         "high": 1},
        {"quantity": "decode", "contender": "b", "length": 16, "batch": 1, "median": "",
         "stopped": "time: about 9 s are needed, and 3 s are left"},
    ]  # fmt: skip
    a, b = lines_of(DECODE, rows)
    assert a.x == [16, 32] and a.y == [1, 2] and a.low == [1, 1] and a.stopped is None
    assert b.x == [] and stops([a, b], DECODE) == [
        "b stops before 16 tokens: time: about 9 s are needed, and 3 s are left"
    ]
    assert lines_of(MEMORY, rows) == []  # no peaks in them
    sections = report_sections(rows, {"decode": ["a is alone"]})
    assert sections[0].note.startswith("a is alone. ") and sections[0].series[0].low == [1, 1]
    assert sections[1].rows == [["16", "1", "time"], ["32", "2 (1 to 3)", ""]]


def test_a_figure_marks_crossovers_and_ends(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("archzoo.analysis.bench.showing.save", lambda f, path: drawn.append(f))
    x = [256, 512, 1024]
    lines = [line("a", x, [3, 3, 3]), line("b", x[:2], [2, 4], (1024, "memory: full"))]
    draw(DECODE, lines, tmp_path / "x.png", "machine")
    [panel] = drawn[0].axes
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["a", "b (× memory)"]
    at = crossover(*lines, False).at[0]
    assert any(entry.get_xdata()[0] == at for entry in panel.lines)
    assert any("than b from 380 on" in text.get_text() for text in panel.texts)
    assert panel.get_xscale() == panel.get_yscale() == "log"


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The command with sides whose time is ours; gives what was asked of them."""
    said = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARCHZOO_COMMIT", "abc")
    monkeypatch.setattr(command, "get_ready", lambda: None)
    monkeypatch.setattr(command, "free_memory", lambda device: 2**34)
    monkeypatch.setattr("archzoo.registry.machine_memory", lambda: 2**34)

    def start(spec, device, threads, modules):
        attention = "transformer" in spec["name"] or "Attention" in spec["name"]

        def law(length, batch):
            return 1e-3 * (length if attention else 48)

        side = FakeSide(Clock(), law, lambda length: 2**20 * length, said)
        said.append(("start", spec["name"]))
        return side

    monkeypatch.setattr(command, "Process", start)
    return said


ARGUMENTS = ["bench", "retnet_micro", "transformer_micro", "--lengths", "16,32,64,128"]
ARGUMENTS += ["--device", "cpu", "--batches", "1,2", "--context", "8", "--peers", "none"]


def test_the_command_writes_rows_tables_figures_and_words(fake, tmp_path, capsys):
    assert main([*ARGUMENTS, "--output", "out/mine"]) == 0
    said = capsys.readouterr().out
    assert "retnet_micro is faster than transformer_micro from 48 tokens on" in said
    assert "transformer_micro's cache outgrows retnet_micro's state" in said
    assert "(measured); by their sizes at 16" in said
    assert "at its shape is predicted to take more from 17 tokens on" in said
    rows = evidence.read_rows(tmp_path / "out" / "mine.csv")
    assert len(rows) == 2 * (4 * 4 + 2)
    for row in rows:
        assert all(row[name] for name in ("machine", "torch", "commit", "command", "dtype"))
        assert row["median"] and row["settings"]
    assert {row["memory_bytes"] for row in rows if row["quantity"] == "training"} != {""}
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    kinds = ("training", "training-memory", "prefill", "decode", "batch", "state")
    assert pictures == {f"mine-{kind}.png" for kind in kinds}


def test_the_same_command_continues_and_again_measures_anew(fake, tmp_path, capsys, monkeypatch):
    first = [*ARGUMENTS, "--prefill", "--output", "mine"]
    path = tmp_path / "mine.csv"

    count = 0
    original = FakeSide.ask

    def interrupted(self, do, timeout, **request):
        nonlocal count
        count += do == "prepare"
        if count == 6:
            raise KeyboardInterrupt
        return original(self, do, timeout, **request)

    monkeypatch.setattr(FakeSide, "ask", interrupted)
    assert main(first) == 130
    assert "4 rows are in mine.csv; the same command continues" in capsys.readouterr().err
    assert len(evidence.read_rows(path)) == 4
    monkeypatch.setattr(FakeSide, "ask", original)
    fake.clear()
    assert main(first) == 0
    assert "4 rows were measured before" in capsys.readouterr().out
    assert len(evidence.read_rows(path)) == 8
    assert {length for do, length in fake if do == "prepare"} == {64, 128}
    fake.clear()
    assert main(first) == 0 and fake == []  # nothing is started
    assert main([*first, "--again"]) == 0 and len(evidence.read_rows(path)) == 8
    assert len([do for do, _ in fake if do == "prepare"]) == 8
    monkeypatch.setenv("ARCHZOO_COMMIT", "other")  # another commit is measured anew
    fake.clear()
    assert main(first) == 0 and len([do for do, _ in fake if do == "prepare"]) == 8
    with path.open() as file:
        assert {row["commit"] for row in csv.DictReader(file)} == {"other"}


def test_one_preset_with_each_mixer(fake, capsys):
    arguments = ["bench", "retnet_tiny", "--mixers", "Retention,Attention", "--peers", "none"]
    arguments += ["--state", "--lengths", "16,32", "--output", "mixers"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "retnet_tiny:Attention" in said and "parameters matched" in said


def test_compiling_is_for_training(fake, tmp_path):
    arguments = [*ARGUMENTS, "--training", "--decode", "--output", "c", "--compile"]
    assert main(arguments) == 0
    found = {(r["quantity"], r["contender"]) for r in evidence.read_rows(tmp_path / "c.csv")}
    names = ("retnet_micro", "transformer_micro")
    expected = {("decode", name) for name in names}
    assert found == expected | {("training", f"{name}:compiled") for name in names}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retnet_mikro"], "there is no model 'retnet_mikro'; nearest: retnet_micro"),
        (["retnet_micro", "--trainig"], "there is no option --trainig; nearest: --training"),
        (["retnet_micro", "--context", "1k,x"], "context=1k,x: 'x' is not an integer"),
        (["retnet_micro", "--profile"], "profile is of archzoo fit: add --fit"),
        (["retnet_micro:fit:compiled"], "archzoo fit chooses the form, and whether to compile"),
        (["retnet_micro", "--lengths", "256,0"], "'0' is not an integer of at least 1"),
        (["retnet_micro", "--lengths", "256,-4"], "'-4' is not an integer"),
        (["retnet_micro", "--batches", "x"], "batches=x: 'x' is not an integer"),
        (["retnet_micro", "--minutes", "0"], "minutes=0.0 must be more than 0"),
        (["retnet_micro", "--rounds", "0"], "rounds=0 must be at least 1"),
        (["retnet_micro", "--mixers", "Atention"], "nearest: Attention"),
        (["retnet_micro", "--peers", "lama"], "there is no 'lama'; nearest: llama"),
        (["retnet_micro", "--device", "tpu"], "is not a valid device"),
        (["retnet_micro", "--device", "cpu:7"], "device=cpu:7: there is one; take cpu"),
        (["retnet_micro", "--device", "cuda:99"], "device=cuda:99: there "),
        (["llama"], "name a preset too"),
        (
            ["retnet_micro:parallel", "--decode", "--state"],
            "retnet_micro:parallel cannot be asked for decode, state: decoding is the recurrent",
        ),
        (["retnet_base:depth=9000"], "parameters take 255 GB, and this machine has"),
        (["retnet_base:dim=3072"], "weights, gradients and AdamW's moments of"),
        (["retnet_micro", "--output", "file/bench"], "file/bench.csv cannot be written: "),
        (["retnet_micro", "--mixers", ","], "mixers=, names none: give some"),
        (["retnet_micro", "--output", ""], "--output '' names no file: give a name without its"),
        (["retnet_micro", "--output", "held/"], "--output held/ names no file: give a name"),
        (["retnet_micro", "--output", "held"], "held.csv cannot be written: it is a directory"),
        (["retnet_micro", "--output", "other"], "other.csv is no table of archzoo bench, and"),
        (["retnet_micro", "--output", "picture"], "picture.csv is no table of archzoo bench"),
        (["retnet_micro:chunk_size=x"], "chunk_size=x: Retention: chunk_size='x' is not valid: it"),
        (["retnet_micro:dropout=x"], "micro:dropout=x: dropout='x' is not valid: it takes float"),
    ],
)
def test_errors_are_one_line_before_anything_is_measured(fake, tmp_path, capsys, arguments, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "held.csv").mkdir()
    (tmp_path / "other.csv").write_text("step,loss\n1,2.0\n")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n\xff\x00")
    assert main(["bench", *arguments]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert fake == []


def test_a_model_that_knows_digits_is_timed_without_a_task():
    side = ZooContender("abacus_micro")
    tokens = torch.arange(12)[None]
    side.build("cpu", "float32", True)
    before = [p.clone() for p in side.model.parameters()]
    side.train_step(tokens)
    assert not all(map(torch.equal, before, side.model.parameters()))
    side.build("cpu", "float32", False)
    assert side.decoding_seconds(side.texts(tokens, 1), 2) > 0
    assert nbytes(side.prefill(tokens, 2)) > 0


def test_without_matplotlib_all_but_figures_is_there(fake, tmp_path, capsys, monkeypatch):
    def missing():
        raise ValueError("a figure needs matplotlib: pip install 'archzoo[plots]'")

    monkeypatch.setattr(command, "pyplot", missing)
    assert main([*ARGUMENTS, "--state", "--output", "plain"]) == 0
    said = capsys.readouterr().out
    assert "without figures: a figure needs matplotlib: pip install 'archzoo[plots]'" in said
    assert [path.name for path in tmp_path.glob("plain*")] == ["plain.csv"]


def test_lengths_are_read():
    assert command.integers("[256, 1k, 16k]", "lengths") == [256, 1024, 16384]
    assert command.integers("8, 4,4", "lengths") == [4, 8]


def test_a_cache_outgrows_a_state_where_their_sizes_say():
    retention, attention = ZooContender("retnet_tiny"), ZooContender("transformer_tiny")
    at = command.cache_outgrows(retention, attention)
    sizes = [nbytes(retention.make().init_state(1)), nbytes(
        attention.make().init_state(1, capacity=math.floor(at))
    )]  # fmt: skip
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)
    assert command.cache_outgrows(retention, retention) is None


# ---------------------------------------------------------------------------- fit as a side


def test_a_text_of_random_characters_holds_all_of_them():
    text = random_text(50_000, 40_000)
    assert len(text) == 50_000 and len(set(text)) == 40_000
    assert random_text(50_000, 40_000) == text and not set(text) & set(" \n")
    assert len(text.encode("utf-8")) > 0  # no surrogates
    assert len(random_text(3, 64)) == 64
    assert ZooContender("abacus_micro").knows_digits
    assert set(random_text(500, 20, digits=True)) > set("0123456789+=")


def in_this_process(command, **options):
    """For `subprocess.run` of the command line, which takes seconds to import all."""
    assert command[1:3] == ["-m", "archzoo"] and options["env"]["OMP_NUM_THREADS"]
    return subprocess.CompletedProcess(command, main(command[3:]), "", "error: what it said")


def test_memory_has_not_grown_by_less_than_nothing():
    assert grown(begin_peak() + 10**12) == 0 < grown(0)


def test_fit_is_run_as_a_command_and_tells_its_steps(monkeypatch, capsys):
    monkeypatch.setattr(fitting.subprocess, "run", in_this_process)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # by another test, say
    bench = Bench(contender_of({"name": "retnet_micro:Attention:fit", "match": True}), "cpu")
    made = bench.build("float32", True)
    assert made["parameters"] == ZooContender("retnet_micro:Attention").count
    found = bench.prepare("training", **SIZES)
    assert len(found["turns"]) == 5 and min(found["turns"]) > 0
    assert found["memory_bytes"] >= 0 and "kernels" not in found
    assert found["operations"] == training_operations(bench.contender.meta(), 8)
    assert "retnet_micro" in capsys.readouterr().out  # what fit says of the model


def test_why_fit_was_not_measured_is_told(monkeypatch):
    bench = Bench(FitContender("retnet_micro:fit"), "cpu")
    bench.build("float32", True)

    def ended(status, said):
        result = subprocess.CompletedProcess([], status, "", said)
        monkeypatch.setattr(fitting.subprocess, "run", lambda *_, **__: result)
        return answer_to(bench, {"do": "prepare", "quantity": "training", **SIZES})

    assert ended(1, "Traceback\nerror: no such thing\n") == {
        "stopped": "error",
        "why": "archzoo fit ended with 1: error: no such thing",
    }
    assert ended(1, "torch.OutOfMemoryError: CUDA out of memory. Tried")["stopped"] == "memory"
    assert ended(-9, "")["stopped"] == "memory"
    assert ended(0, "")["why"] == "archzoo fit ended with 0: it said nothing"


def test_its_settings_are_those_of_a_user_on_a_gpu(tmp_path):
    contender = FitContender("retnet_micro:fit")
    contender.build("cuda:1", "bf16-mixed", True)
    found = contender.run_settings(tmp_path, 64, 4)
    trainer = found["trainer"]
    assert trainer["accelerator"] == "gpu" and trainer["devices"] == [1]
    assert trainer["precision"] == "bf16-mixed" and trainer["max_steps"] == 20 + 100 + 1
    assert trainer["val_check_interval"] == trainer["max_steps"]  # at the end
    assert "compile" not in found  # which fit decides
    assert set(contender.without) == {"prefill", "decode", "batch", "state"}


def test_a_profile_is_of_the_steps_behind_the_timed_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting.subprocess, "run", in_this_process)
    spec = {"name": "retnet_micro:fit", "match": True, "profiled": True}
    bench = Bench(contender_of(spec), "cpu")
    bench.build("float32", True)
    found = bench.prepare("training", **SIZES)
    assert len(found["turns"]) == 5 and found["kernels"] == []  # a CPU has none
    settings = bench.contender.run_settings(tmp_path, 8, 2)
    assert settings["trainer"]["max_steps"] == 2 + 5 + 1 + 4


def test_kernels_are_told_by_what_they_are_for():
    def event(name, kind, microseconds):
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=kind, time_range=elapsed)

    events = [event("stream_kernel", "DeviceType.CUDA", 500)] * 4
    events += [event("nvjet_sm90_tst_256", "DeviceType.CUDA", 3000)] * 2
    events += [event("aten::mm", "DeviceType.CPU", 9000)]
    kernels = kernels_of(SimpleNamespace(events=lambda: events), 2)
    assert kernels == [
        {"kernel": "nvjet_sm90_tst_256", "calls": 1, "ms": 3.0},
        {"kernel": "stream_kernel", "calls": 2, "ms": 1.0},
    ]
    row = {"contender": "a:fit", "settings": "x", "length": 8, "batch": 2, "dtype": "float32"}
    first = profile_rows(row | {"seconds": 0.0065, "median": 3}, kernels)[0]
    assert first["part"] == "matrix products" and first["step_ms"] == 6.5 and "median" not in first
    assert {
        part_of("triton_per_fused__fused_rms_norm_backward__to_copy_add_view_5"): "norms",
        part_of("triton_poi_fused__unsafe_view_cat_mul_silu_silu_backward_split_view_3"): "SwiGLU",
        part_of("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam"): (
            "optimizer"
        ),
        part_of("cross_entropy_kernel"): "loss",
        part_of("gate_backward_kernel"): "head norm and gate",
        part_of("rotate_kernel"): "rotation",
        part_of("Memcpy DtoD (Device -> Device)"): "copies, casts and zeros",
        part_of("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16"): "attention",
        part_of("triton_poi_fused_add_3"): "all else",
    } == {
        name: name
        for name in (
            *("norms", "SwiGLU", "optimizer", "loss", "head norm and gate", "rotation"),
            *("copies, casts and zeros", "attention", "all else"),
        )
    }


def test_a_side_that_makes_all_its_steps_at_once_has_a_process_for_each_size():
    said = []

    class Whole(FakeSide):
        def ask(self, do, timeout, **request):
            answer = super().ask(do, timeout, **request)
            if do == "prepare":
                answer |= {"turns": [2.0, 1.0, 2.0, 3.0], "memory_bytes": 9, "operations": 5e3}
            return answer

    side = Named("a")
    side.trains = True
    plan = plan_of(side, quantities=["training"], lengths=[16, 32], peak=1e6, tracks_peaks=True)
    sides = {"a": Whole(Clock(), lambda *_: 1.0, said=said)}
    rows = [row for row, _ in measure(plan, lambda c: sides[c.name], Budget(1e6, Clock()))]
    assert [do for do, _ in said if do in ("build", "run", "close")] == ["build", "close"] * 2
    assert [(row["median"], row["mean"], row["rounds"]) for row in rows] == 2 * [(16, 16, 4)]
    assert rows[0]["memory_bytes"] == 9 and rows[0]["mfu"] == 0.08
    assert lines_of(MEASURES[1], rows)[0].y == [8, 8]  # per cent


def test_steps_of_a_run_are_put_together_to_turns():
    assert in_turns([], 1.0) == []
    assert in_turns([2.0, 3.0], 1.0) == [2.0, 3.0]  # each takes as long by itself
    assert in_turns([0.5, 1.5, 1.0, 2.0], 2.0) == [1.0, 1.5]
    assert in_turns([0.25] * 9, 0.75) == [0.25] * 3
    assert in_turns([0.25] * 8, 0.75) == [0.25] * 2  # two are left over
    assert in_turns([0.1] * 3, 9.0) == [pytest.approx(0.1)]  # all there are


def test_fit_and_compiling_take_turns_over_sides(fake, tmp_path):
    arguments = [*ARGUMENTS[:-2], "--peers", "nanogpt", "--training", "--decode"]
    assert main([*arguments, "--output", "f", "--fit", "--compile"]) == 0
    found = {(r["quantity"], r["contender"]) for r in evidence.read_rows(tmp_path / "f.csv")}
    names = ("retnet_micro", "transformer_micro")
    expected = {("decode", name) for name in names} | {("training", "nanogpt:compiled")}
    assert found == expected | {("training", f"{name}:fit") for name in names}


def test_a_peer_that_is_skipped_says_why(fake, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = [*ARGUMENTS[:-1], "llama,nanogpt,fla", "--state", "--output", "p"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "skipping llama: transformers is not installed (pip install 'archzoo[peers]')" in said
    assert "skipping fla: flash-linear-attention needs a CUDA device" in said


def test_throughput_after_several_lengths_is_a_line_each(fake, tmp_path, capsys):
    arguments = [*ARGUMENTS, "--batch", "--context", "8,32", "--output", "b"]
    assert main(arguments) == 0
    rows = evidence.read_rows(tmp_path / "b.csv")
    found = {(row["contender"], row["length"], row["batch"]) for row in rows}
    assert len(rows) == len(found) == 2 * 2 * 2
    batch = next(measure for measure in MEASURES if measure.name == "batch")
    names = [line.name for line in lines_of(batch, rows)]
    assert names == [
        f"{name}, {length}" for length in (8, 32) for name in ("retnet_micro", "transformer_micro")
    ]


def test_throughput_of_one_batch_is_against_the_length():
    rows = [
        {"quantity": "batch", "contender": name, "length": length, "batch": 64, "median": length,
         "low": length, "high": length}
        for name in ("a", "b") for length in (8, 32)
    ]  # fmt: skip
    batch = next(measure for measure in measures_of(rows) if measure.name == "batch")
    assert batch.axis == "length" and "of 64 rows" in batch.title
    assert [(line.name, line.x) for line in lines_of(batch, rows)] == [
        ("a", [8, 32]),
        ("b", [8, 32]),
    ]
    assert measures_of(rows[:1]) == list(MEASURES)


# ---------------------------------------------------------------------------- nanoGPT


def test_nanogpt_learns_positions_that_a_graph_can_keep():
    """What inference mode makes could not be saved for a compiled backward pass."""
    with torch.device("meta"):
        shape = Shape.of(ZooContender("transformer_micro").make())
    peer = Nano("nanogpt", shape)
    peer.build("cpu", "float32", True)
    Bench(peer, "cpu").prepare("training", 12, 2, 16)
    assert len(peer.model.positions) == 12
    assert not peer.model.positions.is_inference()


def test_nanogpt_is_causal_and_holds_what_a_block_of_ours_does():
    with torch.device("meta"):
        ours = ZooContender("transformer_base").make()
        shape = Shape.of(ours)
    peer = Nano("nanogpt", shape._replace(vocab_size=64, dim=64, depth=2, heads=2))
    peer.build("cpu", "float32", True)
    peer.fresh_shape(8)
    assert peer.model.positions.shape == (8, 64)
    # 12 dim^2 and two norms a block, the last norm, the head; positions are looked up.
    active = 2 * (12 * 64**2 + 2 * 64) + 64 + 64 * 64
    assert peer.parameters() == active + 8 * 64
    assert peer.operations(8) == 6 * active + 3 * 2 * 2 * 64 * 9
    before = [parameter.detach().clone() for parameter in peer.model.parameters()]
    tokens = torch.randint(64, (2, 9))
    logits = peer.logits(tokens[:, :8])
    changed = tokens[:, :8].clone()
    changed[:, 5] = (changed[:, 5] + 1) % 64
    difference = (peer.logits(changed) - logits).abs().amax((0, 2))
    assert difference[:5].max() == 0 < difference[5:].min()
    peer.train_step(tokens)
    after = list(peer.model.parameters())
    assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert set(peer.without) == {"prefill", "decode", "batch", "state"}


def test_peers_with_attention_have_its_heads_beside_retention():
    with torch.device("meta"):
        retention = Shape.of(ZooContender("retnet_base").make())
        attention = Shape.of(ZooContender("transformer_base").make())
    assert Nano("nanogpt", retention).heads == Nano("nanogpt", attention).heads == 12
    assert Llama("llama", retention).heads == 12 and retention.heads == 3
    assert set(Llama("llama:static", attention).without) == {"training", "prefill", "state"}
    peer = Nano("nanogpt", attention)
    with torch.device("meta"):
        peer.model = peer.make()
    # As ours of the same dim and depth, but for the width of the feed-forward's three matrices.
    assert peer.operations(2_048) == training_operations(
        ZooContender("transformer_base").meta(), 2_048
    )
