"""Expert-parallel ranks with other tokens each compute what one process does with all of them, in fp64.

Masked, sliced and soft micro-batches are in flight together; biases favour experts that their subnets have dropped.
"""

from pathlib import Path
from typing import Any

import pool_expert_parallel
import pytest
import torch
from worker_pool import WorkerPool

TOLERANCE = 1e-10
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "ep2_dp2": {"ep": 2},
    "ep2_tp2": {"ep": 2, "tp": 2},
    "ep2_tp2_sp": {"ep": 2, "tp": 2, "sp": True},
    "ep2_pp2": {"ep": 2, "pp": 2},
}
SIZES = {name: 2 if name == "ep2" else 4 for name in LAYOUTS}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MODES = ("masked", "sliced", "few", "soft", "one_hot", "plain")
_references: dict[Any, dict[str, Any]] = {}


def reference(feature: str, replicas: int, **settings: Any) -> dict[str, Any]:
    key = (feature, replicas, *settings.items())
    if key not in _references:
        _references[key] = pool_expert_parallel.step(feature, MODES, replicas=replicas, **settings)
    return _references[key]


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error, scale = (found - expected).norm().item(), expected.norm().item()
    assert error <= TOLERANCE * max(scale, 1e-3), f"{what}: {error:.1e} of {scale:.1e}"


def assert_same(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    names = set()
    for rank in ranks:
        assert_close(rank["losses"][:, 0], expected["losses"][:, rank["rank"]], "losses")
        for name, gradient in rank["gradients"].items():
            assert_close(gradient, expected["gradients"][name], name)
            names.add(name)
        for mode, values in expected["values"].items():
            for dim, gradient in values.items():
                assert_close(rank["values"][mode][dim], gradient, f"{dim} of {mode}")
    assert names == set(expected["gradients"])


def replicas_of(name: str) -> int:
    layout = LAYOUTS[name]
    return SIZES[name] // (layout.get("tp", 1) * layout.get("pp", 1))


CASES = [(name, feature) for name in LAYOUTS for feature in ("nemotron", "granite")]
QUICK = {("ep4", "nemotron"), ("ep2_tp2_sp", "granite"), ("ep2_pp2", "nemotron"), ("ep2_dp2", "granite")}


@pytest.mark.parametrize(
    ("name", "feature"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow, id="-".join(c)) for c in CASES]
)
def test_expert_parallel_is_one_process(
    request: pytest.FixtureRequest, one_rank: None, name: str, feature: str
) -> None:
    pool: WorkerPool = request.getfixturevalue(f"pool{SIZES[name]}")
    expected = reference(feature, replicas_of(name))
    assert_same(pool.run(pool_expert_parallel.step, feature, MODES, **LAYOUTS[name]), expected)


@pytest.mark.parametrize("name", ["ep2", "ep4"])
def test_without_gradients_every_rank_takes_part(
    request: pytest.FixtureRequest, one_rank: None, tmp_path: Path, name: str
) -> None:
    """Three batches for two ranks, or none for one of four: losses and the teacher's states are one process'."""
    pool: WorkerPool = request.getfixturevalue(f"pool{SIZES[name]}")
    *losses, states = pool_expert_parallel.without_gradients(str(tmp_path / "alone"))
    for rank in pool.run(pool_expert_parallel.without_gradients, str(tmp_path / "shared"), **LAYOUTS[name]):
        assert rank[:2] == pytest.approx(losses, rel=1e-6)
        assert (rank[2] - states).norm() < 1e-5 * states.norm()


@pytest.mark.parametrize("case", ["recomputed", "few_groups", "plain"])
def test_and_so_are_others(pool4: WorkerPool, one_rank: None, case: str) -> None:
    """Recomputed, with latent channels; as many groups of experts as ranks, of neurons more; the plain model."""
    feature, settings = {
        "recomputed": ("latent", FULL),
        "few_groups": ("nemotron", {"groups": 2}),
        "plain": ("qwen", {"plain": True}),
    }[case]
    modes = MODES if case != "few_groups" else tuple(m for m in MODES if m not in ("soft", "one_hot"))
    expected = pool_expert_parallel.step(feature, modes, replicas=2, **settings)
    found = pool4.run(pool_expert_parallel.step, feature, modes, **LAYOUTS["ep2_tp2_sp"], **settings)
    assert_same(found, expected)
