"""The transformer, the baseline that everything is compared with.

Ingredients:

* RMSNorm before each branch and after the last block; no biases anywhere
* causal softmax attention with grouped queries (as many key heads as query heads, unless told)
* RoPE on queries and keys
* SwiGLU, 8/3 dim wide

::

    x = x + Attention(RMSNorm(x))
    x = x + (silu(h Wg) * (h Wu)) Wd,   h = RMSNorm(x)

Paper: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, in the later form of Touvron
et al., LLaMA, arXiv 2302.13971, section 2.2. Differs from LLaMA in the initialisation, which is
the decoder's for all models.
"""

from archzoo.registry import register_model

ARCHITECTURE = {
    "mixer": "Attention",
    "feed_forward": "GatedFeedForward",
    "embedding": "TokenEmbedding",
    "norm": "rms",
    "norm_placement": "pre",
}

SIZES = {
    "micro": {"vocab_size": 64, "dim": 32, "depth": 2, "heads": 2, "context_length": 64},
    "tiny": {"vocab_size": 256, "dim": 128, "depth": 4, "heads": 4, "context_length": 256},
    "small": {
        "vocab_size": 8_192,
        "dim": 512,
        "depth": 8,
        "heads": 8,
        "context_length": 1_024,
        "tie_weights": True,
    },
    "base": {
        "vocab_size": 32_000,
        "dim": 768,
        "depth": 12,
        "heads": 12,
        "context_length": 2_048,
        "tie_weights": True,
    },
}

for size, sizes in SIZES.items():
    register_model(
        f"transformer_{size}", ARCHITECTURE | sizes, paper="arXiv 1706.03762", about=__doc__
    )
