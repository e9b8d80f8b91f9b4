"""Write your own mixer: __init__, init_state and step, and it is part of the zoo.

    python examples/write_your_own_mixer.py

The mixer below remembers one vector a row. Each channel fades at a rate that the token chooses:

    f_n = sigmoid(x_n Wf)
    m_n = f_n * m_(n-1) + (1 - f_n) * (x_n Wv)          the state
    y_n = (silu(x_n Wg) * m_n) Wo

`step` is all there is to say about it. The base class folds it over time, resets it where a
document begins and holds it still at padding, so forms, packing, decoding and checkpoints work.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo.block import nbytes


class FadingMemory(archzoo.Mixer):
    """A running mean whose rate each token chooses.

    Args:
        dim: Width of x.
        heads: Unused: every channel is alone.
        memory: Where the rates start, in tokens that the memory reaches back.
    """

    def __init__(self, dim: int, heads: int, *, memory: float = 8.0) -> None:
        super().__init__()
        self.fade, self.value, self.gate = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.output = nn.Linear(dim, dim, bias=False)
        self.output.closes_residual = True  # the decoder starts these smaller
        self.offset = nn.Parameter(torch.full((dim,), memory).log())

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        # A sum over time is kept in float32 at least, whatever the model's dtype.
        dtype = torch.promote_types(dtype or self.output.weight.dtype, torch.float32)
        shape = (batch_size, 1, self.output.in_features)
        return {"mean": torch.zeros(shape, device=device, dtype=dtype)}

    def step(self, x, state, context):
        fade = torch.sigmoid(self.fade(x) + self.offset).to(state["mean"].dtype)
        mean = fade * state["mean"] + (1 - fade) * self.value(x)
        return self.output(F.silu(self.gate(x)) * mean.to(x.dtype)), {"mean": mean}


def train(model: archzoo.Decoder, steps: int = 300) -> float:
    """Learn rows such as abababab: the next letter is the last but one. Its accuracy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        tokens = torch.randint(64, (64, 2)).repeat(1, 5)
        logits = model(tokens[:, 1:-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        tokens = torch.randint(64, (1000, 2)).repeat(1, 5)
        guessed = model(tokens[:, :-1]).logits[:, 2:].argmax(-1)  # where the last but one is seen
    return (guessed == tokens[:, 3:]).double().mean().item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    torch.manual_seed(0)
    archzoo.check(FadingMemory)  # raises if a rule of the interface is broken

    print(f"\n{'mixer':<14}{'parameters':>12}{'state after 1k tokens':>24}{'letters right':>16}")
    for mixer in (FadingMemory, archzoo.Retention, archzoo.Attention):
        # Swap one part, keep everything else: the same number of parameters, too.
        model = archzoo.create_model("retnet_micro", mixer=mixer, match="parameters")
        right = train(model)
        with torch.no_grad():
            state = model(torch.randint(64, (1, 1000)), model.init_state(1)).state
        size = nbytes(state["blocks"])
        # Tens of per cent: more than that differs from processor to processor.
        tens = f"> {10 * math.ceil(10 * right - 1):d} %"
        print(f"{mixer.__name__:<14}{model.parameter_count():>12,}{size:>18,} bytes{tens:>16}")


if __name__ == "__main__":
    main()
