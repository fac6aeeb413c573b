"""What a run is expected to need at the layout that it has: steps, tokens, FLOPs, GPU-hours, a GPU's memory. No torch.

`training_cost` and `layouts.memory_bytes`, for one layout instead of all; what was needed stands in the logs beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.sections import RunConfig
from ..cost.gpu_layout import GpuLayout
from ..family import Family
from ..processes.launchers import data_parallel_size
from ..space.subnet import Subnet
from .gpu_work import Work, rotary_percent
from .layouts import memory_bytes
from .training_cost import training_cost


def expected(run: RunConfig, family: Family, subnets: Mapping[str, Subnet], processes: int) -> dict[str, Any]:
    """`steps`, `tokens`, `flops`, `gpu_hours` (at report.mfu of report.peak_tflops), `memory_bytes` of the fullest GPU
    without `report.gpu.reserve_gb`.

    Args:
        subnets: what each budget runs once its choice is hard.
    """
    cost = training_cost(run, family, subnets)
    if cost is None:
        return {}
    found = {"steps": cost["steps"], "tokens": cost["tokens"], "flops": cost["flops"]["total"]}
    memory = memory_bytes(Work(run, family, subnets), layout_of(run, processes))
    allocated = memory["total"] - memory["reserve"]  # what CUDA itself takes is in no allocator's count
    return found | {"gpu_hours": cost["gpu_hours"], "memory_bytes": allocated}


def layout_of(run: RunConfig, processes: int) -> GpuLayout:
    """The layout of a configured run over so many processes, a GPU each."""
    train = run.train
    tp, pp, cp = (
        train.tensor_model_parallel_size,
        train.pipeline_model_parallel_size,
        train.context_parallel_size,
    )
    return GpuLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=train.expert_model_parallel_size,
        data_parallel_size=data_parallel_size(processes, tp, pp, cp, train.expert_model_parallel_size),
        sequence_parallel=bool(train.sequence_parallel),
        micro_batch_size=max(stage.micro_batch_size or train.micro_batch_size for stage in train.stages),
        recompute_granularity=train.recompute_granularity,
        use_distributed_optimizer=train.distributed_optimizer,
        element=4 if train.precision == "32" else 2,
        rotary_percent=rotary_percent(run.model),
    )
