"""LoRA and DoRA in the file format of Hugging Face's peft: written, and read.

::

    lora/
      adapter_config.json            what peft's LoraConfig holds
      adapter_model.safetensors      base_model.model.PATH.lora_A.weight (rank, columns),
                                     .lora_B.weight (rows, rank), .lora_magnitude_vector (rows)

``PeftModel.from_pretrained(decoder, "lora")`` then computes what the adapted decoder does. peft
itself is not needed to write or read them.

peft changes whole matrices, and knows nothing of the blocks of rows that share one, such as
``query_key_value``. Still every function here has an equal there:

* The LoRAs of a matrix's blocks are one LoRA of the summed rank: A holds theirs one below the
  other, and B is block diagonal, with rows of zeros for the blocks that none changes. Only training
  it on in peft is another thing: the zeros would learn, too.
* Norms are those of rows, so the same holds for DoRA. A block that none changes gets the norms of
  its weight.
* PiSSA and MoSLoRA are written as LoRAs (`archzoo.conversion.low_rank`).

Reading turns it round: a block gets those columns of B, with their rows of A, that are not zero in
its rows, and a block without any is not adapted. What was written comes back as it was; where a
block had a column of zeros, it has less rank. An adapter that peft made gives each block all of A.

peft replaces the module, so what is not a module that is called as a whole cannot be said: experts
(a stack), routers (their weight is read), the matrix of filtered attention (called in parts).
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.adapters import Adapter
from archzoo.adapters.attach import adapt, attached, list_targets
from archzoo.adapters.dora import DoRA
from archzoo.checkpoint.archives import Stored, read_json
from archzoo.checkpoint.bases import base_of, check_base, parse_base
from archzoo.checkpoint.building import FLOATS
from archzoo.checkpoint.pretrained import open_tensors, write_directory
from archzoo.compiled import uncompiled
from archzoo.conversion.low_rank import low_rank_factors
from archzoo.decoder import Decoder
from archzoo.linear import Linear
from archzoo.names import nearest
from archzoo.parts import named_adapters
from archzoo.trust import shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "archzoo_base"  # in the tensors' metadata, which peft leaves alone and does not hand on
TENSOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
#: Settings of peft that do not say what is computed, or are read here; others must say nothing.
READ = """
    alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha
    lora_dropout lora_ga_config megatron_config megatron_core peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_dora
    use_rslora
"""
#: Starts of peft that leave the base as it is; the others take something from it.
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


class _Module(NamedTuple):
    """What a file says of one matrix: ``s B A``, and DoRA's m."""

    first: Tensor
    second: Tensor
    magnitude: Tensor | None
    scale: float


# ---------------------------------------------------------------------------- written


def export_peft(
    decoder: Decoder, directory: str | os.PathLike[str], name: str | None = None
) -> None:
    """Write an adapter of a decoder as peft's files.

    Everything is written beside the directory first and then moved in.

    Args:
        decoder: With the adapter: LoRA, DoRA, PiSSA or MoSLoRA.
        directory: It is made where it is missing.
        name: Of the adapter, where the decoder has several.

    Raises:
        ValueError: There is no such adapter, or peft cannot say what it changes.
        OSError: The files cannot be written; nothing has changed.
    """
    decoder = uncompiled(decoder)
    entries = named_adapters(decoder.config)
    if not entries:
        raise ValueError("the model has no adapter to export: archzoo.adapt puts one on it")
    if name is None and len(entries) > 1:
        raise ValueError(
            f"the model has the adapters {', '.join(entries)}: name the one that is exported, "
            f"as --name {next(iter(entries))}"
        )
    name = next(iter(entries)) if name is None else name
    if name not in entries:
        raise ValueError(f"the model has no adapter {name!r}; {nearest(name, list(entries))}")
    by_module: dict[str, list[tuple[str, Linear, Adapter]]] = {}
    for entry, place, adapter in attached(decoder):
        if entry == name:
            path = place.target.path.removesuffix(f".{place.name}")
            _check_exported(path, place.module, adapter)
            holder: Any = place.module
            by_module.setdefault(path, []).append((place.name, holder, adapter))
    fused = {
        path: _fused(those[0][1], {block: adapter for block, _, adapter in those})
        for path, those in by_module.items()
    }
    tensors = {}
    for path, module in fused.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = module.first
        tensors[f"{PREFIX}{path}.lora_B.weight"] = module.second
        if module.magnitude is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = module.magnitude
    one = next(iter(by_module.values()))[0][2]
    settings = _settings(fused, float(getattr(one, "dropout", 0.0)))
    text = json.dumps(settings, indent=2) + "\n"
    metadata = {BASE: json.dumps(base_of(decoder)._asdict())}
    write_directory(directory, WEIGHTS, tensors, metadata, {CONFIG: text.encode()})


