"""The peers: other projects' models at the shapes of ours, in an environment of their own.

Some peers replace torch or jsonargparse when they are installed beside us, so a benchmark starts
itself again in `.venv-peers`, which this file makes: the pinned torch, transformers, and
torchscale without its declared dependencies (they bring another torch).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = Path(os.environ.get("ARCHZOO_PEERS", ROOT / ".venv-peers"))
WITH_DEPENDENCIES = ["einops", "safetensors", "numpy", "matplotlib", "transformers>=5,<6"]
ALONE = ["torchscale==0.3.0", "fairscale==0.4.13"]


def run_in_peer_environment() -> None:
    """Return if this process runs in the peers' environment; else make it and continue there."""
    python = ENVIRONMENT / "bin" / "python"
    if Path(sys.prefix) == ENVIRONMENT:
        return
    if not python.exists():
        print(f"making {ENVIRONMENT} (once)", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
        pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, pin.group() if pin else "torch"], check=True)
        subprocess.run([*pip, *WITH_DEPENDENCIES], check=True)
        subprocess.run([*pip, "--no-deps", *ALONE], check=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else every import of torch is slow
    raise SystemExit(subprocess.run([python, *sys.argv], env=environment, check=False).returncode)


def llama(dim: int, depth: int, heads: int, width: int, vocab_size: int) -> torch.nn.Module:
    """Hugging Face's LlamaForCausalLM with scaled_dot_product_attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=width,
        vocab_size=vocab_size,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def torchscale_retnet(
    dim: int, depth: int, heads: int, width: int, vocab_size: int, chunk_size: int | None
) -> torch.nn.Module:
    """torchscale's RetNet: values 2 dim wide; chunk_size None: its parallel form."""
    # It wants one function of timm, which would replace torch; with no drop path it is identity.
    timm_layers = types.ModuleType("timm.models.layers")
    timm_layers.drop_path = lambda x, *arguments: x  # type: ignore[attr-defined]
    sys.modules.setdefault("timm", types.ModuleType("timm"))
    sys.modules.setdefault("timm.models", types.ModuleType("timm.models"))
    sys.modules.setdefault("timm.models.layers", timm_layers)
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = RetNetConfig(
        decoder_embed_dim=dim,
        decoder_value_embed_dim=2 * dim,
        decoder_retention_heads=heads,
        decoder_ffn_embed_dim=width,
        decoder_layers=depth,
        activation_fn="swish",
        vocab_size=vocab_size,
        chunkwise_recurrent=chunk_size is not None,
        recurrent_chunk_size=chunk_size or 512,
    )
    return RetNetDecoder(config, embed_tokens=torch.nn.Embedding(vocab_size, dim))
