"""Skywork-MoE: a transformer of experts whose gate is normalised and whose balance adapts.

Ingredients:

* RMSNorm before each branch and after the last block; no biases anywhere
* causal softmax attention with RoPE
* SwiGLU experts, 2 for each token, dropless, none shared
* a linear router whose logits are divided by their deviation, token by token (lambda = 1), so that
  the gate stays sharp; weights renormalised over the chosen
* a balancing loss for each layer, sum_j (P_j - 1/n)^2, whose coefficient follows the layer's drop
  rate: at most 0.01, a fifth of the rate, averaged over some 100 steps

::

    x = x + Attention(RMSNorm(x))
    x = x + sum over the 2 chosen e of w_e (silu(h Wg_e) * (h Wu_e)) Wd_e,   h = RMSNorm(x)

Paper: Wei et al., Skywork-MoE, arXiv 2406.06563. Differs in that nothing is dropped: the paper
trains with a capacity that it does not state, here the coefficient follows what a capacity factor
of 1.25 would have dropped (set ``drop: position`` to drop it); in the start of the coefficient,
which the paper does not give (0.01 here); in the initialisation, which is the decoder's for all
models; and in the number of experts of the smaller sizes (16 there, and from small size on here).
The released model divides by the sample deviation alone, as here with 1e-6 beside the variance.

Experts are 4/3 dim wide, half the transformer's feed-forward, so that the active parameters are as
many as the transformer of the size has, within 1 % from tiny on; the router adds dim for each
expert. The inactive experts come on top.
"""

from archzoo.registry import register_model


def experts(number: int) -> dict[str, object]:
    """The mixture, with that many experts."""
    router = {"class_path": "LinearRouter", "init_args": {"logit_norm": 1.0}}
    arguments = {
        "experts": number,
        "top_k": 2,
        "router": router,
        "balance": "squared_mean",
        "coefficient": 0.01,
        "adaptive": True,
    }
    return {"class_path": "MixtureOfExperts", "init_args": arguments}


ARCHITECTURE = {
    "mixer": "Attention",
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
        "width": 40,
        "feed_forward": experts(8),
        "context_length": 64,
    },
    "tiny": {
        "vocab_size": 256,
        "dim": 128,
        "depth": 4,
        "heads": 4,
        "width": 168,
        "feed_forward": experts(8),
        "context_length": 256,
    },
    "small": {
        "vocab_size": 8_192,
        "dim": 512,
        "depth": 8,
        "heads": 8,
        "width": 680,
        "feed_forward": experts(16),
        "context_length": 1_024,
        "tie_weights": True,
    },
    "base": {
        "vocab_size": 32_000,
        "dim": 768,
        "depth": 12,
        "heads": 12,
        "width": 1_024,
        "feed_forward": experts(16),
        "context_length": 2_048,
        "tie_weights": True,
    },
}

for size, sizes in SIZES.items():
    register_model(f"skywork_{size}", ARCHITECTURE | sizes, paper="arXiv 2406.06563", about=__doc__)
