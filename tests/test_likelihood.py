"""Log-likelihoods by which evaluations score: those of `archzoo test`, whatever the batch is."""

import math
import sys
from pathlib import Path

import lightning
import pytest
import torch
from families import MICRO, micro
from torch.nn import functional as F

import archzoo
from archzoo.cli import main
from archzoo.evaluation.likelihood import Scored, log_likelihoods
from archzoo.inputs import IGNORED
from archzoo.tasks import Text
from archzoo.training.module import LanguageModel

DATA = Path(__file__).parents[1] / "data"


def sharpened(name="retnet_micro", **arguments):
    """A micro model to which contexts matter."""
    torch.manual_seed(1)
    model = micro(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    return model.eval()


def pairs_of(lengths, vocab_size=64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(vocab_size, (n,), generator=generator).tolist() for n in pair)
        for pair in lengths
    ]


LENGTHS = [(1, 1), (7, 3), (2, 12), (20, 1), (5, 5), (1, 19), (9, 2)]


@pytest.mark.parametrize(
    ("tokenizer", "size"), [("characters", None), ("bpe", 300)], ids=["characters", "bpe"]
)
@pytest.mark.parametrize("name", ["retnet_micro", "transformer_micro"])
def test_sums_are_those_of_the_test_command(tmp_path, name, tokenizer, size):
    """On the same windows and labels, the last and shorter window included."""
    path = tmp_path / "text.txt"
    path.write_text((DATA / "shakespeare.txt").read_text()[5000:45_000])
    task = Text(
        str(path), tokenizer, size, context_length=48, batch_size=4, cache_dir=str(tmp_path)
    )
    task.prepare()
    module = LanguageModel(name)
    module.decoder = sharpened(name, vocab_size=task.vocab_size)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    logged = trainer.test(module, task, verbose=False)[0]
    pairs, size = [], 0
    for batch in task.evaluation_loader("test"):
        for tokens, labels, told in zip(
            *(batch[name] for name in ("tokens", "labels", "bytes")), strict=True
        ):
            kept = labels != IGNORED
            row = [*tokens[kept].tolist(), *labels[kept].tolist()[-1:]]
            pairs.append((row[:1], row[1:]))
            size += int(told[kept].sum())
    assert len(pairs) > 8 and len(pairs[-1][1]) < 48
    scored = log_likelihoods(module.decoder, pairs, batch_size=5)
    nats = -sum(each.log_likelihood for each in scored)
    count = sum(len(continuation) for _, continuation in pairs)
    assert nats == pytest.approx(logged["test/loss"] * count, rel=1e-6)
    bits = nats / math.log(2) / size
    assert bits == pytest.approx(logged["test/bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("name", [*MICRO, "hybrid"])
def test_a_batch_scores_what_each_gets_alone(name):
    """Of any lengths, padded on the left: equal to a softmax over the logits of one row."""
    arguments = {"pattern": ["Retention", "Attention"]} if name == "hybrid" else {}
    model = sharpened("retnet_micro" if name == "hybrid" else name, **arguments).double()
    pairs = pairs_of(LENGTHS)
    together = log_likelihoods(model, pairs, batch_size=4)
    alone = log_likelihoods(model, pairs, batch_size=1)
    for (context, continuation), one, other in zip(pairs, together, alone, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
        here = logits[len(context) - 1 : -1]
        wanted = here.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert one.log_likelihood == pytest.approx(wanted, rel=1e-12)
        assert other.log_likelihood == pytest.approx(wanted, rel=1e-12)
        assert one.greedy == other.greedy == (here.argmax(-1).tolist() == continuation)


def test_what_decoding_writes_is_greedy_and_nothing_else():
    model = sharpened()
    prompts = [context for context, _ in pairs_of(LENGTHS)]
    written = archzoo.generate(model, prompts, max_tokens=6).tokens
    right = list(zip(prompts, written, strict=True))
    wrong = [(prompt, [*tokens[:3], (tokens[3] + 1) % 64]) for prompt, tokens in right]
    assert all(each.greedy for each in log_likelihoods(model, right))
    assert not any(each.greedy for each in log_likelihoods(model, wrong))


def test_bfloat16_is_scored_in_float32():
    model = sharpened().bfloat16()
    context, continuation = [1, 2, 3], [4, 5, 6, 7]
    (found,) = log_likelihoods(model, [(context, continuation)])
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, 2:-1].float()
    wanted = -F.cross_entropy(logits, torch.tensor(continuation), reduction="sum").item()
    assert found.log_likelihood == pytest.approx(wanted, rel=1e-6)


def test_nothing_to_score_costs_nothing_and_the_mode_stays():
    model, told = sharpened().train(), []
    pairs = [([1, 2], []), ([1], [2, 3]), ([4], [5])]
    found = log_likelihoods(model, pairs, batch_size=1, done=told.append)
    assert found[0] == Scored(0.0, True) and found[1].log_likelihood < 0
    assert model.training and told == [1, 1]
    with pytest.raises(ValueError, match="the first token of a text has no probability"):
        log_likelihoods(model, [([], [1])])


def test_the_command_says_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "nowhere", "--tasks", "shakespeare"]) == 1
    assert "pip install 'archzoo[eval]'" in capsys.readouterr().err
