"""`archzoo convert`: other libraries' weights as a model of the zoo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from archzoo.checkpoint import save_pretrained
from archzoo.checkpoint.pretrained import new_directory
from archzoo.conversion.llama import llama_config, llama_weights
from archzoo.conversion.mixtral import mixtral_config, mixtral_weights
from archzoo.conversion.retnet import (
    fla_config,
    fla_weights,
    torchscale_config,
    torchscale_weights,
)
from archzoo.decoder import Decoder
from archzoo.registry import build_decoder

KNOWN = "llama, mixtral, retnet (flash-linear-attention) and torchscale's RetNet"


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory: of its .safetensors files, else of a state dict of torch.

    Raises:
        FileNotFoundError: It holds neither.
        ValueError: A file that holds something else.
    """
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    files = sorted(file for kind in ("bin", "pt", "pth") for file in directory.glob(f"*.{kind}"))
    if not files:
        raise FileNotFoundError(f"{directory} holds no .safetensors, .bin, .pt or .pth file")
    found: dict[str, Any] = {}
    for file in files:
        content = torch.load(file, map_location="cpu", weights_only=True)
        content = content.get("model", content) if isinstance(content, dict) else content
        if not isinstance(content, dict) or not all(
            isinstance(value, Tensor) for value in content.values()
        ):
            raise ValueError(f"{file} is not a state dict: it must hold tensors by name alone")
        found |= content
    return found


def convert(directory: Path) -> Decoder:
    """The model of another library's directory: config.json and weights.

    Raises:
        FileNotFoundError: One of both is missing.
        ValueError: A family that cannot be loaded, or something in it; the message names it.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json, which says what the model is")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a valid configuration: it holds a {type(config).__name__}")
    family = config.get("model_type")
    if family is None and "decoder_embed_dim" in config:
        arguments = torchscale_config(config)
        weights = torchscale_weights(read_weights(directory), config)
    elif family == "retnet":
        held = read_weights(directory)
        gate = held.get("model.layers.0.mlp.gate_proj.weight")
        if gate is None:
            raise ValueError(
                f"{directory} is no flash-linear-attention RetNet: it has no weight "
                "model.layers.0.mlp.gate_proj.weight"
            )
        arguments, weights = fla_config(config, len(gate)), fla_weights(held, config)
    elif family in ("llama", "mixtral"):
        read = {"llama": llama_config, "mixtral": mixtral_config}[family]
        rename = {"llama": llama_weights, "mixtral": mixtral_weights}[family]
        arguments = read(config)
        heads, tied = config["num_attention_heads"], arguments["tie_weights"]
        kv_heads = config.get("num_key_value_heads") or heads
        weights = rename(read_weights(directory), heads, kv_heads, tied=tied)
    else:
        raise ValueError(f"model_type={family!r} cannot be converted: known are {KNOWN}")
    model = build_decoder(arguments)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{directory}: {str(error).splitlines()[-1].strip()}") from None
    return model.to(weights["head.weight"].dtype).eval()


def convert_command(source: str, output: str | None = None, /, out: str | None = None) -> None:
    """Read the weights of another library as a model of the zoo.

    Llama and Mixtral as Hugging Face lays them out, and RetNets of flash-linear-attention and of
    torchscale, by the key maps in archzoo/conversion; what has no equal here is refused by name.

    Args:
        source: A directory with config.json and weights (.safetensors, or a state dict of torch);
            of torchscale config.json holds the arguments of RetNetConfig.
        output: The directory that is written; the same as --out.
        out: The directory that is written; there must be none yet.

    Raises:
        FileNotFoundError: There is no such directory, or it lacks a file.
        FileExistsError: There is something where the model is to be written.
        ValueError: Something that cannot be converted; the message names it.
    """
    given = [place for place in (output, out) if place is not None]
    target = new_directory(given[0] if len(given) == 1 else None, "archzoo convert DIR")
    if not Path(source).is_dir():
        raise FileNotFoundError(f"there is no directory {source}")
    model = convert(Path(source))
    save_pretrained(target, model)
    print(f"{target}: {model.parameter_count():,} parameters")
