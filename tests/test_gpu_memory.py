"""The memory model against what a rank holds, keeps and exchanges: bytes to the last, saved tensors within 5 %
(under context parallelism, with torch's attention, 10 %).

Each layout trains a small family with the kernels of this machine (`kernels="torch"`): the parent, and a child sliced,
masked, with straight-through gates, under soft masks, in fp32 and bf16.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from dense_features import FEATURES
from pool_family import run_config
from pool_memory import LENGTH, MICRO_BATCH, MICRO_BATCHES, measured
from sweep import seed_of
from worker_pool import WorkerPool

from nemo_elastic.cost.activation_memory import hand_over_bytes, saved_bytes
from nemo_elastic.cost.gpu_layout import GpuLayout, Running
from nemo_elastic.cost.held_memory import held_bytes, stage_rows
from nemo_elastic.distill.gpu_work import rotary_percent, router_elements
from nemo_elastic.family import Family, family_of
from nemo_elastic.router.model import Router
from nemo_elastic.space.layout import ParamLayout

MODES = ("whole", "sliced", "sliced-gates", "masked", "masked-gates", "soft")
LAYOUTS = [  # processes, tensor, pipeline, sequence parallel[, context]; what remains of them is data parallel
    (2, 2, 1, False),
    (2, 2, 1, True),
    (2, 1, 2, False),
    (2, 1, 1, False),
    (4, 2, 2, False),
    (4, 2, 2, True),
    (4, 4, 1, False),
    (4, 4, 1, True),
    (4, 1, 4, False),
    (4, 2, 1, True),
    (4, 1, 2, False),
    (4, 1, 1, False),
    (2, 1, 1, False, 2),
    (4, 2, 1, True, 2),
    (4, 1, 2, False, 2),
    (4, 1, 1, False, 4),
]


def family(tied: bool = False, feature: str = "") -> Family:
    return family_of(run_config(tied=tied, feature=feature), tuple(range(8)))


def child(of: Family):
    return of.space.subnet(hidden_size=36, ffn_hidden_size=32, mamba_num_heads=8, num_attention_heads=8, num_layers=7)


def runnings(of: Family) -> dict[str, Running]:
    full, small = of.space.full_subnet(), child(of)
    subnets = {"whole": full, "soft": full}
    return {
        mode: Running(subnet=subnets.get(mode, small), mode=mode.partition("-")[0], gates=mode.endswith("gates"))
        for mode in MODES
    }


def router_of(of: Family) -> list[int]:
    """Elements of a router's tensors, as `plan` counts them and as they are."""
    counted = router_elements(run_config(), of)
    assert counted == [p.numel() for p in Router(of.space, of.learned, run_config().router, seed=3).parameters()]
    return counted


