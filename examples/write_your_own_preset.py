"""Write your own preset: a family of models with names, listed and trained like the zoo's.

    python examples/write_your_own_preset.py

or from the command line, in this directory:

    archzoo list "hybrid*" --import write_your_own_preset
    archzoo show hybrid_tiny --import write_your_own_preset
    archzoo fit --import write_your_own_preset --model.preset hybrid_micro --data Addition

The family below is a hybrid: of every four blocks three mix by the fading memory of
write_your_own_mixer.py, whose state is one vector, and the fourth by attention, which looks up
what the memory has let go (as Jamba does with Mamba; Lieber et al., arXiv 2403.19887).
"""

import argparse

import torch
from write_your_own_mixer import FadingMemory

import archzoo
from archzoo.block import nbytes

ARCHITECTURE = {
    "pattern": [FadingMemory, FadingMemory, FadingMemory, "Attention"],
    "feed_forward": "GatedFeedForward",
}

SIZES = {
    "micro": {"vocab_size": 64, "dim": 32, "depth": 4, "heads": 2, "width": 16},
    "tiny": {"vocab_size": 256, "dim": 128, "depth": 4, "heads": 4, "width": 352},
}

for size, sizes in SIZES.items():
    archzoo.register_model(
        f"hybrid_{size}",
        ARCHITECTURE | sizes | {"context_length": 256},
        paper="arXiv 2403.19887",
        about=__doc__,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    print(f"{'model':<20}{'parameters':>12}{'state after 1k tokens':>24}")
    for name in ("hybrid_micro", "hybrid_tiny", "retnet_tiny", "transformer_tiny"):
        model = archzoo.create_model(name)
        with torch.no_grad():
            state = model(torch.zeros(1, 1000, dtype=torch.long), model.init_state(1)).state
        print(f"{name:<20}{model.parameter_count():>12,}{nbytes(state['blocks']):>18,} bytes")


if __name__ == "__main__":
    main()
