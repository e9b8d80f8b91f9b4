"""The progressive loss: what is drawn, the gradients, and a resumed run."""

import lightning
import pytest
import torch
from torch.nn import functional as F

from archzoo.block import make_context
from archzoo.tasks import Addition, Text
from archzoo.training.module import LanguageModel
from archzoo.training.progressive import passes


@pytest.mark.parametrize("loops", [2, 3, 4, 8])
def test_runs_are_drawn_as_the_rule_says(loops):
    counts = torch.zeros(loops, loops + 1)
    for step in range(4000):
        (one,) = passes(loops, 1.0, 3, step)
        counts[one.no_grad_loops, one.loops] += 1
    assert counts.sum() == 4000
    for free in range(loops):
        most = min(loops - free, max(loops // 2, 1))
        assert (counts[free, most + 1 :] == 0).all() and counts[free, 0] == 0
        expected = 4000 / loops / most
        # Within 5 standard deviations of a binomial count.
        assert (counts[free, 1 : most + 1] - expected).abs().max() < 5 * expected**0.5


def test_the_share_says_which_passes_there_are():
    assert passes(1, 1.0, 0, 0) == passes(4, 0.0, 0, 0) == [(1.0, None, 0)]
    full, drawn = passes(4, 0.25, 0, 7)
    assert full == (0.75, None, 0)
    assert drawn == passes(4, 1.0, 0, 7)[0]._replace(weight=0.25)
    assert [passes(4, 1.0, 0, s) for s in range(9)] != [passes(4, 1.0, 1, s) for s in range(9)]


def trainer(directory, steps, **arguments):
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        max_steps=steps,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def addition():
    return Addition(digits=2, batch_size=4, steps_per_epoch=50)


def looped(share, **arguments):
    lightning.seed_everything(0)
    return LanguageModel(
        "transformer_micro",
        loops=4,
        injection="loop",
        progressive_loss=share,
        progressive_seed=5,
        **arguments,
    )


class Gradients(lightning.Callback):
    """Those of one step, before clipping, and the weights they were taken at."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.batch = batch
            self.weights = {n: p.detach().clone() for n, p in module.net.named_parameters()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            self.found = {n: p.grad.clone() for n, p in module.net.named_parameters()}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradients_are_those_computed_by_hand(tmp_path, share):
    module, seen = looped(share), Gradients(step=2)
    trainer(tmp_path, 3, callbacks=[seen]).fit(module, addition())
    net, batch = module.net, seen.batch
    net.load_state_dict(seen.weights, strict=False)
    (drawn,) = passes(4, 1.0, 5, 2)
    assert drawn.no_grad_loops, "without such iterations it would prove little"

    def loss(loops, no_grad_loops):
        context, _ = make_context(*batch["tokens"].shape, documents=batch["documents"])
        embedding, _ = net.embedding(batch["tokens"], None, context)
        x = embedding
        for loop in range(no_grad_loops + loops):
            x = x + embedding if loop else x
            for block in net.blocks:
                x, _, _ = block(x, None, context)
            if loop < no_grad_loops:
                x = x.detach()
        return F.cross_entropy(net.head(net.norm(x)).flatten(0, 1), batch["labels"].flatten())

    total = (1 - share) * loss(4, 0) + share * loss(drawn.loops, drawn.no_grad_loops)
    names, weights = zip(*net.named_parameters(), strict=True)
    want = dict(zip(names, torch.autograd.grad(total, weights), strict=True))
    for name in names:
        torch.testing.assert_close(seen.found[name], want[name], rtol=1e-4, atol=1e-7)


def test_a_resumed_run_draws_what_the_whole_run_drew(tmp_path):
    constant = {"schedule": "constant", "warmup_steps": 1}  # whatever the number of steps
    whole = looped(0.5, **constant)
    trainer(tmp_path / "whole", 8).fit(whole, addition())
    begun = looped(0.5, **constant)
    first = trainer(tmp_path / "part", 3)
    first.fit(begun, addition())
    first.save_checkpoint(tmp_path / "part.ckpt")
    resumed = looped(0.5, **constant)
    trainer(tmp_path / "part", 8).fit(resumed, addition(), ckpt_path=tmp_path / "part.ckpt")
    weights = [torch.cat([p.flatten() for p in m.net.parameters()]) for m in (whole, resumed)]
    assert torch.equal(*weights)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"progressive_loss=1.5 must lie in \[0, 1\]"):
        looped(1.5)


def test_no_state_is_carried_past_a_window_that_is_read_twice(tmp_path):
    """By this seed each pass of the first steps has all iterations: nothing else refuses them."""
    assert all(sum(passes(2, 0.5, 5, step)[1][1:]) == 2 for step in range(3))
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 60)
    text = Text(
        path=str(tmp_path / "text.txt"),
        context_length=8,
        batch_size=2,
        carry_state=True,
        cache_dir=str(tmp_path),
    )
    module = LanguageModel(
        "retnet_micro", loops=2, progressive_loss=0.5, progressive_seed=5, warmup_steps=1
    )
    with pytest.raises(ValueError, match="set carry_state to false, or progressive_loss to 0"):
        trainer(tmp_path, 2).fit(module, text)
