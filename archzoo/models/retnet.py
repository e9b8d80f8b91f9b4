"""RetNet: a transformer whose attention is retention, and so a recurrent network as well.

Ingredients:

* RMSNorm before each branch and after the last block; no biases anywhere
* multi-scale retention: rotated queries and keys, a fixed decay per head (1 - 2^(-5-h)), values
  2 dim wide, RMS norm per head, swish gate
* SwiGLU, 4/3 dim wide, so that a block holds 12 dim^2 parameters as a transformer's does

::

    x = x + Retention(RMSNorm(x))
    x = x + (silu(h Wg) * (h Wu)) Wd,   h = RMSNorm(x)

Paper: Sun et al., Retentive Network: A Successor to Transformer for Large Language Models,
arXiv 2307.08621. Differs from the paper's own layout in the norms (LayerNorm there, RMSNorm in
the authors' later code and here), in the feed-forward (two matrices with GELU, 2 dim wide, there:
``feed_forward: PlainFeedForward, width: 2 dim``), in the initialisation, which is the decoder's
for all models, and in the normaliser, which depends on the position alone (see
archzoo/mixers/retention.py). Heads are wide, as the paper's are: 256 channels at base size.
"""

from archzoo.registry import register_model

ARCHITECTURE = {
    "mixer": "Retention",
    "feed_forward": "GatedFeedForward",
    "embedding": "TokenEmbedding",
    "norm": "rms",
    "norm_placement": "pre",
}

SIZES = {
    "micro": {
        "vocab_size": 64,
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "width": 48,
        "context_length": 64,
    },
    "tiny": {
        "vocab_size": 256,
        "dim": 128,
        "depth": 4,
        "heads": 4,
        "width": 176,
        "context_length": 256,
    },
    "small": {
        "vocab_size": 8_192,
        "dim": 512,
        "depth": 8,
        "heads": 4,
        "width": 688,
        "context_length": 1_024,
        "tie_weights": True,
    },
    "base": {
        "vocab_size": 32_000,
        "dim": 768,
        "depth": 12,
        "heads": 3,
        "width": 1_024,
        "context_length": 2_048,
        "tie_weights": True,
    },
}

for size, sizes in SIZES.items():
    register_model(f"retnet_{size}", ARCHITECTURE | sizes, paper="arXiv 2307.08621", about=__doc__)
