"""Hold the state of a text: save it, continue it with a model loaded anew, fork it in two.

    python examples/keep_a_conversation.py

or, with any checkpoint and from one process to the next:

    archzoo generate CHECKPOINT "one two, " --save_state talk.state
    archzoo generate CHECKPOINT "" --state talk.state

Nothing is read twice: what is continued is the state, not the text. The model learns a counting
rhyme by heart first, which takes seconds.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from decode_side_by_side import RHYME, learn

import archzoo
from archzoo.states import nbytes
from archzoo.tasks.tokenizers import CharacterTokenizer

SAMPLED = {"temperature": 0.5, "seed": 7}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    tokenizer = CharacterTokenizer("".join(sorted(set(RHYME))))
    model = learn("retnet_micro", tokenizer).model

    begun = archzoo.generate(
        model, "one two, ", max_tokens=16, tokenizer=tokenizer, keep_state=True, **SAMPLED
    )
    print(f"begun:     one two, {begun.texts[0]}")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "talk.state")
        archzoo.save_pretrained(Path(directory, "model"), model, tokenizer)
        archzoo.save_state(file, begun.conversation, model)
        again, tokenizer = archzoo.from_pretrained(Path(directory, "model"))
        held = archzoo.load_state(file, again)
    print(f"saved:     {int(held.read[0])} tokens in {nbytes(held.state):,} bytes of state")

    # The model that was loaded has never seen the text, and draws as if there had been no pause.
    more = archzoo.generate(again, conversation=held, max_tokens=30, tokenizer=tokenizer, **SAMPLED)
    print(f"continued: {more.texts[0]}")
    whole = archzoo.generate(model, "one two, ", max_tokens=46, tokenizer=tokenizer, **SAMPLED)
    same = begun.tokens[0] + more.tokens[0] == whole.tokens[0]
    print(f"without a pause: {'the same tokens' if same else 'OTHER TOKENS'}")

    # A conversation stays as it is, so one reading serves many questions.
    for question in ("three four, ", "three four, knock at the door; five six, "):
        answer = archzoo.generate(
            again, question, conversation=held, max_tokens=20, tokenizer=tokenizer
        )
        print(f"asked:     {question}{answer.texts[0]}")

    # A bare state is consumed by the call that it is given to: fork it to continue it in two ways.
    with torch.inference_mode():
        for text in ("three four, knock at the d", "five six, pick up st"):
            state = archzoo.fork(held.state)
            logits = again(torch.tensor([tokenizer.encode(text)]), state).logits[0, -1]
            print(f"forked:    {text}, then {tokenizer.decode([int(logits.argmax())])}")


if __name__ == "__main__":
    main()
