"""A model as a directory of Hugging Face's transformers: source, weights, tokenizer, card."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einops import rearrange
from torch import Tensor

from archzoo._version import __version__
from archzoo.checkpoint.pretrained import WEIGHTS, write_directory
from archzoo.decoder import Decoder
from archzoo.export.files import check_source, module_of
from archzoo.export.source import source_of
from archzoo.export.tokenizer import tokenizer_files
from archzoo.export.wrapper import IMPORTS, WRAPPER
from archzoo.mixers.attention import Attention
from archzoo.positions.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

MODULE = "modeling_archzoo"


def is_llama(model: Decoder) -> bool:
    """Whether a model is Llama's architecture, so that transformers has it already."""
    config = model.config
    plain = all(
        config[name] is None
        for name in ("pattern", "convolution", "bias", "loops", "injection", "linear")
    )
    spec = config["feed_forward"]
    mixers = [block.mixer for block in model.blocks]
    rotaries = [getattr(mixer, "rotary", None) for mixer in mixers]
    return (
        plain
        and all(type(mixer) is Attention for mixer in mixers)
        and all(type(rotary) is RotaryEmbedding for rotary in rotaries)
        and all(2 * len(rotary.frequencies) == rotary.head_dim for rotary in rotaries if rotary)
        # Which Llama turns all of a text by the length of the whole, where it reads it at once.
        and all(rotary.rope_parameters()["rope_type"] != "dynamic" for rotary in rotaries if rotary)
        and spec["class_path"] == "GatedFeedForward"
        and spec["init_args"].get("activation", "silu") == "silu"
        and config["embedding"]["class_path"] == "TokenEmbedding"
        and (config["norm"], config["norm_placement"]) == ("rms", "pre")
        and config["dropout"] == 0
    )


