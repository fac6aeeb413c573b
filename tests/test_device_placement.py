"""Nothing of ours is on the CPU or waits for the device, but for what is listed here; on `meta`, in place of a GPU.

A line of ours that makes a CPU tensor ("cpu"), copies one to the device and waits for that ("copy"), or needs a value
of the device ("wait") is an event. Every test says which it expects; without a list none is allowed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pool_family
import pytest
import torch
from checkpoint_family import MODEL, manifest
from device_trace import META, DeviceTrace, Event, backward, on_meta_device, tensors_of
from pool_elastic import architecture, gates, layout_of, random_weights, soft_masks
from small_parent import FFN_GROUPS, space_of
from torch import Tensor
from worker_pool import WorkerPool

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import DistillConfig, RankConfig
from nemo_elastic.importance.ranking import random_orders
from nemo_elastic.mcore.elastic.plan import hard_plan, soft_plan
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
from nemo_elastic.mcore.models.evaluate import heldout_loss, whole_logits
from nemo_elastic.mcore.ranking.rank import rank_parent
from nemo_elastic.mcore.ranking.sort_live import sort_model
from nemo_elastic.nemo.export.first_difference import nested_trace, plain_trace
from nemo_elastic.nemo.run.elastic_model import ElasticLossReduction
from nemo_elastic.serving import ElasticFamily

CONF = Path(__file__).parents[1] / "conf"
SUBNET = {
    "hidden_size": 32,
    "ffn_hidden_size": 32,
    "num_attention_heads": 8,
    "mamba_num_heads": 8,
    "layers": (0, 1, 3, 4, 7),
}
# Once a step: which subnet a budget means is decided on the host, from probabilities.
CHOICES = {("mcore/family/planner.py:_on_the_host", "wait")}
# Per micro-batch, without waiting: noise is drawn on the CPU, so that a seed means the same on every device; the
# numbers of the chosen subnet come from the host.
DRAWN = {("router/sampling.py:gumbel_noise", "cpu")}
PICKED = {("router/selection.py:indices_on", "cpu")}


def traced(act: Callable[[], Any]) -> set[Event]:
    with on_meta_device(), DeviceTrace() as trace:
        act()
    return trace.events


def ids(batch: int = 2, length: int = 16) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.int64, device=META)


def stack(kind: str, **more: Any) -> Any:
    groups = {"ffn_groups": FFN_GROUPS} if kind == "elastic" else {}
    model = (build_elastic_model if kind == "elastic" else build_plain_model)(architecture(), **groups, **more)
    assert not [name for name, t in tensors_of(model).items() if not t.is_meta]
    return model


@pytest.mark.parametrize("kind", ["plain", "elastic"])
def test_a_stack_is_built_and_run_on_the_device(one_rank: None, kind: str) -> None:
    def act() -> None:
        backward(stack(kind)(ids(), ids(), None, labels=ids()).sum())

    assert traced(act) == set()


RECOMPUTE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


@pytest.mark.parametrize(("recompute", "dtype"), [("nothing", torch.bfloat16), ("full", torch.float32),
                                                  ("selective", torch.float32)])  # fmt: skip
@pytest.mark.parametrize("mode", ["sliced", "masked", "soft"])
def test_a_plan_is_run_on_the_device(one_rank: None, mode: str, recompute: str, dtype: torch.dtype) -> None:
    arch = architecture()
    made = soft_masks(arch) if mode == "soft" else gates(arch)
    values = {n: v.detach().to(META, torch.float32).requires_grad_() for n, v in made.items()}

    def act() -> None:
        model = stack("elastic", params_dtype=dtype, **RECOMPUTE[recompute]).train()
        if mode == "soft":
            plan = soft_plan(model.layout, space_of(arch).full_subnet(), values)
        else:
            plan = hard_plan(model.layout, space_of(arch).subnet(**SUBNET), mode, values)
        backward(model(ids(), None, None, labels=ids(), elastic=plan).sum())

    assert traced(act) == set()


def run_step(
    model: Any, planner: Any, distill: DistillConfig, step: int, length: int = 16, *, only: str | None = None
) -> None:
    """A step of one micro-batch a budget (or `only` one's), as `ElasticCallback` and the loss reduction run it."""
    names = tuple(b.name for b in planner.family.budgets)
    reduction = ElasticLossReduction(distill, names, planner.loss)
    state = planner.begin_step(model.policy, step)
    for index, name in enumerate(names if only is None else [only]):
        shares = planner.budgets_of({n: float(n == name) + 0.01 for n in names}, step, index, distill.budgets_per_batch)
        planned = planner.micro_batch(model.policy, state, shares, index)
        tokens, mask = ids(2, length), torch.ones(2, length, device=META)
        heads = model(tokens, None, None, elastic=[p.plan for p in planned], distill=True)
        total, _ = reduction.forward({"labels": tokens, "loss_mask": mask, "elastic": planned}, heads)
        backward(total)
    planner.end_step(state)


def step_events(step: int, distill: dict[str, Any], *, only: str | None = None, **more: Any) -> set[Event]:
    """Of the second of two equal steps (the first makes what is made once); 0 warm-up, 1 soft, 3 hard, 5 frozen."""
    run = pool_family.run_config(**distill)
    with on_meta_device(), DeviceTrace():
        model, planner = pool_family.build(run, torch.float32, load=False, **more)
        run_step(model, planner, run.distill, step, only=only)
    return traced(lambda: run_step(model, planner, run.distill, step, only=only))


LOSSES: dict[str, dict[str, Any]] = {
    kind + ("" if fused else ", logits"): {"loss": kind, "fuse_output_layer": fused, "top_k": 5}
    for kind in ("forward_kl", "reverse_kl", "topk_kl")
    for fused in (True, False)
} | {
    "tempered, hidden": {"temperature": 2.0, "hidden_weight": 0.5},
    "no teacher": {"kd_weight": 0.0, "ce_weight": 1.0},
    "two budgets": {"budgets_per_batch": 2},
}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_distillation_loss_is_on_the_device(one_rank: None, loss: str) -> None:
    assert step_events(5, LOSSES[loss], only="small") == set()  # the frozen phase, where nothing else is to be seen


ROUTER = {0: set(), 1: CHOICES | DRAWN, 3: CHOICES | DRAWN | PICKED, 5: set()}


@pytest.mark.parametrize("step", list(ROUTER))
def test_a_step_of_the_router(one_rank: None, step: int) -> None:
    assert step_events(step, {"hidden_weight": 0.5}) == ROUTER[step]


def on_two_ranks(step: int) -> set[Event]:
    return step_events(step, {}, sequence_parallel=True)


@pytest.mark.parametrize("step", [1, 3])
def test_tensor_and_sequence_parallelism(pool2: WorkerPool, step: int) -> None:
    assert pool2.run(on_two_ranks, step, tp=2) == [ROUTER[step]] * 2


def test_a_step_of_the_12b(one_rank: None) -> None:
    """The published parent's shape, in a hard phase, sliced; its teacher, router and loss."""
    run = load_config(CONF / "nemotron_nano_12b_v2.yaml", ["router.shapes=learned"]).config
    with on_meta_device():
        model, planner = pool_family.build(run, torch.bfloat16, tuple(range(62)), load=False)
        assert sum(p.numel() for p in model.teacher.parameters()) == 12_310_001_152
        assert not [name for name, t in tensors_of(model).items() if not t.is_meta]
    events = traced(lambda: run_step(model, planner, run.distill, 3, length=256, only=planner.learned[-1]))
    made_once = {("router/selection.py:_made_once", "copy"), ("router/selection.py:_kept_layers", "cpu")}
    assert events - made_once == ROUTER[3]


# A ranking reads text, keeps states that an interrupted one goes on from, and ends with scores on the host.
RANKING = {
    ("mcore/ranking/rank.py:rank_parent", "copy"),
    ("importance/run_state.py:RunState.save", "wait"),
    ("mcore/ranking/collect.py:WidthCollector.state", "cpu"),
    ("mcore/ranking/collect.py:WidthCollector._over_data_parallel", "wait"),
    ("mcore/ranking/stack_forward.py:StackForward.__init__", "cpu"),
    ("mcore/ranking/collect.py:WidthCollector.widths", "cpu"),
}
ABLATION = {
    ("mcore/ranking/depth.py:DepthAblation.state", "wait"),
    ("mcore/ranking/depth.py:DepthAblation._reduced", "wait"),
}
DEPTH = {
    "greedy": ABLATION,
    "one_shot": ABLATION,
    "cosine": {("mcore/ranking/cosine.py:cosine_scores", "wait")},
}


def rank(model: Any, depth: str, folder: Path, *, resume: bool = False) -> None:
    config = RankConfig(samples=4, seq_length=16, micro_batch_size=2, depth=depth, depth_samples=2)
    rank_parent(
        model,
        layout_of(architecture()),
        config,
        lambda i: torch.zeros(16, dtype=torch.int64),
        min_layers=6,
        folder=folder,
        resume=resume,
    )


@pytest.mark.parametrize("depth", list(DEPTH))
def test_ranking(one_rank: None, tmp_path: Path, depth: str) -> None:
    with on_meta_device():
        model = stack("plain")
    assert traced(lambda: rank(model, depth, tmp_path)) == RANKING | DEPTH[depth]


def test_an_interrupted_ranking_goes_on_with_its_sums_on_the_device(one_rank: None, tmp_path: Path) -> None:
    with on_meta_device(), DeviceTrace():
        model = stack("plain")
        rank(model, "cosine", tmp_path)
        (tmp_path / ".state" / "rank0-2.safetensors").unlink()  # one of two batches is done
        rank(model, "cosine", tmp_path, resume=True)


def test_evaluation(one_rank: None) -> None:
    with on_meta_device():
        model = stack("elastic")
    plan = hard_plan(model.layout, space_of(architecture()).subnet(**SUBNET))
    batch = torch.zeros(2, 16, dtype=torch.int64)
    batches = {("mcore/models/evaluate.py:run_forward", "copy"), ("mcore/models/evaluate.py:whole_logits", "copy")}
    results = {("mcore/models/evaluate.py:heldout_loss", "wait"), ("mcore/models/evaluate.py:whole_logits", "wait")}

    def act() -> None:
        heldout_loss(model, [(batch, batch, torch.ones(2, 16)), (batch, batch, torch.ones(2, 16))], plan)
        whole_logits(model, batch, plan)

    assert traced(act) == batches | results


def test_what_verify_compares_layer_by_layer(one_rank: None) -> None:
    with on_meta_device():
        nested, plain = stack("elastic"), stack("plain")
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    results = {
        ("nemo/export/first_difference.py:nested_trace", "wait"),
        ("nemo/export/first_difference.py:plain_trace", "wait"),
    }

    def act() -> None:
        nested_trace(nested, tokens, space_of(architecture()).subnet(**SUBNET))
        plain_trace(plain, tokens)

    assert traced(act) == results | {("nemo/export/first_difference.py:_first_row", "copy")}


def test_sorting_a_live_model(one_rank: None) -> None:
    with on_meta_device():
        model = stack("plain")
    layout = layout_of(architecture())
    orders = random_orders(layout, ("hidden_size", "ffn_hidden_size", "mamba_num_heads"), torch.Generator())
    indices = {
        ("space/slicing.py:_axis_order", "cpu"),
        ("space/slicing.py:_factor_order", "cpu"),
        ("space/slicing.py:permute", "copy"),
    }
    assert traced(lambda: sort_model(model, layout, orders)) == indices


def test_weights_are_copied_from_where_they_are_read(one_rank: None) -> None:
    with on_meta_device():
        model = stack("plain")
    weights = random_weights(architecture(), torch.float32)
    events = traced(lambda: load_weights(model, weights, architecture(), ffn_groups=FFN_GROUPS))
    assert events == {("mcore/models/build.py:load_weights", "copy")}


@pytest.mark.parametrize("compact", [False, True])
def test_serving(compact: bool) -> None:
    table = manifest().layout.table
    weights = {name: torch.empty(spec.shape({}), device=META) for name, spec in table.items()}

    def act() -> None:
        served = ElasticFamily(weights, manifest().layout, MODEL, manifest().subnets)
        for name in served.budgets:
            served.switch(name, compact=compact)
            served.logits(ids())
            served.generate(ids(2, 5), 3)
            served.generate(ids(2, 5), 3, step=served.decode_step(2, room=8))

    assert traced(act) == set()
