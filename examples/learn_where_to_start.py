"""Give a RetNet another first state: what it writes changes, its weights and its speed do not.

    python examples/learn_where_to_start.py

or, with any checkpoint:

    archzoo fit --model.weights CHECKPOINT --model.adapter PTuningV2 --data TASK

A recurrent layer begins every text with a state of zeros. Here that state is learned, as prefix
tuning learns keys and values for attention, and it takes no more room than the zeros did. The model
knows two rhymes that begin alike; where it starts from decides which one it writes.
"""

import argparse

import torch
from adapt_a_trained_model import NEW, OLD, learn

import archzoo
from archzoo.states import nbytes
from archzoo.tasks.tokenizers import CharacterTokenizer


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    tokenizer = CharacterTokenizer("".join(sorted(set(OLD + NEW))))
    rhymes = {"shoes": tokenizer.encode(OLD), "skies": tokenizer.encode(NEW)}
    torch.manual_seed(0)
    model = archzoo.create_model("retnet_micro", vocab_size=tokenizer.vocab_size)
    learn(model, list(rhymes.values()), steps=200)

    for name, rhyme in rhymes.items():
        archzoo.adapt(model, archzoo.PTuningV2())
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        learn(model, [rhyme], steps=40)
        written = archzoo.generate(model, "one two, ", max_tokens=44, tokenizer=tokenizer)
        print(f"started for {name}, {learned:,} numbers: one two, {written.texts[0]}")
        print(f"its state: {nbytes(model.init_state(1)['blocks']):,} bytes, as without")
        archzoo.remove_adapters(model)

    # Without training: start as if a text had been read before every document.
    read = tokenizer.encode(OLD)
    archzoo.adapt(model, archzoo.PTuningV2(tokens=read))
    text = torch.tensor([tokenizer.encode("one two, ")])
    with torch.no_grad():
        started = model(text).logits
        archzoo.remove_adapters(model)
        whole = model(torch.cat([torch.tensor([read]), text], 1)).logits[:, len(read) :]
    print(f"started behind a text, against reading it: {(started - whole).abs().max():.0e}")


if __name__ == "__main__":
    main()
