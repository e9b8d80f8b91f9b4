"""What the Abacus embedding costs: a training step with it against one with plain words.

    python benchmarks/abacus.py                  small, sums of 20 digits: at most 2 % of a step
    python benchmarks/abacus.py --size tiny --digits 7 --rows 128

The batches are a task's own, padding and example numbers with them; forward, backward and AdamW,
on a GPU under bfloat16 autocast. Both sides differ in the embedding alone, and are timed in turn.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import harness
import torch
from torch.nn import functional as F

import archzoo
from archzoo.tasks.arithmetic import Addition
from archzoo.tasks.stream import IGNORED

ALLOWED = 0.02  # of a step


def step(name: str, embedding: str | None, task: Addition, device: str) -> Callable[[], None]:
    """A function that trains for one step, and waits for the device."""
    torch.manual_seed(0)
    model = archzoo.create_model(name, embedding=embedding).to(device)
    model.bind(task, training=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = {key: entry.to(device) for key, entry in task.train_dataloader().batch(0).items()}
    on_gpu = device == "cuda"

    def run() -> None:
        cast = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
        with cast:
            x, _, _ = model.hidden(
                batch["tokens"], documents=batch["documents"], examples=batch["examples"]
            )
            logits = model.head(x).float().flatten(0, 1)
            loss = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--digits", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048], help="[512 2048]")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    name, found = f"abacus_{given.size}", []
    for rows in given.rows:
        task = Addition(digits=given.digits, batch_size=rows)
        sides = {
            "abacus": step(name, None, task, device),
            "words": step(name, "TokenEmbedding", task, device),
            "words again": step(name, "TokenEmbedding", task, device),  # how far is chance?
        }
        times = harness.in_turn(sides, given.rounds, warmup=5)
        share = times["abacus"] / times["words"] - 1
        found.append(
            {
                "model": name,
                "rows": rows,
                "tokens": rows * task.context_length,
                "abacus_ms": round(times["abacus"], 3),
                "words_ms": round(times["words"], 3),
                "words_again_ms": round(times["words again"], 3),
                "share": round(share, 4),
                "allowed": ALLOWED,
            }
        )
        verdict = "within" if share <= ALLOWED else "MORE THAN"
        print(f"{found[-1]}: {verdict} {ALLOWED:.0%}", flush=True)
    dtype = "bfloat16" if device == "cuda" else "float32"
    harness.write_rows(f"{dtype}-abacus", found, on_gpu=device == "cuda")


if __name__ == "__main__":
    main()
