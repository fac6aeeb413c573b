"""What was found on the hybrids, said so that another kind of parent can agree or not: the page's *Other parents*."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from readings import NONE, Results, relative
from runs import CHILDREN, PARENTS, RUNS
from tables import LAYERS, paired

Pairs = Callable[[Results, str], tuple[Sequence[float], Sequence[float]]]  # (ours, theirs) of a budget, seed by seed


@dataclass(frozen=True)
class Claim:
    """A sentence about ours / theirs - 1 of some budgets.

    Attributes:
        words: true of the hybrids.
        pairs: losses, of one run and of another.
        below: the claim is that the difference is below `limit`, or above it.
        budgets: those it is made of.
    """

    words: str
    pairs: Pairs
    below: bool = True
    limit: float = 0.0
    budgets: Sequence[str] = CHILDREN

    def row(self, parents: Mapping[int, Results]) -> dict[str, str]:
        """The difference on every parent, and whether the claim holds there (parents of a kind together)."""
        row = {"words": self.words}
        met: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for number, results in parents.items():
            found = {budget: self.pairs(results, budget) for budget in self.budgets}
            found = {budget: pair for budget, pair in found.items() if pair[0]}
            row[str(number)] = ", ".join(f"`{b}` {relative(*pair)}" for b, pair in found.items()) or NONE
            for ours, theirs in found.values():
                mean = statistics.fmean(a / b - 1 for a, b in zip(ours, theirs, strict=True))
                met[PARENTS[number].kind].append(mean < self.limit if self.below else mean > self.limit)
        return row | {kind: held(found) for kind, found in met.items()}


KINDS = tuple(dict.fromkeys(parent.kind for parent in PARENTS.values()))


def held(met: Sequence[bool]) -> str:
    """In a word."""
    return NONE if not met else "yes" if all(met) else "in part" if any(met) else "no"


def over(name: str, other: str) -> Pairs:
    """A run over another one; in their names `BUDGET` stands for the budget."""
    return lambda results, budget: tuple(
        paired(results, name.replace("BUDGET", budget), other.replace("BUDGET", budget), budget)
    )


def over_parent(name: str) -> Pairs:
    """A run over its parent."""

    def pairs(results: Results, budget: str) -> tuple[Sequence[float], Sequence[float]]:
        ours = results.losses(name, budget, results.seeds(name))
        return ours, [results.parent["heldout_loss"]] * len(ours)

    return pairs


def across(*ways: Pairs) -> Pairs:
    """The first of these that a parent has runs of: one question, in other sizes of a hybrid and a transformer."""
    return lambda results, budget: next((p for p in (way(results, budget) for way in ways) if p[0]), ([], []))


CLAIMS = (
    Claim("Shapes matter: evenly shrunk children end above those with learned shapes",
          over("shapes-even", "family"), below=False),
    Claim("Learned shapes end lower when they are given from the first step", over("shapes-own", "family")),
    Claim("Greedy search ends below learned shapes", over("greedy-family", "family")),
    Claim("A child whose shape is learned ends within 0.5 % of itself alone on equal tokens, or below",
          over("family", "alone-BUDGET"), limit=0.005),
    Claim("A child whose shape is given (greedy search) ends below itself alone on equal tokens",
          over("greedy-family", "greedy-alone-BUDGET")),
    Claim("Alone for all of the family's steps a child ends below the family's, learned shapes",
          over("family", "whole-BUDGET"), below=False),
    Claim("The same with greedy search", over("greedy-family", "greedy-whole-BUDGET"), below=False),
    Claim("The full member has not come back to its parent, learned shapes",
          over_parent("family"), below=False, budgets=("full",)),
    Claim("The same with greedy search", over_parent("greedy-family"), below=False, budgets=("full",)),
    Claim("With greedy search, all budgets in every micro-batch and a low rate (*gentle*) a child ends within 1 % of "
          "itself alone for all steps", over("greedy-gentle", "greedy-whole-BUDGET"), limit=0.01),
    Claim("*Gentle*, the full member ends below that of the default family",
          over("greedy-gentle", "family"), budgets=("full",)),
    Claim("Layers (blocks) by what the logits lose end below random ones",
          across(over("depth-parent", "depth-random"), over("depth-blocks-parent", "depth-blocks-random")),
          budgets=("shallow",)),
)  # fmt: skip


def claims(parents: Mapping[int, Results]) -> list[dict[str, str]]:
    """A row per claim, where another kind of parent has runs; nothing else."""
    if not any(results.runs for number, results in parents.items() if not PARENTS[number].hybrid):
        return []
    return [claim.row(parents) for claim in CLAIMS]


EXPERTS = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")


def found_shapes(results: Results) -> list[dict[str, str]]:
    """A row per child and way to its shape, of the first seed: its sizes, and which layers it lacks."""
    rows = []
    for name in ("family", "greedy-family", "shapes-even"):
        for seed in results.seeds(name)[:1]:
            for child in CHILDREN:
                subnet = results.runs[name, seed]["subnets"][child]
                kept = subnet["layers"]
                row = {"what": RUNS[name].what, "seed": str(seed), "child": child}
                row["dropped"] = ", ".join(str(n) for n in range(LAYERS) if n not in kept) or "none"
                for dim in ("hidden_size", "ffn_hidden_size", "mamba_num_heads", "num_attention_heads"):
                    row[dim] = str(subnet.get(dim) or NONE)  # an empty list: no such layer
                experts = [str(subnet.get(dim) or "") for dim in EXPERTS]
                row["experts"] = "{} x {} + {}".format(*experts) if experts[0] else NONE
                rows.append(row)
    return rows
