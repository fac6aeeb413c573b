"""What ranks of a pool run for the checkpoint tests: stock Megatron saves and loads of the plain model, any layout."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from checkpoint_family import MODEL, random_weights
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.mcore.models.build import build_plain_model, load_weights, named_global_parameters
from nemo_elastic.space.layout import ParamLayout


def plain(seed: int | None = 0) -> torch.nn.Module:
    """This rank's part of the family's parent; `seed=None` leaves its own initialisation."""
    architecture = architecture_of(MODEL)
    model = build_plain_model(architecture, perform_initialization=seed is None)
    if seed is not None:
        load_weights(model, random_weights(seed=seed), architecture)
    return model


def stock_save(folder: str, seed: int = 0) -> None:
    """`dist_checkpointing.save` of the plain model, under the prefix that NeMo gives it."""
    _save(plain(seed).sharded_state_dict(prefix="module."), folder)


def _save(state: dict, folder: str) -> None:
    """`dist_checkpointing.save` from a process of a pool."""
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    settings = multiprocessing.current_process()._config
    daemon, settings["daemon"] = settings.get("daemon"), False  # the save starts processes, which a daemon may not
    try:
        dist_checkpointing.save(state, folder)
    finally:
        filesystem_async._results_queue = None  # ends the process that serves it
        settings["daemon"] = daemon


def optimizer_state(model: torch.nn.Module, optimizer: Any, kind: str, loading: bool) -> dict:
    """What NeMo saves of a step: model, distributed optimizer, and plain values."""
    parameters = model.sharded_state_dict(prefix="module.")
    state = optimizer.sharded_state_dict(parameters, is_loading=loading, metadata={"distrib_optim_sharding_type": kind})
    return {"state_dict": parameters, "optimizer": [state], "global_step": 3, "epoch": 0}


def optimizer_round_trip(folder: str, kind: str) -> tuple[float, float, int]:
    """Save a model with the distributed optimizer after a step, load it from what `HeldCheckpoint` hands on.

    Returns the sums of weights after one more step of both, and the number of byte objects in the checkpoint.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from nemo_elastic.mcore.checkpoint.held_checkpoint import HeldCheckpoint, refuse_hostile
    from nemo_elastic.mcore.versions import build_optimizer

    def made() -> tuple[Any, Any]:
        core = plain()
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        model = DistributedDataParallel(core.config, settings, core)
        config = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, params_dtype=torch.float32)
        return model, build_optimizer(config, [model])

    def total(model: Any) -> float:
        return float(sum(p.detach().double().abs().sum() for p in model.parameters()))

    def step(model: Any, optimizer: Any, gradient: float) -> None:
        for parameter in model.parameters():
            parameter.main_grad.fill_(gradient)
        model.finish_grad_sync()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer, 0.01)
    _save(optimizer_state(model.module, optimizer, kind, False), folder)
    torch.distributed.barrier()
    objects = len(refuse_hostile(folder).objects)
    again, its_optimizer = made()
    step(again, its_optimizer, -0.02)
    assert total(again) != total(model)
    wanted = optimizer_state(again.module, its_optimizer, kind, True)
    with HeldCheckpoint(folder) as checked:
        state = dist_checkpointing.load(wanted, str(checked / "weights"))
    again.module.load_state_dict({n.removeprefix("module."): v for n, v in state["state_dict"].items()}, strict=False)
    with torch.no_grad():
        its_optimizer.load_state_dict(state["optimizer"][0])
    for one, other in ((model, optimizer), (again, its_optimizer)):
        step(one, other, 0.03)  # the same only if the moments came back, too
    return total(model), total(again), objects


def stock_load(folder: str) -> dict[str, tuple[int, torch.Tensor]]:
    """`dist_checkpointing.load` into a fresh model; name -> (tensor-parallel rank, this rank's shard)."""
    model = plain(seed=None)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), folder)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    layout = ParamLayout(architecture_of(MODEL), tp_size=size)
    return {name: (rank, p.detach().clone()) for name, p in named_global_parameters(model, layout)}


def stock_copy(folder: str, target: str) -> None:
    """Load a checkpoint into a fresh model by stock Megatron, and save that model by stock Megatron."""
    model = plain(seed=None)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), folder)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    _save(model.sharded_state_dict(prefix="module."), target)


def stock_keys() -> set[str]:
    """Keys of everything that stock Megatron stores for the plain model on this rank."""
    found: set[str] = set()
    pending = [plain(seed=None).sharded_state_dict(prefix="module.")]
    from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories

    apply_factories(pending[0])
    while pending:
        node = pending.pop()
        if isinstance(node, ShardedBase):
            found.add(getattr(node, "unique_key", None) or node.key)
        elif isinstance(node, dict | list):
            pending += node.values() if isinstance(node, dict) else node
    return found


def verified(nested: str, children: dict[str, str], batches: list, tp: int) -> list[dict]:
    """`verify` with the nested side at tensor-parallel size `tp`."""
    from nemo_elastic.config import load_config
    from nemo_elastic.nemo.export.verify import verify

    run = load_config("tiny_parent.yaml", [f"train.tensor_model_parallel_size={tp}"]).config
    return [check.to_dict() for check in verify(nested, {n: Path(f) for n, f in children.items()}, run, batches)]
