"""States that are kept: continued, saved, loaded in another process, forked, and refused."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MICRO, micro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import Prefix, Prompt

import archzoo
from archzoo.checkpoint import weights_digest
from archzoo.cli import main
from archzoo.decoder import Decoder
from archzoo.generation import Conversation, generate
from archzoo.generation.state_files import StateLayout, read_state, write_state
from archzoo.states import State, map_state
from archzoo.tasks.tokenizers import CharacterTokenizer

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]

#: A name, and what a decoder is made of: everything that carries something over time.
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in MICRO},
    "pattern": {"preset": "retnet_micro", "pattern": ["Retention", "FilteredAttention"]},
    "loops": {"preset": "retnet_micro", "loops": 2, "injection": "loop"},
    "convolution": {"preset": "retnet_micro", "pattern": ["Attention"], "convolution": 4},
    "bias": {"preset": "transformer_micro", "bias": "ALiBi"},
    "learned positions": {"preset": "transformer_micro", "embedding": "LearnedPositions"},
    "abacus digits": {
        "preset": "transformer_micro",
        "embedding": {"class_path": "AbacusEmbedding", "init_args": {"digit_tokens": [*range(10)]}},
    },
    "prefix": {"preset": "transformer_micro", "adapter": Prefix},
    "prompt": {"preset": "yuan_micro", "adapter": Prompt},
}
MIXED = ("retnet_micro", "pattern", "loops")  # the kinds that are tried in every dtype


def make(kind: str = "retnet_micro", dtype: torch.dtype = torch.float32, **more: Any) -> Decoder:
    """A micro model whose weights are large enough that contexts matter to what it writes."""
    torch.manual_seed(1)
    arguments = {**KINDS[kind], **more}
    model = micro(arguments.pop("preset"), **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    return model.to(dtype).eval()


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    differ: list[object] = []

    def compare(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype != b.dtype or not torch.equal(a, b):
            differ.append(a)
        return a

    map_state(compare, one, other)
    return not differ


# ---------------------------------------------------------------------------- continued


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in KINDS),
        *((kind, dtype) for kind in MIXED for dtype in (torch.bfloat16, torch.float64)),
    ],
)
def test_a_pause_changes_nothing(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Greedy and sampled, one row and ragged ones: bit for bit what one call writes."""
    model = make(kind, dtype)
    sampled: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 7}
    tries: list[tuple[Any, dict[str, Any]]] = [(PROMPTS[0], {}), (PROMPTS, sampled)]
    if kind in MIXED and dtype == torch.float32:
        tries += [(PROMPTS[0], sampled), (PROMPTS, {})]
    for prompts, sampling in tries:
        whole = generate(model, prompts, max_tokens=7, keep_state=True, **sampling)
        begun = generate(model, prompts, max_tokens=3, keep_state=True, **sampling)
        archzoo.save_state(tmp_path / "state", begun.conversation, model)
        loaded = archzoo.load_state(tmp_path / "state", model)
        assert same(loaded, begun.conversation)
        rest = generate(model, conversation=loaded, max_tokens=4, keep_state=True, **sampling)
        both = [a + b for a, b in zip(begun.tokens, rest.tokens, strict=True)]
        assert both == whole.tokens
        assert same(rest.conversation, whole.conversation)
        assert same(loaded, begun.conversation), "it stays as it is"


