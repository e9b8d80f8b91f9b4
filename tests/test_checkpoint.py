"""Models written and read again, and files that must be refused."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from families import MICRO, micro
from safetensors import safe_open

import archzoo
from archzoo.checkpoint import load, read_safely
from archzoo.decoder import Decoder
from archzoo.generation import generate_command
from archzoo.tasks.tokenizers import CharacterTokenizer, learn_bpe, learn_unigram

TOKENS = torch.tensor([[1, 5, 9, 2, 6], [3, 3, 0, 7, 7]])


@torch.no_grad()
def same(first: Decoder, second: Decoder) -> bool:
    """Configuration, names, weights with their dtypes, and logits, bit for bit."""
    weights, others = first.state_dict(), second.state_dict()
    return (
        first.config == second.config
        and weights.keys() == others.keys()
        and all(w.dtype == others[n].dtype and w.equal(others[n]) for n, w in weights.items())
        and first.eval()(TOKENS).logits.equal(second(TOKENS).logits)
    )


# ---------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tie_weights": True},
        {"pattern": ["Retention", "Attention"]},
        {"mixer": {"class_path": "Retention", "init_args": {"value_factor": 1.0}}},
        {"mixer": {"class_path": "Attention", "init_args": {"kv_heads": 1}}},
        {"norm": "layer", "norm_placement": "post", "dropout": 0.1},
    ],
)
def test_round_trip(name: str, arguments: dict[str, object], tmp_path: Path) -> None:
    model = micro(name, **arguments)
    archzoo.save_pretrained(tmp_path / "model", model)
    again, tokenizer = archzoo.from_pretrained(tmp_path / "model")
    assert same(model, again)
    assert tokenizer is None
    assert not again.training
    assert (again.head.weight is again.embedding.weight) == bool(arguments.get("tie_weights"))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    archzoo.save_pretrained(tmp_path, micro(tie_weights=True))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "embedding.weight" in names
    assert "head.weight" not in names


def test_weights_tied_by_hand_come_back(tmp_path: Path) -> None:
    model = micro()
    model.head.weight = model.embedding.weight
    archzoo.save_pretrained(tmp_path, model)
    assert same(model, archzoo.from_pretrained(tmp_path)[0])


class LowRank(torch.nn.Module):
    """Put instead of a Linear, as fine-tuning by hand does."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.zeros(2, base.in_features))
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, 2))


