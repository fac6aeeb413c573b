"""`distill.teacher: self` without a second model: while the full member is still the parent, children learn to the bit
what they learn from the parent; it learns the text, or what a cached parent says.

Layouts are `test_family_parallel.py`'s, bytes `test_gpu_memory.py`'s, a resume `test_resume_layouts.py`'s.
"""

from pathlib import Path
from typing import Any

import pool_family
import pytest
import torch
from test_family_parallel import FULL, assert_same
from worker_pool import WorkerPool

from nemo_elastic.cli.main import main

STEPS = {"steps": (0, 1, 3)}  # warm-up, soft, hard
TERMS = {"hidden_weight": 0.5, "ce_weight": 0.1}
WORDS = 5  # of a budget: kd, ce, hidden, tokens, budget loss


def run(**more: Any) -> dict[str, Any]:
    """Models with the parent's weights: teacher and student are one function."""
    distill = {**TERMS, **more.pop("distill", {})}
    return pool_family.train_steps(**STEPS, **{"teacher_seed": 0, **more}, distill=distill)


def rows(step: dict[str, Any]) -> dict[str, list[float]]:
    """Each budget's numbers."""
    return {name: step["losses"][1 + WORDS * i :][:WORDS] for i, name in enumerate(step["seen"])}


def assert_same_children(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    found, expected = ({n: row for n, row in rows(step).items() if n != "full"} for step in (ours, theirs))
    assert found == expected and found
    assert all(kd > 0.01 and hidden > 0.01 for kd, _, hidden, *_ in found.values()), "there is something to learn"


def assert_sum(found: dict[str, Any], *parts: dict[str, Any]) -> None:
    """The gradients of the full member and of the others: losses are fp32 inside, so that an order could show."""
    for ours, *theirs in zip(found["steps"], *(part["steps"] for part in parts), strict=True):
        for kind in ("gradients", "router"):
            for name, gradient in ours[kind].items():
                expected = sum(step[kind][name] for step in theirs)
                close = 1e-12 if gradient.dtype == torch.float64 else 1e-6
                assert (gradient - expected).norm() <= close * expected.norm().clamp_min(1e-12), (kind, name)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_children_learn_what_the_parent_would_teach(one_rank: None, count: int) -> None:
    """With its own student's forward where the micro-batch has the full member, and with one of its own elsewhere."""
    several = {"budgets_per_batch": count}
    found = run(distill={"teacher": "self", **several})
    children = run(distill=several, only="children")
    text = run(distill={**several, "kd_weight": 0.0, "ce_weight": 1.1, "hidden_weight": 0.0}, only="full")
    for ours, theirs, own in zip(*(r["steps"] for r in (found, children, text)), strict=True):
        assert_same_children(ours, theirs)
        assert rows(ours).get("full") == rows(own).get("full")
    seen = [rows(step)["full"] for step in found["steps"] if "full" in step["seen"]]
    assert seen and all(kd == hidden == 0 and ce > 1 for kd, ce, hidden, *_ in seen)
    assert_sum(found, children, text)


def test_the_full_member_may_be_held_to_a_cached_parent(one_rank: None, tmp_path: Path) -> None:
    """The cached parent has other weights than the full member has by now: only that one learns from it."""
    several, cache = {"budgets_per_batch": 2}, str(tmp_path / "states")
    found = run(distill={"teacher": "self", "teacher_cache": cache, **several}, teacher_seed=1, cache=cache)
    children = run(distill=several, only="children")
    full = run(distill={"teacher_cache": cache, **several}, teacher_seed=1, cache=cache, only="full")
    for ours, theirs, own in zip(*(r["steps"] for r in (found, children, full)), strict=True):
        assert_same_children(ours, theirs)
        assert rows(ours).get("full") == rows(own).get("full")
    assert any("full" in step["seen"] and rows(step)["full"][0] > 0.1 for step in found["steps"])
    assert_sum(found, children, full)


@pytest.mark.parametrize("kind", ["recompute", "logits", "tied"])
def test_and_so_in_other_ways_to_compute(one_rank: None, kind: str) -> None:
    mine = {"teacher": "self", "budgets_per_batch": 2}
    if kind == "recompute":
        assert_same([run(distill=mine, **FULL)], run(distill=mine))
    elif kind == "logits":
        assert_same([run(distill={**mine, "fuse_output_layer": False})], run(distill=mine))
    else:
        children = run(distill={"budgets_per_batch": 2}, only="children", tied=True)
        taught = run(distill=mine, only="children", tied=True)
        for ours, theirs in zip(taught["steps"], children["steps"], strict=True):
            assert_same_children(ours, theirs)
        assert_sum(taught, children)


def experts(teacher: str, **more: Any) -> dict[str, Any]:
    return pool_family.train_steps(
        steps=(0, 3, 5), feature="nemotron", bias_rate=0.05, distill={"teacher": teacher}, **more
    )


def test_its_own_forward_moves_no_expert(one_rank: None, pool2: WorkerPool) -> None:
    """Tokens are counted of students alone, so the bias moves as it does beside another teacher."""
    found, expected = experts("self"), experts("parent")
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert torch.equal(ours["load"], theirs["load"]) and ours["load"].any()
    names = [name for name in found["weights"] if name.endswith("expert_bias")]
    assert names and all(torch.equal(found["weights"][name], expected["weights"][name]) for name in names)
    shared = experts("self", sharing=2)
    for rank in pool2.run(experts, "self", ep=2):
        assert_same([rank], shared)
        assert all(torch.equal(a["load"], b["load"]) for a, b in zip(rank["steps"], shared["steps"], strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.teacher=selves"], "distill.teacher: 'selves' must be one of parent, self"),
        (
            ["distill.teacher=self", "distill.kd_weight=0", "distill.ce_weight=1"],
            "distill.teacher: self has no use with distill.kd_weight=0 and distill.hidden_weight=0; leave it out",
        ),
        (
            ["distill.teacher=self", "distill.kd_weight=0", "distill.hidden_weight=1"],
            "distill.ce_weight: 0 with distill.kd_weight=0 and distill.teacher=self leaves the full member nothing to "
            "learn; set it above 0, or name a distill.teacher_cache",
        ),
        (
            ["distill.teacher=self", "elastic.budgets.full=0.9"],
            "distill.teacher: self needs a budget of 1.0, the full member that teaches; add one to elastic.budgets, or "
            "take parent",
        ),
        (
            ["distill.teacher=self", "train.stages=[{steps: 4}, {steps: 4, budget_probabilities: {small: 1}}]"],
            "train.stages.1.budget_probabilities: never draws full, which distill.teacher=self lets teach the others; "
            "give it a share, or take parent",
        ),
    ],
    ids=["word", "text alone", "nothing to learn", "no full member", "never drawn"],
)
def test_what_cannot_be_is_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--config", "tiny_parent.yaml", "--out", str(tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err.splitlines() == ["nemo-elastic train: a problem to mend", f"  {message}"]
    assert list(tmp_path.iterdir()) == []
