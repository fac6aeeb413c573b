"""torchrun for `--nproc`: when the workers have said what was wrong, it leaves with their exit code and adds nothing.

Stock torchrun answers every worker that ends with another code than 0 with a traceback of its own and exit code 1.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

SAID = (2, 143)  # bad input, stopped: the first rank has written one message


def main(words: Sequence[str]) -> int:
    """Start the workers; their exit code where they explained it, else torchrun's own error."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about its own imports
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.main(list(words))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode in SAID]
        if not codes:
            raise
        return codes[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
