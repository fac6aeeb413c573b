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
    """

    pattern: str
    min_layers: int = 1
    protected_layers: tuple[int, ...] = ()
    min_attention_layers: int = 0

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
        """Layers that may go next, ascending; none when the wanted depth is reached."""
        left = [layer for layer in range(len(self.pattern)) if layer not in removed]
        if len(left) <= self.min_layers:
            return []
        count = Counter(self.pattern[layer] for layer in left)
        keep = {kind.letter for kind in kinds() if kind.fewest and count[kind.letter] <= getattr(self, kind.fewest)}
        return [layer for layer in left if layer not in self.protected_layers and self.pattern[layer] not in keep]


@dataclass
class DepthProgress:
    """Rounds so far: what was removed, and the last score of every layer. Greedy goes on from here after a stop."""

    removed: list[int] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    def remove_worst(self, rules: DepthRules) -> int:
        """Remove the layer with the lowest score among those that may go; the later one when scores are equal."""
        worst = min(rules.removable(self.removed), key=lambda layer: (self.scores[layer], -layer))
        self.removed.append(worst)
        return worst

    def ranking(self, rules: DepthRules) -> tuple[int, ...]:
        """All layers, most important first. Layers that were never scored (protected ones) count as the best."""
        scores = {layer: self.scores.get(layer, float("inf")) for layer in range(len(rules.pattern))}
        return depth_ranking(self.removed, scores, rules.protected_layers)


def rank_greedy(
    score: Callable[[Sequence[int], Sequence[int]], Mapping[int, float]],
    rules: DepthRules,
    progress: DepthProgress | None = None,
) -> DepthProgress:
    """Remove layer after layer; `score(removed, candidates)` gives the score of removing each candidate as well."""
    progress = progress or DepthProgress()
    while candidates := rules.removable(progress.removed):
        progress.scores.update(score(tuple(progress.removed), candidates))
        progress.remove_worst(rules)
    return progress


def rank_by(scores: Mapping[int, float], rules: DepthRules) -> DepthProgress:
    """Remove by scores that are never measured again (`one_shot`, `cosine`)."""
    progress = DepthProgress(scores=dict(scores))
    while rules.removable(progress.removed):
        progress.remove_worst(rules)
    return progress


def rank_randomly(rules: DepthRules, seed: int) -> DepthProgress:
    """The `random` baseline under the same rules."""
    draw = random.Random(seed)
    return rank_by({layer: draw.random() for layer in range(len(rules.pattern))}, rules)


def rounds(rules: DepthRules) -> list[int]:
    """Number of candidates in every round of a greedy ranking, an upper bound under `min_attention_layers`."""
    removable = len(rules.removable(()))
    return [removable - r for r in range(min(removable, len(rules.pattern) - rules.min_layers))]
