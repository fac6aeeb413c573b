"""Which tokens sample `i` is: windows of a stream in a shuffled order, a pure function of (seed, i).

    epoch, rank = divmod(i, n)         n = windows in an epoch
    start(i)    = offset(seed, epoch) + seq_length * permutation(seed, epoch)[rank]

Nothing else decides: not the number of workers, not the parallel layout, not whether the run was
resumed. Every epoch shifts the grid of windows by a random offset below `seq_length`, so that the cuts
fall elsewhere; windows cross documents, which end-of-text marks.
"""

from __future__ import annotations

import numpy as np


class Windows:
    """Windows of `seq_length + 1` tokens over a stream, in an order that is shuffled anew every epoch.

    Args:
        stream: token ids, `[tokens]`.
        seq_length: tokens of a sample; the label of the last one is one token further.
        seed: of the shuffling.
        shuffle: False reads the grid in order, every epoch alike (held-out text).

    Raises:
        ValueError: the stream is shorter than two windows (one, unshuffled).
    """

    def __init__(self, stream: np.ndarray, seq_length: int, *, seed: int = 0, shuffle: bool = True) -> None:
        self.stream, self.seq_length, self.seed, self.shuffle = stream, seq_length, seed, shuffle
        self.per_epoch = (len(stream) - 1) // seq_length - int(shuffle)
        if self.per_epoch < 1:
            raise ValueError(
                f"data: {len(stream)} tokens of text are too few for data.seq_length={seq_length}; "
                "add text or use shorter sequences"
            )
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def start(self, index: int) -> int:
        """Position in the stream where sample `index` (any integer from 0) begins."""
        epoch, rank = divmod(int(index), self.per_epoch)
        if not self.shuffle:
            return rank * self.seq_length
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            offset = int(generator.integers(self.seq_length))
            self._starts = offset + self.seq_length * generator.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._starts[rank])

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of sample `index`, two `int64` arrays `[seq_length]`."""
        start = self.start(index)
        window = np.asarray(self.stream[start : start + self.seq_length + 1], dtype=np.int64)
        return window[:-1], window[1:]

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of samples `first .. first + count - 1`, two arrays `[count, seq_length]`."""
        tokens, labels = zip(*(self.sample(first + k) for k in range(count)), strict=True)
        return np.stack(tokens), np.stack(labels)
