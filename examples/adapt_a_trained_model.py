"""Teach a trained model something else by a LoRA: its weights stay, a small change learns.

    python examples/adapt_a_trained_model.py

or, with any checkpoint and any task of the same vocabulary:

    archzoo fit --model.weights CHECKPOINT --model.adapter LoRA --model.adapter.rank 4 --data TASK

The model learns a counting rhyme by heart first, and then another one, which takes seconds.
"""

import argparse

import torch
from torch.nn import functional as F

import archzoo
from archzoo.tasks.tokenizers import CharacterTokenizer

OLD = "one two, buckle my shoe; three four, knock at the door; five six, pick up sticks. "
NEW = "one two, the sky is blue; three four, sea and shore; five six, stones and bricks. "


def learn(model: archzoo.Decoder, rows: list[list[int]], steps: int, rate: float = 1e-2) -> None:
    """Train whatever learns of a model to write these rows."""
    torch.manual_seed(0)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    tokens = torch.tensor(rows)
    for _ in range(steps):
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    tokenizer = CharacterTokenizer("".join(sorted(set(OLD + NEW))))
    old, new = tokenizer.encode(OLD), tokenizer.encode(NEW)
    torch.manual_seed(0)
    model = archzoo.create_model("retnet_micro", vocab_size=tokenizer.vocab_size)

    def say(what: str) -> list[int]:
        written = archzoo.generate(model, "one two, ", max_tokens=44, tokenizer=tokenizer)
        print(f"{what}: one two, {written.texts[0]}")
        return written.tokens[0]

    learn(model, [old], steps=150)
    before = say("trained ")

    archzoo.adapt(model, archzoo.LoRA(rank=4, targets=["mixer", "feed_forward"]))
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"learns  : {learned:,} of {model.parameter_count():,} parameters")
    learn(model, [new], steps=150)
    after = say("adapted ")

    # Nothing of the model has changed: switched off, the adapter is not there.
    with archzoo.disable_adapters(model):
        print(f"off     : {'what it wrote before' if say('base    ') == before else 'OTHER'}")

    # Merged into the weights it costs nothing more, and the model is a plain one again.
    archzoo.merge_adapter(model)
    print(f"merged  : {'what it wrote adapted' if say('merged  ') == after else 'OTHER'}")


if __name__ == "__main__":
    main()
