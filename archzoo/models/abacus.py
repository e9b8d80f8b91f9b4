"""Abacus: a transformer that adds numbers longer than any it was trained on.

Ingredients:

* an embedding of words and of each digit's index in its number, their sum normalised (see
  archzoo/embeddings/abacus.py); numbers are written least significant digit first
* no rotation: order comes from the causal mask, and in the larger sizes from a FIRE bias
* RMSNorm before each branch and after the last block; no biases anywhere
* gated feed-forward with GELU, as wide as the model (micro and tiny: twice)
* small: the embedding is added again before every block (input injection)
* base: 8 blocks run twice with the same weights, the embedding added before each run

::

    e = RMSNorm(words[token] + table[row]);   x = e
    x = x + e                                         # injection
    x = x + Attention(RMSNorm(x))
    x = x + (gelu(h Wg) * (h Wu)) Wd,   h = RMSNorm(x)

Paper: McLeish et al., Transformers Can Do Arithmetic with the Right Embeddings,
arXiv 2405.17399. Differs from it in the norms (LayerNorm after each branch there), in the
initialisation, which is the decoder's for all models, and in where a looped model starts (from
noise there, also in evaluation; from the embedding here). micro and tiny, too shallow to find the
units digit by themselves, couple the operators to it (after Cho et al., arXiv 2405.20671) and need
no bias; their matrices start at 0.1, about dim^-0.5 (tiny on sums of 3 digits, after 400 steps:
loss 0.5, from 0.02 it is 1.6). `digit_tokens`, `operator_tokens` and `longest_run` come from the
task.

Sizes: base (59 M parameters) is the paper's width and depth, and small (11 M) and tiny (0.1 M) are
cut down from it by what sums of their lengths need, not to what the names of sizes promise.
"""

from archzoo.registry import register_model

ARCHITECTURE = {
    "mixer": "Attention",
    "feed_forward": {"class_path": "GatedFeedForward", "init_args": {"activation": "gelu"}},
    "rotary": "NoRotation",
    "norm": "rms",
    "norm_placement": "pre",
}

SIZES = {
    "micro": {
        "vocab_size": 96,
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "width": 64,
        "context_length": 12,  # sums of 3 digits
        "embedding": {
            "class_path": "AbacusEmbedding",
            "init_args": {"coupled": True, "max_shift": 5, "rows": 32},
        },
        "init_std": 0.1,
    },
    "tiny": {
        "vocab_size": 96,
        "dim": 64,
        "depth": 2,
        "heads": 4,
        "width": 128,
        "context_length": 24,  # sums of 7 digits
        "embedding": {
            "class_path": "AbacusEmbedding",
            "init_args": {"coupled": True, "max_shift": 50, "rows": 64},
        },
        "init_std": 0.1,
    },
    "small": {
        "vocab_size": 96,
        "dim": 512,
        "depth": 6,
        "heads": 8,
        "width": 512,
        "context_length": 63,  # sums of 20 digits
        "embedding": {"class_path": "AbacusEmbedding", "init_args": {"max_shift": 100}},
        "bias": "FIRE",
        "injection": "layer",
    },
    "base": {
        "vocab_size": 96,
        "dim": 1_024,
        "depth": 8,
        "heads": 16,
        "width": 1_024,
        "context_length": 63,
        "embedding": {"class_path": "AbacusEmbedding", "init_args": {"max_shift": 100}},
        "bias": "FIRE",
        "loops": 2,
        "injection": "loop",
    },
}

for size, sizes in SIZES.items():
    register_model(f"abacus_{size}", ARCHITECTURE | sizes, paper="arXiv 2405.17399", about=__doc__)
