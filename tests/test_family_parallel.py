"""A training step of a family in every layout: losses, gradients of model and router, choices equal to one process'.

Four micro-batches with mixed budgets, a loss mask and a teacher, through Megatron's schedule, its data-parallel wrapper
and `finalize_model_grads`, in a soft and in a hard step of the router.
"""

from typing import Any

import pool_family
import pytest
import torch
from dense_features import FAMILIES
from worker_pool import WorkerPool

TOLERANCE = 1e-5  # fp64 weights; the losses are fp32 inside
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "dp2": {},
    "tp4": {"tp": 4},
    "tp4_sp": {"tp": 4, "sp": True},
    "pp4": {"pp": 4},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_pp2_sp": {"tp": 2, "pp": 2, "sp": True},
    "tp2_dp2": {"tp": 2},
    "tp2_sp_dp2": {"tp": 2, "sp": True},
    "pp2_dp2": {"pp": 2},
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "cp2_tp2_sp": {"cp": 2, "tp": 2, "sp": True},
    "cp2_pp2": {"cp": 2, "pp": 2},
    "cp2_dp2": {"cp": 2},
}
SIZES = {
    name: 4 if name.startswith(("tp4", "pp4", "cp4", "tp2_pp2")) or name.count("2") == 2 else 2 for name in LAYOUTS
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "recompute": FULL,
    "logits": {"distill": {"fuse_output_layer": False, "loss": "reverse_kl"}},
    "shared_teacher": {"distill": {"budgets_per_batch": 2, "hidden_weight": 0.5}},
    "top_k": {"distill": {"loss": "topk_kl", "top_k": 5}},
    "self_taught": {"distill": {"teacher": "self", "budgets_per_batch": 2, "hidden_weight": 0.5}},
    "no_teacher": {"distill": {"kd_weight": 0.0, "ce_weight": 1.0}},
}
QUICK = {
    ("dp2", "plain"), ("tp2_sp", "shared_teacher"), ("pp2", "shared_teacher"), ("tp2_pp2_sp", "tied"),
    ("tp2_dp2", "plain"), ("pp2_dp2", "recompute"), ("tp4", "logits"), ("pp4", "plain"), ("pp2", "no_teacher"),
    ("tp2", "self_taught"), ("pp2", "self_taught"), ("cp4", "recompute"), ("cp2_tp2_sp", "shared_teacher"),
}  # fmt: skip
SWEPT = (pytest.mark.slow, pytest.mark.sweep(15))
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in QUICK else SWEPT, id=f"{name}-{kind}")
    for name in LAYOUTS
    for kind in KINDS
]
_references: dict[str, dict[str, Any]] = {}


def reference(kind: str) -> dict[str, Any]:
    if kind not in _references:
        _references[kind] = pool_family.train_steps(**KINDS[kind])
    return _references[kind]


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    error, scale = (found - expected).norm().item(), expected.norm().item()
    assert error <= tolerance * max(scale, 1e-12), f"{what}: {error:.1e} of {scale:.1e}"


def assert_same(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    names = set()
    for rank in ranks:
        for ours, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=TOLERANCE)
            assert ours["errors"] == theirs["errors"]
            for name, gradient in ours["gradients"].items():
                assert_close(gradient, theirs["gradients"][name], name)
                names.add(name)
            # fp32, and some of its biases have gradients a thousand times smaller than others: against the whole
            whole = torch.cat([g.flatten() for g in theirs["router"].values()]).norm().item()
            for name, gradient in ours["router"].items():
                assert (gradient - theirs["router"][name]).norm() <= TOLERANCE * whole, f"router {name}"
        assert rank["subnets"] == expected["subnets"]
    assert names == set(expected["steps"][0]["gradients"])


def test_the_router_gets_a_gradient_for_every_dim(one_rank: None) -> None:
    for step in reference("plain")["steps"]:
        for name, gradient in step["router"].items():
            assert gradient.norm() > 1e-6, name


def test_again_is_the_same_to_the_bit(one_rank: None) -> None:
    first, again = reference("plain"), pool_family.train_steps(**KINDS["plain"])
    for one, other in zip(first["steps"], again["steps"], strict=True):
        assert one["losses"] == other["losses"]
        for part in ("gradients", "router"):
            assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


def test_evaluation_has_nothing_random(one_rank: None) -> None:
    first, again = pool_family.evaluated_twice()
    assert first == again
    assert len({loss for losses in first["losses"].values() for loss in losses.values()}) > 4


def test_a_longer_run_chooses_again_and_a_frozen_start_has_choices(one_rank: None) -> None:
    first, again = pool_family.pinned_and_released()
    assert set(first) == {"full", "large", "small"}  # before any step
    assert again == {}  # pins of a run that was made longer


def test_fused_is_logits(one_rank: None) -> None:
    kind = {"loss": "reverse_kl", "ce_weight": 0.3}
    fused = pool_family.train_steps(distill=kind)
    assert_same([pool_family.train_steps(distill={**kind, "fuse_output_layer": False})], fused)


