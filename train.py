"""fit | validate | test | predict: `python train.py fit --config configs/addition.yaml`."""

import sys

from archzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
