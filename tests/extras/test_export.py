"""A directory for Hugging Face's transformers: it loads, generates and trains without archzoo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import archzoo
from archzoo.contract.measure import relative_error
from archzoo.export.hugging_face import write_transformers
from archzoo.tasks.tokenizers import (
    CharacterTokenizer,
    Tokenizer,
    learn_bpe,
    learn_characters,
    learn_unigram,
)

pytestmark = pytest.mark.extras
transformers = pytest.importorskip("transformers")

TOKENIZER = CharacterTokenizer("0123456789+=abc ", special=True)
DIGITS = {"digit_tokens": list(range(10)), "operator_tokens": [10, 11]}
FAMILIES = [name.removesuffix("_micro") for name in archzoo.list_models("*_micro")]
PROMPTS = ["12+34=", "7+", "a b c 1"]


def model_of(family: str, **given: object) -> archzoo.Decoder:
    torch.manual_seed(0)
    if family == "abacus":
        given["embedding"] = {"class_path": "AbacusEmbedding", "init_args": DIGITS}
    given = {"vocab_size": TOKENIZER.vocab_size} | given
    model = archzoo.create_model(f"{family}_micro", **given).eval()
    with torch.no_grad():  # so that what is drawn differs from token to token
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers copies a directory's source to."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("modules")
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(place))
        patch.syspath_prepend(str(place))
        yield


def exported(model: archzoo.Decoder, directory: Path):
    """The directory as transformers loads it."""
    if not directory.exists():
        write_transformers(directory, model, TOKENIZER)
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(directory, trust_remote_code=True).eval()
    return loaded, transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_decoding(family: str, tmp_path: Path) -> None:
    ours = model_of(family)
    theirs, tokenizer = exported(ours, tmp_path / family)
    assert type(theirs).__name__ == (
        "LlamaForCausalLM" if family == "transformer" else "ArchzooForCausalLM"
    )
    tokens = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert [row[m.bool()].tolist() for row, m in zip(*batch.values(), strict=True)] == tokens
    seen = batch["attention_mask"].bool()
    wanted = ours(batch["input_ids"], documents=seen.long() - 1).logits[seen]
    assert relative_error(theirs(**batch).logits[seen], wanted) < 1e-6
    exact = theirs.double()(**batch).logits[seen]
    wanted = ours.double()(batch["input_ids"], documents=seen.long() - 1).logits[seen]
    # Hugging Face's Llama computes its rotation and its norms in float32.
    assert relative_error(exact, wanted) < (1e-6 if family == "transformer" else 1e-12)

    greedy = theirs.generate(**batch, max_new_tokens=9, do_sample=False)
    found = archzoo.generate(ours, tokens, max_tokens=9, stop_token=TOKENIZER.stop_token).tokens
    for row, mine in zip(greedy[:, seen.shape[1] :].tolist(), found, strict=True):
        assert row[: len(mine)] == mine


TEXT = (Path(__file__).parents[2] / "data" / "shakespeare.txt").read_text()[:200_000]
TEXTS = ["ROMEO:\nO", "To be, or not to be:", "a"]
TEXT_TOKENIZERS = {
    "characters": lambda: learn_characters([TEXT]),
    "bpe": lambda: learn_bpe([TEXT], 400),
    "unigram": lambda: learn_unigram([TEXT], 500),
}


@pytest.mark.parametrize("family", ["retnet", "transformer"])
@pytest.mark.parametrize("kind", TEXT_TOKENIZERS)
@torch.no_grad()
def test_a_text_tokenizer_pads(kind: str, family: str, tmp_path: Path) -> None:
    """It has no token for padding of its own, and gets one that changes no text."""
    tokenizer: Tokenizer = TEXT_TOKENIZERS[kind]()
    ours = model_of(family, vocab_size=tokenizer.vocab_size)
    write_transformers(tmp_path / "model", ours, tokenizer)
    theirs, auto = exported(ours, tmp_path / "model")
    assert auto.padding_side == "left"
    tokens = [tokenizer.encode(text) for text in TEXTS]
    batch = auto(TEXTS, padding=True, return_tensors="pt")
    assert [row[m.bool()].tolist() for row, m in zip(*batch.values(), strict=True)] == tokens
    assert auto.decode(batch["input_ids"][2], skip_special_tokens=True).lstrip("\n") == "a"
    length = batch["input_ids"].shape[1]
    found = theirs.generate(**batch, max_new_tokens=9, do_sample=False)[:, length:].tolist()
    wanted = archzoo.generate(ours, tokens, max_tokens=9).tokens
    assert found == wanted
    alone = theirs.generate(torch.tensor(tokens[:1]), max_new_tokens=9, do_sample=False)
    assert alone[0, len(tokens[0]) :].tolist() == wanted[0]  # its line end is no padding
    ended = theirs.generate(**batch, max_new_tokens=9, do_sample=False, eos_token_id=wanted[0][2])
    for row, mine in zip(ended[:, length:].tolist(), wanted, strict=True):
        stop = [*mine, wanted[0][2]].index(wanted[0][2])
        assert row[:stop] == mine[:stop]  # others go on where a row has ended


def test_beams_and_sampling(tmp_path: Path) -> None:
    for family in ("retnet", "yuan"):
        theirs, tokenizer = exported(model_of(family), tmp_path / family)
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
        kept = theirs.generate(**batch, **how)
        assert torch.equal(kept, theirs.generate(**batch, **how, use_cache=False))
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            drawn.append(
                theirs.generate(**batch, max_new_tokens=8, do_sample=True, use_cache=use_cache)
            )
        assert torch.equal(*drawn)
        one = tokenizer(PROMPTS[1], return_tensors="pt")
        alone = theirs.generate(**one, **how)[0, one["input_ids"].shape[1] :].tolist()
        assert kept[1, batch["input_ids"].shape[1] :].tolist()[: len(alone)] == alone


def test_spread_over_devices_and_offloaded(tmp_path: Path) -> None:
    """A part that reads another's weights would read nothing where they are offloaded."""
    pytest.importorskip("accelerate")
    ours = model_of("yuan")
    theirs, tokenizer = exported(ours, tmp_path / "yuan")
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    names = ("model.embedding", "model.blocks.0", "model.blocks.1", "model.norm", "model.head")
    load = transformers.AutoModelForCausalLM.from_pretrained
    given = {"trust_remote_code": True, "offload_folder": tmp_path / "offload"}
    spread = load(tmp_path / "yuan", device_map=dict.fromkeys(names, "cpu"), **given)
    assert torch.equal(spread(**batch).logits, theirs(**batch).logits)
    kept = dict.fromkeys(names, "cpu") | {"model.blocks.1": "disk"}
    offloaded = load(tmp_path / "yuan", device_map=kept, **given)
    with pytest.raises(ValueError, match="take a device_map that keeps all in memory"):
        offloaded(**batch)


