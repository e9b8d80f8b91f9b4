"""Training on the CPU against torchscale's RetNet and Hugging Face's Llama, side by side.

4 layers, width 128, 4 heads, vocabulary 65, float32: forward, backward and AdamW.

    python benchmarks/training.py            all lengths: 64, 2,048 and 8,192 tokens
    python benchmarks/training.py 64         one length
    python benchmarks/training.py --sweep    our own forms and chunk sizes against each other
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import harness
import peers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = {"dim": 128, "depth": 4, "heads": 4, "vocab_size": 65}
BATCH = {64: 12}  # rows; 1 at other lengths
ROUNDS = {64: 100, 2_048: 15, 8_192: 7}
# Our form is chosen by the model; torchscale's chunk is its default, 512, and its best here.
TORCHSCALE_CHUNKS = (64, 512)


def training_step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step: logits, cross-entropy, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        output = model(tokens)
        logits = output.logits if hasattr(output, "logits") else output[0]
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(time: int) -> list[dict]:
    """Our two models against their peers at one length."""
    import archzoo

    tokens, labels = torch.randint(0, 65, (2, BATCH.get(time, 1), time))
    models: dict[str, nn.Module] = {
        "retnet": archzoo.create_model("retnet_tiny", vocab_size=65),
        "transformer": archzoo.create_model("transformer_tiny", vocab_size=65),
        "llama": peers.llama(width=344, **SHAPE),
    }
    chunks: tuple[int | None, ...] = (None,) if time <= 64 else TORCHSCALE_CHUNKS
    for chunk in chunks:
        name = "torchscale parallel" if chunk is None else f"torchscale chunk {chunk}"
        models[name] = peers.torchscale_retnet(width=176, chunk_size=chunk, **SHAPE)
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    steps = {name: training_step(model, tokens, labels) for name, model in models.items()}
    taken = harness.in_turn(steps, ROUNDS.get(time, 5))

    def row(what: str, ours: str, peer: str, required: float, aimed: float) -> dict:
        pair = ((ours, taken[ours]), (peer, taken[peer]))
        return harness.ratio_row(f"{what}, {time} tokens", *pair, required, aimed)

    rows = []
    for name in models:
        if name.startswith("torchscale"):
            bounds = {64: (1.1, 1.2), 2_048: (1.1, 1.3), 8_192: (1.05, 1.2)}[time]
            rows.append(row("training", "retnet", name, *bounds))
    if time > 64:
        bounds = {2_048: (1.5, 1.7), 8_192: (3.5, 4.0)}[time]
        rows.append(row("training", "retnet", "llama", *bounds))
    bounds = (1.05, 1.1) if time == 64 else (0.95, 0.95)
    rows.append(row("training", "transformer", "llama", *bounds))
    return rows


def sweep() -> None:
    """Our parallel form and chunk sizes, at lengths where the choice turns."""
    import archzoo

    for time in (64, 128, 256, 512, 1_024, 2_048):
        tokens, labels = torch.randint(0, 65, (2, 1, time))
        steps = {}
        for chunk in (32, 64, 128, 256, time):
            spec = {"class_path": "Retention", "init_args": {"chunk_size": chunk}}
            model = archzoo.create_model("retnet_tiny", vocab_size=65, mixer=spec)
            for block in model.blocks:  # chunkwise, whatever the length
                block.mixer.choose_form = lambda *_: "chunkwise"
            steps["parallel" if chunk == time else f"chunk {chunk}"] = training_step(
                model, tokens, labels
            )
        taken = harness.in_turn(steps, 20)
        print(f"{time:6,} tokens  " + "  ".join(f"{n} {ms:.2f} ms" for n, ms in taken.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("time", nargs="*", type=int, default=[64, 2_048, 8_192])
    parser.add_argument("--sweep", action="store_true", help="our own forms against each other")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    peers.run_in_peer_environment()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.sweep:
        return sweep()
    rows = [row for time in arguments.time for row in compare(time)]
    harness.write_rows("float32-training", rows)


if __name__ == "__main__":
    main()
