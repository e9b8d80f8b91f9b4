"""What an optimizer step is: its gradient however it is cut, and a step that is skipped."""

import lightning
import pytest
import torch
from families import MICRO
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

from archzoo import block as interface
from archzoo.block import Aux, FeedForward
from archzoo.tasks.stream import IGNORED
from archzoo.training.module import LanguageModel
from archzoo.training.progressive import passes

WORDS = 11
EACH = 4  # micro-batches of a step


def cut(labelled, carried=False):
    """Micro-batches of 2 rows and 9 tokens with this many labels: of padding, if None of text."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for count in labelled:
        tokens, labels = torch.randint(WORDS, (2, 2, 9), generator=generator)
        labels.view(-1)[torch.randperm(18, generator=generator)[count:]] = IGNORED
        batch = {"tokens": tokens, "labels": labels}
        if carried:
            batch["continues"] = torch.tensor([True, count % 2 == 0])
        else:
            length = torch.randint(4, 10, (2, 1), generator=generator)
            batch["documents"] = torch.where(torch.arange(9) < length, 0, -1)
            batch["labels"] = torch.where(batch["documents"] < 0, IGNORED, labels)
        batches.append(batch)
    return batches


def whole(batches, each=EACH):
    """The steps' micro-batches side by side."""
    steps = [batches[first : first + each] for first in range(0, len(batches), each)]
    return [{name: torch.cat([b[name] for b in step]) for name in step[0]} for step in steps]


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


class Gradients(lightning.Callback):
    """Those of every step before clipping, and of their norm; of float16 after unscaling."""

    def __init__(self):
        self.found, self.norms = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found.append({n: p.grad.clone() for n, p in module.net.named_parameters()})

    def on_train_batch_end(self, trainer, module, *_):
        if module._gradient_norm is not None:
            self.norms.append(float(module._gradient_norm))


def make(preset="transformer_micro", **arguments):
    lightning.seed_everything(0)
    # A rate that moves nothing: every step's gradient is taken at the same weights.
    return LanguageModel(preset, vocab_size=WORDS, learning_rate=1e-30, **arguments)


def trained(model, batches, each, *callbacks, ckpt_path=None, **arguments):
    seen = Gradients()
    settings = {"precision": "64-true", "gradient_clip_val": 0.1, "max_epochs": 1} | arguments
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        accumulate_grad_batches=each,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, *callbacks],
        **settings,
    )
    trainer.fit(model, loader(batches), ckpt_path=ckpt_path)
    return seen


