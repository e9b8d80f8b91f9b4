"""Models of 1 bit a weight, made of dense ones, and their packed form."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from archzoo.checkpoint.bases import DTYPES
from archzoo.checkpoint.pretrained import new_directory
from archzoo.decoder import Decoder
from archzoo.linear import Linear
from archzoo.linears.binary import BinaryLinear
from archzoo.parts import named_adapters
from archzoo.registry import build_decoder

Method = Literal["OneBit", "BinaryMoS"]
CLASSES = {"OneBit": "OneBitLinear", "BinaryMoS": "BinaryMoSLinear"}


def is_binary(model: Decoder) -> bool:
    """Whether Linears of its blocks are of 1 bit."""
    return any(isinstance(module, BinaryLinear) for module in model.modules())


def is_packed(model: Decoder) -> bool:
    """Whether it holds its signs alone, 1 bit each."""
    return any(isinstance(m, BinaryLinear) and m.packed for m in model.modules())


def binarise(
    dense: Decoder,
    method: Method = "OneBit",
    *,
    latent: Literal["weights", "signs"] = "weights",
    **arguments: Any,
) -> Decoder:
    """A decoder whose Linears are the binary form of a dense one's: ``Sign(W) * (h g^T)``.

    The scales of each block of rows are the decomposition of its matrix, see
    `archzoo.linears.binary.svid`. Embedding, head, routers and norms stay as they are. What the
    binary model computes is far from what the dense one does until it is distilled.

    Args:
        dense: It stays as it is.
        method: "OneBit" or "BinaryMoS".
        latent: Where the latent weights start: "weights", the dense ones, or "signs", .01 times
            their signs, as OneBit's own code has it.
        **arguments: Of `OneBitLinear` or `BinaryMoSLinear`: norm, scales, straight_through.

    Returns:
        The binary model, in the dense one's dtype and on its device.

    Raises:
        ValueError: The model is binary already, has adapters, or Linears of another class.
    """
    if method not in CLASSES:
        raise ValueError(f"method={method!r} is not one of {', '.join(CLASSES)}")
    if latent not in ("weights", "signs"):
        raise ValueError(f"latent={latent!r} is neither weights nor signs")
    if named_adapters(dense.config):
        raise ValueError(
            "a model with adapters cannot be made binary: archzoo.merge_adapter merges them"
        )
    kind = (dense.config["linear"] or {}).get("class_path", "Linear")
    if is_binary(dense):
        raise ValueError(f"the model is binary already: its linear is {kind}")
    if kind != "Linear":
        raise ValueError(f"only a model of plain Linears can be made binary, this one has {kind}")
    spec = {"class_path": CLASSES[method], "init_args": {**arguments, "packed": False}}
    with torch.random.fork_rng(devices=[]):  # of what is drawn and then replaced
        torch.manual_seed(0)
        binary = build_decoder(dense.config | {"linear": spec})
    binary = binary.to(dense.device, dense.dtype)
    found = {n: m for n, m in binary.named_modules() if isinstance(m, BinaryLinear)}
    latents = {f"{name}.weight" for name in found}
    shared = {name: t for name, t in dense.state_dict().items() if name not in latents}
    binary.load_state_dict(shared, strict=False)
    for name, module in found.items():
        old = dense.get_submodule(name)
        assert isinstance(old, Linear)
        module.start_from(old.base_weight(), latent)
    binary.task, binary.merged = dense.task, dense.merged
    return binary.train(dense.training)


def pack(binary: Decoder) -> Decoder:
    """The same model with 1 bit for each weight of its binary Linears.

    Raises:
        ValueError: It has none, is packed already, or has adapters.
    """
    if named_adapters(binary.config):
        raise ValueError("a model with adapters cannot be packed: remove them first")
    if not is_binary(binary):
        raise ValueError("the model is not binary: give --method OneBit or BinaryMoS")
    if is_packed(binary):
        raise ValueError("the model is packed already")
    spec = copy.deepcopy(binary.config["linear"])
    spec["init_args"]["packed"] = True
    with torch.random.fork_rng(devices=[]):  # of what is drawn and then replaced
        packed = build_decoder(binary.config | {"linear": spec})
    packed = packed.to(binary.device, binary.dtype)
    state = dict(binary.state_dict())
    for name, module in binary.named_modules():
        if isinstance(module, BinaryLinear):
            own = module.packed_state()
            del state[f"{name}.weight"]
            state |= {f"{name}.{entry}": tensor for entry, tensor in own.items()}
    packed.load_state_dict(state)
    packed.task, packed.base, packed.merged = binary.task, binary.base, binary.merged
    return packed.train(binary.training)


def bits_a_weight(model: nn.Module) -> float:
    """Of the binary Linears of a model, once packed: signs and scales over weights."""
    found = [m for m in model.modules() if isinstance(m, BinaryLinear)]
    weights = sum(m.in_features * m.out_features * (m.stack or 1) for m in found)
    return sum(module.bits() for module in found) / weights


def binarise_command(
    checkpoint: str,
    /,
    out: str | None = None,
    method: Method | None = None,
    packed: bool = False,
    latent: Literal["weights", "signs"] = "weights",
    init_args: dict[str, Any] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Make a model of 1 bit a weight of a checkpoint.

    Of a dense checkpoint and a method: the binary model, with latent weights to be trained, which
    distillation (archzoo fit, see configs/onebit.yaml) makes a good one. With --packed: 1 bit a
    weight on disk, which loads and runs as it lies and is not trained; so a trained binary
    checkpoint is packed, too, without a method.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
        out: The directory that is written; there must be none yet.
        method: OneBit or BinaryMoS, for a dense checkpoint.
        packed: Write the signs alone, 1 bit each.
        latent: Where the latent weights start: weights, the dense ones; or signs, .01 times their
            signs, as OneBit's own code has it.
        init_args: Arguments of OneBitLinear or BinaryMoSLinear: --init_args.norm true.
        dtype: Of all else; the checkpoint's own by default.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        FileExistsError: There is something where the model is to be written.
        ValueError: The checkpoint is binary already, cannot be made binary, or has weights that are
            not finite.
    """
    target = new_directory(out, "archzoo binarise CHECKPOINT")
    from archzoo.checkpoint import check_finite, load, save_pretrained

    found = load(checkpoint)
    model = found.model
    check_finite(model.state_dict(), checkpoint)
    if is_packed(model):
        raise ValueError(f"{checkpoint} is binary and packed already")
    if is_binary(model):
        kind = model.config["linear"]["class_path"]
        if method is not None or init_args or latent != "weights" or not packed:
            raise ValueError(
                f"{checkpoint} is binary already ({kind}): --packed alone writes it with 1 bit a "
                "weight"
            )
    elif method is None:
        raise ValueError(f"{checkpoint} is dense: give --method OneBit or --method BinaryMoS")
    else:
        arguments = dict(init_args or {})
        if "packed" in arguments:
            raise ValueError("init_args.packed: give --packed instead")
        model = binarise(model, method, latent=latent, **arguments)
    if dtype is not None:
        model = model.to(DTYPES[dtype])
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError(f"dtype={dtype} does not hold all numbers of {checkpoint}: omit it")
    bits = bits_a_weight(model)
    if packed:
        model = pack(model)
    save_pretrained(target, model, found.tokenizer, found.task)
    size = (target / "model.safetensors").stat().st_size
    form = "" if packed else " once packed; its latent weights are floats"
    print(f"{target}: {size:,} bytes, {bits:.3f} bits a weight of its binary matrices{form}")
