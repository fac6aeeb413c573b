"""What a run's students start with: the sorted parent, or a family that was trained from it (`train.start_from`).

Weights of a family lie in the order of its own ranking, so they mean something here only where this run has the same
parent, in the same order. What teaches does not change by it: the sorted parent, or with `distill.teacher: self` the
full member. The folder is read again at the end of the run, for the losses before training.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_elastic.checkpoint.reader import TensorReader
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.family import Family
from nemo_elastic.mcore.models.parents import SortedParent
from nemo_elastic.nemo.export.nested import open_nested
from nemo_elastic.problems import Problem, ProblemsError, raise_if_any

KEY = "train.start_from"


def start_problems(config: RunConfig, family: Family, out: Path) -> list[Problem]:
    """What is known before anything is ranked: no nested checkpoint, one of another parent's sizes, or in `out`."""
    if not config.train.start_from:
        return []
    if Path(config.train.start_from).resolve().is_relative_to(out.resolve()):
        words = f"{config.train.start_from!r} lies in --out {str(out)!r}, where this run writes; choose another --out"
        return [Problem(KEY, words)]
    try:
        theirs = open_nested(config.train.start_from).manifest.space
    except ProblemsError as error:
        return [Problem(KEY, f"{p.key}: {p.message}") for p in error.problems]
    pairs = {
        "model": (theirs.architecture, family.architecture),
        "elastic.ffn_groups": (theirs.groups.ffn, family.space.groups.ffn),
    }
    if family.architecture.num_moe_experts > 1:
        pairs["elastic.expert_groups"] = theirs.groups.experts, family.space.groups.experts
    wrong = [name for name, (had, has) in pairs.items() if had != has]
    words = f"{config.train.start_from!r} is a family of another parent ({', '.join(wrong)} differ); name one of this"
    return [Problem(KEY, words)] if wrong else []


def start_reader(config: RunConfig, parent: SortedParent) -> TensorReader:
    """Weights of the students before the first step.

    Raises:
        ProblemsError: the family is sorted otherwise than this run's parent.
    """
    if not config.train.start_from:
        return parent.reader
    nested = open_nested(config.train.start_from)
    theirs, ours = nested.permutations(), parent.permutations
    same = theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n].to(torch.int64)) for n in ours)
    if not same or nested.manifest.space.depth_ranking != parent.depth_ranking:
        words = (
            f"{config.train.start_from!r} is sorted by other scores than this run's; "
            "copy importance/ and sorted/ of the run that made it into --out, and start again"
        )
        raise_if_any([Problem(KEY, words)])
    return nested.reader