def test_rows_that_stopped_stay_until_they_read_more() -> None:
    model = make("pattern")
    free = generate(model, PROMPTS, max_tokens=12)
    stop = free.tokens[1][2]
    given: dict[str, Any] = {"stop_token": stop, "keep_state": True}
    whole = generate(model, PROMPTS, max_tokens=12, **given)
    begun = generate(model, PROMPTS, max_tokens=6, **given)
    assert whole.tokens == generate(model, PROMPTS, max_tokens=12, stop_token=stop).tokens
    assert whole.conversation is not None and begun.conversation is not None
    assert whole.conversation.stopped.tolist() == whole.stopped
    held = begun.conversation
    rest = generate(model, conversation=held, max_tokens=6, **given)
    assert [a + b for a, b in zip(begun.tokens, rest.tokens, strict=True)] == whole.tokens
    assert rest.tokens[1] == [] and rest.stopped[1]
    assert same(rest.conversation, whole.conversation)
    # The same rows without a state to keep: those that have stopped leave the batch.
    dropped = generate(model, conversation=held, max_tokens=6, stop_token=stop)
    assert dropped.tokens == rest.tokens and dropped.stopped == rest.stopped
    # A row that reads more writes again; what it reads is what is said of it.
    again = generate(model, [[], [4, 5], []], conversation=held, max_tokens=2, **given)
    text = PROMPTS[1] + whole.tokens[1] + [4, 5]
    assert again.tokens[1] == generate(model, text, max_tokens=2, stop_token=stop).tokens[0]
    assert again.tokens[0] == rest.tokens[0][:2]
    text += again.tokens[1]
    assert again.conversation is not None
    assert again.conversation.read.tolist()[1] == len(text)
    assert again.conversation.tail[1, -len(text) :].tolist() == text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_later_is_read_as_if_at_once(kind: str) -> None:
    model = make(kind, torch.float64)
    begun = generate(model, PROMPTS, max_tokens=3, keep_state=True)
    more = [[12, 13], [14], [15, 16, 17]]
    found = generate(model, more, conversation=begun.conversation, max_tokens=8)
    texts = [a + b + c for a, b, c in zip(PROMPTS, begun.tokens, more, strict=True)]
    assert found.tokens == generate(model, texts, max_tokens=8).tokens


def test_one_state_forks_into_several_texts() -> None:
    model = make()
    held = generate(model, [1, 2, 3], max_tokens=2, keep_state=True).conversation
    assert held is not None
    twice = [
        generate(model, [5 * which], conversation=held, max_tokens=6).tokens for which in (1, 2)
    ]
    assert twice[0] != twice[1]
    # By hand: a decoder consumes the state that it is given, a fork of it is left.
    with torch.no_grad():
        copy = archzoo.fork(held)
        model(torch.tensor([[5]]), copy.state)
        assert same(held.state, archzoo.fork(held.state)) and not same(held.state, copy.state)
    rows = archzoo.reorder(held, torch.tensor([0, 0]))
    assert isinstance(rows, Conversation) and rows.batch_size == 2
    seeds = generate(model, conversation=rows, max_tokens=6, temperature=1.0, seed=1)
    assert seeds.tokens[0] != seeds.tokens[1]


def test_a_plain_state_is_saved_too(tmp_path: Path) -> None:
    model = make("transformer_micro")
    text = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        state = model(text[:, :3], model.init_state(1, capacity=50)).state
        archzoo.save_state(tmp_path / "state", state, model)
        loaded = archzoo.load_state(tmp_path / "state", model)
        assert loaded.logits is None and loaded.read.tolist() == [3]
        assert loaded.state["blocks"][0]["keys"].shape[2] == 3, "and not the whole buffer"
        found = model(text[:, 3:], loaded.state).logits
        assert torch.equal(found, model(text[:, 3:], state).logits)
    assert (tmp_path / "state").stat().st_size < 10_000
    with pytest.raises(ValueError, match="must read a prompt"):
        generate(model, conversation=loaded, max_tokens=2)
    # Before the first token, too.
    archzoo.save_state(tmp_path / "empty", model.init_state(2), model)
    empty = archzoo.load_state(tmp_path / "empty", model)
    found = generate(model, PROMPTS[:2], conversation=empty, max_tokens=3)
    assert found.tokens == generate(model, PROMPTS[:2], max_tokens=3).tokens


