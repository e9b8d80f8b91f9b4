"""Read a text of any length into a state, in segments; stop in the middle, and resume from there.

    python examples/read_a_long_document.py

or, with any checkpoint, and as often interrupted as you like:

    archzoo read CHECKPOINT book.txt --state book.state
    archzoo generate CHECKPOINT "Who was it? " --state book.state

The memory that this takes does not depend on the length of the text where the model's state does
not grow, as retention's does not. The model here is untrained: it is about the state alone.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import archzoo
from archzoo.generation import Reading
from archzoo.states import nbytes
from archzoo.tasks.tokenizers import CharacterTokenizer

TEXT = "".join(f"{number} green bottles hanging on the wall; " for number in range(800, 0, -1))


def stop_halfway(reading: Reading) -> None:
    if reading.done > reading.size / 2:
        raise KeyboardInterrupt  # as Ctrl-C does, at any moment


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer("".join(sorted(set(TEXT))))
    model = archzoo.create_model("retnet_micro", vocab_size=tokenizer.vocab_size).eval()
    begun: list[Reading] = []

    with tempfile.TemporaryDirectory() as directory:
        document, file = Path(directory, "bottles.txt"), Path(directory, "bottles.state")
        document.write_text(TEXT, encoding="utf-8")
        often = {"segment": 4_096, "save_every": 0.0}  # here after every segment
        try:
            archzoo.read_document(
                model, document, tokenizer, state=file, on_segment=stop_halfway, **often
            )
        except KeyboardInterrupt:
            print(f"stopped: {int(archzoo.load_state(file, model).read[0]):,} tokens are kept")
        resumed = archzoo.read_document(
            model, document, tokenizer, state=file, on_segment=begun.append, **often
        )
        print(f"resumed: from byte {begun[0].resumed:,} of {begun[0].size:,}")
        whole = archzoo.read_document(model, document, tokenizer, segment=4_096)

    size = nbytes(resumed.state)
    print(f"read:    {int(resumed.read[0]):,} tokens; the state has {size:,} bytes")
    same = all(
        torch.equal(ours["memory"], theirs["memory"])
        for ours, theirs in zip(resumed.state["blocks"], whole.state["blocks"], strict=True)
    ) and torch.equal(resumed.logits, whole.logits)
    print(f"as in one go: {'bit for bit' if same else 'DIFFERENT'}")

    # What follows needs the state alone; the text is not read again.
    written = archzoo.generate(
        model, "one ", conversation=resumed, max_tokens=20, tokenizer=tokenizer
    )
    print(f"written: 20 tokens after it, {written.milliseconds_per_token:.1f} ms each")


if __name__ == "__main__":
    main()
