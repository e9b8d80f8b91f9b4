"""A model as one file of plain PyTorch: equal to the zoo's, short, and of nothing but torch."""

import ast
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import MICRO, micro

import archzoo
from archzoo.contract.measure import relative_error
from archzoo.conversion.llama import llama_config, llama_weights
from archzoo.decoder import Decoder
from archzoo.export.files import check_source, module_of, weights_of, write_file
from archzoo.export.hugging_face import figures, is_llama, llama_files
from archzoo.export.source import source_of
from archzoo.export.tokenizer import tokenizer_files
from archzoo.export.unigram import HARD, unigram_file
from archzoo.tasks.tokenizers import SentencePieceTokenizer, learn_unigram

DIGITS = {"digit_tokens": list(range(10)), "operator_tokens": [10, 11]}
EXACT, ROUNDED = 1e-12, 1e-6
OTHERS = [name.removesuffix("_micro") for name in MICRO if name != "retnet_micro"]
PARTS = {
    "window of patterns": {"pattern": ["Retention", "Attention", "Retention"], "depth": 3},
    "post": {"norm_placement": "post", "norm": "layer", "feed_forward": "PlainFeedForward"},
    "convolution": {"convolution": 4, "mixer": "FilteredAttention"},
    "convolution as a mixer": {"pattern": ["ShortConvolution", "Attention"]},
    "loops": {"loops": 3, "injection": "loop"},
    "tied": {"tie_weights": True, "dropout": 0.1},
    "layer injection": {"injection": "layer", "mixer": "Attention", "bias": "T5Bias"},
    "grouped": {
        "mixer": {"class_path": "Attention", "init_args": {"kv_heads": 1}},
        "rotary": "XPos",
        "bias": "ALiBi",
    },
    "learned decay": {
        "mixer": {
            "class_path": "Retention",
            "init_args": {"decay": "learnable", "head_norm": "group", "gate": False},
        }
    },
    "no decay": {"mixer": {"class_path": "Retention", "init_args": {"decay": 1}}},
    "paper's decay": {
        "mixer": {
            "class_path": "Retention",
            "init_args": {"decay": "paper_lm", "head_norm": "none", "value_factor": 1.0},
        },
        "rotary": "RotaryEmbedding",
    },
    "kerple": {"mixer": "Attention", "bias": "KERPLE", "rotary": "none"},
    "fire": {"mixer": "Attention", "bias": "FIRE"},
    "experts": {
        "feed_forward": {
            "class_path": "MixtureOfExperts",
            "init_args": {
                "experts": 4,
                "top_k": 1,
                "shared_experts": 1,
                "z_coefficient": 1e-3,
                "router": {
                    "class_path": "LinearRouter",
                    "init_args": {"score": "sigmoid", "bias_rate": 1e-3},
                },
            },
        }
    },
    "abacus": {"embedding": {"class_path": "AbacusEmbedding", "init_args": DIGITS}},
    "coupling": {
        "embedding": {
            "class_path": "PositionCoupling",
            "init_args": DIGITS | {"prompt": "plain", "max_position": 60},
        }
    },
    "learned positions": {"embedding": "LearnedPositions", "rotary": "none"},
    "randomised positions": {
        "mixer": "Attention",
        "embedding": {
            "class_path": "RandomisedPositions",
            "init_args": {"embedding": {"class_path": "AbacusEmbedding", "init_args": DIGITS}},
        },
    },
} | {
    f"rope {kind}": {
        "mixer": "Attention",
        "rotary": {
            "class_path": "RotaryEmbedding",
            "init_args": {
                "rope_type": kind,
                "factor": 3.0,
                "original_max_position_embeddings": 8,
                "partial_rotary_factor": 0.5,
            },
        },
    }
    for kind in ("linear", "ntk", "dynamic", "yarn", "llama3")
}  # fmt: skip


