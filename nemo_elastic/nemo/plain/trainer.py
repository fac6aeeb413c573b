"""From the user's numbers to NeMo's optimizer and trainer.

Nothing here knows of elasticity: the parent's pretraining and the elastic run call the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from nemo.lightning.pytorch.strategies.utils import RestoreConfig

from nemo_elastic.mcore.checkpoint import writer as checkpoint_writer
from nemo_elastic.mcore.checkpoint.held_checkpoint import HeldCheckpoint
from nemo_elastic.mcore.versions import DistributedDataParallelConfig, OptimizerConfig
from nemo_elastic.nemo.plain import cpu, open_saves
from nemo_elastic.nemo.plain.optimizer import OptimizerModule
from nemo_elastic.nemo.plain.plain_config import DTYPES, Precision
from nemo_elastic.processes.launchers import MEETING, RANKS, data_parallel_size, started_processes


def build_optimizer(
    lr: float,
    *,
    precision: Precision = "32",
    min_lr: float | None = None,
    warmup_steps: int = 0,
    max_steps: int | None = None,
    schedule: LRSchedulerModule | None = None,
    weight_decay: float = 0.1,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.95,
    clip_grad: float = 1.0,
    use_distributed_optimizer: bool | None = None,
    **of_module: Any,
) -> OptimizerModule:
    """Adam as Megatron runs it; with `min_lr`, cosine decay to it after a linear warm-up.

    Args:
        schedule: a schedule of one's own instead.
        use_distributed_optimizer: None means on a GPU only.
        of_module: `scale_lr_cond`, `lr_mult`, `no_weight_decay_cond` of NeMo's optimizer module.

    Raises:
        ValueError: `min_lr` without `max_steps`.
    """
    scheduler = schedule
    if schedule is None and min_lr is not None:
        if max_steps is None:
            raise ValueError("train.min_lr needs train.max_steps: the cosine ends there")
        scheduler = CosineAnnealingScheduler(
            max_steps=max_steps, warmup_steps=warmup_steps, constant_steps=0, min_lr=min_lr
        )
    if use_distributed_optimizer is None:
        use_distributed_optimizer = torch.cuda.is_available()
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=weight_decay,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        clip_grad=clip_grad,
        bf16=precision == "bf16-mixed",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=use_distributed_optimizer,
    )
    return OptimizerModule(config=config, lr_scheduler=scheduler, **of_module)


class OneProcess(LightningEnvironment):
    """A process that no launcher started, whatever variables of Slurm and others lie around (`launchers.py`).

    Lightning leaves half of a launcher's variables behind when a run has ended. Here they are afterwards what they
    were, so that another run can follow in the same process, as in a notebook.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before = {name: os.environ.get(name) for name in (*RANKS, *MEETING, "NODE_RANK")}

    def teardown(self) -> None:
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    def node_rank(self) -> int:
        return 0

    def local_rank(self) -> int:
        return 0


class OneGpuEach(TorchElasticEnvironment):
    """torchrun's processes that see one GPU each (by CUDA_VISIBLE_DEVICES): to each of them it is the first.

    Lightning takes the GPU with the process' number on its machine, so here every process is a machine of its own.
    """

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()