def _check_exported(path: str, module: Any, adapter: Adapter) -> None:
    """Refuse what peft cannot say, by name."""
    name = type(adapter).__name__
    if type(adapter) is not DoRA and low_rank_factors(adapter) is None:
        raise ValueError(
            f"{name} is not exported to peft: LoRA, DoRA, PiSSA and MoSLoRA are; save_adapter "
            "writes any"
        )
    why = _unsayable(module)
    if why is None and type(adapter) is DoRA and _has_own_weight(module):
        why = f"{type(module).__name__} has a base_weight() of its own, and peft reads .weight"
    if why is not None:
        raise ValueError(
            f"{name} on {path} is not exported to peft: {why}; save_adapter writes it, and "
            "archzoo.merge_adapter puts it into the weights"
        )


def _unsayable(module: Any) -> str | None:
    """Why peft cannot change a Linear."""
    if module.stack is not None:
        return "it is a stack of experts, where peft knows one matrix"
    if module.weight_is_read:
        return "its weight is read without a call, where peft replaces the module"
    if module.called_in_parts:
        return "it is called block by block, where peft knows the whole matrix"
    return None


def _has_own_weight(module: Linear) -> bool:
    return type(module).base_weight is not Linear.base_weight


@torch.no_grad()
def _fused(linear: Linear, adapters: dict[str, Adapter]) -> _Module:
    """The adapters of a Linear's blocks as one of the whole matrix."""
    held: dict[str, Any] = adapters
    own = {block: (one.factors(), one.scale) for block, one in held.items()}
    first = torch.cat([own[block][0][0] for block in linear.blocks if block in own])
    second = first.new_zeros(linear.out_features, len(first))
    begin = 0
    for block in linear.blocks:
        if block in own:
            part = own[block][0][1]
            second[linear.rows(block), begin : begin + part.shape[1]] = part
            begin += part.shape[1]
    magnitude = None
    if any(type(adapter) is DoRA for adapter in adapters.values()):
        dtype = next(one.magnitude.dtype for one in held.values())
        magnitude = DoRA.norms(linear.base_weight()).to(dtype)
        for block, one in held.items():
            magnitude[linear.rows(block)] = one.magnitude
    return _Module(first, second, magnitude, next(iter(own.values()))[1])


