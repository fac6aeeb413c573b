"""Which layers go first: rounds of removal over scores that somebody else measures. No model here.

Greedy (METHOD section 3): score every layer that may go, remove the one with the lowest score, score the rest again
against the FULL model; `one_shot` scores once. The removal order reversed, behind the layers that stayed, is the
ranking. Ties remove the later layer. Plain Python.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..kinds import kinds
from ..problems import Problem, raise_if_any
from ..space.blocks import units_of
from .ranking import depth_ranking

DEPTH_METHODS = {
    "greedy": "remove the least important layer, score the rest again, and so on",
    "one_shot": "score every layer once against the full model",
    "cosine": "1 - cosine of what enters and what leaves the layer, one forward",
    "random": "a seeded shuffle, to compare with",
}
DEPTH_METRICS = {
    "centred_mse": "squared error of the logits less their mean over the vocabulary, which a softmax does not see",
    "mse": "squared error of the logits as they are (the paper's formula)",
}


@dataclass(frozen=True, kw_only=True)
class DepthRules:
    """What may be removed.

    Attributes:
        pattern: the parent's `hybrid_override_pattern`.
        min_layers: stop removing at this depth.
        protected_layers: never removed.
        min_attention_layers: at least so many attention layers stay.
        unit: layers that go as one (`space.blocks`). Candidates are named by a unit's first layer.
    """

    pattern: str
    min_layers: int = 1
    protected_layers: tuple[int, ...] = ()
    min_attention_layers: int = 0
    unit: int = 1

    def __post_init__(self) -> None:
        depth = len(self.pattern)
        found = []
        if not 1 <= self.min_layers <= depth:
            found.append(Problem("rank.min_layers", f"{self.min_layers} must be between 1 and the {depth} layers"))
        for kind in (kind for kind in kinds() if kind.fewest):
            wanted, there = getattr(self, kind.fewest), self.pattern.count(kind.letter)
            if not 0 <= wanted <= there:
                rule = f"must be between 0 and the parent's {there} {kind.words} layers"
                found.append(Problem(f"rank.{kind.fewest}", f"{wanted} {rule}"))
        foreign = [layer for layer in self.protected_layers if not 0 <= layer < depth]
        if foreign:
            found.append(Problem("rank.protected_layers", f"{foreign} are no layers: they count from 0 to {depth - 1}"))
        raise_if_any(found)

    def removable(self, removed: Sequence[int]) -> list[int]:
        """First layers of the units that may go next, ascending; none when the wanted depth is reached."""
        left = [layer for layer in range(len(self.pattern)) if layer not in removed]
        if len(left) - self.unit < self.min_layers:
            return []
        count = Counter(self.pattern[layer] for layer in left)
        keep = {kind.letter for kind in kinds() if kind.fewest and count[kind.letter] <= getattr(self, kind.fewest)}
        stay = {layer for layer in left if layer in self.protected_layers or self.pattern[layer] in keep}
        units = (unit for unit in units_of(len(self.pattern), self.unit) if unit[0] not in removed)
        return [unit[0] for unit in units if not stay.intersection(unit)]

    def layers_of(self, candidate: int) -> tuple[int, ...]:
        """The layers of the unit that starts with `candidate`."""
        return tuple(range(candidate, candidate + self.unit))


@dataclass
class DepthProgress:
    """Rounds so far: what was removed, and the last score of every layer. Greedy goes on from here after a stop."""

    removed: list[int] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    def take(self, scores: Mapping[int, float], rules: DepthRules) -> None:
        """Note the scores of candidates: each layer of a unit has the unit's."""
        self.scores.update({layer: score for first, score in scores.items() for layer in rules.layers_of(first)})

    def remove_worst(self, rules: DepthRules) -> int:
        """Remove the unit with the lowest score among those that may go; the later one when scores are equal."""
        worst = min(rules.removable(self.removed), key=lambda layer: (self.scores[layer], -layer))
        self.removed.extend(reversed(rules.layers_of(worst)))
        return worst

    def ranking(self, rules: DepthRules) -> tuple[int, ...]:
        """All layers, most important first. Layers that were never scored (protected ones) count as the best."""
        scores = {layer: self.scores.get(layer, float("inf")) for layer in range(len(rules.pattern))}
        protected = [unit for unit in units_of(len(rules.pattern), rules.unit) if set(unit) & {*rules.protected_layers}]
        return depth_ranking(self.removed, scores, [layer for unit in protected for layer in unit])


def rank_greedy(
    score: Callable[[Sequence[int], Sequence[int]], Mapping[int, float]],
    rules: DepthRules,
    progress: DepthProgress | None = None,
) -> DepthProgress:
    """Remove layer after layer; `score(removed, candidates)` gives the score of removing each candidate as well."""
    progress = progress or DepthProgress()
    while candidates := rules.removable(progress.removed):
        progress.take(score(tuple(progress.removed), candidates), rules)
        progress.remove_worst(rules)
    return progress


def rank_by(scores: Mapping[int, float], rules: DepthRules) -> DepthProgress:
    """Remove by scores of units that are never measured again (`one_shot`, `cosine`)."""
    progress = DepthProgress()
    progress.take(scores, rules)
    while rules.removable(progress.removed):
        progress.remove_worst(rules)
    return progress


def rank_randomly(rules: DepthRules, seed: int) -> DepthProgress:
    """The `random` baseline under the same rules."""
    draw = random.Random(seed)
    return rank_by({unit[0]: draw.random() for unit in units_of(len(rules.pattern), rules.unit)}, rules)


def rounds(rules: DepthRules) -> list[int]:
    """Number of candidates in every round of a greedy ranking, an upper bound under `min_attention_layers`."""
    removable = len(rules.removable(()))
    return [removable - r for r in range(min(removable, (len(rules.pattern) - rules.min_layers) // rules.unit))]
