"""From which length on is retention faster than attention, and its state smaller?

    python examples/bench_mixers.py

It is this command, over lengths that take seconds:

    archzoo bench retnet_tiny --mixers Retention,Attention --report report.html

Sides are timed in turn, so that both see whatever else the machine does. The rows name the machine,
the versions, the commit and the command, and say in words where curves cross.
"""

import argparse
import tempfile
from pathlib import Path

from archzoo.cli import main as archzoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()  # --help, or none
    with tempfile.TemporaryDirectory() as directory:
        status = archzoo(
            [
                *("bench", "retnet_micro", "--mixers", "Retention,Attention", "--device", "cpu"),
                *("--decode", "--state", "--lengths", "16,64,256", "--rounds", "3"),
                *("--minutes", "2", "--peers", "none", "--output", f"{directory}/bench"),
            ]
        )
        print("wrote", *sorted(path.name for path in Path(directory).iterdir()))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
