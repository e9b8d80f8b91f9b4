"""Decoding and prefill on the CPU against Hugging Face's Llama with its cache, side by side.

4 layers, width 256, 4 heads, batch 1, float32, one thread.

    python benchmarks/decoding.py    at 1,024 and 16,384 tokens; 65,536 for RetNet
"""

from __future__ import annotations

import argparse
import os
import time as clock

import harness
import peers
import torch
from torch import nn

SHAPE = {"dim": 256, "depth": 4, "heads": 4, "vocab_size": 65}
STEPS, TURNS = 10, 12  # steps of one model in a row, and how often each has its turn


def prefilled(model: nn.Module, tokens: torch.Tensor) -> tuple[list, float]:
    """A state that has read the tokens, in a list of one, and the milliseconds it took."""
    begin = clock.perf_counter()
    state = model.init_state(1, capacity=tokens.shape[1] + 2 * STEPS * TURNS)
    state = model(tokens, state, logits_to_keep=1).state
    return [state], (clock.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    peers.run_in_peer_environment()
    torch.set_num_threads(arguments.threads)
    if arguments.threads == 1 and hasattr(os, "sched_setaffinity"):
        # One core, so that no side loses its cache by being moved to another.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    from transformers import DynamicCache

    import archzoo

    transformer = archzoo.create_model("transformer_tiny", width=688, **SHAPE).eval()
    retnet = archzoo.create_model("retnet_tiny", width=344, **SHAPE).eval()
    llama = peers.llama(width=688, **SHAPE).eval()
    token = torch.zeros((1, 1), dtype=torch.int64)
    rows = []

    def decoder(model: nn.Module, held: list):
        def step() -> None:
            held[0] = model(token, held[0]).state

        return step

    with torch.inference_mode():
        for context in (1_024, 16_384):
            tokens = torch.randint(0, 65, (1, context))
            cache = DynamicCache(config=llama.config)
            begin = clock.perf_counter()
            llama(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            llama_prefill = (clock.perf_counter() - begin) * 1e3
            transformer_state, _ = prefilled(transformer, tokens)
            retnet_state, retnet_prefill = prefilled(retnet, tokens)

            def llama_step(cache: DynamicCache = cache) -> None:
                llama(token, past_key_values=cache, use_cache=True)

            taken = harness.in_turn(
                {
                    "transformer": decoder(transformer, transformer_state),
                    "retnet": decoder(retnet, retnet_state),
                    "llama": llama_step,
                },
                TURNS,
                repeat=STEPS,
            )
            peer = ("llama", taken["llama"])
            what = f"decoding at {context} tokens"
            bounds = {1_024: ((1.4, 1.6), (1.7, 2.0)), 16_384: ((1.7, 2.0), (9.0, 12.0))}[context]
            ours = ("transformer", taken["transformer"])
            rows.append(harness.ratio_row(what, ours, peer, *bounds[0]))
            ours = ("retnet", taken["retnet"])
            rows.append(harness.ratio_row(what, ours, peer, *bounds[1]))
            if context == 16_384:
                peer = ("llama", llama_prefill)
                what = f"prefill of {context} tokens"
                rows.append(harness.ratio_row(what, ("retnet", retnet_prefill), peer, 2.0, 2.0))

        # The recurrent form's time must not depend on what came before. The two contexts are
        # timed in turn; the ratio is time at 1k over time at 64k, so 1 / 1.2 is required.
        near, _ = prefilled(retnet, torch.randint(0, 65, (1, 1_024)))
        far, _ = prefilled(retnet, torch.randint(0, 65, (1, 65_536)))
        sides = {"64k": decoder(retnet, far), "1k": decoder(retnet, near)}
        taken = harness.in_turn(sides, TURNS, repeat=STEPS)
        pair = (("retnet at 65536", taken["64k"]), ("retnet at 1024", taken["1k"]))
        rows.append(harness.ratio_row("decoding, far against near", *pair, round(1 / 1.2, 3), 1.0))
    harness.write_rows("float32-decoding", rows)


if __name__ == "__main__":
    main()
