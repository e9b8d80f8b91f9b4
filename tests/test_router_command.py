"""`archzoo router`: the load is counted exactly, padding out and shared experts in."""

import pytest
import torch

import archzoo
from archzoo.analysis import routing
from archzoo.analysis.routing import read_routers
from archzoo.cli import main

RUN = """
seed_everything: 0
model: {preset: skywork_micro, width: 8}
data: {class_path: Addition, init_args: {digits: 1, batch_size: 8}}
trainer: {accelerator: cpu, max_steps: 4, limit_val_batches: 1, log_every_n_steps: 1}
"""


def mixture(**arguments):
    return archzoo.create_model(
        "transformer_micro",
        feed_forward={"class_path": "MixtureOfExperts", "init_args": arguments},
    )


def test_shares_are_counted_over_all_batches_without_padding():
    net = mixture(experts=4, top_k=2, shared_experts=2)
    documents = torch.tensor([[-1] * 3 + [0] * 9, [0] * 5 + [1] * 7])
    batches = [
        {"tokens": torch.randint(64, (2, 12)), "documents": documents},
        {"tokens": torch.randint(64, (1, 30))},
    ]
    counts, seen = torch.zeros(2, 4), []
    for layer, block in enumerate(net.blocks):
        block.feed_forward.router.register_forward_hook(
            lambda _, arguments, routing, layer=layer: seen.append((layer, arguments, routing))
        )
    layers = read_routers(net, batches)
    for layer, (_, context), decision in seen:
        chosen = decision.indices[context.valid.flatten()]
        counts[layer] += chosen.flatten().bincount(minlength=4)
    assert len(seen) == 4
    for layer in layers:
        want = counts[layer.number] / (9 + 12 + 30)
        assert layer.fractions == pytest.approx(want.tolist())
        assert sum(layer.fractions) == pytest.approx(2) and layer.even == 0.5
        assert layer.shared == 2
        assert layer.values["max_violation"] == pytest.approx((want.max() / 0.5 - 1).item())
        assert "coefficient" not in layer.values


def test_ratios_weigh_batches_by_their_tokens():
    net = mixture(experts=4)
    rows = torch.randint(64, (4, 10))
    together = read_routers(net, [{"tokens": rows}])
    apart = read_routers(net, [{"tokens": rows[:1]}, {"tokens": rows[1:]}])
    for a, b in zip(together, apart, strict=True):
        assert a.values == pytest.approx(b.values, rel=1e-5)


def test_the_model_is_left_without_a_graph_and_in_evaluation():
    net = mixture(experts=4, drop="position", capacity_factor=0.1)
    (first, _) = read_routers(net, [{"tokens": torch.randint(64, (2, 12))}])
    assert not net.training
    assert first.values["drop_rate"] > 0.5, "the virtual rate: nothing is dropped in evaluation"


def test_the_command_on_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    assert main(["fit", "--config", "run.yaml"]) == 0
    capsys.readouterr()
    assert main(["router", "runs/run", "--figure", "router.png", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert all(heading in shown for heading in routing.COLUMNS.values())
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")
    history = routing._history(tmp_path / "runs/run/metrics.csv")
    assert set(history) == {"coefficient", "drop_rate", "max1_max2"}
    assert [step for step, _ in history["coefficient"][1]] == [1, 2, 3, 4]
    assert main(["router", "runs/run/last.ckpt", "--batches", "0"]) == 1
    assert "batches=0 must be at least 1" in capsys.readouterr().err


def test_what_has_no_router_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="no router: its feed-forward is GatedFeedForward"):
        read_routers(archzoo.create_model("transformer_micro"), [])
    with pytest.raises(ValueError, match="no batch"):
        read_routers(mixture(experts=4), [])
    archzoo.save_pretrained(tmp_path / "model", mixture(experts=4))
    assert main(["router", str(tmp_path / "model")]) == 1
    assert "there is no task" in capsys.readouterr().err
