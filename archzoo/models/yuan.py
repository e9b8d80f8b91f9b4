"""Yuan 2.0-M32: localized filtering attention, and experts chosen by an attention router.

Ingredients:

* RMSNorm before each branch and after the last block
* attention whose queries and keys come after two causal convolutions of two taps each, its
  values from before them; RoPE
* SwiGLU experts, 2 for each token, dropless, none shared
* an attention router: each expert's query, key and value are one number, and the scores are those
  of the experts' attention to each other; weights renormalised over the chosen
* no balancing loss, as in the released recipe

::

    x = x + FilteredAttention(RMSNorm(x))
    x = x + sum over the 2 chosen e of w_e (silu(h Wg_e) * (h Wu_e)) Wd_e,   h = RMSNorm(x)

Paper: Wu et al., Yuan 2.0-M32, arXiv 2405.17976; the filter: Wu et al., Yuan 2.0, arXiv
2311.15786. Differs in the width of attention (heads * 256 = 2 dim there, dim here), in RoPE (on
half of a head's channels there, on all here), in the initialisation, which is the decoder's for
all models but the router's (N(0, 1 / dim), see archzoo/feedforward/routers.py), and in the number
of experts of the smaller sizes (32 there, and at base size here).

Experts are dim wide, so that the active parameters are as many as the transformer of the size has:
a block's 6 dim^2 of filtered attention and 2 * 3 dim^2 of experts are 12 dim^2 as there, and the
router adds 3 dim for each expert. The inactive experts come on top.
"""

from archzoo.registry import register_model


def experts(number: int) -> dict[str, object]:
    """The mixture, with that many experts."""
    arguments = {"experts": number, "top_k": 2, "router": "AttentionRouter", "balance": "none"}
    return {"class_path": "MixtureOfExperts", "init_args": arguments}


ARCHITECTURE = {
    "mixer": "FilteredAttention",
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
        "width": 32,
        "feed_forward": experts(8),
        "context_length": 64,
    },
    "tiny": {
        "vocab_size": 256,
        "dim": 128,
        "depth": 4,
        "heads": 4,
        "width": 128,
        "feed_forward": experts(8),
        "context_length": 256,
    },
    "small": {
        "vocab_size": 8_192,
        "dim": 512,
        "depth": 8,
        "heads": 8,
        "width": 512,
        "feed_forward": experts(16),
        "context_length": 1_024,
        "tie_weights": True,
    },
    "base": {
        "vocab_size": 32_000,
        "dim": 768,
        "depth": 12,
        "heads": 12,
        "width": 768,
        "feed_forward": experts(32),
        "context_length": 2_048,
        "tie_weights": True,
    },
}

for size, sizes in SIZES.items():
    register_model(f"yuan_{size}", ARCHITECTURE | sizes, paper="arXiv 2405.17976", about=__doc__)