def test_another_process_continues(tmp_path: Path) -> None:
    model = make("pattern")
    archzoo.save_pretrained(tmp_path / "model", model)
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    begun = generate(model, PROMPTS, max_tokens=5, keep_state=True, **sampled)
    archzoo.save_state(tmp_path / "state", begun.conversation, model)
    code = (
        "import archzoo\n"
        "model, _ = archzoo.from_pretrained('model')\n"
        "held = archzoo.load_state('state', model)\n"
        "print(archzoo.generate(model, conversation=held, max_tokens=7, temperature=1.0, seed=3)"
        ".tokens)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    whole = generate(model, PROMPTS, max_tokens=12, **sampled)
    assert done.stdout.strip() == str([tokens[5:] for tokens in whole.tokens])


def test_a_character_whose_bytes_are_parted_by_a_pause() -> None:
    from archzoo.tasks.tokenizers import learn_bpe

    tokenizer = learn_bpe(["abc"], 256)
    model = make(vocab_size=256)
    model.embedding.weight.data.zero_()
    text = "n\u00e9\u20ac."
    written = iter(tokenizer.encode(text))
    model.head.register_forward_hook(
        lambda *call: torch.nn.functional.one_hot(torch.tensor([[next(written, 0)]]), 256).float()
    )
    texts: list[str] = []
    found = generate(model, ["x"], max_tokens=1, tokenizer=tokenizer, keep_state=True)
    while len(texts) < len(text.encode()):
        texts += found.texts or []
        found = generate(
            model,
            conversation=found.conversation,
            max_tokens=1,
            tokenizer=tokenizer,
            keep_state=True,
        )
    assert texts == ["n", "", "\u00e9", "", "", "\u20ac", "."]


def test_what_cannot_be_continued_is_said() -> None:
    model = make()
    held = generate(model, PROMPTS, max_tokens=2, keep_state=True).conversation
    with pytest.raises(ValueError, match="3 rows and there are 2 prompts"):
        generate(model, [[1], [2]], conversation=held, max_tokens=2)
    with pytest.raises(ValueError, match="only the recurrent form"):
        generate(model, [1], max_tokens=2, keep_state=True, form="parallel")
    with pytest.raises(ValueError, match="only the recurrent form"):
        generate(model, conversation=held, max_tokens=2, check=True)
    with pytest.raises(ValueError, match="there is no prompt"):
        generate(model, max_tokens=2)
    with pytest.raises(ValueError, match="the conversation is a dict"):
        generate(model, [1], conversation=model.init_state(1), max_tokens=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another model's"):
        generate(make(vocab_size=70), conversation=held, max_tokens=2)


# ---------------------------------------------------------------------------- refused


def refused(path: Path, layout: StateLayout, match: str | None = None) -> None:
    """It is, in one line that names the file."""
    with pytest.raises(ValueError, match=match) as error:
        read_state(path, layout)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.fixture(scope="module")
def layout() -> StateLayout:
    return StateLayout(make("pattern"))


@pytest.fixture
def written(layout: StateLayout, tmp_path: Path) -> Path:
    """The state of two ragged rows, of retention and of an attention with a filter."""
    held = generate(layout.model, PROMPTS[:2], max_tokens=2, keep_state=True).conversation
    assert held is not None
    write_state(tmp_path / "state", held, layout)
    return tmp_path / "state"


def forged(
    path: Path,
    tensors: dict[str, Any] | None = None,
    values: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A state that was changed by someone who knows how it is signed; None takes a leaf away."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    held: dict[str, Any] = load_file(path)
    for here, changes in ((held, tensors or {}), (about["values"], values or {})):
        for name, value in changes.items():
            assert name in here or value is not None
            here[name] = value
            if value is None:
                del here[name]
    text = json.dumps(about | more)
    digest = hashlib.sha256(f"{weights_digest(held)}\n{text}".encode()).hexdigest()
    save_file(held, path, metadata=metadata | {"about": text, "digest": digest})
    return path


def test_another_model_s_state_is_refused(layout: StateLayout, written: Path) -> None:
    other = make("pattern")
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    refused(written, StateLayout(other), "of a model with other weights: load the one that made")
    refused(written, StateLayout(make("pattern", depth=4)), "of a model built with other settings")
    refused(written, StateLayout(make("pattern", torch.float64)), "other weights")
    read_state(written, StateLayout(make("pattern", dropout=0.5, context_length=9)))
    with pytest.raises(FileNotFoundError, match="there is no state at"):
        archzoo.load_state(written.with_name("other"), layout.model)
    with pytest.raises(ValueError, match="a directory and not a regular file"):
        archzoo.load_state(written.parent, layout.model)
    save_file({"a": torch.zeros(2)}, written)
    refused(written, layout, "not a state that archzoo.save_state wrote")


@pytest.mark.parametrize(
    ("tensors", "values", "match"),
    [
        ({"read": None}, {}, "does not say how many tokens"),
        ({"read": torch.zeros(0, dtype=torch.int64)}, {}, "does not say how many tokens"),
        ({"read": torch.zeros(1, dtype=torch.int64)}, {}, r"drawn of shape \(2,\), and not \(1\)"),
        ({"read": torch.tensor([-1, 3])}, {}, "-1 in read, which is not in 0 to"),
        ({"drawn": torch.tensor([2**40, 3])}, {}, "in drawn, which is not in 0 to 268435456"),
        ({"tail": torch.full((2, 256), 64)}, {}, "64 in tail, which is not in -1 to 63"),
        ({"stopped": torch.zeros(2)}, {}, "stopped as float32, and this model as bool"),
        ({"logits": torch.zeros(2, 63)}, {}, r"logits of shape \(2, 63\), and not \(2, 64\)"),
        ({"state/place/positions": torch.tensor([-2, 3])}, {}, "-2 in state/place/positions"),
        ({"state/place/begun": torch.tensor([1, 2**60])}, {}, "in state/place/begun"),
        ({"state/blocks/0/memory": None}, {}, "misses 'state/blocks/0/memory'"),
        ({"state/blocks/0/memory": torch.zeros(2, 4, 8, 8)}, {}, "memory of shape"),
        ({"state/blocks/0/memory": torch.zeros(2, 2, 16, 32).double()}, {}, "memory as float64"),
        ({"state/blocks/0/memory": torch.full((2, 2, 16, 32), torch.nan)}, {}, "NaN in state/bl"),
        ({"state/blocks/1/../../secret": torch.zeros(2)}, {}, "holds 'state/blocks/1/../../sec"),
        ({"/etc/passwd": torch.zeros(2)}, {}, "holds '/etc/passwd'"),
        ({}, {"state/blocks/1/length": 10**6}, "a cache is shorter than it says"),
        ({}, {"state/blocks/1/length": -1}, "a cache holds 0 tokens or more"),
        ({}, {"state/blocks/1/length": 10**400}, "out of range"),
        ({}, {"state/blocks/1/length": 2.0}, "length=2.0, which is not a valid int"),
        ({}, {"state/blocks/1/length": True}, "length=True, which is not a valid int"),
        ({}, {"state/blocks/1/length": [[]]}, "which is not a valid int"),
        ({}, {"state/place/packed": None}, "holds 'state/blocks/1/documents'"),
        ({}, {"state/place/packed": "yes"}, "holds 'state/blocks/1/documents'"),
        ({}, {"state/place/packed": False}, "holds 'state/blocks/1/documents'"),
        ({}, {"state/place/more": 1}, "holds 'state/place/more'"),
    ],
)
def test_what_no_reading_gives_is_refused(
    layout: StateLayout, written: Path, tensors: Any, values: Any, match: str
) -> None:
    refused(forged(written, tensors, values), layout, match)


def test_metadata_that_is_not_plain_is_refused(layout: StateLayout, written: Path) -> None:
    content = written.read_bytes()
    forged(written, more=float("nan"))
    refused(written, layout, "NaN is not a number that a state holds")
    for about, match in (
        ("[" * 10_000, "nests deeper than 64"),
        ("{", "is damaged"),
        ("[]", "does not say what it holds"),
        ('{"values": 3}', "does not say what it holds"),
        ('{"values": {"n": ' + "9" * 10_000 + "}}", "is damaged|other settings"),
    ):
        written.write_bytes(content)
        metadata = {"archzoo.state": "1", "about": about, "digest": ""}
        save_file(load_file(written), written, metadata=metadata)
        refused(written, layout, match)
    save_file({"read": torch.zeros(2)}, written, metadata={"archzoo.state": "2"})
    refused(written, layout, "of format '2', and this archzoo reads 1")


def test_sizes_that_a_header_claims_are_not_allocated(layout: StateLayout, written: Path) -> None:
    content = written.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for change in (
        {"shape": [2**40, 2**20]},
        {"shape": [2, 4, 2**40, 16]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [-8, 0]},
        {"dtype": "F64"},
        {"dtype": "pickle"},
    ):
        changed = dict(header)
        changed["state/blocks/0/memory"] = header["state/blocks/0/memory"] | change
        text = json.dumps(changed).encode()
        written.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        refused(written, layout)
    written.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    refused(written, layout, "its table of contents has")


def test_hundreds_of_damaged_files_are_refused_or_the_same(
    layout: StateLayout, written: Path
) -> None:
    """Bits flipped, bytes cut out, put in and set, anywhere, header and tensors alike."""
    content = written.read_bytes()
    whole, _ = read_state(written, layout)
    header = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    accepted, said = 0, list[str]()
    for number in range(300):
        damaged = bytearray(content)
        place = draw.randrange(header if number % 2 else len(content))
        kind = number % 5
        if kind == 0:
            del damaged[place:]
        elif kind == 1:
            del damaged[place : place + draw.randrange(1, 20)]
        elif kind == 2:
            damaged[place:place] = draw.randbytes(draw.randrange(1, 20))
        else:
            damaged[place] = (
                damaged[place] ^ (1 << draw.randrange(8)) if kind == 3 else 48 + place % 10
            )
        written.write_bytes(damaged)
        try:
            found, _ = read_state(written, layout)
        except ValueError as error:
            said.append(str(error))
        else:
            assert same(found, whole)
            accepted += damaged != content
    assert all("\n" not in line and str(written) in line for line in said)
    assert accepted < 10, "blanks of the header at most"


def test_a_state_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    model, other = make(), make("transformer_micro")
    path = tmp_path / "state"
    with pytest.raises(ValueError, match="blocks hold no 'length' where this model's do"):
        archzoo.save_state(path, model.init_state(1), other)
    with pytest.raises(ValueError, match="keys as bfloat16, and this model as float32"):
        archzoo.save_state(path, other.init_state(1, dtype=torch.bfloat16), other)
    state = model.init_state(1)
    state["blocks"][0]["memory"][:] = torch.nan
    with pytest.raises(ValueError, match="has NaN in state/blocks/0/memory"):
        archzoo.save_state(path, state, model)
    with pytest.raises(ValueError, match="the state is a list"):
        archzoo.save_state(path, [], model)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="is a directory: give the name of a file"):
        archzoo.save_state(tmp_path, model.init_state(1), model)
    archzoo.save_state(path, model.init_state(1), model)
    before = path.read_bytes()
    path.with_name("readonly").mkdir()
    (path.with_name("readonly") / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        archzoo.save_state(path.with_name("readonly") / "file" / "state", state_of(model), model)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def state_of(model: Decoder) -> State:
    return model.init_state(1)


# ---------------------------------------------------------------------------- the command


def test_the_command_continues_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = CharacterTokenizer("abcdefgh")
    archzoo.save_pretrained("model", make(vocab_size=8), tokenizer)
    command = ["generate", "model", "--max_tokens"]
    assert main([*command, "9", "abc"]) == 0
    whole = capsys.readouterr().out.splitlines()[0]
    assert main([*command, "4", "abc", "--save_state", "a.safetensors"]) == 0
    begun = capsys.readouterr().out
    assert "a.safetensors: the state after 7 tokens" in begun
    assert main([*command, "5", "", "--state", "a.safetensors"]) == 0
    rest = capsys.readouterr().out.splitlines()[0]
    assert begun.splitlines()[0] + rest == whole
    assert main([*command, "5", "ab", "cd", "--state", "a.safetensors"]) == 1
    assert "the conversation has 1 rows and there are 2 prompts" in capsys.readouterr().err
    assert main([*command, "5", "ab", "--state", "model/model.safetensors"]) == 1
    assert "is not a state that archzoo.save_state wrote" in capsys.readouterr().err
    assert main([*command, "2", "a", "ab", "--save_state", "model"]) == 1
    assert "model is a directory" in capsys.readouterr().err
