"""Upcycling: the first logits are the dense model's, and the experts diverge in training."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from families import MICRO, micro

import archzoo
from archzoo.cli import main
from archzoo.contract import relative_error
from archzoo.conversion.upcycle import upcycle

ATTENTION = {"router": "AttentionRouter", "experts": 4, "top_k": 3}
NORMED = {
    "router": {"class_path": "LinearRouter", "init_args": {"logit_norm": 1.0}},
    "balance": "squared_mean",
    "adaptive": True,
}
PLAIN = {"class_path": "GatedFeedForward", "init_args": {}}
DENSE = [name for name in MICRO if micro(name).config["feed_forward"] == PLAIN]
SIGMOID = {"router": {"class_path": "LinearRouter", "init_args": {"score": "sigmoid"}}}


def off(**init_args):
    return {"class_path": "LinearRouter", "init_args": init_args}


@pytest.mark.parametrize("mixture", [{}, ATTENTION, NORMED, SIGMOID], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_first_logits_are_the_dense_models(name, mixture):
    dense = micro(name, init_std=0.2, tie_weights=True).double()
    kept = copy.deepcopy(dense.state_dict())
    sparse = upcycle(dense, **mixture)
    tokens = torch.randint(64, (2, 20))
    assert relative_error(sparse(tokens).logits, dense(tokens).logits) < 1e-12
    assert all(torch.equal(value, kept[k]) for k, value in dense.state_dict().items())
    assert sparse.blocks[0].feed_forward.experts.similarity().item() == pytest.approx(1)
    again = archzoo.Decoder(**sparse.config)
    assert again.parameter_count() == sparse.parameter_count() > dense.parameter_count()


def test_experts_come_apart_and_the_metric_says_so():
    torch.manual_seed(0)
    sparse = upcycle(archzoo.create_model("transformer_micro", init_std=0.2), experts=4)
    optimizer = torch.optim.Adam(sparse.parameters(), lr=1e-2)
    tokens, seen = torch.randint(64, (4, 24)), []
    for _ in range(15):
        output = sparse(tokens)
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        seen.append([layer.metrics["similarity"].item() for layer in output.aux])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[0] == pytest.approx([1, 1], abs=1e-5)
    assert all(later < earlier - 0.01 for earlier, later in zip(seen[0], seen[-1], strict=True))


def test_the_same_seed_gives_the_same_routers():
    dense = archzoo.create_model("transformer_micro")
    first, same, other = (
        upcycle(dense, seed=seed).blocks[0].feed_forward.router.projection.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"router": off(renormalise=False)}, "off a sum of 1"),
        ({"router": off(renormalise=False, score="sigmoid")}, "renormalise to true"),
        ({"top_k": 1}, "off a sum of 1"),
        ({"shared_experts": 1}, "shared experts would be added"),
        ({"expert": 4}, "no argument 'expert'; nearest: experts"),
    ],
)
def test_what_would_not_be_equal_is_refused(mixture, words):
    with pytest.raises(ValueError, match=words):
        upcycle(archzoo.create_model("transformer_micro"), **mixture)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("skywork_micro", None),
        ("transformer_micro", "PlainFeedForward"),
        (
            "transformer_micro",
            {"class_path": "GatedFeedForward", "init_args": {"activation": "gelu"}},
        ),
    ],
)
def test_only_swiglu_can_be_upcycled(name, part):
    with pytest.raises(ValueError, match="only GatedFeedForward with silu"):
        upcycle(archzoo.create_model(name, feed_forward=part))


def test_the_command_writes_a_model_that_can_be_read(tmp_path, capsys):
    dense = archzoo.create_model("transformer_micro", init_std=0.2)
    archzoo.save_pretrained(tmp_path / "dense", dense)
    arguments = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--experts", "4"]
    assert main([*arguments, "--init_args.balance", "squared_mean"]) == 0
    assert "of them active" in capsys.readouterr().out
    sparse, _ = archzoo.from_pretrained(tmp_path / "sparse")
    assert sparse.config["feed_forward"]["init_args"]["balance"] == "squared_mean"
    tokens = torch.randint(64, (2, 20))
    assert relative_error(sparse(tokens).logits, dense.eval()(tokens).logits) < 1e-5
    options = ["--router", "AttentionRouter", "--router_args.logit_norm", "0.5"]
    capsys.readouterr()
    assert main(arguments) == 1, "what stands there is not written over"
    assert f"{tmp_path / 'sparse'} exists: name a directory" in capsys.readouterr().err
    assert main(["upcycle", str(tmp_path / "dense")]) == 1
    assert "--out DIR" in capsys.readouterr().err
    arguments[2:3] = ["--out", str(tmp_path / "other")]
    assert main([*arguments, "--top_k", "1", *options, "--router_args.renormalise", "true"]) == 0
    sparse, _ = archzoo.from_pretrained(tmp_path / "other")
    router = sparse.blocks[0].feed_forward.router
    assert type(router).__name__ == "AttentionRouter"
    assert router.logit_norm == 0.5 and router.renormalise and router.top_k == 1
    arguments[3] = str(tmp_path / "third")
    capsys.readouterr()
    assert main([*arguments, "--top_k", "1"]) == 1
    assert "--router_args.renormalise true" in capsys.readouterr().err
    assert main([*arguments, "--init_args.shared_experts", "1"]) == 1
    assert "omit shared_experts" in capsys.readouterr().err


DENSE = """
seed_everything: 0
model: {preset: transformer_micro, width: 16}
data: {class_path: Addition, init_args: {digits: 1, batch_size: 8, validation_examples: 20}}
trainer: {accelerator: cpu, max_steps: 3, val_check_interval: 3, log_every_n_steps: 1}
"""


def test_training_resumes_from_what_was_upcycled(tmp_path, monkeypatch, capsys):
    """From the dense run's loss, while the experts diverge."""
    monkeypatch.chdir(tmp_path)
    Path("dense.yaml").write_text(DENSE)
    assert main(["fit", "--config", "dense.yaml"]) == 0
    upcycle = ["upcycle", "runs/dense/last.ckpt", "moe", "--experts", "4"]
    assert main([*upcycle, "--init_args.balance", "squared_mean"]) == 0
    fit = ["fit", "--model.weights", "moe", "--trainer.accelerator", "cpu"]
    steps = ["--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1"]
    assert main([*fit, *steps, "--model.learning_rate", "0.02", "--model.warmup_steps", "1"]) == 0
    dense, sparse = (
        list(csv.DictReader(Path(f"runs/{name}/metrics.csv").read_text().splitlines()))
        for name in ("dense", "moe_fit")
    )
    first = next(float(row["train/loss"]) for row in sparse if row["train/loss"])
    last = [float(row["validation/loss"]) for row in dense if row["validation/loss"]][-1]
    assert first == pytest.approx(last, abs=0.2), "the loss at which the dense run ended"
    for layer in range(2):
        seen = [row[f"train/metric/similarity/{layer}"] for row in sparse]
        values = [float(value) for value in seen if value]
        assert values[0] == pytest.approx(1, abs=1e-5) and values[-1] < values[0] - 1e-4
    # A run of its own, which resumes like any other.
    more = ["fit", "--ckpt_path", "runs/moe_fit/last.ckpt", "--trainer.max_steps", "5"]
    assert main([*more, "--trainer.accelerator", "cpu"]) == 0
    capsys.readouterr()
    assert main([*fit, "--model.dim", "64"]) == 1
    assert "brings its own architecture: omit dim" in capsys.readouterr().err
    two = ["--data", "Addition", "--data.digits", "1", "--data.reverse", "true"]
    assert main([*fit, *two, "--trainer.max_steps", "1"]) == 0, "the same vocabulary"
    Path("text.txt").write_text("abc\n" * 200)
    other = ["--data", "Text", "--data.path", "text.txt", "--data.context_length", "8"]
    assert main([*fit, *other, "--data.cache_dir", "cache"]) == 1
    assert "another vocabulary" in capsys.readouterr().err


def test_a_model_with_adapters_is_not_upcycled():
    net = archzoo.create_model("transformer_micro", vocab_size=20, adapter="LoRA")
    with pytest.raises(ValueError, match=r"archzoo\.merge_adapter merges them"):
        upcycle(net, experts=4)
    assert upcycle(archzoo.merge_adapters(net), experts=4).config["adapter"] is None
