"""`python -m archzoo`: the same as the `archzoo` command."""

import sys

from archzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