def test_without_a_teacher_it_is_a_teacher_without_weight(one_rank: None) -> None:
    almost = pool_family.train_steps(distill={"kd_weight": 1e-30, "ce_weight": 1.0})
    for step, without in zip(almost["steps"], reference("no_teacher")["steps"], strict=True):
        assert step["losses"][0] == pytest.approx(without["losses"][0], rel=TOLERANCE)
        assert step["losses"][1] > 0.1 and without["losses"][1] == 0.0  # KD for the log: not measured
        for name, gradient in step["gradients"].items():
            assert_close(without["gradients"][name], gradient, name)


def test_recomputed_is_kept(one_rank: None) -> None:
    assert_same([reference("recompute")], reference("plain"))


def test_selective_recomputation_with_biases_is_kept(one_rank: None) -> None:
    """A bias that a recomputed MLP returned would become a result of itself: its backward would never end."""
    kept = pool_family.train_steps(feature="all")
    assert_same([pool_family.train_steps(feature="all", **SELECTIVE)], kept)


def test_a_shared_teacher_is_the_mean_of_its_students(one_rank: None) -> None:
    """Both halves of a systematic pair, each with its own teacher forward, have the pair's mean gradient."""
    both = pool_family.train_steps(steps=(0,), distill={"budgets_per_batch": 2})
    alone = [pool_family.train_steps(steps=(0,), distill={"budgets_per_batch": 2}, half=half) for half in (0, 1)]
    for name, gradient in both["steps"][0]["gradients"].items():
        mean = sum(a["steps"][0]["gradients"][name] for a in alone)
        assert_close(gradient, mean, name)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_layout_changes_nothing(request: pytest.FixtureRequest, one_rank: None, name: str, kind: str) -> None:
    pool: WorkerPool = request.getfixturevalue(f"pool{SIZES[name]}")
    assert_same(pool.run(pool_family.train_steps, **LAYOUTS[name], **KINDS[kind]), reference(kind))


# No tensor-parallel size above 1 divides 61 rows: 62 at TP 2, 64 at TP 4.
ODD: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "logits": {"distill": {"fuse_output_layer": False, "loss": "reverse_kl", "ce_weight": 0.3}},
    "top_k": {"distill": {"loss": "topk_kl", "top_k": 61, "temperature": 2.0}},
}
PADDED = [("tp2_sp", "untied"), ("tp4", "tied"), ("tp2", "logits"), ("tp4_sp", "top_k"), ("tp2_pp2_sp", "tied")]


@pytest.mark.parametrize(("name", "kind"), PADDED)
def test_a_vocabulary_that_tp_does_not_divide_is_padded_and_nothing_changes(
    request: pytest.FixtureRequest, one_rank: None, name: str, kind: str
) -> None:
    settings = ODD[kind] | {"vocab_size": 61}
    if f"odd {kind}" not in _references:
        _references[f"odd {kind}"] = pool_family.train_steps(**settings)
    pool: WorkerPool = request.getfixturevalue(f"pool{SIZES[name]}")
    assert_same(pool.run(pool_family.train_steps, **LAYOUTS[name], **settings), _references[f"odd {kind}"])


# Megatron clips fp32 gradients only, and Adam divides by their size: rounding grows with every step.
ALL_STEPS = {"steps": (0, 1, 2, 3, 4, 5), "optimize": True, "dtype": torch.float32}


ADAM = ["dp2", "tp2_pp2_sp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tp2_sp_dp2", "pp2_dp2", "pp2"))]
ADAM += ["cp2_tp2_sp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cp2_pp2", "cp2_dp2", "cp4"))]


@pytest.mark.parametrize("name", ADAM)
def test_six_steps_of_adam_end_alike(request: pytest.FixtureRequest, one_rank: None, name: str) -> None:
    """Warm-up to frozen, gradients clipped by one norm over all ranks: same weights, probabilities and children."""
    if "adam" not in _references:
        _references["adam"] = pool_family.train_steps(**ALL_STEPS)
    expected, pool = _references["adam"], request.getfixturevalue(f"pool{SIZES[name]}")
    for rank in pool.run(pool_family.train_steps, **LAYOUTS[name], **ALL_STEPS):
        assert_same_run(rank, expected, 1e-3)


def six_steps_alike(pool: WorkerPool, feature: str, tolerance: float) -> None:
    """Losses of six steps at TP 2 x PP 2 with sequence parallelism, and where they end, against one process."""
    settings = ALL_STEPS | {"feature": feature}
    expected = pool_family.train_steps(**settings)
    assert_alike(pool.run(pool_family.train_steps, **LAYOUTS["tp2_pp2_sp"], **settings), expected, tolerance)


def assert_alike(ranks: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    for rank in ranks:
        for ours, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance, abs=1e-5)
        assert_same_run(rank, expected, 1e-3)


