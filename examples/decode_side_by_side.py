"""Watch a RetNet and a transformer continue one text, a token in turn: text, time, bytes of state.

    python examples/decode_side_by_side.py

or with models that are trained on Shakespeare first, in some minutes:

    archzoo demo --train

The two models here learn a counting rhyme by heart, which takes seconds.
"""

import argparse

import torch
from torch.nn import functional as F

import archzoo
from archzoo.demo.decoding import Side, decode
from archzoo.demo.terminal import show
from archzoo.tasks.tokenizers import CharacterTokenizer

RHYME = (
    "one two, buckle my shoe; three four, knock at the door; five six, pick up sticks; "
    "seven eight, lay them straight; nine ten, a big fat hen. "
)


def learn(preset: str, tokenizer: CharacterTokenizer, steps: int = 160) -> Side:
    torch.manual_seed(0)
    model = archzoo.create_model(preset, vocab_size=tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    text = torch.tensor(tokenizer.encode(RHYME * 3))
    for _ in range(steps):
        begins = torch.randint(len(RHYME), (4, 1))
        rows = text[begins + torch.arange(240)]  # anywhere in the rhyme, which comes round again
        logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Side(preset, model.eval(), tokenizer)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    tokenizer = CharacterTokenizer("".join(sorted(set(RHYME))))
    sides = [learn(preset, tokenizer) for preset in ("retnet_micro", "transformer_micro")]
    prompt = "three four, "
    show(sides, prompt, decode(sides, prompt, max_tokens=200, temperature=0.0))


if __name__ == "__main__":
    main()
