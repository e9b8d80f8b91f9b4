"""Write a report: tables, interactive plots and every setting in one HTML file that can be sent on.

    pip install 'archzoo[report]'
    python examples/write_a_report.py report.html

`archzoo compare` and `archzoo bench` write theirs with --report report.html. This one shows two
numbers that need no training: what a text's state takes, and how long a token stays in a head's
memory.
"""

import argparse

import torch

import archzoo
from archzoo.analysis.report import Cell, Chart, Series, Table, write_report
from archzoo.analysis.window import windows
from archzoo.block import nbytes

MODELS = ("retnet_tiny", "transformer_tiny")
LENGTHS = [2**n for n in range(8, 15)]


def state_bytes(model: archzoo.Decoder, length: int) -> int:
    """Of one text of that length; on the meta device a model has shapes and no memory."""
    return nbytes(model.init_state(1, capacity=length, device="meta", dtype=torch.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", nargs="?", default="report.html")
    path = parser.parse_args().path

    with torch.device("meta"):
        models = {name: archzoo.create_model(name) for name in MODELS}
    sizes = {name: [state_bytes(model, n) for n in LENGTHS] for name, model in models.items()}
    curves = [Series(name, LENGTHS, size) for name, size in sizes.items()]
    rows = [
        [
            name,
            model.parameter_count(),
            *(Cell(s, f"{s / 1024:,.0f} KiB") for s in sizes[name][::3]),
        ]
        for name, model in models.items()
    ]
    headings = ["model", "parameters", *(f"state at {n:,}" for n in LENGTHS[::3])]
    ages = list(range(0, 513, 8))
    heads = [w for w in windows(archzoo.create_model("retnet_tiny")) if w.layer == 0]
    memory = [Series(f"head {w.head}", ages, [w.gamma**age for age in ages]) for w in heads]
    write_report(
        path,
        "What is kept of a text",
        command="python examples/write_a_report.py",
        settings={"models": MODELS, "lengths": LENGTHS, "dtype": "float32"},
        sections=[
            "Attention keeps every token that it has read; retention keeps a state of one size, "
            "in which each head lets go of old tokens at a rate of its own.",
            Table("The state of one text", headings, rows),
            Chart("Bytes against length", "tokens", "bytes", curves, log_x=True, log_y=True),
            Chart(
                "A token in the memory of retnet_tiny",
                "tokens since",
                "weight",
                memory,
                note="Of the first layer; a token just read weighs 1.",
            ),
        ],
    )


if __name__ == "__main__":
    main()
