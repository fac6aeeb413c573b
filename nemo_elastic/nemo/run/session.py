"""The record of a start or a resume in `logs/sessions.jsonl`: from which step, on what, and what was expected of it.

{step, time, processes, device, layout: {...}, planned: {steps, tokens, flops, gpu_hours, memory_bytes}}
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from nemo_elastic.config.sections import RunConfig
from nemo_elastic.distill.expected import expected
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.space.subnet import Subnet

logger = logging.getLogger(__name__)


def session(step: int, run: RunConfig, planner: Planner, subnets: dict[str, Subnet]) -> dict[str, Any]:
    """What a start says.

    Args:
        step: steps done before it.
        subnets: of every budget, as it stands.
    """
    names = (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
        "expert_model_parallel_size",
    )  # fmt: skip
    return {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": process_groups.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "layout": {name: getattr(run.train, name) for name in names},
        "planned": _expected(run, planner, subnets),
    }


def _expected(run: RunConfig, planner: Planner, subnets: dict[str, Subnet]) -> dict[str, Any]:
    """An estimate for the log, without which a run goes on all the same: one rank makes it, the others would wait."""
    try:
        return expected(run, planner.family, subnets, process_groups.world_size())
    except Exception as error:
        logger.warning("what this run takes is not estimated: %s: %s", type(error).__name__, error)
        return {}
