"""Process groups for verbs that run Megatron without a NeMo trainer (`rank`, `verify`, evaluation).

The same environment as for training: torchrun's variables when present, else a single process. What is already
initialised (by a trainer in the same process, or by a test pool) is kept when its layout is the wanted one.

Two kinds of waiting: collectives of a step, which NCCL gives up after ten minutes, as something hangs then; and waits
for one process that sorts, nests or extracts a whole parent, which may take hours. The latter are on a gloo group of
their own with a limit of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from ...config.sections import TrainConfig
from ...problems import Problem, ProblemsError, raise_if_any
from ...processes.launchers import data_parallel_size, started_processes
from . import cpu

_waits: dict[str, Any] = {"group": None, "limit": timedelta(minutes=TrainConfig().wait_minutes)}


def start(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    *,
    expert_model_parallel_size: int = 1,
    seed: int = 1234,
    wait_minutes: float | None = None,
) -> int:
    """Initialise torch.distributed and Megatron's groups for a layout; returns this process' rank.

    Training alone has context parallelism; to other verbs those processes are data-parallel ranks.

    Args:
        wait_minutes: limit of `barrier` and `on_first_rank`; None: as it is.

    Raises:
        ProblemsError: more processes on this machine than GPUs, or processes that do not fill the layout.
    """
    cpu.install()
    if wait_minutes is not None and timedelta(minutes=wait_minutes) != _waits["limit"]:
        _waits.update(group=None, limit=timedelta(minutes=wait_minutes))
    if not dist.is_initialized():
        store = None
        if started_processes() == 1:  # whoever says so, and whether it says where to meet
            store = dist.TCPStore("127.0.0.1", 0, 1, True)  # port 0: one that nobody else can take meanwhile
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), RANK="0", WORLD_SIZE="1")
        device = own_gpu()  # before the first collective: NCCL takes the current device, which is the first one
        alone = {} if store is None else {"store": store, "rank": 0, "world_size": 1}
        dist.init_process_group("gloo" if device is None else "nccl", device_id=device, **alone)
    wanted = (
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        context_parallel_size,
        expert_model_parallel_size,
    )
    data_parallel_size(dist.get_world_size(), *wanted)
    if parallel_state.model_parallel_is_initialized():
        there = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_group().size(),
            parallel_state.get_expert_model_parallel_group().size(),
        )
        if there == wanted:
            return dist.get_rank()
        forget_layout()
    names = ("tensor_model", "pipeline_model", "context", "expert_model")
    sizes = {f"{name}_parallel_size": size for name, size in zip(names, wanted, strict=True)}
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(seed)
    return dist.get_rank()


def own_gpu() -> torch.device | None:
    """The GPU of this process, made the current one: its number on this machine, or the only one it sees.

    Raises:
        ProblemsError: there is no such GPU.
    """
    if not torch.cuda.is_available():
        return None
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    last = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)) - 1
    if max(number, last) >= count > 1:  # all of a machine refuse, also those that would find a GPU
        words = f"{number} is the process' number on this machine, which shows {count} GPUs; start at most {count} here"
        raise ProblemsError([Problem("LOCAL_RANK", words)])
    device = torch.device("cuda", number if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def forget_layout() -> None:
    """Drop Megatron's groups AND the communicators behind them.

    Megatron only forgets its groups: under gloo each keeps threads that poll for the rest of the process, and after a
    few layouts those take the machine.
    """
    parallel_state.destroy_model_parallel()
    _waits["group"] = None
    for group in [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def rank() -> int:
    """This process' number; 0 before anything is started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes, however long one of them works (`train.wait_minutes`)."""
    if dist.is_initialized():
        dist.barrier(group=_waiting_group())


def _waiting_group() -> dist.ProcessGroup:
    """All processes, over gloo; made by the first wait, which all of them come to."""
    if _waits["group"] not in dist.distributed_c10d._world.pg_map:  # none yet, or of processes that have met anew
        _waits["group"] = dist.new_group(backend="gloo", timeout=_waits["limit"])
    return _waits["group"]


def on_first_rank(act: Callable[[], Any]) -> Any:
    """What `act` returns on the first rank, on all of them; the other ranks wait.

    Raises:
        ProblemsError: what `act` raised there, on all ranks; an OSError or ValueError goes on as it is on the first
            rank, and in words on the others.
    """
    answer: list[Any] = [None, None]
    failure: OSError | ValueError | None = None
    if rank() == 0:
        try:
            answer[0] = act()
        except (OSError, ValueError) as error:
            failure = error
            problems = error.problems if isinstance(error, ProblemsError) else None
            answer[1] = problems or [Problem("the first process", f"{type(error).__name__}: {error}")]
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0, group=_waiting_group())
    if failure is not None:
        raise failure
    raise_if_any(answer[1] or ())
    return answer[0]


def is_started() -> bool:
    """Whether Megatron's groups are there."""
    return dist.is_initialized() and parallel_state.model_parallel_is_initialized()


def is_last_stage() -> bool:
    """Whether this rank computes losses."""
    return parallel_state.is_pipeline_last_stage()
