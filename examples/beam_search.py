"""Follow several texts at once and keep the most probable: beam search beside greedy decoding.

    python examples/beam_search.py

or, with any checkpoint:

    archzoo generate CHECKPOINT "one two, " --beams 4

Greedy decoding takes the most probable token each time, and may so miss the most probable text.
The hypotheses are rows of one batch, and their states change rows with them (`archzoo.reorder`).
The model learns a counting rhyme in some steps first, but not by heart.
"""

import argparse

import torch
from decode_side_by_side import RHYME, learn

import archzoo
from archzoo.tasks.tokenizers import CharacterTokenizer


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    tokenizer = CharacterTokenizer("".join(sorted(set(RHYME))))
    model = learn("retnet_micro", tokenizer, steps=25).model
    prompts = ["one two, ", "a big "]  # of any lengths

    for beams in (1, 8):
        found = archzoo.beam_search(model, prompts, beams=beams, max_tokens=12, tokenizer=tokenizer)
        print(f"{beams} beam{'s' * (beams > 1)}, state {found.state_bytes:,} bytes")
        for prompt, texts, chances in zip(
            prompts, found.texts, found.log_probabilities, strict=True
        ):
            for text, chance in zip(texts[:3], chances, strict=False):
                print(f"  log p {chance:7.2f}  {prompt}{text}")


if __name__ == "__main__":
    main()