def test_the_state_is_the_cache(tmp_path: Path) -> None:
    theirs, _ = exported(model_of("retnet"), tmp_path / "retnet")
    tokens = torch.randint(10, (2, 12))
    with torch.no_grad():
        whole = theirs(tokens).logits
        first = theirs(tokens[:, :5], use_cache=True)
        cache = first[-1]
        size = cache.state["blocks"][0]["memory"].numel()
        steps = [first.logits]
        steps += [theirs(tokens[:, t : t + 1], cache=cache).logits for t in range(5, 12)]
        assert relative_error(torch.cat(steps, dim=1), whole) < 1e-5
    assert cache.get_seq_length() == 12
    assert cache.state["blocks"][0]["memory"].numel() == size


@pytest.mark.parametrize(
    "given",
    [{}, {"tie_weights": True}, {"mixer": "Attention", "tie_weights": True, "norm": "layer"}],
)
def test_saved_and_loaded_again(given: dict, tmp_path: Path) -> None:
    theirs, tokenizer = exported(model_of("retnet", **given), tmp_path / "first")
    theirs.save_pretrained(tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    again, _ = exported(model_of("retnet"), tmp_path / "second")
    tokens = torch.randint(10, (2, 12))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@torch.no_grad()
def test_a_mixer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    own = __import__("write_your_own_mixer")
    ours = model_of("retnet", mixer=own.FadingMemory)
    theirs, tokenizer = exported(ours, tmp_path / "own")
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    seen = batch["attention_mask"].bool()
    wanted = ours.double()(batch["input_ids"], documents=seen.long() - 1).logits[seen]
    assert relative_error(theirs.double()(**batch).logits[seen], wanted) < 1e-12
    found = theirs.float().generate(**batch, max_new_tokens=5, num_beams=2, do_sample=False)
    assert found.shape[1] > seen.shape[1]


def test_trainer_takes_a_step(tmp_path: Path) -> None:
    theirs, tokenizer = exported(model_of("skywork"), tmp_path / "skywork")
    rows = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in ["1+2=3"] * 4]
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trained = transformers.Trainer(theirs, arguments, train_dataset=rows).train()
    assert trained.training_loss > 0
    moved = [name for name, p in theirs.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)


def test_without_archzoo(tmp_path: Path) -> None:
    """In a process that cannot import it."""
    write_transformers(tmp_path / "model", model_of("retnet"), TOKENIZER)
    script = """
import sys
sys.modules["archzoo"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)
out = model.generate(**tokenizer(["1+2="], return_tensors="pt"), max_new_tokens=4)
print(out.shape[1] > 4, repr(tokenizer.decode(tokenizer("12+3=")["input_ids"])))
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "True '12+3='", done.stderr
