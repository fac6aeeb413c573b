"""`python -m nemo_elastic`, which is what torchrun starts."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
