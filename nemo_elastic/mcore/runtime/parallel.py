"""Megatron's process groups and ranks for callers that do not import Megatron."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state
from torch import Tensor


def tensor_parallel_group() -> dist.ProcessGroup | None:
    """The group the vocabulary is split over; None when it is not split."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return parallel_state.get_tensor_model_parallel_group()


def data_parallel_group() -> dist.ProcessGroup:
    """Ranks with the same weights: replicas, and the context-parallel ranks of each."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def over_context(value: Tensor) -> Tensor:
    """The sum over the context-parallel ranks of a replica; the tensor itself where there is one."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return total


def data_parallel_rank_and_size() -> tuple[int, int]:
    """This replica's number, and how many there are."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def stage_ends() -> tuple[bool, bool]:
    """(first stage?, last stage?)"""
    return parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()


def from_first_rank(value: Any) -> Any:
    """What the first process has, on all."""
    if dist.get_world_size() == 1:
        return value
    payload = [value]
    dist.broadcast_object_list(payload, src=0)
    return payload[0]


def broadcast_from_last_stage(values: list[float]) -> list[float]:
    """The last stage's numbers on every stage of the pipeline."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return values
    payload = [values]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(payload, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return payload[0]


def set_batch_sizes(global_batch_size: int, micro_batch_size: int) -> None:
    """Tell Megatron the sizes of the steps to come; nothing happens when they are the ones it has."""
    known = num_microbatches_calculator
    if (known.get_current_global_batch_size(), known.get_micro_batch_size()) != (global_batch_size, micro_batch_size):
        known.reconfigure_num_microbatches_calculator(
            rank=0,
            rampup_batch_size=None,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
