"""One decoding step of one budget, whose calls and memory never change: on a GPU a CUDA graph of it.

    step(token t) == logits(token t, a cache that grows)        for as many tokens as there is room

Decoding is bound by launches: dozens of kernels a layer, each over before the next one has started. A graph launches
all of them at once. It can be recorded because nothing of a step depends on how many tokens were seen: keys lie in
memory of one size, and where the next one goes is a number on the device that the step itself moves on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .network import Network

WARM_UPS = 2  # kernels are compiled and chosen, and libraries make their workspaces, before anything is recorded


@dataclass
class Cache:
    """What one generation of `batch` rows remembers; it belongs to its budget. `length` tokens were seen."""

    budget: str
    batch: int
    layers: list[Any]
    length: int = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these (a layer's cache is a dataclass of tensors whose first dim is the batch)."""
        for layer in filter(None, self.layers):
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    setattr(layer, name, value[list(rows)])
        self.batch = len(rows)


@dataclass(eq=False)
class DecodeStep:
    """A step of `batch` rows with room for `room` tokens, prompt and all. On a GPU it is recorded when it is made.

    It holds the weights of its budget, a compact copy among them, as long as it lives: `switch` does not free those.

    Args:
        network: of the budget.
        budget: its name.
    """

    network: Network
    budget: str
    batch: int
    room: int
    length: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        with torch.inference_mode():
            device = self.network.embedding.device
            self._tokens = torch.zeros(self.batch, 1, dtype=torch.int64, device=device)
            self._position = torch.zeros(1, dtype=torch.int64, device=device)
            self._layers = self.network.new_caches(self.batch, self.room, self._position)
            self._play = recorded(self._run, self._position.zero_) if records(device) else self._run

    @torch.inference_mode()
    def begin(self, cache: Cache) -> None:
        """Go on from the tokens that `cache` has seen; what the step remembered is forgotten.

        Raises:
            ValueError: a cache of another budget or batch, or one that is longer than there is room.
        """
        if (cache.budget, cache.batch) != (self.budget, self.batch) or cache.length > self.room:
            raise ValueError(
                f"the step is of budget {self.budget!r}, {self.batch} rows and {self.room} tokens; the cache is of "
                f"{cache.budget!r}, {cache.batch} rows and {cache.length} tokens"
            )
        for mine, given in zip(self._layers, cache.layers, strict=True):
            if mine is not None:
                mine.take(given)
        self._position.fill_(cache.length)
        self.length = cache.length

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """The next tokens `[b, 1]` -> their logits `[b, 1, v]`, which the next call overwrites on a GPU.

        Raises:
            ValueError: there is no room for another token.
        """
        if self.length == self.room:
            raise ValueError(f"the step has room for {self.room} tokens, and all of it is taken")
        self._tokens.copy_(tokens)
        self.length += 1
        return self._play()

    def _run(self) -> Tensor:
        logits = self.network.logits(self._tokens, self._layers)
        self._position += 1
        return logits


def records(device: torch.device) -> bool:
    """Whether calls can be recorded there."""
    return device.type == "cuda"


def recorded(run: Callable[[], Tensor], rewind: Callable[[], object]) -> Callable[[], Tensor]:
    """`run` as a CUDA graph; what it returns is always the same tensor.

    Args:
        rewind: called before every run that comes first, so that these do not run out of room.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            rewind()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def play() -> Tensor:
        graph.replay()
        return result

    return play
