"""Layer kinds: what is a fact of one stands in its own file here, and nobody else compares a letter.

`kinds()` are those of this process. A kind of another package joins by `register` before anything of this package that
reads them is imported: the fields of `Architecture` and `Subnet` are made of them, once.
"""

from functools import cache

from .attention import ATTENTION
from .experts import EXPERTS
from .kind import Dim, Kind, Size
from .mamba import MAMBA
from .mlp import MLP

__all__ = [
    "Dim",
    "Kind",
    "Size",
    "dims",
    "flags",
    "kind_of",
    "kind_of_dim",
    "kinds",
    "kinds_by_dim",
    "kinds_of",
    "register",
    "sizes",
]

_registered: list[Kind] = [MAMBA, ATTENTION, MLP, EXPERTS]
_read = False


def register(kind: Kind) -> None:
    """Add a layer kind to this process.

    Raises:
        ValueError: a letter or name that is taken, or one of Megatron's own that the kind does not compute.
        RuntimeError: too late, the kinds have been read.
    """
    if _read:
        raise RuntimeError(
            f"kind {kind.name!r} comes too late: register it before nemo_elastic.space.architecture is read"
        )
    taken = [k for k in _registered if k.letter == kind.letter or k.name == kind.name]
    if taken or len(kind.letter) != 1:
        words = f"those of {taken[0].name!r}" if taken else "no single letter"
        raise ValueError(f"kind {kind.name!r} has letter {kind.letter!r} and name {kind.name!r}: {words}; take others")
    _registered.append(kind)


def kinds() -> tuple[Kind, ...]:
    """Every kind, in the order in which tables list them."""
    global _read
    _read = True
    return tuple(_registered)


@cache
def _by_letter() -> dict[str, Kind]:
    return {kind.letter: kind for kind in kinds()}


def kind_of(letter: str) -> Kind:
    """The kind that a letter of a pattern means.

    Raises:
        KeyError: none.
    """
    return _by_letter()[letter]


def kinds_of(pattern: str) -> tuple[Kind, ...]:
    """The kinds that a pattern has layers of, in the order of `kinds`."""
    return tuple(kind for kind in kinds() if kind.letter in pattern)


@cache
def dims() -> tuple[Dim, ...]:
    """Every elastic dim that belongs to a kind, by its `place`."""
    return tuple(sorted((dim for kind in kinds() for dim in kind.dims), key=lambda dim: dim.place))


@cache
def _of_dim() -> dict[str, Kind]:
    return {dim.name: kind for dim in dims() for kind in kinds() if dim in kind.dims}


def kind_of_dim(name: str) -> Kind:
    """The kind whose layers a dim cuts.

    Raises:
        KeyError: none: `hidden_size`, `num_layers`.
    """
    return _of_dim()[name]


def kinds_by_dim() -> tuple[Kind, ...]:
    """Every kind with a dim, in the order of the dims."""
    return tuple(dict.fromkeys(_of_dim().values()))


def sizes() -> tuple[Size, ...]:
    """Every size of a kind, as `Architecture` and config.json list them."""
    return tuple(size for kind in reversed(kinds()) for size in kind.sizes)


def flags() -> tuple[str, ...]:
    """Every true or false of a kind, each once."""
    return tuple(dict.fromkeys(flag for kind in kinds() for flag in kind.flags))