def llama_files(model: Decoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of `LlamaForCausalLM`: the opposite of `conversion.llama`."""
    mixer: Any = model.blocks[0].mixer
    heads, kv_heads = mixer.heads, mixer.kv_heads
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.config["norm_eps"],
        "max_position_embeddings": model.context_length or 2048,
        "rope_parameters": mixer.rotary.rope_parameters(),
        "tie_word_embeddings": model.tie_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": model.init_std,
    }
    weights: dict[str, Any] = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
    }
    if not model.tie_weights:
        weights["lm_head.weight"] = model.head.weight
    for layer, block in enumerate(model.blocks):
        part: Any = block
        theirs = f"model.layers.{layer}"
        q, k, v = part.mixer.query_key_value.weight.split(
            [model.dim, kv_heads * mixer.head_dim, kv_heads * mixer.head_dim]
        )
        gate, up = part.feed_forward.gate_up.weight.chunk(2)
        weights |= {
            f"{theirs}.self_attn.q_proj.weight": apart(q, heads),
            f"{theirs}.self_attn.k_proj.weight": apart(k, kv_heads),
            f"{theirs}.self_attn.v_proj.weight": v,
            f"{theirs}.self_attn.o_proj.weight": part.mixer.output.weight,
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": part.feed_forward.down.weight,
            f"{theirs}.input_layernorm.weight": part.mixer_norm.weight,
            f"{theirs}.post_attention_layernorm.weight": part.feed_forward_norm.weight,
        }
    return config, weights


def apart(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head from (2i, 2i + 1) pairs to (i, i + head_dim/2) pairs.

    Args:
        weight: (heads * head_dim, dim).
        heads: Of this projection.
    """
    return rearrange(weight, "(h p two) d -> (h two p) d", h=heads, two=2)


def own_files(model: Decoder, name: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The configuration, the weights and the source of a model that transformers does not have.

    Args:
        model: To write.
        name: For the first line of the source.
    """
    source = source_of(model, name, wrapped=True)
    check_source(model, source, "Decoder(**DECODER)")
    tied = {"model.head.weight": "model.embedding.weight"} if model.tie_weights else None
    wrapper = WRAPPER.replace("_tied_weights_keys = TIED", f"_tied_weights_keys = {tied!r}")
    head, rest = source.split("\n\n\n", 1)
    whole = f"{head}\n{IMPORTS}\n\n{rest.rstrip()}\n\n\n{wrapper}"
    config = {
        "model_type": "archzoo",
        "architectures": ["ArchzooForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.ArchzooConfig",
            "AutoModelForCausalLM": f"{MODULE}.ArchzooForCausalLM",
        },
        "arguments": module_of(source).DECODER,
        "context_length": model.context_length,
        "tie_word_embeddings": model.tie_weights,
    }
    weights = {f"model.{n}": tensor for n, tensor in model.state_dict().items()}
    if model.tie_weights:
        del weights["model.head.weight"]
    return config, weights, whole


def write_transformers(
    directory: Path,
    model: Decoder,
    tokenizer: Tokenizer | None,
    *,
    name: str = "a model",
    source: str = "",
) -> str:
    """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` load; its architecture.

    Args:
        directory: To write; there must be none yet.
        model: To write. A Llama is written as one, others with their source.
        tokenizer: To write, or None.
        name: For the card and the first line of the source.
        source: Of the weights, for the card.

    Raises:
        FileExistsError: There is something already.
        ValueError: A part that cannot be exported.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists: name one that does not, or move it away")
    files: dict[str, bytes] = {}
    if is_llama(model):
        config, weights = llama_files(model)
    else:
        config, weights, text = own_files(model, name)
        files[f"{MODULE}.py"] = text.encode()
    architecture: str = config["architectures"][0]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    special: dict[str, Any] = {"eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        free = None if architecture == "LlamaForCausalLM" else tokenizer.vocab_size
        if tokenizer.vocab_size < model.vocab_size:
            free = tokenizer.vocab_size
        written, pad = tokenizer_files(tokenizer, model.context_length, free)
        special = {"eos_token_id": tokenizer.stop_token, "pad_token_id": pad}
        files |= written
    config |= {"bos_token_id": None} | special
    files["generation_config.json"] = _json({"bos_token_id": None} | special)
    files["README.md"] = card(model, name, source, architecture).encode()
    files["config.json"] = _json(config)
    kept = {n: tensor.detach().cpu().contiguous().clone() for n, tensor in weights.items()}
    write_directory(directory, WEIGHTS, kept, {}, files)
    return architecture


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def card(model: Decoder, name: str, source: str, architecture: str) -> str:
    """The model card, Markdown.

    Args:
        model: Whose it is.
        name: Its title.
        source: Where the weights were read from: a run's figures stand beside them.
        architecture: The class that transformers loads.
    """
    remote = "" if architecture == "LlamaForCausalLM" else ", trust_remote_code=True"
    task = model.task or {}
    data = task.get("class_path", "not known")
    given = {n: _shown(v) if n == "path" else v for n, v in task.get("init_args", {}).items()}
    about = json.dumps(given, ensure_ascii=False, default=str)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [archzoo]",
        "---",
        "",
        f"# {name}",
        "",
        f"{model.parameter_count():,} parameters, written by archzoo {__version__}"
        + (f" from `{_shown(source)}`." if source else "."),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{remote})',
        f'tokenizer = AutoTokenizer.from_pretrained("."{remote})',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | `{architecture}` |",
        f"| trained on | {data} `{about}` |",
        f"| context length | {model.context_length} tokens |",
        *(f"| {metric} | {value} |" for metric, value in figures(source).items()),
        f"| commit | {commit() or 'not known'} |",
        "| licence | of the source: MIT, as archzoo's; of the weights: yours to say, after that of "
        "the data |",
        "",
        "## Architecture",
        "",
        "```json",
        json.dumps({k: v for k, v in model.config.items() if v is not None}, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _shown(path: Any) -> Any:
    """A path as the card names it: of one in full its last part, for the rest is of one machine."""
    return Path(path).name if isinstance(path, str) and Path(path).is_absolute() else path


def figures(source: str) -> dict[str, str]:
    """The last values of a run's validation and test, as its log has them; {} without a log."""
    path = Path(source)
    log = (path if path.is_dir() else path.parent) / "metrics.csv"
    if not source or not log.is_file():
        return {}
    with open(log, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [name for name in (rows[0] if rows else []) if name.startswith(("val", "test"))]
    last = {name: [row[name] for row in rows if row[name]] for name in kept}
    return {name: f"{float(values[-1]):.6g}" for name, values in last.items() if values}


def commit() -> str | None:
    """The commit of the source that runs, where it is a repository."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
