"""Which activations to keep, so that an ablation restarts where it begins to differ.

    the activation that enters layer l depends only on the batch and on the removed layers below l

so `(batch, removed below l, l)` names it, across candidates and across rounds of a greedy ranking. `ActivationIndex`
decides what is kept within a number of entries per pipeline stage. It knows names only and is a pure function of the
calls made, so every rank keeps the same index of all stages and holds only its own tensors. No torch here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BASE, CANDIDATE = "base", "candidate"  # entries of the network of this round; of one with a candidate left out


@dataclass(frozen=True)
class Entry:
    """The activation that enters `layer` when the layers in `removed` (all below it) are left out."""

    batch: int
    removed: frozenset[int]
    layer: int


class ActivationIndex:
    """Names of kept activations.

    Args:
        stage_of: layer -> pipeline stage; an entry lives on the stage of its layer.
        capacity: entries that a stage can hold.
        unit: layers that are left out as one.
    """

    def __init__(self, stage_of: Mapping[int, int], capacity: int, unit: int = 1) -> None:
        self.stage_of, self.capacity, self.unit = stage_of, max(0, capacity), unit
        self._kinds: dict[Entry, str] = {}  # in the order of their arrival
        self._held = dict.fromkeys(sorted(set(stage_of.values())), 0)
        self.evicted: list[Entry] = []

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._kinds

    def __len__(self) -> int:
        return len(self._kinds)

    def restart(self, batch: int, removed: Iterable[int]) -> int:
        """The highest layer whose entering activation is kept for this network; 0 (the embedding) when none is."""
        removed = frozenset(removed)
        for layer in range(len(self.stage_of) - 1, 0, -1):
            if entry_of(batch, removed, layer) in self._kinds:
                return layer
        return 0

    def wants(self, entry: Entry, kind: str, stride: int = 1) -> bool:
        """Whether to keep this activation; makes room for one of this round's network, never for a candidate's.

        `stride` thins the entries of a network that does not fit: only every stride-th layer's is kept.
        """
        if entry in self._kinds or self.capacity == 0 or (kind == BASE and entry.layer % stride):
            return False
        stage = self.stage_of[entry.layer]
        if self._held[stage] >= self.capacity and not (kind == BASE and self._make_room(stage, entry.batch)):
            return False
        self._kinds[entry] = kind
        self._held[stage] += 1
        return True

    def stride(self, removed: Sequence[int]) -> int:
        """Smallest stride at which one batch's network fits into every stage."""
        layers: dict[int, int] = {}
        for layer, stage in self.stage_of.items():
            if layer not in removed:
                layers[stage] = layers.get(stage, 0) + 1
        return max((-(-n // max(1, self.capacity)) for n in layers.values()), default=1)

    def next_round(self, removed: Iterable[int]) -> None:
        """Drop what the network without `removed`, or without one more layer, can no longer use."""
        removed = frozenset(removed)
        for entry in list(self._kinds):
            below = frozenset(layer for layer in removed if layer < entry.layer)
            extra = entry.removed - below
            if not below <= entry.removed or len(extra) > self.unit:
                self._drop(entry)
            else:
                self._kinds[entry] = CANDIDATE if extra else BASE

    def take_evicted(self) -> list[Entry]:
        """Entries dropped since the last call, whose tensors can be freed."""
        gone, self.evicted = self.evicted, []
        return gone

    def _make_room(self, stage: int, batch: int) -> bool:
        """Drop the youngest entry of a candidate, else of another batch; False when there is none."""
        here = [e for e in reversed(self._kinds) if self.stage_of[e.layer] == stage]
        victims = [e for e in here if self._kinds[e] == CANDIDATE] or [e for e in here if e.batch != batch]
        if not victims:
            return False
        self._drop(victims[0])
        return True

    def _drop(self, entry: Entry) -> None:
        del self._kinds[entry]
        self._held[self.stage_of[entry.layer]] -= 1
        self.evicted.append(entry)


def entry_of(batch: int, removed: Iterable[int], layer: int) -> Entry:
    """The name of the activation that enters `layer` in the network without `removed`."""
    return Entry(batch, frozenset(r for r in removed if r < layer), layer)
