"""`python -m nemo_elastic`, which is what torchrun and `--nproc` start."""

import sys

from .cli.launch import end_with_launcher
from .cli.main import main

if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main())
