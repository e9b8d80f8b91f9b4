"""Every model of the zoo, found by being registered: a new family is tested without a line here.

Each micro preset is trained for two steps on sums, which binds it to a task as training does, and
is then rebuilt, run in every form, saved, loaded, and made to generate.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import lightning
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import archzoo
from archzoo import models
from archzoo.analysis.listing import row_of
from archzoo.block import FORMS
from archzoo.cli import main
from archzoo.contract import relative_error
from archzoo.decoder import Decoder
from archzoo.models import ACTIVE_PARAMETERS, sized_as_named
from archzoo.registry import get_preset
from archzoo.tasks import Addition
from archzoo.training.files import CheckpointFiles
from archzoo.training.module import LanguageModel

FAMILIES = [module.name for module in pkgutil.iter_modules(models.__path__)]
MICRO = archzoo.list_models("*_micro")
micro = pytest.mark.parametrize("name", MICRO)


class Trained(NamedTuple):
    module: LanguageModel
    task: Addition
    checkpoint: Path


@functools.cache
def trained(name: str, directory: Path) -> Trained:
    """A micro preset after two steps on sums of three digits, and its run's checkpoint."""
    torch.manual_seed(0)
    task = Addition(digits=3, batch_size=8, validation_examples=8, test_examples=8)
    module = LanguageModel(name, init_std=0.3)  # at which contexts matter to the logits
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[CheckpointFiles()],
    )
    trainer.fit(module, task)
    trainer.save_checkpoint(directory / f"{name}.ckpt")
    return Trained(module, task, directory / f"{name}.ckpt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def model_of(name: str, runs: Path) -> Decoder:
    """Its decoder in float64, where equal means equal, for a test to do with as it likes."""
    return copy.deepcopy(trained(name, runs).module.net).double().eval()


def problems(name: str, runs: Path) -> list[Tensor]:
    """The tokens of some sums, each of its own length."""
    batch = trained(name, runs).task.train_dataloader().batch(1)
    return [row[kept >= 0] for row, kept in zip(batch["tokens"], batch["documents"], strict=True)]


def same(first: Decoder, second: Decoder, tokens: Tensor) -> bool:
    """Configuration, names, weights with their dtypes, and logits, bit for bit."""
    weights, others = first.state_dict(), second.state_dict()
    with torch.no_grad():
        return (
            first.config == second.config
            and weights.keys() == others.keys()
            and all(w.dtype == others[n].dtype and w.equal(others[n]) for n, w in weights.items())
            and first.eval()(tokens).logits.equal(second.eval()(tokens).logits)
        )


# ---------------------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_in_every_size(family: str) -> None:
    for size in ACTIVE_PARAMETERS:
        assert f"{family}_{size}" in archzoo.list_models()


@pytest.mark.parametrize("name", archzoo.list_models())
def test_a_preset_is_what_its_name_and_its_file_say(name: str) -> None:
    """Sized as promised, or its file's docstring says why, naming the size; nothing is built."""
    preset = get_preset(name)
    size = name.rpartition("_")[2]
    assert preset.paper.startswith("arXiv ") and "Ingredients" in preset.about
    assert preset.arguments["context_length"]
    assert size in ACTIVE_PARAMETERS
    [why] = re.findall(r"^Sizes: (?:.+\n)+", preset.about, re.MULTILINE) or [""]
    assert sized_as_named(name, row_of(name).active) or re.search(rf"\b{size}\b", why)
    with torch.device("meta"):
        config = json.loads(json.dumps(archzoo.create_model(name).config))
        assert Decoder(**config).config == config


def test_the_promises_of_sizes() -> None:
    assert ACTIVE_PARAMETERS == {"micro": 30e3, "tiny": 0.86e6, "small": 30e6, "base": 110e6}
    assert sized_as_named("retnet_small", 34_000_000) and sized_as_named("mine_3b", 1)
    assert not sized_as_named("retnet_small", 35_000_000)
    assert not sized_as_named("retnet_small", 25_000_000)


def test_listing_shows_the_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "*_small"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "within 15%: micro 30,000, tiny 860,000, small 30,000,000, base 110,000,000." in shown
    assert shown.endswith("Sized otherwise, for reasons that archzoo show gives: abacus_small.")


# ---------------------------------------------------------------------------- forms


@micro
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@torch.no_grad()
def test_forms_agree_and_hand_over_to_each_other(
    name: str, dtype: torch.dtype, allowed: float, runs: Path
) -> None:
    """Packed and padded rows and plain ones, whole, token by token, and from each form to each."""
    model, sums = model_of(name, runs).to(dtype), problems(name, runs)
    packed = [torch.cat(sums[:4]), torch.cat(sums[4:])]
    numbers = [
        torch.cat([torch.full_like(tokens, number) for number, tokens in enumerate(row)])
        for row in (sums[:4], sums[4:])
    ]
    time = max(map(len, packed)) + 2
    padding = [(time - 1 - len(row), 1) for row in packed]  # on the left, and one on the right
    tokens = torch.stack([F.pad(r, pad) for r, pad in zip(packed, padding, strict=True)])
    padded = torch.stack([F.pad(r, pad, value=-1) for r, pad in zip(numbers, padding, strict=True)])
    handed_over = [(a, b, (0, 11, 12, 20, time)) for a in FORMS for b in FORMS]
    for documents in (None, padded):
        valid = torch.ones_like(padded, dtype=torch.bool) if documents is None else padded >= 0
        want = model(tokens, documents=documents, form="recurrent").logits
        for form in (*FORMS, None):
            got = model(tokens, documents=documents, form=form).logits
            assert relative_error(got[valid], want[valid]) < allowed, form
        for first, second, cuts in [*handed_over, (None, None, range(time + 1))]:
            state, segments = model.init_state(2), []
            for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
                here = None if documents is None else documents[:, begin:end]
                form = second if number % 2 else first
                output = model(tokens[:, begin:end], state, here, form=form)
                state = output.state
                segments.append(output.logits)
            got = torch.cat(segments, dim=1)
            assert relative_error(got[valid], want[valid]) < allowed, (first, second)


@micro
@torch.no_grad()
def test_a_row_of_a_batch_is_what_the_text_gets_alone(name: str, runs: Path) -> None:
    model, sums = model_of(name, runs), problems(name, runs)
    longest = max(map(len, sums))
    tokens = torch.stack([F.pad(row, (longest - len(row), 0)) for row in sums])
    documents = torch.stack([F.pad(0 * row, (longest - len(row), 0), value=-1) for row in sums])
    together = model(tokens, documents=documents).logits
    for row, alone in enumerate(sums):
        want = model(alone[None]).logits[0]
        assert relative_error(together[row, longest - len(alone) :], want) < 1e-12


# ---------------------------------------------------------------------------- files


@micro
def test_its_configuration_builds_it_again(name: str, runs: Path) -> None:
    model = copy.deepcopy(trained(name, runs).module.net)
    config = json.loads(json.dumps(model.config))  # config.json holds no more than JSON does
    torch.manual_seed(1)  # other draws than the model's own
    again = Decoder(**config)
    again.load_state_dict(model.state_dict())
    assert same(again, model, problems(name, runs)[0][None])


@micro
def test_it_is_saved_and_loaded(name: str, runs: Path, tmp_path: Path) -> None:
    module, task, checkpoint = trained(name, runs)
    archzoo.save_pretrained(tmp_path, module.net, task.tokenizer)
    for path in (tmp_path, checkpoint):
        again, tokenizer = archzoo.from_pretrained(path)
        assert same(again, copy.deepcopy(module.net), problems(name, runs)[0][None])
        assert tokenizer is not None and tokenizer.files() == task.tokenizer.files()


# ---------------------------------------------------------------------------- use


@micro
@torch.no_grad()
def test_it_writes_what_a_plain_pass_finds_most_likely(name: str, runs: Path) -> None:
    """Prompts of several lengths, carried on and recomputed."""
    model = model_of(name, runs)
    first, second, third, *_ = problems(name, runs)
    prompts = [first[:4].tolist(), second[:1].tolist(), third[:6].tolist()]
    written = archzoo.generate(model, prompts, max_tokens=5, check=True)
    assert written.largest_difference is not None and written.largest_difference < 1e-12
    for prompt, tokens in zip(prompts, written.tokens, strict=True):
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


@micro
def test_every_parameter_gets_a_gradient(name: str, runs: Path) -> None:
    module, task, _ = trained(name, runs)
    module.zero_grad()
    module.train().training_step(task.train_dataloader().batch(2), 0).backward()
    for parameter_name, parameter in module.net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name