def family(name: str) -> Decoder:
    """A micro model, in float64."""
    digits = {"embedding": {"class_path": "AbacusEmbedding", "init_args": DIGITS}}
    torch.manual_seed(0)
    return micro(name, **(digits if name.startswith("abacus") else {})).double().eval()


def tokens_of(model: Decoder, time: int = 21) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.vocab_size, (3, time), generator=generator)


#: Left padding, two documents a row, padding at the end.
DOCUMENTS = torch.tensor([[-1] * 6 + [0] * 15, [3] * 9 + [5] * 12, [1] * 16 + [-1] * 5])


@torch.no_grad()
def hold_equal(model: Decoder) -> str:
    """The file of a model in float64, once it is sure that it computes the same."""
    source = source_of(model)
    theirs = module_of(source).build().double()
    theirs.load_state_dict(model.state_dict())
    theirs.eval()
    tokens, seen = tokens_of(model), DOCUMENTS >= 0
    for documents in (None, DOCUMENTS):
        positions = model.embedding.prompt_positions(tokens, documents)
        given = {"documents": documents, "positions": positions}
        wanted = model(tokens, **given).logits[seen]
        assert relative_error(theirs(tokens, **given).logits[seen], wanted) < EXACT
        state, steps = theirs.init_state(3), []
        for t in (*range(8), (8, 13), *range(13, 21)):  # tokens, and a piece of several
            cut = slice(*t) if isinstance(t, tuple) else slice(t, t + 1)
            part = {n: v if v is None else v[:, cut] for n, v in given.items()}
            step = theirs(tokens[:, cut], state, **part)
            steps.append(step.logits)
            state = step.state
        assert relative_error(torch.cat(steps, dim=1)[seen], wanted) < EXACT
    return source


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_every_family_is_equal_in_all_forms(name: str) -> None:
    model = family(name)
    source = hold_equal(model)
    theirs = module_of(source).build().eval()
    theirs.load_state_dict(model.float().state_dict())
    tokens = tokens_of(model)
    assert relative_error(theirs(tokens).logits, model(tokens).logits) < ROUNDED


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_equal(name: str) -> None:
    torch.manual_seed(0)
    hold_equal(archzoo.create_model("retnet_micro", **PARTS[name]).double().eval())


