"""In which chunks the scan in torch goes through a sequence: its states, one a chunk, are kept for the backward."""

import math


def scan_chunk_length(length: int, head_dim: int, state_dim: int) -> int:
    """Chunk length of the scan in torch: balances the work inside a chunk, ``~ Q`` a step, with that on the states,
    ``~ p n / Q``.

    The constants were measured (``benchmarks/ssd.py --chunks``): powers of two near ``sqrt(p n / 2)``, from 32 to 128.
    """
    balanced = 2 ** int(math.log2(max(head_dim * state_dim / 2, 1)) / 2)
    return max(1, min(length, max(32, min(128, balanced))))