def _settings(fused: dict[str, _Module], dropout: float) -> dict[str, Any]:
    """What peft's LoraConfig holds, as it is written."""
    ranks = {path: module.first.shape[0] for path, module in fused.items()}
    alphas = {path: module.scale * ranks[path] for path, module in fused.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    # peft takes them for regular expressions that match from the beginning or from a dot.
    others = {"^" + re.escape(path): (ranks[path], alphas[path]) for path in fused}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(fused),
        "rank_pattern": {path: r for path, (r, _) in others.items() if r != rank},
        "alpha_pattern": {path: a for path, (_, a) in others.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any(module.magnitude is not None for module in fused.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


# ---------------------------------------------------------------------------- read


def import_peft(decoder: Decoder, directory: str | os.PathLike[str]) -> Decoder:
    """Put an adapter in peft's files on a decoder, in place: LoRA or DoRA; it alone learns.

    Args:
        decoder: Without adapters; the base of the one in the files. Files that `export_peft` wrote
            say by a digest which one that is; peft's own say nothing of it.
        directory: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The decoder. Blocks of one rank and scale are one adapter ("default"), those of others go
        by names of their own ("default_2", ...).

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, says something that has no equal here, does not fit the
            decoder, or belongs to another base; nothing has changed.
    """
    decoder = uncompiled(decoder)
    path = Path(directory)
    settings = _read_settings(path / CONFIG)
    modules = _read_modules(decoder, path, settings)
    groups = _grouped(decoder, modules)
    cls = "DoRA" if settings.get("use_dora") else "LoRA"
    dropout = settings.get("lora_dropout") or 0.0
    specs: dict[str, Any] = {}
    for number, ((rank, scale), targets) in enumerate(groups.items(), 1):
        given = {"targets": list(targets), "rank": rank, "alpha": scale * rank}
        if dropout:
            given["dropout"] = dropout
        name = "default" if number == 1 else f"default_{number}"
        specs[name] = {"class_path": cls, "init_args": given}
    adapt(decoder, specs)
    values = {target: own for group in groups.values() for target, own in group.items()}
    with torch.no_grad():
        for _, place, adapter in attached(decoder):
            own = values[place.target.path]
            dtype = torch.promote_types(own.first.dtype, decoder.dtype)
            held: Any = adapter.to(dtype)  # never narrower than it was written
            held.first.copy_(own.first)
            held.second.copy_(own.second)
            if own.magnitude is not None:
                held.magnitude.copy_(own.magnitude)
    return decoder


def _read_settings(file: Path) -> dict[str, Any]:
    """Peft's settings, once it is sure that all of them are known here."""
    try:
        settings = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        path = file.parent
        if not path.is_dir():
            raise FileNotFoundError(f"there is no directory {path}") from None
        own = (path / "adapter.json").exists()
        hint = "; it is an adapter of archzoo, which needs no import" if own else ""
        raise FileNotFoundError(f"{path} holds no {CONFIG}{hint}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise ValueError(f"{file}: peft_type {shown(kind)} is not read: LORA is, DoRA included")
    for name, value in settings.items():
        if name not in READ.split() and value not in (None, False, "none", {}, []):
            raise ValueError(
                f"{file}: {shown(name)} = {shown(value)} has no equal here: a plain LoRA or DoRA "
                "is read"
            )
    if settings.get("init_lora_weights") not in STARTS:
        raise ValueError(
            f"{file}: init_lora_weights = {shown(settings['init_lora_weights'])} has changed the "
            "base: let peft convert it to a plain LoRA (path_initial_model_for_weight_conversion)"
        )
    for name in ("lora_alpha", "lora_dropout"):
        if not _is_number(settings.get(name, 0.0)):
            raise ValueError(f"{file}: {name} = {shown(settings[name])} must be a number")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
        raise ValueError(f"{file}: alpha_pattern must hold numbers by module")
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_modules(decoder: Decoder, path: Path, settings: dict[str, Any]) -> dict[str, _Module]:
    """The file's tensors by the path of the Linear that they change, each held to its shape."""
    linears = {n: m for n, m in decoder.named_modules() if isinstance(m, Linear)}
    file = path / WEIGHTS
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with open_tensors(file) as (opened, metadata, held):
            if BASE in metadata:
                check_base(decoder, parse_base(_json(metadata[BASE], file), file), path)
            for name, entry in held.items():
                matched = TENSOR.fullmatch(name.removeprefix(PREFIX))
                if not matched:
                    raise ValueError(f"{file}: {shown(name)} does not belong to a LoRA or DoRA")
                module, kind = matched.groups()
                if module not in linears:
                    near = nearest(module[:200], list(linears))
                    raise ValueError(f"{file}: the model has no Linear {shown(module)}; {near}")
                _check_tensor(name, kind, linears[module], entry, file)
                found.setdefault(module, {})[kind] = opened.get_tensor(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS}") from None
    kinds = {"lora_A.weight", "lora_B.weight"}
    kinds |= {"lora_magnitude_vector"} if settings.get("use_dora") else set()
    modules = {}
    for module, tensors in found.items():
        if tensors.keys() != kinds:
            raise ValueError(
                f"{file}: {module} has {', '.join(sorted(tensors))} where "
                f"{', '.join(sorted(kinds))} are expected"
            )
        first, second = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if not 1 <= len(first) == second.shape[1]:
            raise ValueError(
                f"{file}: {module} has A of rank {len(first)} and B of rank {second.shape[1]}"
            )
        alpha = _alpha(module, settings, path / CONFIG)
        scale = alpha / (math.sqrt(len(first)) if settings.get("use_rslora") else len(first))
        modules[module] = _Module(first, second, tensors.get("lora_magnitude_vector"), scale)
    if not modules:
        raise ValueError(f"{file} holds no tensors")
    return modules


def _json(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: {BASE} is damaged: {error}") from None


def _check_tensor(name: str, kind: str, linear: Linear, entry: Stored, file: Path) -> None:
    """Refuse a tensor that the Linear cannot take."""
    why = _unsayable(linear)
    if why is not None:
        raise ValueError(f"{file}: {shown(name)} changes nothing in peft: {why}")
    if entry.dtype not in FLOATS:
        raise ValueError(f"{file}: {shown(name)} is {entry.dtype}, not a floating-point dtype")
    rows, columns, shape = linear.out_features, linear.in_features, entry.shape
    wanted, fits = {
        "lora_A.weight": (f"(rank, {columns})", len(shape) == 2 and shape[1] == columns),
        "lora_B.weight": (f"({rows}, rank)", len(shape) == 2 and shape[0] == rows),
        "lora_magnitude_vector": (f"({rows},)", shape == (rows,)),
    }[kind]
    if not fits:
        raise ValueError(f"{file}: {shown(name)} has shape {shape} where {wanted} is expected")


def _alpha(module: str, settings: dict[str, Any], file: Path) -> float:
    """Alpha of one module: peft's patterns, read as paths or ends of paths."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        plain = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise ValueError(
                f"{file}: alpha_pattern {shown(pattern)} is a regular expression: paths are read"
            )
        if module == plain or (pattern[0] != "^" and module.endswith(f".{plain}")):
            return float(alpha)
    return float(settings.get("lora_alpha", 8))


def _grouped(
    decoder: Decoder, modules: dict[str, _Module]
) -> dict[tuple[int, float], dict[str, _Module]]:
    """The files' tensors by block, and the blocks' paths by rank and scale."""
    groups: dict[tuple[int, float], dict[str, _Module]] = {}
    learned = {module: bool(own.second.any()) for module, own in modules.items()}
    for place in list_targets(decoder):
        path = place.target.path.removesuffix(f".{place.name}")
        if path not in modules or not isinstance(place.module, Linear):
            continue
        whole, rows = modules[path], place.module.rows(place.name)
        second = whole.second[rows]
        magnitude = None if whole.magnitude is None else whole.magnitude[rows]
        used = second.any(dim=0).nonzero().flatten()
        if not len(used):
            if magnitude is not None:
                norms = DoRA.norms(place.module.base_weight()[rows]).to(magnitude.dtype)
                kept = bool((norms == magnitude.to(norms.device)).all())
            else:
                kept = True
            if learned[path] and kept:
                continue  # it changes nothing of this block
            most = min(len(whole.first), *place.target.shape)  # any are as good: B is 0
            used = torch.arange(most)
        own = _Module(whole.first[used], second[:, used], magnitude, whole.scale)
        groups.setdefault((len(used), whole.scale), {})[place.target.path] = own
    return groups