def test_long_texts_are_read_in_chunks() -> None:
    model = family("retnet_micro")
    theirs = module_of(source_of(model)).build().double().eval()
    theirs.load_state_dict(model.state_dict())
    tokens = tokens_of(model, 300)
    documents = (torch.arange(300) // 170).expand(3, -1)
    with torch.no_grad():
        for given in (None, documents):
            wanted = model(tokens, documents=given).logits
            assert relative_error(theirs(tokens, documents=given).logits, wanted) < EXACT


@pytest.mark.parametrize(
    "name",
    ["retnet_small", *(pytest.param(f"{n}_small", marks=pytest.mark.slow) for n in OTHERS)],
)
@torch.no_grad()
def test_float32_is_rounded_as_in_the_zoo(name: str) -> None:
    """Each form does what the zoo's does in its order: else a deep RetNet differs by 6e-6."""
    given = {"embedding": {"class_path": "AbacusEmbedding", "init_args": DIGITS}}
    model = archzoo.create_model(name, **(given if name.startswith("abacus") else {})).eval()
    theirs = module_of(source_of(model)).build().eval()
    theirs.load_state_dict(model.state_dict())
    tokens = torch.randint(model.vocab_size, (1, 200))  # which retention reads in chunks
    documents = torch.tensor([[-1] * 9 + [0] * 191])
    for given in ({}, {"documents": documents}):
        for part in (tokens, tokens[:, :60]):
            given = {n: v[:, : part.shape[1]] for n, v in given.items()}
            found, wanted = (m(part, **given).logits[:, 9:] for m in (theirs, model))
            assert relative_error(found, wanted) < ROUNDED
    states = [model.init_state(1), theirs.init_state(1)]
    for t in range(20):
        out = [m(tokens[:, t : t + 1], s) for m, s in zip((model, theirs), states, strict=True)]
        states = [each.state for each in out]
        assert relative_error(out[1].logits, out[0].logits) < ROUNDED


def test_gradients_and_the_losses_of_experts_are_the_zoos() -> None:
    model = family("skywork_micro").train()
    theirs = module_of(source_of(model)).build().double().train()
    theirs.load_state_dict(model.state_dict())
    tokens = tokens_of(model)
    out = model(tokens, documents=DOCUMENTS)
    ours = sum(sum(layer.losses.values()) for layer in out.aux)
    given = theirs(tokens, documents=DOCUMENTS)
    loss = sum(sum(layer.losses.values()) for layer in given.aux)
    assert relative_error(loss, ours) < EXACT
    (out.logits.square().mean() + ours).backward()
    (given.logits.square().mean() + loss).backward()
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(other.grad, mine.grad) < 1e-10, name
    model.after_step([layer.sums for layer in out.aux])
    for block, layer in zip(theirs.blocks, given.aux, strict=True):
        block.feed_forward.after_step(layer.sums)
    ours, alphas = (
        torch.stack([b.feed_forward.balance.alpha for b in m.blocks]) for m in (model, theirs)
    )
    assert relative_error(alphas, ours) < EXACT


@pytest.mark.parametrize("given", [{}, {"dropout": 0.1, "tie_weights": True}])
@pytest.mark.parametrize("name", [*archzoo.list_models("*_base"), "abacus_tiny"])
def test_a_page_is_enough(name: str, given: dict) -> None:
    """500 lines for RetNet and the transformer, 900 for any; of torch alone; all of it is used."""
    if name.startswith("abacus"):
        given = given | {"embedding": {"class_path": "AbacusEmbedding", "init_args": DIGITS}}
    with torch.device("meta"):
        model = archzoo.create_model(name, **given)
    source = source_of(model, name)
    short = name.startswith(("retnet", "transformer"))
    assert len(source.splitlines()) <= (500 if short else 900)
    assert max(map(len, source.splitlines())) <= 100
    tree = ast.parse(source)
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {"__future__", "math", "sys", "pathlib", "typing", "collections", "torch",
                        "einops"}  # fmt: skip
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    defined = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assert defined <= used | {"Decoder", "build", "load", "main", "generate", "loss_of"}
    assert "arXiv" in source and '"""' in source


def test_the_file_trains_and_decodes_without_archzoo(tmp_path: Path) -> None:
    model = family("retnet_micro").float()
    write_file(tmp_path / "mine.py", model, "a RetNet")
    assert (tmp_path / "mine.pt").exists()
    script = """
import sys
sys.modules["archzoo"] = None  # an import of it fails
import torch, mine
model = mine.load()
print(*mine.generate(model, [1, 2, 3], max_tokens=8))
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(30):
    loss = mine.loss_of(model, torch.tensor([[1, 2, 3, 4, 5, 6] * 3] * 4))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
print(losses[-1] < 0.5 * losses[0])
print(*mine.generate(model.eval(), [1, 2, 3], max_tokens=3))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    greedy, learns, learnt = done.stdout.splitlines()
    wanted = archzoo.generate(model, [[1, 2, 3]], max_tokens=8).tokens[0]
    assert greedy == " ".join(map(str, wanted))
    assert learns == "True" and learnt == "4 5 6"


# ---------------------------------------------------------------------------- one's own parts


OWN = '''
import math  # not used below

import torch
from einops import rearrange
from torch import nn

import archzoo
from archzoo import Linear, block
from archzoo.block import Context as Seen
{extra}

SLOW = 8.0  # a constant of the module


def helper(x):
    """Called below."""
    return torch.sigmoid(x)


def not_used(x):
    return x


class Memory(archzoo.Mixer):
    """A running mean.

    Args:
        dim: Width of x.
        heads: Unused.
    """

    def __init__(self, dim: int, heads: int, *, rate: float = 0.5) -> None:
        super().__init__()
        self.fade = nn.Linear(dim, dim)
        self.output = Linear(dim, {{"output": dim}}, residual_projection=True)
        self.rate = rate

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        shape = (batch_size, 1, self.output.in_features)
        return {{"mean": torch.zeros(shape, device=device, dtype=dtype)}}

    def step(self, x, state, context: Seen):
        # the rate is the token's
        fade = helper(self.fade(x) - SLOW) * self.rate
        mean = fade * state["mean"] + (1 - fade) * x
        {line}
        return self.output(rearrange(mean, "b t d -> b t d")), {{"mean": mean}}


class Deep(archzoo.Attention):
    """Attention whose values are doubled, with ALiBi of its own."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.rotary = archzoo.RotaryEmbedding(self.head_dim, base=500.0)

    def forward(self, x, state, context, form=None):
        y, state = super().forward(x, state, context)
        return block.merge_heads(2 * block.split_heads(y, self.heads)), state
'''


def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, **words: str) -> object:
    text = OWN.format(**{"extra": "", "line": "pass"} | words)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return __import__(name)


def test_a_mixer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = own_module(tmp_path, monkeypatch, "own_mixers")
    for mixer in (module.Memory, module.Deep):
        torch.manual_seed(0)
        model = archzoo.create_model("retnet_micro", mixer=mixer).double().eval()
        source = hold_equal(model)
        check_source(model, source)
        assert "archzoo" not in re.sub('"""One? .*|made by archzoo export', "", source)
        assert "not_used" not in source and "import math" in source
    model = archzoo.create_model("retnet_micro", mixer=module.Memory)
    assert "# the rate is the token's" in source_of(model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"extra": "import numpy", "line": "numpy.zeros(1)"}, "imports numpy: .* alone"),
        ({"line": "import numpy"}, "imports numpy within a function"),
        (
            {"extra": "from archzoo import generate", "line": "generate"},
            "uses archzoo's generate",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_its_name(
    words: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{abs(hash(message)) % 10**8}"
    module = own_module(tmp_path, monkeypatch, name, **words)
    with pytest.raises(ValueError, match=message):
        source_of(archzoo.create_model("retnet_micro", mixer=module.Memory))


TWICE = '''
import archzoo
from archzoo import Mixer


class Retention(Mixer):
    """A part of the zoo's name."""

    def __init__(self, dim, heads):
        super().__init__()
        self.inner = archzoo.Retention(dim, heads)
'''


def test_two_parts_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "twice.py").write_text(TWICE)
    monkeypatch.syspath_prepend(tmp_path)
    mixer = importlib.import_module("twice").Retention
    try:
        model = archzoo.create_model("retnet_micro", mixer=mixer)
        with pytest.raises(ValueError, match="two parts are called Retention"):
            source_of(model)
    finally:  # others ask for Retention by its name
        mixer.__name__ = mixer.__qualname__ = "Twice"


# ---------------------------------------------------------------------------- the command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from archzoo.cli import main

    model = family("transformer_micro").float()
    archzoo.save_pretrained(tmp_path / "saved", model)
    out = tmp_path / "model.py"
    assert main(["export", str(tmp_path / "saved"), str(out)]) == 0
    assert re.search(
        r"model\.py: \d+ lines, .* parameters, and .*model\.pt", capsys.readouterr().out
    )
    loaded = module_of(out.read_text(), str(out)).load()
    tokens = tokens_of(model)
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, model(tokens).logits) < ROUNDED
    assert main(["export", "retnet_micro", "--out", str(tmp_path / "new.py")]) == 0
    assert not (tmp_path / "new.pt").exists()
    given = [sys.executable, str(tmp_path / "new.py"), "3", "1", "4"]  # by weights drawn anew
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 32


def test_a_llama_is_written_as_one(tmp_path: Path) -> None:
    """And comes back by the key map that reads one; what transformers makes of it: tests/extras."""
    kv = {"class_path": "Attention", "init_args": {"kv_heads": 1}}
    for given in ({"mixer": kv}, {"tie_weights": True}):
        torch.manual_seed(0)
        model = micro("transformer_micro", **given)
        assert is_llama(model)
        config, weights = llama_files(model)
        again = Decoder(**llama_config(config))
        tied = config["tie_word_embeddings"]
        again.load_state_dict(llama_weights(weights, 2, config["num_key_value_heads"], tied=tied))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
    scaled = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    dynamic = {"rotary": {"class_path": "RotaryEmbedding", "init_args": scaled}}
    for other in (
        dynamic, {"bias": "ALiBi"}, {"convolution": 4}, {"norm": "layer"}, {"dropout": 0.1}
    ):  # fmt: skip
        assert not is_llama(micro("transformer_micro", **other))
    assert not is_llama(micro("retnet_micro"))


def test_a_directory_for_transformers(tmp_path: Path) -> None:
    from archzoo.cli import main

    out = tmp_path / "theirs"
    assert main(["export", "retnet_micro", str(out), "--to", "transformers"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_archzoo.ArchzooForCausalLM"
    source = (out / "modeling_archzoo.py").read_text()
    assert "import archzoo" not in source and "from archzoo" not in source
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n1,3,2.5\n2,2,\n")
    assert figures(str(tmp_path / "last.ckpt")) == {"val/loss": "2.5"}
    card = (out / "README.md").read_text()
    assert all(word in card for word in ("licence", "commit", "parameters", "trained on"))
    assert main(["export", "retnet_micro", str(out), "--to", "transformers"]) != 0  # it exists


@pytest.mark.parametrize("path", ["shakespeare.txt", "three_kingdoms.txt"])
def test_a_unigram_model_as_a_tokenizer_json(path: str) -> None:
    """Of the same tokens on a text, and on what sentencepiece has in store for names of pieces."""
    import tokenizers

    text = (Path(__file__).parents[1] / "data" / path).read_text()[:100_000]
    ours = learn_unigram([text], 4000)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(unigram_file(ours)))
    # In a text of a megabyte sentencepiece's own sums, of float32, round.
    for given in (*text.splitlines(keepends=True), *HARD, "</s><unk> x<0x0A>y", "\ue000"):
        assert theirs.encode(given, add_special_tokens=False).ids == ours.encode(given)
    assert theirs.decode(ours.encode(text)) == text


def test_a_sentencepiece_model_that_differs_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    for kind, words in (("unigram", "cuts .* otherwise"), ("bpe", "another kind than unigram")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a dog sat"] * 50),
            model_writer=model, model_type=kind, vocab_size=17, minloglevel=2,
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"{words}.*: export with --without_tokenizer"):
            tokenizer_files(SentencePieceTokenizer(model.getvalue()), None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retnet_micro"], "where is the model written"),
        (["retnet_micro", "model.txt"], r"model.txt does not end in .py"),
        (["retnet_micr", "model.py"], "no checkpoint at retnet_micr"),
        (["abacus_micro", "model.py"], "digit_tokens is not set"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from archzoo.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) != 0
    said = capsys.readouterr().err.strip()
    assert re.search(words, said) and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.py exists"):
        write_file(tmp_path / "model.py", family("retnet_micro"), "a model")
    assert (tmp_path / "model.py").read_text() == "mine"


def test_adapters_are_merged_first() -> None:
    model = archzoo.create_model("retnet_micro", adapter="LoRA")
    with pytest.raises(ValueError, match="archzoo adapter merge"):
        source_of(model)


def test_a_file_that_computes_something_else_is_refused() -> None:
    model = family("retnet_micro")
    source = source_of(model).replace("F.silu(gate[0])", "F.gelu(gate[0])")
    with pytest.raises(ValueError, match="computes other logits than the model, a text at once"):
        check_source(model, source)
    assert set(weights_of(model)) == set(model.state_dict())