def check(
    pool: WorkerPool,
    layout: tuple,
    recompute: str | None,
    modes: Sequence[str],
    *,
    element: int,
    tied: bool,
    feature: str = "",
    distill: dict[str, Any] | None = None,
) -> None:
    size, tp, pp, sp, cp = (*layout, 1)[:5]
    of = family(tied, feature)
    ways = {mode: way for mode, way in runnings(of).items() if mode in modes}
    distributed = element == 2
    results = pool.run(
        measured,
        [(mode, way.subnet) for mode, way in ways.items()],
        recompute,
        element=element,
        sp=sp,
        tied=tied,
        feature=feature,
        distributed=distributed,
        distill=distill,
        tp=tp,
        pp=pp,
        cp=cp,
    )
    table = ParamLayout(of.architecture, ffn_groups=of.space.ffn_groups, tp_size=tp)
    replicas, router = size // tp // pp // cp, router_of(of)
    how = GpuLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        data_parallel_size=replicas,
        sequence_parallel=sp,
        micro_batch_size=MICRO_BATCH,
        use_distributed_optimizer=distributed,
        element=element,
        rotary_percent=rotary_percent(FEATURES.get(feature, {})),
        kernels="torch",
    )
    states = {stage: 0.0 for stage in range(pp)}
    for rank, found in enumerate(results):
        stage = rank // (size // pp)
        alone = (distill or {}).get("teacher") == "self"  # the whole network teaches: no parent beside it
        held, predicted = found["held"], held_bytes(table, how, stage, router=router, teacher=not alone)
        for name in ("weights", "gradients", "teacher"):
            assert held[name] == predicted[name], (rank, name)
        assert alone or held["cached"] == held_bytes(table, how, stage, cached=True)["teacher"], rank
        assert held["elements"] == sum(stage_rows(table, how, stage).values()) + sum(router)
        assert held["optimizer"] <= predicted["optimizer"]
        states[stage] += held["optimizer"] / tp
        for mode, kept in found["runs"].items():
            way = ways[mode]
            once = saved_bytes(table, how, way, stage, LENGTH, recompute)
            close = 0.1 if cp > 1 else 0.05  # torch's attention keeps masks and copies that no flash kernel makes
            assert kept["saved"] == pytest.approx(once * how.in_flight(stage, MICRO_BATCHES), rel=close), (
                rank, mode)  # fmt: skip
            exchange = {"students": [way], "seq_length": LENGTH, "micro_batches": MICRO_BATCHES}
            exchange["teacher"] = not (alone and mode == "whole")
            received = kept["received"] * (how.in_flight(stage, MICRO_BATCHES) + 1)
            assert received + 2 * kept["sent"] == hand_over_bytes(table, how, stage=stage, **exchange), (rank, mode)
    for stage, total in states.items():  # over the replicas to the byte: what is padding belongs to nobody
        rows = sum(stage_rows(table, how, stage).values())
        each = (12 if element == 2 else 8) * rows + 8 * sum(router)
        assert total == each * (1 if distributed else replicas * cp)


@pytest.mark.slow
@pytest.mark.sweep(8)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("element", [2, 4])
def test_what_a_rank_holds_and_keeps(
    layout: tuple, recompute: Any, element: int, request: pytest.FixtureRequest
) -> None:
    pool = request.getfixturevalue(f"pool{layout[0]}")
    check(pool, layout, recompute, MODES, element=element, tied=layout[2] > 1 and layout[0] == 2)


def test_a_layout_drawn_by_chance(pool4: WorkerPool, request: pytest.FixtureRequest) -> None:
    """The same of one layout of four processes, one recomputation and two ways to run."""
    draw = random.Random(seed_of(request.config))
    layout = draw.choice([layout for layout in LAYOUTS if layout[0] == 4])
    recompute, modes = draw.choice([None, "selective", "full"]), draw.sample(MODES, 2)
    check(pool4, layout, recompute, modes, element=draw.choice([2, 4]), tied=draw.random() < 0.5)


@pytest.mark.parametrize("layout", [(2, 2, 1, True), (2, 1, 2, False)], ids=str)
@pytest.mark.parametrize("recompute", [None, "full"])
def test_without_a_second_model(layout: tuple, recompute: Any, request: pytest.FixtureRequest) -> None:
    """`distill.teacher: self`: no byte of a teacher, nothing kept of its forward, a lane only beside children."""
    pool, modes = request.getfixturevalue(f"pool{layout[0]}"), ("whole", "sliced", "soft")
    check(pool, layout, recompute, modes, element=2, tied=False, distill={"teacher": "self"})


@pytest.mark.slow
@pytest.mark.sweep(8)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("feature", ["gated", "rotary", "qk_norm", "all"])
def test_features_of_dense_parents(layout: tuple, recompute: Any, feature: str, request: pytest.FixtureRequest) -> None:
    """Gate and up, turned queries and keys, norms of heads; one by one and together with biases and multipliers."""
    pool, element = request.getfixturevalue(f"pool{layout[0]}"), 2 if sum(layout) % 2 else 4
    check(pool, layout, recompute, MODES, element=element, tied=False, feature=feature)
