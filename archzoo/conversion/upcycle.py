"""Upcycling: a mixture of experts that begins as the dense model it is made from.

Every expert starts as a copy of the layer's dense feed-forward, and the chosen weights sum to 1, so
the first logits are the dense model's; the router starts at random, and different tokens make the
copies diverge. Source: Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055, section 2.2;
whether it pays, and the similarity of experts as the thing to watch: Wei et al., Skywork-MoE,
arXiv 2406.06563.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from archzoo.decoder import Decoder
from archzoo.documents import make_context
from archzoo.feedforward.dense import GatedFeedForward
from archzoo.feedforward.moe import MixtureOfExperts
from archzoo.parts import named_adapters
from archzoo.registry import build_decoder


def upcycle(dense: Decoder, *, seed: int = 0, **mixture: Any) -> Decoder:
    """A decoder whose feed-forwards are mixtures of copies of a dense one's.

    Args:
        dense: Of gated feed-forwards with silu. It stays as it is.
        seed: Of the routers' weights.
        **mixture: Arguments of `MixtureOfExperts`: experts, top_k, router, balance, ...

    Returns:
        The mixture, in the dense model's dtype and on its device; it logs the similarity of its
        experts, unless `watch_similarity` says otherwise.

    Raises:
        ValueError: The feed-forwards are not SwiGLU, or the mixture's first output would not be
            the dense one's, since weights do not sum to 1 or shared experts are added.
    """
    if named_adapters(dense.config):
        raise ValueError(
            "a model with adapters cannot be upcycled: archzoo.merge_adapter merges them"
        )
    spec = dense.config["feed_forward"]
    gated = all(type(block.feed_forward) is GatedFeedForward for block in dense.blocks)
    if not gated or spec["init_args"].get("activation", "silu") != "silu":
        raise ValueError(f"only GatedFeedForward with silu can be upcycled, this is {spec}")
    if mixture.get("shared_experts"):
        raise ValueError("shared experts would be added to the dense output: omit shared_experts")
    arguments = {"watch_similarity": True} | mixture
    part = {"class_path": "MixtureOfExperts", "init_args": arguments}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sparse = build_decoder(dense.config | {"feed_forward": part})
    sparse = sparse.to(dense.device, dense.dtype)
    shared = {k: v for k, v in dense.state_dict().items() if ".feed_forward." not in k}
    sparse.load_state_dict(shared, strict=False)
    for block, old in zip(sparse.blocks, dense.blocks, strict=True):
        new = block.feed_forward
        assert isinstance(new, MixtureOfExperts) and isinstance(old.feed_forward, GatedFeedForward)
        _refuse_other_sums(new, dense.dim)
        with torch.no_grad():
            new.experts.gate_up.weight.copy_(old.feed_forward.gate_up.base_weight())
            new.experts.down.weight.copy_(old.feed_forward.down.base_weight())
    sparse.task = dense.task
    return sparse.train(dense.training)


def _refuse_other_sums(mixture: MixtureOfExperts, dim: int) -> None:
    """A mixture of copies is the copy where the weights sum to 1: try it, for any router."""
    down = mixture.experts.down
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 32, dim), generator=generator).to(down.device, down.dtype)
    with torch.no_grad():
        weights = mixture.router(x, make_context(1, 32, device=x.device)[0]).weights
    off = (weights.sum(dim=-1) - 1).abs().max().item()
    if off > 1e-5:
        raise ValueError(
            f"the weights of the chosen experts are off a sum of 1 by up to {off:.2g}, so the "
            "first logits would not be the dense model's: set the router's renormalise to true "
            "(archzoo upcycle ... --router_args.renormalise true)"
        )


def upcycle_command(
    checkpoint: str,
    output: str | None = None,
    /,
    out: str | None = None,
    experts: int = 8,
    top_k: int = 2,
    router: str = "LinearRouter",
    router_args: dict[str, Any] | None = None,
    init_args: dict[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """Make a mixture of experts of a dense checkpoint; its first logits are the dense model's.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
        output: The directory that is written; the same as --out.
        out: The directory that is written; there must be none yet.
        experts: Copies of each feed-forward.
        top_k: Experts a token is sent to.
        router: LinearRouter or AttentionRouter.
        router_args: Its options: --router_args.logit_norm 1.
        init_args: Further arguments of MixtureOfExperts: --init_args.balance squared_mean.
        seed: Of the routers' weights.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        FileExistsError: There is something where the model is to be written.
        ValueError: The checkpoint cannot be upcycled so.
    """
    if (output is None) == (out is None):
        raise ValueError("where is the model written? archzoo upcycle CHECKPOINT --out DIR")
    target = Path(output or out or "")
    if target.exists():
        raise FileExistsError(f"{target} exists: name a directory that does not, or move it away")
    from archzoo.analysis.listing import active_parameters
    from archzoo.checkpoint import load, save_pretrained

    found = load(checkpoint)
    spec = {"class_path": router, "init_args": router_args or {}}
    arguments = {"experts": experts, "top_k": top_k, "router": spec} | (init_args or {})
    sparse = upcycle(found.model, seed=seed, **arguments)
    save_pretrained(target, sparse, found.tokenizer, found.task)
    print(
        f"{target}: {sparse.parameter_count():,} parameters, {active_parameters(sparse):,} of them "
        f"active; the dense model had {found.model.parameter_count():,}"
    )
