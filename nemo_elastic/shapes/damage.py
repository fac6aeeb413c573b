"""What a subnet is estimated to lose, from the scores that `rank` measured; to compare proposals without any forward.

    damage = sum over layers of w_l (1 - keep_l) / sum of w_l
    keep_l = product over the dims that cut layer l of (kept squared score / squared score),   0 for a dropped layer

w_l is what the output loses without layer l. A stand-in for a held-out loss, good for an order and no more: it knows
nothing of how cuts add up. No torch here; the scores are read with numpy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError
from ..space.architecture import Architecture
from ..space.choices import Selection, choice_shapes, is_row_per_layer, kept_by_depth, layers_of_dim
from ..space.dims import DEALT_DIMS, DEPTH, KIND_OF_DIM
from ..space.elastic_space import ElasticSpace
from .importance_file import DESCRIPTION, TENSORS, read_description

FOLDER = "importance"
HIDDEN = "hidden_size"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `rank` wrote, as plain numbers: dim -> layer -> score per unit, and what the output loses per layer."""

    widths: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)
    layers: Mapping[int, float] = field(default_factory=dict)
    depth_ranking: tuple[int, ...] | None = None


def read_scores(folder: str | Path, architecture: Architecture) -> Scores:
    """Scores from `OUT/importance` or from the run folder `OUT`.

    Raises:
        ProblemsError: nothing there, or scores of another parent.
    """
    base = Path(folder)
    base = base / FOLDER if (base / FOLDER / DESCRIPTION).is_file() else base
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        description = read_description(base, architecture)
        flat = load_file(base / TENSORS)
        widths: dict[str, dict[int, Sequence[float]]] = {}
        for name, scores in flat.items():
            dim, layer = name.rsplit(".", 1)
            rows = scores.astype("float64")
            if rows.ndim > 1:  # an order in every expert: what goes at a size is the least of each
                rows = np.sort(rows, axis=-1)[:, ::-1].sum(0)
            widths.setdefault(dim, {})[int(layer)] = rows.tolist()
        ranking = tuple(description["depth_ranking"]) or None
        losses = {int(layer): float(score) for layer, score in description["depth_scores"].items()}
        made = description["provenance"]
    except ProblemsError as error:
        words = f"{str(folder)!r} has no scores of this parent ({error}); give a folder that `nemo-elastic rank` wrote"
        raise ProblemsError([Problem("--ranking", words.replace("\n", "; "))]) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else error.strerror
        words = f"{str(folder)!r} has no scores ({reason}); give a folder that `nemo-elastic rank` wrote"
        raise ProblemsError([Problem("--ranking", words)]) from error
    scores = Scores(widths=widths, layers=_increments(losses, made), depth_ranking=ranking)
    _check(scores, architecture, folder)
    return scores


def _increments(losses: Mapping[int, float], made: Mapping[str, Any]) -> dict[int, float]:
    """A greedy ranking scores a layer together with all that went before it: take the difference.

    Where layers go in blocks, each has its block's score, and an equal part of what the block adds.
    """
    settings, removed = made.get("config", {}), list(made.get("removed", ()))
    unit, found, gone = settings.get("depth_unit", 1), {}, 0.0
    if settings.get("depth") != "greedy":
        return {layer: score / unit for layer, score in losses.items()}
    for layer in removed[::unit]:
        added = max(losses[layer] - gone, 0.0) / unit
        found |= dict.fromkeys((other for other in losses if other // unit == layer // unit), added)
        gone = max(gone, losses[layer])
    return found | {layer: max(score - gone, 0.0) / unit for layer, score in losses.items() if layer not in found}


def _check(scores: Scores, architecture: Architecture, folder: str | Path) -> None:
    wrong = (
        [f"depth_ranking of {len(scores.depth_ranking)} layers"]
        if (scores.depth_ranking and sorted(scores.depth_ranking) != list(range(architecture.num_layers)))
        else []
    )
    for dim, by_layer in scores.widths.items():
        units = getattr(architecture, dim, None)
        if any(len(row) != units for row in by_layer.values()):
            wrong.append(f"{dim} with {len(next(iter(by_layer.values())))} units, the parent has {units}")
    if wrong:
        words = f"{str(folder)!r} has scores of another parent: {'; '.join(wrong)}"
        raise ProblemsError([Problem("--ranking", words)])


class Damage:
    """Estimated damage of selections of one space.

    Raises:
        ProblemsError: a dim with choices has no scores.
    """

    def __init__(self, space: ElasticSpace, scores: Scores) -> None:
        self.space = space
        layers = range(space.architecture.num_layers)
        known = any(scores.layers.get(i, 0.0) > 0 for i in layers)
        raw = [scores.layers.get(i, 0.0) if known else 1.0 for i in layers]
        self.worth = [w / sum(raw) for w in raw]
        self.kept = [set(k) for k in kept_by_depth(space)]
        self.shares = {name: self._shares(name, scores) for name in choice_shapes(space) if name != DEPTH}
        self.rows = {name: {layer: r for r, layer in enumerate(layers_of_dim(space, name))} for name in self.shares}
        cuts = {layer: [n for n in self.shares if n == HIDDEN or KIND_OF_DIM[n] == letter]
                for layer, letter in enumerate(space.architecture.hybrid_override_pattern)}  # fmt: skip
        self.cuts = cuts

    def _shares(self, name: str, scores: Scores) -> dict[int, list[float]]:
        """Layer -> per choice, the kept share of the squared scores."""
        if not scores.widths.get(name):
            words = f"has no scores of {name}, which elastic.dims lets vary; rank again"
            raise ProblemsError([Problem("--ranking", words)])
        dim, by_layer = self.space.dims[name], scores.widths[name]
        groups = 1 if name in DEALT_DIMS else dim.groups  # such units are ranked as a whole, then dealt
        if name == HIDDEN:  # one order for the whole net: the sum over norms
            summed = [sum(column) for column in zip(*by_layer.values(), strict=True)]
            by_layer = dict.fromkeys(range(self.space.architecture.num_layers), summed)
        return {layer: [kept_share(row, size, groups) for size in dim.choices] for layer, row in by_layer.items()}

    def of(self, selection: Selection) -> float:
        """From 0 (the parent) to 1."""
        kept = self.kept[selection.get(DEPTH, (0,))[0]]
        total = 0.0
        for layer, worth in enumerate(self.worth):
            share = 1.0 if layer in kept else 0.0
            for name in self.cuts[layer] if share else ():
                row = selection[name]
                chosen = row[self.rows[name][layer]] if is_row_per_layer(self.space, name) else row[0]
                share *= self.shares[name][layer][chosen]
            total += worth * (1 - share)
        return total


def kept_share(scores: Sequence[float], size: int, groups: int) -> float:
    """Share of the squared scores in the best `size / groups` units of every one of `groups` equal groups."""
    per_group, kept, total = len(scores) // groups, 0.0, 0.0
    for g in range(groups):
        squares = sorted((s * s for s in scores[g * per_group : (g + 1) * per_group]), reverse=True)
        kept, total = kept + sum(squares[: size // groups]), total + sum(squares)
    return kept / total if total else 1.0
