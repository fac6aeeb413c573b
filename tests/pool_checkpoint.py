"""What ranks of a pool run for the checkpoint tests: stock Megatron saves and loads of the plain model, any layout."""

import multiprocessing
from pathlib import Path

import torch
from checkpoint_family import MODEL, random_weights
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.layout import ParamLayout
from nemo_elastic.mcore.build import build_plain_model, load_weights, named_global_parameters


def plain(seed: int | None = 0) -> torch.nn.Module:
    """This rank's part of the family's parent; `seed=None` leaves its own initialisation."""
    architecture = architecture_of(MODEL)
    model = build_plain_model(architecture, perform_initialization=seed is None)
    if seed is not None:
        load_weights(model, random_weights(seed=seed), architecture)
    return model


def stock_save(folder: str, seed: int = 0) -> None:
    """`dist_checkpointing.save` of the plain model, under the prefix that NeMo gives it."""
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    settings = multiprocessing.current_process()._config
    daemon, settings["daemon"] = settings.get("daemon"), False  # the save starts processes, which a daemon may not
    try:
        dist_checkpointing.save(plain(seed).sharded_state_dict(prefix="module."), folder)
    finally:
        filesystem_async._results_queue = None  # ends the process that serves it
        settings["daemon"] = daemon


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
    from nemo_elastic.nemo.verify import verify

    run = load_config("tiny_parent.yaml", [f"train.tensor_model_parallel_size={tp}"]).config
    return [check.to_dict() for check in verify(nested, {n: Path(f) for n, f in children.items()}, run, batches)]
