"""The same losses, weight gradients and gate gradients in every parallel layout as in one process.

Five micro-batches of different subnets (sliced with per-layer widths, masked, full, one that leaves whole stages empty,
soft) go through Megatron's own schedule, so that under pipeline parallelism they are in flight together and change the
width of the residual stream. The reference runs them one at a time, without recomputation, in one process.
"""

from typing import Any

import pool_elastic
import pytest
import torch
from worker_pool import WorkerPool

TOLERANCE = 1e-5  # fp64, but Megatron's cross entropy is fp32 inside
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


_references: dict[bool, list[dict[str, Any]]] = {}
_features: dict[str, list[dict[str, Any]]] = {}


@pytest.fixture
def one_at_a_time(tied: bool, one_rank: None) -> list[dict[str, Any]]:
    """Each micro-batch alone, in this process."""
    if tied not in _references:
        count = len(pool_elastic.micro_batches(pool_elastic.architecture()))
        _references[tied] = [pool_elastic.schedule_step(tied=tied, order=[i]) for i in range(count)]
    return _references[tied]


def assert_same(ranks: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """`ranks` of one replica against the micro-batches run one at a time (losses are divided by their number)."""
    count = len(reference)
    losses = next(r["losses"] for r in ranks if r["losses"])
    assert losses == pytest.approx([r["losses"][0] for r in reference], rel=TOLERANCE)
    names = set()
    for rank in ranks:
        for name, found in rank["gradients"].items():
            assert_close(found, sum(r["gradients"][name] for r in reference) / count, name)
            names.add(name)
        for i, gates in rank["gates"].items():
            for dim, found in gates.items():
                assert_close(found, reference[i]["gates"][i][dim] / count, f"{dim} of micro-batch {i}")
    assert names == set(reference[0]["gradients"])


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error, scale = (found - expected).norm().item(), expected.norm().item()
    assert error <= TOLERANCE * scale, f"{what}: {error / max(scale, 1e-30):.1e} of {scale:.1e}"


def test_interleaved_is_one_at_a_time(one_at_a_time: list[dict[str, Any]], tied: bool) -> None:
    assert_same([pool_elastic.schedule_step(tied=tied)], one_at_a_time)
    assert_same([pool_elastic.schedule_step(tied=tied, ddp=True)], one_at_a_time)
    assert_same([pool_elastic.schedule_step(tied=tied, **FULL)], one_at_a_time)


LAYOUTS = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "tp4": {"tp": 4},
    "tp4_sp": {"tp": 4, "sp": True},
    "pp4": {"pp": 4},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_pp2_sp": {"tp": 2, "pp": 2, "sp": True},
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "cp2_tp2_sp": {"cp": 2, "tp": 2, "sp": True},
    "cp2_pp2": {"cp": 2, "pp": 2},
}
QUICK = {
    ("tp2_sp", "ddp"), ("pp2", "ddp_recompute"), ("tp2_pp2_sp", "ddp"), ("tp4", "autograd"), ("pp4", "ddp"),
    ("cp4", "ddp_recompute"), ("cp2_tp2_sp", "ddp"), ("cp2_pp2", "autograd"),
}  # fmt: skip
SWEPT = (pytest.mark.slow, pytest.mark.sweep(10))  # 28 cases, tied and untied
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in QUICK else SWEPT, id=f"{name}-{kind}")
    for name in LAYOUTS
    for kind in ("ddp", "autograd", "ddp_recompute")
]


def pool_of(request: pytest.FixtureRequest, layout: dict[str, Any]) -> WorkerPool:
    """Just as many processes as the layout has."""
    return request.getfixturevalue(f"pool{layout.get('tp', 1) * layout.get('pp', 1) * layout.get('cp', 1)}")


def each(*names: str) -> list[Any]:
    """(layout, kind); of context parallelism one is quick."""
    late = {(n, "ddp_recompute") for n in names if n.startswith("cp")}
    pairs = [(n, kind) for n in names for kind in ("ddp", "ddp_recompute")]
    return [pytest.param(*p, marks=pytest.mark.slow if p in late else (), id="-".join(p)) for p in pairs]


@pytest.mark.parametrize(("name", "kind"), each("tp2", "tp2_pp2_sp", "tp4", "cp2_tp2_sp"))
def test_a_layout_changes_nothing_of_a_dense_parents_features(
    request: pytest.FixtureRequest, one_rank: None, name: str, kind: str
) -> None:
    """Gates, scaled rotary positions, norms of heads (whose gradient every rank has a part of), biases, multipliers."""
    layout, more = LAYOUTS[name], FULL if kind == "ddp_recompute" else {}
    pool = pool_of(request, layout)
    assert_same(pool.run(pool_elastic.schedule_step, **layout, feature="all", ddp=True, **more), one_by_one("all"))


@pytest.mark.parametrize("name", ["cp2", "cp4"])
@pytest.mark.parametrize("alone", [{"pattern": "*-*-*-*-"}, {"one_group": True}], ids=["attention", "one_group"])
def test_context_parallel_ranks_change_nothing_of_other_stacks(
    request: pytest.FixtureRequest, one_rank: None, alone: dict[str, Any], name: str
) -> None:
    """Of a transformer; of Mamba layers whose one group all ranks share, with a part of the heads each."""
    key = str(alone)
    if key not in _features:
        cases = range(len(pool_elastic.micro_batches(pool_elastic.architecture())))
        _features[key] = [pool_elastic.schedule_step(order=[i], **alone) for i in cases]
    pool = pool_of(request, LAYOUTS[name])
    assert_same(pool.run(pool_elastic.schedule_step, **LAYOUTS[name], ddp=True, **alone), _features[key])


@pytest.mark.parametrize(("name", "kind"), each("tp2", "tp2_pp2_sp", "tp4", "cp2_pp2"))
def test_a_layout_changes_nothing_of_experts(
    request: pytest.FixtureRequest, one_rank: None, name: str, kind: str, feature: str = "nemotron"
) -> None:
    """Sigmoid routers with a bias, a shared expert, counts and widths that differ over layers and micro-batches."""
    layout, more = LAYOUTS[name], FULL if kind == "ddp_recompute" else {}
    pool = pool_of(request, layout)
    ranks = pool.run(pool_elastic.schedule_step, **layout, feature=feature, ddp=True, **more)
    assert_same(ranks, one_by_one(feature))


@pytest.mark.parametrize("name", ["tp2", "tp2_pp2_sp"])
@pytest.mark.parametrize("feature", ["latent", "granite"])
def test_a_layout_changes_nothing_of_other_experts(
    request: pytest.FixtureRequest, one_rank: None, feature: str, name: str
) -> None:
    """Latent channels; gates."""
    test_a_layout_changes_nothing_of_experts(request, one_rank, name, "ddp", feature)


def one_by_one(feature: str) -> list[dict[str, Any]]:
    """Each micro-batch of a parent with a feature alone, in this process."""
    if feature not in _features:
        count = len(pool_elastic.micro_batches(pool_elastic.architecture()))
        _features[feature] = [pool_elastic.schedule_step(feature=feature, order=[i]) for i in range(count)]
    return _features[feature]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_layout_changes_nothing(
    request: pytest.FixtureRequest, one_at_a_time: list[dict[str, Any]], tied: bool, name: str, kind: str
) -> None:
    layout = LAYOUTS[name]
    pool = pool_of(request, layout)
    more = FULL if kind == "ddp_recompute" else {}
    ranks = pool.run(pool_elastic.schedule_step, **layout, tied=tied, ddp=kind != "autograd", **more)
    assert_same(ranks, one_at_a_time)
