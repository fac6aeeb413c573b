"""What depth drops: single layers, or blocks of a mixer and the feed-forward layer behind it.

A hybrid of Nemotron's is a list of layers; a Llama, Qwen, Bamba or Granite knows only whole blocks, two letters of a
pattern (`*-`, `M-`), and cannot say a child that has half of one. No torch here.
"""

from ..kinds import kind_of
from ..problems import Problem

DEPTH_UNITS = {"layer": 1, "block": 2}  # name -> layers


def is_blocks(pattern: str) -> bool:
    """Whether a pattern is a sequence of whole blocks."""
    ends = [kind_of(letter).ends_block for letter in pattern]
    return bool(ends) and ends == [False, True] * (len(ends) // 2)


def block_problems(pattern: str, key: str = "elastic.depth_unit") -> list[Problem]:
    """Why the layers of a pattern cannot be dropped as blocks."""
    if is_blocks(pattern):
        return []
    words = f"block needs a pattern of a mixer and a feed-forward layer in turn, such as *-M-*-; this is {pattern}"
    return [Problem(key, words)]


def units_of(layers: int, unit: int) -> tuple[tuple[int, ...], ...]:
    """The layers of every unit, in the order of the forward."""
    return tuple(tuple(range(first, first + unit)) for first in range(0, layers, unit))