def by_hand(model, batches, each=EACH):
    """The gradients that the docstring of `LanguageModel` promises, of a model not yet trained."""
    net, found, state = model.double().net, [], None
    names, weights = zip(*net.named_parameters(), strict=True)
    for taken, first in enumerate(range(0, len(batches), each)):
        step, losses, count = batches[first : first + each], 0, 0
        sums = [{} for _ in range(net.depth)]
        for batch in step:
            tokens, labels = batch["tokens"], batch["labels"]
            asked = int((labels != IGNORED).sum())
            count += asked
            if "continues" in batch:
                fresh = net.init_state(2)
                begun = state is not None
                state = interface.select_rows(batch["continues"], state, fresh) if begun else fresh
            for share, loops, free in passes(
                net.loops, model.progressive_loss, model.progressive_seed, taken
            ):
                x, after, aux = net.hidden(
                    tokens, state, batch.get("documents"), loops=loops, no_grad_loops=free
                )
                pooled = net.pooled_losses([layer.pools for layer in aux])
                loss = F.cross_entropy(
                    net.head(x).flatten(0, 1),
                    labels.flatten(),
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                extra = sum(value for layer in aux + pooled for value in layer.losses.values())
                losses = losses + share * (loss + asked * extra)
                for mine, layer in zip(sums, aux, strict=True):
                    for name, value in layer.sums.items():
                        mine[name] = mine.get(name, 0) + value
            state = None if after is None else interface.detach(after)
        grads = torch.autograd.grad(losses / count, weights)
        found.append(dict(zip(names, grads, strict=True)))
        net.after_step(sums)
    return found


def assert_same(found, wanted, allowed=1e-12):
    """Relative to the largest gradient, for what is 0 but for rounding has no digits."""
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        largest = max(value.abs().max().item() for value in theirs.values())
        assert largest > 1e-3
        for name, value in theirs.items():
            assert mine[name].dtype == torch.float64
            apart = (mine[name] - value).abs().max().item()
            assert apart <= allowed * largest, (name, apart / largest)


def mixture(**options):
    router = options.pop("router", {})
    return {
        "class_path": "MixtureOfExperts",
        "init_args": {"experts": 4, **options, "router": {"class_path": "LinearRouter"} | router},
    }


BIASED = {"init_args": {"bias_rate": 1e-2, "logit_norm": 1.0}}
Z = {"z_coefficient": 0.5}
FORMS = {
    "dense": {},
    "retention": {"preset": "retnet_micro"},
    "bias": {"feed_forward": mixture(balance="none", router=BIASED)},
    "progressive": {"loops": 4, "injection": "loop", "progressive_loss": 0.4},
}
UNEVEN = [18, 3, 0, 7, 1, 12, 5]  # the last step has three micro-batches, and one has no label


@pytest.mark.parametrize("form", FORMS)
def test_an_accumulation_is_the_large_batch(form):
    batches = cut(UNEVEN)
    model = make(**FORMS[form])
    found = trained(model, batches, EACH)
    large = make(**FORMS[form])
    assert_same(found.found, trained(large, whole(batches), 1).found)
    assert_same(found.found, by_hand(make(**FORMS[form]), batches))
    for (name, value), other in zip(
        model.net.state_dict().items(), large.net.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)


def test_counts_move_coefficients_as_the_large_batch_does():
    """Where each token has a label an accumulated z-loss is the large batch's, too."""
    batches = cut(UNEVEN)
    for batch in batches:
        batch["labels"] = torch.where(batch["documents"] < 0, IGNORED, batch["tokens"])
    options = {"adaptive": True, "capacity_factor": 0.3, "coefficient": 0.0}
    nets = []
    for each, steps in ((EACH, batches), (1, whole(batches))):
        model = make(feed_forward=mixture(**options, **Z, router=BIASED))
        for layer in model.net.blocks:  # of no weight in the loss, yet free to move
            layer.feed_forward.balance.largest = 0.5
        nets.append((trained(model, steps, each).found, model.net))
    assert_same(nets[0][0][:1], nets[1][0][:1])  # before the coefficient moves
    for ours, theirs in zip(nets[0][1].blocks, nets[1][1].blocks, strict=True):
        for name, value in ours.feed_forward.named_buffers():
            assert torch.equal(value, dict(theirs.feed_forward.named_buffers())[name]), name
            assert value.abs().sum() > 0


@pytest.mark.parametrize("over", ["rank", "ranks"])
@pytest.mark.parametrize("balance", ["none", "switch", "squared_mean"])
def test_auxiliary_losses_weigh_by_labelled_tokens(balance, over):
    options = {"balance": balance, "coefficient": 0.7, "balance_over": over}
    feed_forward, batches = mixture(**options, **Z), cut(UNEVEN)
    found = trained(make(feed_forward=feed_forward), batches, EACH)
    assert_same(found.found, by_hand(make(feed_forward=feed_forward), batches))
    without = make(feed_forward=mixture(balance="none"))
    name = "blocks.0.feed_forward.router.projection.weight"
    plain = trained(without, batches, EACH).found
    assert not torch.allclose(found.found[0][name], plain[0][name], rtol=0.1)


@pytest.mark.parametrize("preset", MICRO)
def test_an_accumulation_carries_the_state_from_micro_batch_to_micro_batch(preset):
    arguments = {"preset": preset, "mixer": "Retention", "embedding": "TokenEmbedding"}
    batches = cut(UNEVEN, carried=True)
    found = trained(make(**arguments), batches, EACH).found
    assert_same(found, by_hand(make(**arguments), batches))


def test_the_norm_that_is_clipped_and_logged_is_the_mean_gradient_s():
    batches = cut(UNEVEN)
    found = trained(make(), batches, EACH)
    for norm, gradients in zip(dict.fromkeys(found.norms), found.found, strict=True):
        flat = torch.cat([value.flatten() for value in gradients.values()])
        assert norm == pytest.approx(flat.norm().item(), rel=1e-12)
        assert norm > 0.1  # else nothing was clipped


class Nothing(lightning.Callback):
    """Ends the first epoch in the middle of an accumulation."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        return -1 if trainer.current_epoch == 0 and batch_idx == 2 else None


def test_an_accumulation_that_was_given_up_leaves_nothing_behind():
    batches, feed_forward = cut(UNEVEN), mixture(balance="none", router=BIASED)
    given, model = [], make(feed_forward=feed_forward)
    seen = Gradients()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        precision="64-true",
        accumulate_grad_batches=EACH,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, Nothing()],
    )
    after = model.net.after_step
    model.net.after_step = lambda sums: (given.append(sums), after(sums))
    trainer.fit(model, loader(batches))
    valid = sum(int((batch["documents"] >= 0).sum()) for batch in batches[:EACH])
    assert given[0][0]["assignments"].sum() == 2 * valid
    assert_same(seen.found[:2], by_hand(make(feed_forward=feed_forward), batches))


class Interrupt(lightning.Callback):
    """Ends a run in the middle of an accumulation."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == EACH + 2:
            raise RuntimeError("interrupted")


def test_a_run_of_the_same_object_begins_anew():
    batches, feed_forward = cut(UNEVEN), mixture(balance="none", router=BIASED)
    model = make(feed_forward=feed_forward)
    with pytest.raises(RuntimeError, match="interrupted"):
        trained(model, batches, EACH, Interrupt())
    assert model._sums and model.figures.sums()
    model._skipped = 2
    for block in model.net.blocks:
        block.feed_forward.router.reset_parameters()  # the bias has moved
    assert_same(
        trained(model, batches, EACH).found, by_hand(make(feed_forward=feed_forward), batches)
    )
    asked = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    assert model.figures.sums()["loss"][1] == asked and model.steps_taken == 2


# ---------------------------------------------------------------------------- skipped steps


class Counting(FeedForward):
    """A dense part that tells how often a step was taken."""

    def __init__(self, dim, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.taken = 0

    def forward(self, x, context):
        return x * self.weight, Aux(sums={"rows": torch.tensor(x.shape[0])})

    def after_step(self, sums):
        self.taken += 1


def half(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


class Rates(lightning.Callback):
    """The learning rate of every batch, the weights and buffers before it, and what was drawn."""

    def __init__(self):
        self.rates, self.states, self.taken = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.states.append({n: v.clone() for n, v in module.net.state_dict().items()})
        self.taken.append(module.steps_taken)


@pytest.mark.parametrize("each", [1, 2])
def test_a_step_that_float16_skips_moves_nothing(tmp_path, each):
    feed_forward = mixture(adaptive=True, coefficient=1.0, router=BIASED)
    model = make(feed_forward=feed_forward, loops=2, progressive_loss=0.5, warmup_steps=5)
    model.learning_rate = 1e-2
    seen = Rates()
    overflow = 2.0**30
    plugins = [half(overflow)]
    options = {"plugins": plugins, "precision": None, "log_every_n_steps": 1}
    trained(model, cut([9] * 40), each, seen, **options)
    skipped = model._skipped
    assert model.latest["train/skipped_steps"] == skipped
    assert 3 <= skipped <= 40 / each - 5, "some are skipped at first, and then some are not"
    assert plugins[0].scaler.get_scale() == overflow / 2**skipped
    first = skipped * each  # the batch after the skipped ones
    for name, value in seen.states[0].items():
        assert torch.equal(value, seen.states[first][name]), name
    later = seen.states[first + each]
    for name in ("router.expert_bias", "balance.alpha", "router.projection.weight"):
        name = f"blocks.0.feed_forward.{name}"
        assert not torch.equal(later[name], seen.states[0][name]), name
    assert seen.taken[: first + 1] == [0] * (first + 1) and seen.taken[first + each] == 1
    assert len(set(seen.rates[: first + each])) == 1
    assert seen.rates[first + each] == pytest.approx(2 * seen.rates[0])


def test_skipped_steps_are_remembered(tmp_path):
    options = {"precision": None, "log_every_n_steps": 1}
    model, path = make(), tmp_path / "skipped.ckpt"
    trained(model, cut([9] * 30), 1, plugins=[half(2.0**30)], **options)
    model.trainer.save_checkpoint(path)
    assert 0 < model._skipped < 30
    again = make()
    options |= {"max_epochs": 2, "ckpt_path": path}
    trained(again, cut([9] * 30), 1, plugins=[half(2.0**30)], **options)
    assert again._skipped == model._skipped
    assert again.steps_taken == 60 - model._skipped


def test_float16_takes_the_gradient_of_the_large_batch():
    """The scaler's factor and the accumulation's, one after the other."""
    batches = cut(UNEVEN)
    options = {"plugins": [half(2.0**10)], "precision": None}
    found = trained(make(), batches, EACH, **options).found
    for mine, theirs in zip(found, by_hand(make(), batches), strict=True):
        largest = max(value.abs().max().item() for value in theirs.values())
        for name, value in theirs.items():
            assert (mine[name] - value).abs().max() < 1e-2 * largest, name
