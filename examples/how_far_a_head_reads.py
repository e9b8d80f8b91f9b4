"""How far back does each head of retention read? Predicted from its decay, then measured.

    python examples/how_far_a_head_reads.py

or, for any model and any checkpoint:

    archzoo show retnet_tiny --window

A head with decay gamma weighs a token gamma^n after n more. That is measured here on the state
itself: two texts that differ in their first token alone leave states that differ by that token's
share, and by gamma^n of it n tokens later.
"""

import argparse

import torch

import archzoo
from archzoo.analysis.window import outgrown, windows


def measured_half_lives(model: archzoo.Decoder, length: int = 400) -> list[float]:
    """Of the first layer's heads, in tokens."""
    texts = torch.randint(model.vocab_size, (1, length)).repeat(2, 1)
    texts[1, 0] = (texts[0, 0] + 1) % model.vocab_size
    state, differences = model.init_state(2), []
    with torch.no_grad():
        for token in texts.T:
            state = model(token[:, None], state).state
            memory = state["blocks"][0]["memory"]  # (batch, heads, key channels, value channels)
            differences.append((memory[0] - memory[1]).flatten(1).norm(dim=1))
    ages = torch.arange(length, dtype=torch.float32)
    logs = torch.stack(differences).log()  # (length, heads): straight lines over the age
    slopes = torch.linalg.lstsq(torch.stack([ages, torch.ones(length)], 1), logs).solution[0]
    return (-torch.log(torch.tensor(2.0)) / slopes).tolist()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    torch.manual_seed(0)
    for schedule in ("default", "paper_lm"):
        mixer = {"class_path": "Retention", "init_args": {"decay": schedule}}
        model = archzoo.create_model("retnet_micro", heads=4, mixer=mixer).eval()
        print(f"decay {schedule}: head, half-life predicted and measured, 1 % after")
        heads = [window for window in windows(model) if window.layer == 0]
        for window, found in zip(heads, measured_half_lives(model), strict=True):
            print(
                f"{window.head:>4}{window.half_life:>8.1f}{found:>8.1f}{window.one_percent:>8.0f}"
            )
        print(f"attention's cache outgrows this state at {outgrown(model)} tokens\n")


if __name__ == "__main__":
    main()
