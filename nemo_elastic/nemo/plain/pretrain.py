"""Train a plain hybrid model from nothing through NeMo: what makes the shipped tiny parent.

    nl.Trainer + nl.MegatronStrategy + llm.MambaModel + TextDataModule, next-token cross-entropy, Adam

Nothing here is elastic. `pretrain` returns the trained Megatron module of this rank; what becomes of it (the
shipped safetensors, a checkpoint) is the caller's business.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.collections import llm

from nemo_elastic.mcore.checkpoint.held_checkpoint import HeldCheckpoint
from nemo_elastic.mcore.versions import OptimizerConfig
from nemo_elastic.nemo.plain.budget_schedule import BudgetClock, BudgetCosine
from nemo_elastic.nemo.plain.data import TextDataModule
from nemo_elastic.nemo.plain.optimizer import OptimizerModule
from nemo_elastic.nemo.plain.trainer import build_trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Budget and optimizer of a run; the model and the data have their own configurations."""

    max_steps: int
    max_minutes: float | None = None
    lr: float = 4e-3
    min_lr_ratio: float = 0.05
    warmup_steps: int = 200
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    log_every_steps: int = 50
    heldout_every_steps: int = 500
    heldout_batches: int | None = None  # global batches of every held-out loss; None: all
    checkpoint_every_steps: int = 500
    export_minutes: float = 10.0
    seed: int = 1234

    def __post_init__(self) -> None:
        problems = []
        if self.max_steps < 1:
            problems.append(f"max_steps={self.max_steps} must be at least 1")
        if self.max_minutes is not None and self.max_minutes <= 0:
            problems.append(f"max_minutes={self.max_minutes} must be positive")
        if self.heldout_batches is not None and self.heldout_batches < 1:
            problems.append(f"heldout_batches={self.heldout_batches} must be at least 1, or None for all")
        if self.lr <= 0:
            problems.append(f"lr={self.lr} must be positive")
        if not 0 <= self.min_lr_ratio <= 1:
            problems.append(f"min_lr_ratio={self.min_lr_ratio} must be within 0 and 1")
        if problems:
            raise ValueError("; ".join(problems))


class ProgressLog(pl.Callback):
    """Training and held-out loss as JSON lines, one record each, on the first rank.

    Args:
        path: the file; records are appended.
        every_steps: steps between records of the training loss (a mean over them).
    """

    def __init__(self, path: Path, every_steps: int) -> None:
        self.path, self.every_steps = path, every_steps
        self._losses: list[float] = []
        self._start = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock after set-up."""
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the loss; write every so often."""
        if "reduced_train_loss" in trainer.callback_metrics:
            self._losses.append(float(trainer.callback_metrics["reduced_train_loss"]))
        if trainer.global_step % self.every_steps == 0 and self._losses:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._write(trainer, train_loss=sum(self._losses) / len(self._losses), lr=rate)
            self._losses.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the held-out loss."""
        if "val_loss" in trainer.callback_metrics:
            self._write(trainer, heldout_loss=float(trainer.callback_metrics["val_loss"]))

    def _write(self, trainer: pl.Trainer, **values: float) -> None:
        if trainer.is_global_zero:
            minutes = round((time.monotonic() - self._start) / 60, 3)
            record = {"step": trainer.global_step, "minutes": minutes, **values}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            logger.info("%s", record)


class PeriodicExport(pl.Callback):
    """Calls `export(module, step)` every so many minutes, after a training step."""

    def __init__(self, export: Callable[[torch.nn.Module, int], None], every_minutes: float) -> None:
        self.export, self.every_seconds = export, 60 * every_minutes
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export when it is due."""
        now = time.monotonic()
        if now - self._last >= self.every_seconds:
            self._last = now
            self.export(megatron_module(pl_module), trainer.global_step)


def megatron_module(model: Any) -> torch.nn.Module:
    """The `megatron.core` model inside NeMo's wrappers."""
    module = model.module
    while hasattr(module, "module"):
        module = module.module
    return module


def pretrain(
    model_config: llm.SSMConfig,
    data: TextDataModule,
    config: PretrainConfig,
    out: Path,
    *,
    export: Callable[[torch.nn.Module, dict[str, Any]], None] | None = None,
    resume_from: Path | None = None,
    **layout: Any,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Train and return this rank's Megatron module, with what the run was: steps, tokens, minutes, epochs.

    Args:
        model_config: NeMo's configuration of the model.
        data: the text.
        config: budget and optimizer.
        out: folder of checkpoints, logs and `progress.jsonl`.
        export: called with (module, facts) about every `export_minutes` while training.
        resume_from: a checkpoint of an earlier part of the same run.
        layout: parallel layout and precision, as `build_trainer` takes them.
    """
    out.mkdir(parents=True, exist_ok=True)
    schedule = BudgetCosine(config.max_steps, config.max_minutes, config.warmup_steps, config.min_lr_ratio)
    optimizer = OptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=False,
            params_dtype=model_config.params_dtype,
            bf16=model_config.bf16,
        ),
        lr_scheduler=schedule,
    )
    model = llm.MambaModel(model_config, optim=optimizer, tokenizer=data.tokenizer)
    callbacks: list[pl.Callback] = [
        BudgetClock(schedule),
        ProgressLog(out / "progress.jsonl", config.log_every_steps),
    ]
    if export:
        callbacks.append(PeriodicExport(lambda module, step: export(module, facts(step)), config.export_minutes))
    trainer = build_trainer(
        out,
        max_steps=config.max_steps,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        use_distributed_optimizer=False,
        checkpoint_every=config.checkpoint_every_steps,
        val_check_interval=min(config.heldout_every_steps, config.max_steps),
        limit_val_batches=config.heldout_batches or data.heldout_batches,
        callbacks=callbacks,
        seed=config.seed,
        log_every_n_steps=config.log_every_steps,
        **layout,
    )

    def facts(step: int) -> dict[str, Any]:
        tokens = step * data.global_batch_size * data.seq_length
        return {
            "steps": step,
            "tokens": tokens,
            "epochs": round(tokens / (data.windows("train").per_epoch * data.seq_length), 2),
            "minutes": round(schedule.elapsed_minutes, 1),
            "budget_used": round(schedule.used(step), 4),
        }

    with HeldCheckpoint(resume_from) if resume_from else nullcontext() as checked:
        trainer.fit(model, data, ckpt_path=None if checked is None else str(checked))
    return megatron_module(model), facts(trainer.global_step)