def test_a_model_that_its_configuration_does_not_build_is_refused(tmp_path: Path) -> None:
    """It was written, and could not be read."""
    adapted, wider, narrower = micro(), micro(), micro()
    adapted.blocks[1].mixer.output = LowRank(adapted.blocks[1].mixer.output)
    wider.blocks[0].feed_forward = archzoo.GatedFeedForward(32, 56)
    narrower.norm = torch.nn.Identity()
    for model, words in (
        (adapted, r"blocks\.1\.mixer\.output\.weight is missing in the model and has shape"),
        (wider, r"blocks\.0\.\S+ has shape \(112, 32\) in the model and has shape \(96, 32\) in"),
        (narrower, r"norm\.weight is missing in the model .*: a module was replaced by hand"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            archzoo.save_pretrained(tmp_path / "model", model)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_dtypes_come_back(tmp_path: Path) -> None:
    """Also of what must stay float32 in a bfloat16 model."""
    learnable = {"class_path": "Retention", "init_args": {"decay": "learnable"}}
    model = micro(mixer=learnable).bfloat16()
    archzoo.save_pretrained(tmp_path, model)
    again, _ = archzoo.from_pretrained(tmp_path)
    assert same(model, again)
    assert again.head.weight.dtype == torch.bfloat16
    assert again.blocks[0].mixer.decay_rate.dtype == torch.float32


def test_reading_draws_nothing(tmp_path: Path) -> None:
    archzoo.save_pretrained(tmp_path, micro())
    before = torch.get_rng_state()
    archzoo.from_pretrained(tmp_path)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("kind", ["characters", "bpe", "unigram"])
def test_tokenizers_come_back(kind: str, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog, 0123456789 times. " * 20
    tokenizer = {
        "characters": lambda: CharacterTokenizer("".join(sorted(set(text))), special=True),
        "bpe": lambda: learn_bpe([text], 280),
        "unigram": lambda: learn_unigram([text], 300),
    }[kind]()
    archzoo.save_pretrained(tmp_path, micro(vocab_size=tokenizer.vocab_size), tokenizer)
    _, again = archzoo.from_pretrained(tmp_path)
    assert again is not None
    assert type(again) is type(tokenizer)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.stop_token == tokenizer.stop_token
    # Without a tokenizer the old file stays, and is not taken for this model's.
    archzoo.save_pretrained(tmp_path, micro())
    assert archzoo.from_pretrained(tmp_path)[1] is None


def test_config_says_what_it_is(tmp_path: Path) -> None:
    task = {"class_path": "archzoo.tasks.arithmetic.Addition", "init_args": {"reverse": True}}
    archzoo.save_pretrained(tmp_path, micro(), task=task)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["archzoo"] == archzoo.__version__
    assert config["decoder"]["context_length"] == 64
    assert config["decoder"]["mixer"] == {"class_path": "Retention", "init_args": {}}
    assert load(tmp_path).task == config["task"] == task
    for name in ("config.json", "model.safetensors"):  # either file stands for the directory
        assert same(load(tmp_path).model, load(tmp_path / name).model)


MIXER = """
import torch
from archzoo import Mixer


class RunningMean(Mixer):
    def __init__(self, dim, heads, *, scale=1.0):
        super().__init__()
        self.scale = scale
        self.output = torch.nn.Linear(dim, dim)

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        width = self.output.in_features
        return {"sum": torch.zeros(batch_size, width + 1, device=device, dtype=dtype)}

    def step(self, x, state, context):
        ones = torch.ones_like(x[:, 0, :1])
        total = state["sum"] + torch.cat([x[:, 0], ones], dim=-1)
        mean = total[:, :-1] / total[:, -1:]
        return self.scale * self.output(mean)[:, None], {"sum": total}
"""


def test_a_part_from_outside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_strangers_module.py").write_text(MIXER)
    monkeypatch.syspath_prepend(tmp_path)
    path = "a_strangers_module.RunningMean"
    with pytest.raises(ValueError, match=r"not imported.*--import a_strangers_module"):
        micro(mixer=path)
    importlib.import_module("a_strangers_module")
    model = micro(mixer={"class_path": path, "init_args": {"scale": 2.0}})
    archzoo.save_pretrained(tmp_path / "model", model)
    again, _ = archzoo.from_pretrained(tmp_path / "model")
    assert same(model, again)
    assert again.blocks[0].mixer.scale == 2.0
    tokens = [[1, 2, 3], [4]]
    written = archzoo.generate(again, tokens, max_tokens=4, check=True).tokens
    assert written == archzoo.generate(model, tokens, max_tokens=4, form="parallel").tokens


CONSTRUCTED = """
import numpy as np
import torch
from archzoo import PlainFeedForward

HANN = np.hanning(7)[1:-1]


class Tabled(PlainFeedForward):
    def __init__(self, dim, width):
        super().__init__(dim, width)
        self.make(torch.tensor([float(number) for number in HANN]))

    def forward(self, x, context):
        y, aux = super().forward(x, context)
        return y * self.table().to(y).sum(), aux


class Kept(Tabled):
    "A buffer that is saved, from Python numbers: the file gives it back."
    def make(self, numbers):
        self.register_buffer("kept", numbers)
    def table(self):
        return self.kept


class FromNumpy(Tabled):
    "A buffer that no file holds, from numpy."
    def make(self, numbers):
        self.register_buffer("made", torch.from_numpy(HANN), persistent=False)
    def table(self):
        return self.made


class Made(FromNumpy):
    "The same from Python numbers."
    def make(self, numbers):
        self.register_buffer("made", numbers, persistent=False)


class Hidden(Tabled):
    "A tensor that is no buffer, where nobody looks."
    def make(self, numbers):
        self.table = lambda: numbers


class Asked(Tabled):
    "A number that is read from a tensor."
    def make(self, numbers):
        self.total = float(numbers.sum())
    def table(self):
        return torch.tensor([self.total])
"""


@pytest.mark.parametrize(
    ("name", "draws"), [("Kept", 0), ("FromNumpy", 0), ("Made", 1), ("Hidden", 1), ("Asked", 1)]
)
def test_what_a_part_makes_in_its_constructor_is_there(
    name: str, draws: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are put into a model that was built without memory, wherever that gives all of it."""
    (tmp_path / "a_constructed_module.py").write_text(CONSTRUCTED)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("a_constructed_module")
    model = micro(feed_forward=f"a_constructed_module.{name}").eval()
    archzoo.save_pretrained(tmp_path / "model", model)
    drawn = []

    def drawing(decoder: Decoder) -> None:
        if decoder.head.weight.device.type != "meta":
            drawn.append(decoder)

    monkeypatch.setattr(Decoder, "draw_weights", drawing)
    again, _ = archzoo.from_pretrained(tmp_path / "model")
    assert len(drawn) == draws
    assert same(model, again)
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", archzoo.list_models("*_micro"))
def test_weights_are_loaded_without_drawing_any(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built once, without memory; what no file holds, such as which tokens are digits, is there."""
    digits = {"digit_tokens": list(range(10)), "operator_tokens": [10, 11]}
    model = archzoo.create_model(name)
    if name == "abacus_micro":
        spec = model.config["embedding"]
        spec = spec | {"init_args": spec["init_args"] | digits}
        model = archzoo.create_model(name, embedding=spec)
    archzoo.save_pretrained(tmp_path, model.eval())
    built = []

    def building(decoder: Decoder) -> None:
        built.append(decoder.head.weight.device.type)

    monkeypatch.setattr(Decoder, "draw_weights", building)
    again, _ = archzoo.from_pretrained(tmp_path)
    assert built == ["meta"]
    assert same(model, again)
    for mine, theirs in zip(model.buffers(), again.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    tokens = torch.randint(model.vocab_size, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_runs_directory_stands_for_its_last_checkpoint(run: Path) -> None:
    assert same(archzoo.from_pretrained(run)[0], archzoo.from_pretrained(run.parent)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes the GPU")
def test_auto_takes_what_there_is(tmp_path: Path) -> None:
    archzoo.save_pretrained(tmp_path, micro())
    assert load(tmp_path, "auto").model.device.type == "cpu"
    with pytest.raises(ValueError, match="'cuda' cannot be used here, take cpu"):
        load(tmp_path, "cuda")


def test_a_part_that_could_not_be_found_again_is_not_saved(tmp_path: Path) -> None:
    model = micro()
    model.config["mixer"] = {"class_path": "gone.Mixer", "init_args": {}}
    with pytest.raises(ValueError, match=r"'gone\.Mixer' is not imported.*top of a module"):
        archzoo.save_pretrained(tmp_path / "model", model)
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------------------- failing writes


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    archzoo.save_pretrained(tmp_path, micro())
    other = micro("transformer_micro")
    archzoo.save_pretrained(tmp_path, other)
    assert same(other, archzoo.from_pretrained(tmp_path)[0])
    found = {file.name for file in tmp_path.iterdir()}
    assert found == {"config.json", "model.safetensors", "notes.txt"}


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limit there")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    model = micro()
    archzoo.save_pretrained(tmp_path / "model", model)
    program = """
        import resource, sys
        import archzoo
        model = archzoo.create_model("retnet_micro")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            archzoo.save_pretrained(sys.argv[1], model)
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"the model cannot be written to {tmp_path / 'model'}: ")
    assert done.stdout.count("\n") == 1
    assert same(model, archzoo.from_pretrained(tmp_path / "model")[0])
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        archzoo.save_pretrained(tmp_path / "model", micro())
    assert (tmp_path / "model").read_text() == "mine"


# ---------------------------------------------------------------------------- bad files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    archzoo.save_pretrained(tmp_path / "model", micro())
    return tmp_path / "model"


def refused(path: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as error:
        archzoo.from_pretrained(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def change(saved: Path, **decoder: object) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["decoder"] |= decoder
    (saved / "config.json").write_text(json.dumps(config))


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", FileNotFoundError, "there is no checkpoint at")
    refused(tmp_path / "nowhere.ckpt", FileNotFoundError, "there is no checkpoint at")
    (saved / "model.safetensors").unlink()
    refused(saved, FileNotFoundError, r"holds no model\.safetensors")
    (saved / "config.json").unlink()
    refused(saved, FileNotFoundError, r"holds no config\.json: give a run, its \.ckpt file, or a")
    (saved / "sums").mkdir()
    (saved / "sums" / "adapter.json").touch()
    refused(saved, FileNotFoundError, r"it holds adapters, each to be given by itself: .*sums$")
    (saved / "best.ckpt").touch()
    refused(saved, FileNotFoundError, r"holds no config\.json; did you mean .*best\.ckpt\?")
    (saved / "last.ckpt").touch()
    refused(saved, ValueError, r"last\.ckpt is")
    (saved / "adapter_config.json").touch()
    (saved / "last.ckpt").unlink()
    refused(saved, FileNotFoundError, r"holds an adapter of peft: archzoo adapter import")
    (saved / "config.json").write_text('{"model_type": "llama"}')
    refused(saved, ValueError, r"no 'decoder'; .* transformers, 'llama': archzoo convert")
    (saved / "config.json").write_text('{"model_type": "archzoo"}')
    refused(saved, ValueError, "no 'decoder'; it was exported to transformers: give the checkpoint")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_weights(saved: Path, share: float) -> None:
    file = saved / "model.safetensors"
    os.truncate(file, int(share * file.stat().st_size))
    refused(saved, ValueError, r"model\.safetensors is truncated or damaged")


@pytest.mark.parametrize("content", ["", "{", "\udcff", "[]", '{"model_type": "llama"}'])
def test_damaged_config(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content, errors="surrogateescape")
    refused(saved, ValueError, r"config\.json is (damaged|not a valid configuration of archzoo)")


def test_another_vocabulary(saved: Path) -> None:
    change(saved, vocab_size=65)
    refused(saved, ValueError, "a vocabulary of 64 tokens, and the configuration says 65")


def test_a_tokenizer_of_another_vocabulary(saved: Path) -> None:
    tokenizer = CharacterTokenizer("".join(map(chr, range(40, 140))))
    with pytest.raises(ValueError, match="the tokenizer has 100 tokens and the model knows 64"):
        archzoo.save_pretrained(saved, micro(), tokenizer)
    config = json.loads((saved / "config.json").read_text())
    tokenizer.save(saved)
    (saved / "config.json").write_text(json.dumps(config | {"tokenizer": "tokenizer.json"}))
    refused(saved, ValueError, "the tokenizer has 100 tokens and the model knows 64")


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"mixer": {"class_path": "Retension"}}, "there is no mixer 'Retension'.*Retention"),
        ({"mixer": {"class_path": "no_such.Mixer"}}, r"'no_such\.Mixer' is not imported"),
        ({"mixer": {"class_path": "os.system"}}, r"'os\.system' is not a Mixer"),
        ({"depht": 2}, "no argument 'depht'; nearest: depth"),
        ({"depth": 3}, r"do not fit the configuration: they miss blocks\.2\."),
        ({"depth": 1}, r"do not fit the configuration: they have blocks\.1\."),
        ({"width": 56}, r"gate_up\.weight has shape \(96, 32\) where \(112, 32\) is expected"),
        ({"dim": "wide"}, "dim='wide': a decoder needs an integer"),
    ],
)
def test_weights_that_do_not_fit(saved: Path, decoder: dict[str, object], message: str) -> None:
    change(saved, **decoder)
    refused(saved, ValueError, message)


# ---------------------------------------------------------------------------- Lightning's files


def lightning_content(model: Decoder, tokenizer: CharacterTokenizer) -> dict[str, object]:
    """What a run writes, as far as a model and its use are concerned."""
    files = tokenizer.files().items()
    return {
        "hyper_parameters": {"learning_rate": 1e-3, "betas": [0.9, 0.95], **model.config},
        "state_dict": {f"decoder.{name}": value for name, value in model.state_dict().items()},
        "task": {"class_path": "some.Task", "init_args": {"reverse": True}},
        "tokenizer": {
            name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files
        },
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tokenizer = CharacterTokenizer("0123456789+=", special=True)
    model = micro(vocab_size=14, tie_weights=True)
    torch.save(lightning_content(model, tokenizer), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_lightning_checkpoint(run: Path) -> None:
    found = load(run)
    assert found.tokenizer is not None
    assert found.tokenizer.encode("1+1=") == [1, 10, 1, 11]
    assert found.tokenizer.stop_token == 12
    assert found.task == {"class_path": "some.Task", "init_args": {"reverse": True}}
    assert found.model.head.weight is found.model.embedding.weight
    weights = torch.load(run, weights_only=True)["state_dict"]
    assert all(w.equal(weights[f"decoder.{n}"]) for n, w in found.model.state_dict().items())


def test_a_real_runs_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import lightning

    from archzoo.tasks import Addition
    from archzoo.training.module import LanguageModel

    task = Addition(digits=1, batch_size=4, held_out=4)
    module = LanguageModel("retnet_micro", learning_rate=0.01, dropout=0.1)
    trainer = lightning.Trainer(
        max_steps=2,
        logger=False,
        accelerator="cpu",
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, task)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    found = load(tmp_path / "run.ckpt")
    assert same(module.net, found.model)
    assert found.model.config["dropout"] == 0.1
    assert found.task == task.config()
    assert found.tokenizer is not None
    assert found.tokenizer.files() == task.tokenizer.files()

    capsys.readouterr()
    generate_command(str(tmp_path / "run.ckpt"), ["5+7="], max_tokens=3, check=True)
    assert capsys.readouterr().out.startswith("5+7=")


def test_from_run_to_directory(run: Path, tmp_path: Path) -> None:
    found = load(run)
    archzoo.save_pretrained(tmp_path / "model", *found)
    again = load(tmp_path / "model")
    with torch.no_grad():
        tokens = torch.tensor([[1, 10, 1, 11]])
        assert again.model(tokens).logits.equal(found.model(tokens).logits)
    assert again.task == found.task
    assert again.tokenizer is not None
    assert again.tokenizer.files() == found.tokenizer.files()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_checkpoint(run: Path, share: float) -> None:
    os.truncate(run, int(share * run.stat().st_size))
    refused(run, ValueError, "is (empty|truncated)")


def test_damaged_checkpoint(run: Path) -> None:
    content = bytearray(run.read_bytes())
    where = content.index(b"PK", 4) - 200  # the end of the first record, which is the pickle
    content[where : where + 150] = b"\xff" * 150
    run.write_bytes(content)
    refused(run, ValueError, "is damaged")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 5])
def test_code_is_refused_and_not_run(tmp_path: Path, legacy: bool, protocol: int) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "it_ran"
    torch.save(
        {"state_dict": {}, "hyper_parameters": Evil(trace)},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    refused(path, ValueError, "holds code|more than plain data|bare pickle")
    path.write_bytes(pickle.dumps(Evil(trace), protocol))
    refused(path, ValueError, "is a bare pickle, which may run code when loaded: refused")
    assert not trace.exists()
    # The trap is armed: a reader that trusts the file runs it.
    pickle.loads(path.read_bytes())
    assert trace.exists()


def test_objects_are_refused(run: Path) -> None:
    content = read_safely(run)
    content["hyper_parameters"]["mixer"] = functools.partial(archzoo.Retention, value_factor=1)
    torch.save(content, run)
    refused(run, ValueError, r"holds code \(functools\.partial\)")


@pytest.mark.parametrize(
    "content", [[1, 2], {"state_dict": {}}, {"state_dict": {}, "hyper_parameters": {"dim": 32}}]
)
def test_other_files_of_torch(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    words = "is not a valid checkpoint|was not written by archzoo"
    refused(tmp_path / "other.pt", ValueError, words)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello world")
    refused(tmp_path / "text", ValueError, "is not a valid checkpoint")


def test_lightning_checkpoint_of_another_vocabulary(run: Path) -> None:
    content = read_safely(run)
    content["hyper_parameters"]["vocab_size"] = 99
    torch.save(content, run)
    refused(run, ValueError, "a vocabulary of 14 tokens, and the configuration says 99")