def test_six_steps_of_adam_with_a_dense_parents_features_end_alike(pool4: WorkerPool, one_rank: None) -> None:
    six_steps_alike(pool4, "all", 1e-5)


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.parametrize("family", list(FAMILIES))
def test_six_steps_of_adam_of_a_family_end_alike(pool4: WorkerPool, one_rank: None, family: str) -> None:
    six_steps_alike(pool4, family, 1e-5)


def test_six_steps_of_adam_with_experts_end_alike(pool4: WorkerPool, one_rank: None) -> None:
    six_steps_alike(pool4, "nemotron", 1e-5)


EXPERTS = {"ep2_pp2": {"ep": 2, "pp": 2}, "ep2_tp2_sp": {"ep": 2, "tp": 2, "sp": True}, "ep2_dp2": {"ep": 2}}


@pytest.mark.parametrize("name", ["ep2_pp2", *(pytest.param(n, marks=pytest.mark.slow) for n in list(EXPERTS)[1:])])
def test_six_steps_of_adam_with_experts_shared_out_end_alike(pool4: WorkerPool, one_rank: None, name: str) -> None:
    """In one process two micro-batches, one after the other, share a draw, as those of two ranks do."""
    settings = ALL_STEPS | {"feature": "nemotron"}
    if "sharing" not in _references:
        _references["sharing"] = pool_family.train_steps(**settings, sharing=2)
    assert_alike(pool4.run(pool_family.train_steps, **EXPERTS[name], **settings), _references["sharing"], 1e-5)


@pytest.mark.parametrize("name", ["ep2_tp2_sp", pytest.param("ep2_pp2", marks=pytest.mark.slow)])
def test_a_step_with_experts_shared_out_is_one_process(pool4: WorkerPool, one_rank: None, name: str) -> None:
    """Soft and hard: losses, gradients of model and router, choices."""
    expected = pool_family.train_steps(feature="nemotron", sharing=2)
    assert_same(pool4.run(pool_family.train_steps, **EXPERTS[name], feature="nemotron"), expected)


@pytest.mark.parametrize("ep", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_context_parallel_ranks_share_out_experts(pool4: WorkerPool, one_rank: None, ep: int) -> None:
    """Two of one sample, or four of two samples, which share a draw."""
    expected = pool_family.train_steps(feature="nemotron", sharing=ep // 2)
    assert_same(pool4.run(pool_family.train_steps, cp=2, ep=ep, feature="nemotron"), expected)


@pytest.mark.slow
def test_six_steps_of_adam_with_a_padded_vocabulary_end_alike(pool4: WorkerPool, one_rank: None) -> None:
    settings = ALL_STEPS | {"vocab_size": 61, "tied": True}
    expected = pool_family.train_steps(**settings)
    for rank in pool4.run(pool_family.train_steps, **LAYOUTS["tp2_pp2_sp"], **settings):
        for ours, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4, abs=1e-5)
        assert_same_run(rank, expected, 1e-3)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["subnets"] == expected["subnets"] and found["prices"] == pytest.approx(expected["prices"], rel=1e-5)
    norms = [[s["grad_norm"] for s in run["steps"]] for run in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=tolerance)
    for budget, dims in found["probabilities"].items():
        for dim, probabilities in dims.items():
            assert_close(probabilities, expected["probabilities"][budget][dim], f"{budget} {dim}", tolerance)
    for part in ("weights", "router_weights"):
        for key, weight in found[part].items():
            assert_close(weight, expected[part][key], key, tolerance)


DISTRIBUTED = ["dp2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tp2_dp2", "tp2_sp_dp2", "pp2_dp2", "pp2"))]
DISTRIBUTED += [pytest.param("cp2_dp2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_the_distributed_optimizer_changes_nothing(request: pytest.FixtureRequest, name: str) -> None:
    pool: WorkerPool = request.getfixturevalue(f"pool{SIZES[name]}")
    runs = [
        pool.run(pool_family.train_steps, **LAYOUTS[name], **ALL_STEPS, distributed_optimizer=on)
        for on in (True, False)
    ]
    assert_same_with_both(*runs)


@pytest.mark.slow
def test_the_distributed_optimizer_changes_nothing_of_experts_shared_out(pool4: WorkerPool) -> None:
    settings = ALL_STEPS | {"feature": "nemotron", "ep": 2}
    assert_same_with_both(*(
        pool4.run(pool_family.train_steps, **settings, distributed_optimizer=on) for on in (True, False)
    ))  # fmt: skip


def assert_same_with_both(*runs: list[dict[str, Any]]) -> None:
    for on, off in zip(*runs, strict=True):
        # The norm that gradients are clipped by is summed in another order; fp32 rounding grows from there. How much
        # depends on the processor's kernels: under 1e-5 on one, 1.3e-5 on another after six steps.
        assert on["steps"][0]["grad_norm"] == pytest.approx(off["steps"][0]["grad_norm"], rel=1e-6)
        assert_same_run(on, off, 5e-5)
