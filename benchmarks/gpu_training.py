"""Training throughput on a GPU: attention against retention at about 110 M parameters.

    python benchmarks/gpu_training.py                 eager and compiled, 2,048 and 8,192 tokens

32,768 tokens a step, bfloat16 autocast, AdamW; cross-entropy over the whole vocabulary. Both models
hold the same number of parameters and differ in the mixer and in the width that makes up for it.
"""

from __future__ import annotations

import argparse
import statistics

import harness
import torch
from torch.nn import functional as F

import archzoo

TOKENS = 32_768


def measure(name: str, time: int, compiled: bool, steps: int) -> dict:
    """Median milliseconds a step by events on the device, and the most memory it took."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = archzoo.create_model(name).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(model.vocab_size, (TOKENS // time, time + 1), device="cuda")
    run = torch.compile(model) if compiled else model
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for step in range(steps + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.autocast("cuda", torch.bfloat16):
            logits = run(tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        torch.cuda.synchronize()
        if step >= 5:
            taken.append(begin.elapsed_time(end))
    milliseconds = statistics.median(taken)
    row = {
        "model": name,
        "parameters": model.parameter_count(),
        "time": time,
        "mode": "compiled" if compiled else "eager",
        "step_ms": round(milliseconds, 2),
        "tokens_per_second": round(TOKENS / milliseconds * 1e3),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss_after": round(loss.item(), 4),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="base")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA device, and there is none here")
    torch.set_float32_matmul_precision("high")
    rows = []
    for time in (2_048, 8_192):
        for compiled in (False, True):
            for family in ("transformer", "retnet"):
                name = f"{family}_{arguments.size}"
                rows.append(measure(name, time, compiled, arguments.steps))
                harness.write_rows("bfloat16-training", rows, on_gpu=True)  # as far as it came


if __name__ == "__main__":
    main()