def lightning_layout() -> tuple[int, int, LightningEnvironment | TorchElasticEnvironment]:
    """(nodes, devices a node, environment) of the processes that torchrun started, as Lightning counts them."""
    if "LOCAL_RANK" not in os.environ:
        return 1, 1, OneProcess()
    world, local = started_processes(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local > 1 and torch.cuda.is_available() and torch.cuda.device_count() == 1:
        return world, 1, OneGpuEach()
    return world // local, local, TorchElasticEnvironment()


def check_layout(
    processes: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> int:
    """The data-parallel size of a layout.

    Raises:
        ValueError: when the processes do not fill it, or the global batch is not whole micro-batches on every rank.
    """
    sizes = (tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size)
    data_parallel = data_parallel_size(processes, *sizes, expert_model_parallel_size)
    if global_batch_size % (micro_batch_size * data_parallel):
        raise ValueError(
            f"train.global_batch_size={global_batch_size} must be a multiple of train.micro_batch_size="
            f"{micro_batch_size} x {data_parallel} data-parallel ranks"
        )
    return data_parallel


def build_trainer(
    out: Path | str,
    *,
    max_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    precision: Precision = "32",
    use_distributed_optimizer: bool | None = None,
    checkpoint_every: int | None = None,
    async_save: bool = False,
    save_optimizer: bool = True,
    restore_from: Path | str | None = None,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[pl.loggers.Logger] = (),
    val_check_interval: int | None = None,
    limit_val_batches: int = 0,
    seed: int = 1234,
    **trainer_arguments: Any,
) -> nl.Trainer:
    """A `nl.Trainer` on `nl.MegatronStrategy`, on a GPU or a CPU, alone or under torchrun.

    Batch sizes are those of the data module's sampler; they are only checked against the layout here. Checkpoints go
    to `out/checkpoints/step=N`, N counted from zero as NeMo does, and its log files to `out/logs/nemo`.

    Args:
        checkpoint_every: steps between checkpoints, all kept; None saves nothing.
        async_save: the run goes on while a checkpoint is written (`open_saves.py`).
        restore_from: a NeMo checkpoint whose weights (no optimizer, no step) the run starts from, in any layout.
        use_distributed_optimizer: as in `build_optimizer`; give both the same.
        val_check_interval: steps between validations of `limit_val_batches` batches; None does not validate.
        trainer_arguments: further arguments of Lightning's trainer.

    Raises:
        ValueError: from `check_layout`.
    """
    cpu.install()
    checkpoint_writer.install()
    if async_save:
        open_saves.install()
    # NeMo's telemetry raises at the first save unless it was configured for a known cluster.
    CallbackGroup.get_instance()._callbacks.clear()
    num_nodes, devices, environment = lightning_layout()
    check_layout(
        num_nodes * devices,
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        global_batch_size,
        micro_batch_size,
        context_parallel_size,
        expert_model_parallel_size,
    )
    pl.seed_everything(seed, verbose=False)
    on_gpu = torch.cuda.is_available()
    dtype = DTYPES[precision]
    restored = None if restore_from is None else HeldCheckpoint(restore_from)  # Megatron's loader unpickles
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        sequence_parallel=sequence_parallel and tensor_model_parallel_size > 1,
        pipeline_dtype=dtype,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=on_gpu,  # its event synchronisation needs CUDA
            use_distributed_optimizer=on_gpu if use_distributed_optimizer is None else use_distributed_optimizer,
        ),
        ckpt_async_save=async_save,
        ckpt_parallel_load=on_gpu,  # exchanges shards over NCCL
        ckpt_save_optimizer=save_optimizer,
        ckpt_optim_fully_reshardable=True,  # a run may be resumed at another TP x PP x DP
        replace_progress_bar=False,
        restore_config=None if restored is None else RestoreConfig(path=str(restored.path), load_artifacts=False),
    )
    trainer = nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        plugins=[
            nl.MegatronMixedPrecision(
                precision=precision, params_dtype=dtype, pipeline_dtype=dtype, autocast_enabled=False
            ),
            environment,
        ],
        max_steps=max_steps,
        callbacks=[*([open_saves.OneSaveAtATime()] * async_save), *callbacks],
        logger=list(loggers) or False,
        enable_checkpointing=checkpoint_every is not None,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=val_check_interval,
        check_val_every_n_epoch=None if val_check_interval else 1,
        limit_val_batches=limit_val_batches if val_check_interval else 0,
        **{"log_every_n_steps": 1} | trainer_arguments,
    )
    trainer.restored = restored  # its files are there for as long as the trainer is
    nl.NeMoLogger(
        explicit_log_dir=str(Path(out) / "logs" / "nemo"),  # NeMo moves every file it finds there out of its way
        update_logger_directory=False,
        ckpt=None if checkpoint_every is None else _checkpoints(Path(out), checkpoint_every, save_optimizer),
    ).setup(trainer)
    return trainer


def _checkpoints(out: Path, every: int, save_optimizer: bool) -> nl.ModelCheckpoint:
    # The default monitor is val_loss: without validation it would save nothing, silently.
    return nl.ModelCheckpoint(
        dirpath=str(out / "checkpoints"),
        filename="{step}",
        monitor="reduced_train_loss",
        every_n_train_steps=every,
        save_top_k=-1,
        save_last=False,
        save_optim_on_train_end=save_optimizer,
    )
