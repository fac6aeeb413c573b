"""How anything that takes long says how far it is: one callable, the command line's bars as well as a notebook's."""

from typing import Protocol


class Progress(Protocol):
    """Called on the first rank, at the latest once a step. An exception of it ends the run."""

    def __call__(self, name: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` parts of what is called `name` (`rank widths`, `train`, ...) are over; `text`: figures."""


def silent(name: str, done: int, total: int, text: str = "") -> None:
    """The progress of whoever does not ask."""
