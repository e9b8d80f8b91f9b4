"""Retention or attention? Both trained alike, and the difference over seeds with its interval.

    python examples/compare_mixers.py

It is this command, at a size that takes seconds and says nothing yet:

    archzoo compare configs/addition.yaml --model.mixer Retention,Attention \\
        --model.match parameters --seeds 0,1,2 --learning_rates 1e-3,2e-3,4e-3 \\
        --report report.html

The directory it is given holds a row a run (runs.csv), a row an arm (table.csv, table.md) and the
curves; the same command continues what was interrupted.
"""

import argparse
import tempfile
from pathlib import Path

from archzoo.cli import main as archzoo

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "addition.yaml"
SMALL = [
    *("--model.preset", "retnet_micro", "--trainer.max_steps", "4", "--data.batch_size", "4"),
    *("--data.validation_examples", "4", "--data.test_examples", "4"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as directory:
        arms = ["--model.mixer", "Retention,Attention", "--model.match", "parameters"]
        status = archzoo(
            ["compare", str(CONFIG), *arms, "--seeds", seeds, *SMALL, "--output", directory]
        )
        if status == 0:
            print(Path(directory, "table.md").read_text(encoding="utf-8"))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
