"""From the user's numbers to NeMo's objects: the plain model, the optimizer and the trainer.

Nothing here knows of elasticity: the parent's pretraining and the elastic run call the same functions. The vocabulary
of a model has one padded size, `model.vocab_size`, in every layout. NeMo pads the tokenizer's vocabulary to

    ceil(v / (d TP)) d TP,    d = make_vocab_size_divisible_by

so d is set to `vocab_size / TP`: a checkpoint of a differently padded model would load without an error, and wrongly.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
import torch.nn.functional as F
from nemo.collections import llm
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from nemo.lightning.pytorch.strategies.utils import RestoreConfig

from nemo_elastic.mcore.held_checkpoint import HeldCheckpoint
from nemo_elastic.mcore.layer_specs import have_transformer_engine, hybrid_stack_spec
from nemo_elastic.mcore.versions import AttnBackend, DistributedDataParallelConfig, OptimizerConfig, squared_relu
from nemo_elastic.nemo import cpu

Precision = Literal["32", "bf16-mixed"]

DTYPES: dict[str, torch.dtype] = {"32": torch.float32, "bf16-mixed": torch.bfloat16}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "squared_relu": squared_relu,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
# Fused CUDA kernels, and the attention that needs none; Megatron's own defaults assume a GPU.
WITHOUT_GPU: dict[str, Any] = {
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "attention_backend": AttnBackend.local,
}


def plain_model_config(
    model: Mapping[str, Any],
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    precision: Precision = "32",
    config_class: type[llm.SSMConfig] = llm.SSMConfig,
    **more: Any,
) -> llm.SSMConfig:
    """NeMo's config of a plain hybrid model on this machine.

    Args:
        model: `SSMConfig` fields by their own names, and `vocab_size`, the padded size of the embedding.
            `num_layers` follows from `hybrid_override_pattern`; `activation_func` may be a name of `ACTIVATIONS`.
        sequence_parallel: takes effect where `tensor_model_parallel_size` is above one, as it divides that axis.
        precision: of parameters and of what pipeline stages exchange.
        config_class: a subclass of `SSMConfig` to build instead (the elastic model's).
        more: further fields, stronger than `model` and than what a CPU needs.

    Raises:
        ValueError: for a field that `config_class` does not have, an unknown activation, a vocabulary that TP does
            not divide, and whatever Megatron itself refuses.
    """
    cpu.install()
    given = dict(model)
    vocab_size = given.pop("vocab_size")
    if vocab_size % tensor_model_parallel_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} must be a multiple of "
            f"train.tensor_model_parallel_size={tensor_model_parallel_size}"
        )
    activation = given.get("activation_func", "squared_relu")
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"model.activation_func={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    given["activation_func"] = ACTIVATIONS.get(activation, activation)
    dtype = DTYPES[precision]
    settings: dict[str, Any] = {
        "num_layers": len(given["hybrid_override_pattern"]),
        "is_hybrid_model": True,
        "make_vocab_size_divisible_by": vocab_size // tensor_model_parallel_size,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "sequence_parallel": sequence_parallel and tensor_model_parallel_size > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "mamba_stack_spec": hybrid_stack_spec,
    }
    settings |= given
    settings |= {} if have_transformer_engine() else WITHOUT_GPU
    settings |= more
    _refuse_unknown(settings, config_class)
    return config_class(**settings)


def _refuse_unknown(settings: Mapping[str, Any], config_class: type) -> None:
    known = [field.name for field in fields(config_class) if field.init]
    problems = []
    for name in settings.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(f"model.{name} is not a field of {config_class.__name__}" + (f"; {near[0]}?" if near else ""))
    if problems:
        raise ValueError("; ".join(sorted(problems)))


def check_vocabulary(config: llm.SSMConfig, tokenizer_vocab_size: int) -> int:
    """The padded vocabulary that NeMo will build for `config`, which is `model.vocab_size` in every layout.

    Raises:
        ValueError: when the tokenizer has more tokens than the model has rows.
    """
    padded = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    built = nl.get_vocab_size(config, tokenizer_vocab_size, config.make_vocab_size_divisible_by)
    if built != padded:
        raise ValueError(
            f"the tokenizer has {tokenizer_vocab_size} tokens, more than model.vocab_size={padded}; "
            f"set model.vocab_size to {tokenizer_vocab_size} or more"
        )
    return padded


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
) -> nl.MegatronOptimizerModule:
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
    return nl.MegatronOptimizerModule(config=config, lr_scheduler=scheduler, **of_module)


def started_processes() -> tuple[int, int]:
    """(nodes, processes per node) that torchrun started; (1, 1) without it."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return world // local, local


def check_layout(
    processes: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    global_batch_size: int,
    micro_batch_size: int,
) -> int:
    """The data-parallel size of a layout.

    Raises:
        ValueError: when the processes do not fill it, or the global batch is not whole micro-batches on every rank.
    """
    model_parallel = tensor_model_parallel_size * pipeline_model_parallel_size
    if processes % model_parallel:
        raise ValueError(
            f"train.tensor_model_parallel_size={tensor_model_parallel_size} x train.pipeline_model_parallel_size="
            f"{pipeline_model_parallel_size} needs a multiple of {model_parallel} processes, {processes} started; "
            f"start with torchrun --nproc-per-node {model_parallel}"
        )
    data_parallel = processes // model_parallel
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
    sequence_parallel: bool = False,
    precision: Precision = "32",
    use_distributed_optimizer: bool | None = None,
    checkpoint_every: int | None = None,
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
        restore_from: a NeMo checkpoint whose weights (no optimizer, no step) the run starts from, in any layout.
        use_distributed_optimizer: as in `build_optimizer`; give both the same.
        val_check_interval: steps between validations of `limit_val_batches` batches; None does not validate.
        trainer_arguments: further arguments of Lightning's trainer.

    Raises:
        ValueError: from `check_layout`.
    """
    cpu.install()
    # NeMo's telemetry raises at the first save unless it was configured for a known cluster.
    CallbackGroup.get_instance()._callbacks.clear()
    num_nodes, devices = started_processes()
    check_layout(
        num_nodes * devices,
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        global_batch_size,
        micro_batch_size,
    )
    pl.seed_everything(seed, verbose=False)
    on_gpu = torch.cuda.is_available()
    dtype = DTYPES[precision]
    restored = None if restore_from is None else HeldCheckpoint(restore_from)  # Megatron's loader unpickles
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        sequence_parallel=sequence_parallel and tensor_model_parallel_size > 1,
        pipeline_dtype=dtype,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=on_gpu,  # its event synchronisation needs CUDA
            use_distributed_optimizer=on_gpu if use_distributed_optimizer is None else use_distributed_optimizer,
        ),
        ckpt_async_save=False,
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
        plugins=nl.MegatronMixedPrecision(
            precision=precision, params_dtype=dtype, pipeline_dtype=dtype, autocast_enabled=False
        ),
        max_steps=max_steps,
        callbacks=list(callbacks),
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
