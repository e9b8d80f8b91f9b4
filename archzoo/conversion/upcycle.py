"""Upcycling: a mixture of experts that begins as the dense model it is made from, or as several.

Of one model every expert starts as a copy of the layer's dense feed-forward, and the chosen weights
sum to 1, so the first logits are the dense model's; the router starts at random, and different
tokens make the copies diverge. Source: Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055,
section 2.2; whether it pays, and the similarity of experts as the thing to watch: Wei et al.,
Skywork-MoE, arXiv 2406.06563.

Of several models that were trained from one, each gives an expert; all else is the base's, and the
router is made of prompts (`archzoo.conversion.gates`). Experts trained apart on data of their own,
then put together and trained on: Sukhbaatar et al., Branch-Train-MiX, arXiv 2403.07816, who average
all else. Taking it from the base, and routers from prompts, is mergekit-moe's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.checkpoint.digest import own_weights
from archzoo.checkpoint.opened import check_alike, common_ancestor, open_model
from archzoo.checkpoint.pretrained import new_directory
from archzoo.conversion.gates import GATES, Gate, router_rows
from archzoo.conversion.merge import record, task_of_all
from archzoo.decoder import Decoder
from archzoo.documents import make_context
from archzoo.feedforward.dense import GatedFeedForward
from archzoo.feedforward.moe import MixtureOfExperts
from archzoo.feedforward.routers import LinearRouter
from archzoo.generation.prompts import encode
from archzoo.linears.binary import BinaryLinear
from archzoo.parts import named_adapters
from archzoo.registry import build_decoder
from archzoo.tasks.writing import Writing, writing_of

Read = Callable[[str], Tensor]


def upcycle(
    dense: Decoder,
    *,
    sources: Sequence[Decoder] | None = None,
    rows: Tensor | None = None,
    seed: int = 0,
    **mixture: Any,
) -> Decoder:
    """A decoder whose feed-forwards are mixtures of copies of a dense one's, or of several.

    Args:
        dense: Of gated feed-forwards with silu. It stays as it is.
        sources: Of the same shape, whose feed-forwards are the experts, in this order. None: every
            expert is a copy of the dense one's.
        rows: Of the routers, (layers, experts, dim), as `router_rows` makes them. None: they are
            drawn.
        seed: Of the routers' weights.
        **mixture: Arguments of `MixtureOfExperts`: experts, top_k, router, balance, ...

    Returns:
        The mixture, in the dense model's dtype and on its device; it logs the similarity of its
        experts, unless `watch_similarity` says otherwise.

    Raises:
        ValueError: The feed-forwards are not SwiGLU, or the mixture of equal experts would not be
            the dense one, since weights do not sum to 1 or shared experts are added.
    """
    if sources is None:
        return _upcycle(dense, None, rows, seed, mixture)
    weights = [own_weights(source) for source in sources]
    for held in weights:
        for name, weight in own_weights(dense).items():
            if ".feed_forward." in name and getattr(held.get(name), "shape", None) != weight.shape:
                raise ValueError(f"{name} is not the same weight in all models: take models alike")
    return _upcycle(dense, [held.__getitem__ for held in weights], rows, seed, mixture)


@torch.no_grad()
def _upcycle(
    dense: Decoder,
    sources: Sequence[Read] | None,
    rows: Tensor | None,
    seed: int,
    mixture: dict[str, Any],
) -> Decoder:
    """`upcycle` of sources that give their weights by name, one at a time."""
    if named_adapters(dense.config):
        raise ValueError(
            "a model with adapters cannot be upcycled: archzoo.merge_adapter merges them"
        )
    if any(isinstance(module, BinaryLinear) for module in dense.modules()):
        raise ValueError(
            f"a model of {dense.config['linear']['class_path']} cannot be upcycled: upcycle the "
            "dense one, and archzoo binarise the mixture"
        )
    spec = dense.config["feed_forward"]
    gated = all(type(block.feed_forward) is GatedFeedForward for block in dense.blocks)
    if not gated or spec["init_args"].get("activation", "silu") != "silu":
        raise ValueError(f"only GatedFeedForward with silu can be upcycled, this is {spec}")
    if mixture.get("shared_experts"):
        raise ValueError("shared experts would be added to the dense output: omit shared_experts")
    if sources is not None:
        if dense.config["linear"]:
            raise ValueError(
                f"linear={dense.config['linear']}: experts of several models are put together of "
                "plain matrices; omit linear"
            )
        given = mixture.setdefault("experts", len(sources))
        if given != len(sources):
            raise ValueError(f"experts={given} and {len(sources)} models: each gives one expert")
    arguments = {"watch_similarity": True} | mixture
    part = {"class_path": "MixtureOfExperts", "init_args": arguments}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sparse = build_decoder(dense.config | {"feed_forward": part})
    sparse = sparse.to(dense.device, dense.dtype)
    shared = {k: v for k, v in dense.state_dict().items() if ".feed_forward." not in k}
    sparse.load_state_dict(shared, strict=False)
    for layer, (block, old) in enumerate(zip(sparse.blocks, dense.blocks, strict=True)):
        new = block.feed_forward
        assert isinstance(new, MixtureOfExperts) and isinstance(old.feed_forward, GatedFeedForward)
        if rows is not None:
            _set_rows(new, rows[layer])
        _refuse_other_sums(new, dense.dim)
        for name in ("gate_up", "down"):
            stack = getattr(new.experts, name).weight
            if sources is None:
                stack.copy_(getattr(old.feed_forward, name).base_weight())
                continue
            for expert, read in enumerate(sources):
                stack[expert].copy_(read(f"blocks.{layer}.feed_forward.{name}.weight"))
    sparse.task, sparse.merged = dense.task, dense.merged
    return sparse.train(dense.training)


def _set_rows(mixture: MixtureOfExperts, rows: Tensor) -> None:
    """Give a router its rows, (experts, dim)."""
    router = mixture.router
    if type(router) is not LinearRouter:
        raise ValueError(
            f"{type(router).__name__} has no row for each expert, which prompts could give: take "
            "LinearRouter, or the gate random"
        )
    weight = router.projection.weight
    if rows.shape != weight.shape:
        raise ValueError(f"rows of {tuple(rows.shape)} for a router of {tuple(weight.shape)}")
    weight.copy_(rows)


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
    checkpoints: list[str],
    /,
    out: str | None = None,
    base: str | None = None,
    prompts: list[str] | None = None,
    negative: list[str] | None = None,
    gate: Gate = "router_average",
    contrast: bool = True,
    experts: int | None = None,
    top_k: int = 2,
    router: str = "LinearRouter",
    router_args: dict[str, Any] | None = None,
    init_args: dict[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """Make a mixture of experts of a dense checkpoint, or of several.

    `upcycle CHECKPOINT OUT` copies one model's feed-forwards, and the first logits are the dense
    model's. `upcycle A B --out DIR --base X --prompts a.txt b.txt` takes an expert from each of
    several models that were trained from one, all else from that one, and the routers' rows from
    prompts.

    Args:
        checkpoints: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained; of
            one, the directory that is written may follow.
        out: The directory that is written; there must be none yet.
        base: What several checkpoints were trained from.
        prompts: Of each checkpoint a text file, in their order: a line is a prompt for its expert.
        negative: Of each a text file of prompts that are not for its expert, which may be empty.
        gate: What of a prompt makes the row: what the router reads, as the mean over its tokens
            (router_average) or of the last one (router_last); what the block reads (hidden_average,
            hidden_last); the sum of its embedded tokens (cheap_embed); or random, without prompts.
        contrast: Without --negative: the other experts' prompts are each expert's negative ones.
        experts: Copies of each feed-forward [8]; of several checkpoints, one each.
        top_k: Experts a token is sent to.
        router: LinearRouter or AttentionRouter.
        router_args: Its options: --router_args.logit_norm 1.
        init_args: Further arguments of MixtureOfExperts: --init_args.balance squared_mean.
        seed: Of the routers' weights.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        FileExistsError: There is something where the model is to be written.
        ValueError: The checkpoints cannot be upcycled so.
    """
    if out is None and len(checkpoints) == 2:
        checkpoints, out = checkpoints[:1], checkpoints[1]
    target = new_directory(out, "archzoo upcycle CHECKPOINT ...")
    from archzoo.analysis.listing import active_parameters
    from archzoo.checkpoint import check_finite, load, save_pretrained

    if init_args and "router" in init_args:
        raise ValueError("init_args.router: give --router and --router_args instead")
    if not contrast and (negative is not None or prompts is None):
        raise ValueError(
            "contrast=false means nothing "
            + ("beside --negative" if negative is not None else "without --prompts")
            + ": omit it"
        )
    spec = {"class_path": router, "init_args": router_args or {}}
    arguments: dict[str, Any] = {"top_k": top_k, "router": spec} | (init_args or {})
    if experts is not None:
        arguments["experts"] = experts
    if len(checkpoints) == 1:
        if base is not None or prompts is not None or negative is not None:
            raise ValueError(
                "one checkpoint is given, whose experts are all alike: base, prompts and negative "
                "are for several"
            )
        if gate not in (GATES[0], "random"):  # random, as its router is drawn
            raise ValueError(f"gate={gate} means nothing to one checkpoint, whose router is drawn")
        found = load(checkpoints[0])
        check_finite(found.model.state_dict(), checkpoints[0])
        dense, tokenizer = found.model, found.tokenizer
        sparse = upcycle(dense, seed=seed, **arguments)
    else:
        if base is None:
            raise ValueError(
                "attention, norms and the embedding are those of the checkpoint that all were "
                "trained from: name it, --base CHECKPOINT"
            )
        _check_files(checkpoints, prompts, negative, gate)
        with ExitStack() as stack:
            models = [stack.enter_context(open_model(path)) for path in checkpoints]
            origin = stack.enter_context(open_model(base))
            check_alike([*models, origin])
            _, line = common_ancestor(models, origin)
            if line:
                print(line)
            task, about = task_of_all(models)
            dense = load(base).model
            check_finite(dense.state_dict(), base)
            every = [origin, *models]
            tokenizer = next((m.tokenizer for m in every if m.tokenizer is not None), None)
            rows = None
            if prompts is not None:
                writing = writing_of(task)
                positive = [_read(path, tokenizer, dense, writing) for path in prompts]
                if negative is not None:
                    away = [_read(path, tokenizer, dense, writing, False) for path in negative]
                else:
                    away = [
                        [
                            p
                            for j, other in enumerate(positive)
                            for p in other
                            if contrast and j != i
                        ]
                        for i in range(len(positive))
                    ]
                rows = router_rows(dense, positive, away, gate)
            reads = [model.weights.finite for model in models]
            sparse = _upcycle(dense, reads, rows, seed, arguments)
            sparse.task = task
            made = {
                "method": "upcycle",
                "gate": gate,
                "prompts": prompts,
                "negative": negative,
                "contrast": contrast and negative is None,
                "seed": seed,
            }
            sparse.merged = record(made, models, origin)
        if about:
            print(about)
    save_pretrained(target, sparse, tokenizer, sparse.task)
    of = "the dense model" if len(checkpoints) == 1 else f"each of {' and '.join(checkpoints)}"
    print(
        f"{target}: {sparse.parameter_count():,} parameters, {active_parameters(sparse):,} of them "
        f"active; {of} had {dense.parameter_count():,}"
    )


def _check_files(
    checkpoints: Sequence[str],
    prompts: Sequence[str] | None,
    negative: Sequence[str] | None,
    gate: str,
) -> None:
    """Refuse lists of files that do not go with the checkpoints."""
    if (prompts is None) != (gate == "random"):
        raise ValueError(
            "random rows take no prompts: omit --prompts"
            if prompts is not None
            else f"{gate} makes the routers of prompts: give a file for each checkpoint, --prompts "
            "FILE FILE, or draw them, --gate random"
        )
    if negative is not None and prompts is None:
        raise ValueError("negative prompts need positive ones: give --prompts FILE FILE")
    for name, files in (("prompts", prompts), ("negative", negative)):
        if files is not None and len(files) != len(checkpoints):
            raise ValueError(
                f"{len(files)} files of {name} are given for {len(checkpoints)} checkpoints: give "
                "each one, in their order"
            )


def _read(
    path: str, tokenizer: Any, model: Decoder, writing: Writing, needed: bool = True
) -> list[list[int]]:
    """The prompts of a file as tokens, a line each."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): name a text file with a prompt in each line"
        ) from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines and not needed:
        return []
    try:
        return encode(lines, tokenizer, model.vocab_size, writing)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
