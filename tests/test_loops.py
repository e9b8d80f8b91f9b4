"""Looped blocks and input injection."""

import json

import pytest
import torch
from families import MICRO, micro

import archzoo
from archzoo.block import Aux, make_context

TOKENS = torch.arange(22).view(2, 11)


def looped(name="transformer_micro", **arguments):
    torch.manual_seed(0)
    arguments = {"init_std": 0.2, "depth": 2} | arguments
    return micro(name, **arguments).double()


def unrolled(model):
    """The same by hand: x through the blocks, the embedding added where it is said."""
    context, _ = make_context(*TOKENS.shape)
    embedding, _ = model.embedding(TOKENS, None, context)
    x, first = embedding, True
    for _ in range(model.loops):
        for layer, block in enumerate(model.blocks):
            adds = {"none": False, "layer": True, "loop": layer == 0}[model.injection]
            if adds and not first:
                x = x + embedding
            x, _, _ = block(x, None, context)
            first = False
    return model.norm(x)


@pytest.mark.parametrize("injection", ["none", "layer", "loop"])
@pytest.mark.parametrize("loops", [1, 3])
def test_what_is_computed(loops, injection):
    model = looped(loops=loops, injection=injection)
    got, _, _ = model.hidden(TOKENS)
    torch.testing.assert_close(got, unrolled(model), rtol=1e-12, atol=1e-12)


def test_one_loop_without_injection_is_the_standard_model():
    plain, once = looped(), looped(loops=1, injection="none")
    assert plain.config == once.config
    assert torch.equal(plain(TOKENS).logits, once(TOKENS).logits)


def test_every_choice_changes_the_model_and_no_parameter_count():
    choices = [(1, "none"), (1, "layer"), (2, "none"), (2, "loop"), (2, "layer"), (3, "none")]
    models = [looped(loops=loops, injection=injection) for loops, injection in choices]
    assert len({model.parameter_count() for model in models}) == 1
    # Closing projections start smaller the deeper the model is; make weights equal.
    for model in models:
        model.load_state_dict(models[0].state_dict())
    outputs = [model(TOKENS).logits for model in models]
    for index, one in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert (one - other).abs().max() > 1e-3
    stored = json.loads(json.dumps(models[3].config))
    again = archzoo.Decoder(**stored).double()
    again.load_state_dict(models[3].state_dict())
    assert torch.equal(again(TOKENS).logits, outputs[3])


@pytest.mark.parametrize("name", MICRO)
def test_a_state_for_each_run_of_the_stack(name):
    model = looped(name, loops=3, injection="loop").eval()
    with torch.no_grad():
        whole = model(TOKENS).logits
        state = model.init_state(2)
        assert len(state["blocks"]) == 6
        found = []
        for segment in TOKENS.split([1, 5, 1, 1, 3], dim=1):
            output = model(segment, state)
            found.append(output.logits)
            state = output.state
    error = (torch.cat(found, 1) - whole).norm() / whole.norm()
    assert error < 1e-12


def test_no_grad_loops_compute_the_same_and_carry_no_gradient():
    model = looped(loops=3, injection="none")
    full, _, _ = model.hidden(TOKENS)
    got, _, _ = model.hidden(TOKENS, no_grad_loops=1)
    torch.testing.assert_close(got, full, rtol=1e-12, atol=1e-12)
    (embedding,) = torch.autograd.grad(
        got.square().sum(), [model.embedding.weight], allow_unused=True
    )
    assert embedding is None  # all that came of it has no gradient

    # With injection the embedding is added again later; what came before is a constant.
    model = looped(loops=3, injection="loop")
    weights = list(model.blocks.parameters())
    got, _, _ = model.hidden(TOKENS, no_grad_loops=2)
    found = torch.autograd.grad((got**3).sum(), [*weights, model.embedding.weight])
    context, _ = make_context(*TOKENS.shape)
    embedding, _ = model.embedding(TOKENS, None, context)
    with torch.no_grad():
        x = embedding
        for loop in range(2):
            x = x + embedding if loop else x
            for block in model.blocks:
                x, _, _ = block(x, None, context)
    x = x + embedding
    for block in model.blocks:
        x, _, _ = block(x, None, context)
    want = torch.autograd.grad((model.norm(x) ** 3).sum(), [*weights, model.embedding.weight])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_fewer_loops_than_the_model_has():
    model = looped(loops=3, injection="loop")
    once = looped(loops=1, injection="loop")
    once.load_state_dict(model.state_dict())
    assert torch.equal(model.hidden(TOKENS, loops=1)[0], once.hidden(TOKENS)[0])
    with pytest.raises(ValueError, match="3 iterations without gradients and 0 with"):
        model.hidden(TOKENS, no_grad_loops=3)
    with pytest.raises(ValueError, match="a state needs 3 in all"):
        model.hidden(TOKENS, model.init_state(2), loops=1)


class Counts(archzoo.GatedFeedForward):
    """Three kinds of aux, and the sums it was handed."""

    def forward(self, x, context):
        y, _ = super().forward(x, context)
        one = torch.ones((), dtype=x.dtype)
        return y, Aux({"l": 2 * one}, {"m": 3 * one}, {"s": 5 * one})

    def after_step(self, sums):
        self.got = {name: float(value) for name, value in sums.items()}


def test_losses_and_sums_add_up_over_the_runs_and_metrics_are_averaged():
    model = looped(loops=3)
    for block in model.blocks:
        block.feed_forward = Counts(model.dim, model.width).double()
    _, _, aux = model.hidden(TOKENS, no_grad_loops=1)
    assert aux == [Aux({"l": 4}, {"m": 3}, {"s": 10})] * 2
    model.after_step([layer.sums for layer in aux])
    assert [block.feed_forward.got for block in model.blocks] == [{"s": 10}] * 2


def test_recomputing_blocks_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = looped(loops=2, injection="layer", activation_checkpointing=recompute).train()
        model(TOKENS).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_branches_start_smaller_by_the_depth_that_is_run():
    stds = []
    for loops in (1, 4):
        model = archzoo.create_model("transformer_micro", dim=128, loops=loops)
        stds.append(torch.stack([b.mixer.output.weight.std() for b in model.blocks]).mean())
    assert float(stds[0] / stds[1]) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"loops": 0}, "loops=0 must be"), ({"injection": "linear"}, "is not one of none, layer")],
)
def test_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        looped(**arguments)
