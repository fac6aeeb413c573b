"""NeMo's sampler for a curriculum: sequence length and batch size change between steps, the process goes on.

What a step reads is a function of the step alone, so a run may be resumed anywhere, at any data-parallel size:

    step t of stage k    samples  S_k + (t - T_k) B_k  ..  + B_k - 1,      S_k, T_k: samples and steps before the stage
    micro-batch m of rank r:  samples  (m DP + r) b_k .. + b_k - 1  of these
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import nemo.lightning as nl
from nemo.lightning.data import WrappedDataLoader
from torch.utils.data import DataLoader, Sampler

from nemo_elastic.config.sections import StageConfig
from nemo_elastic.distill.curriculum import samples_before, stage_at
from nemo_elastic.mcore.runtime.parallel import data_parallel_rank_and_size, set_batch_sizes


def leave_signals(worker: int) -> None:
    """A process that reads ahead leaves SIGTERM to the one that trains, which still needs it for the step it is in."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class CurriculumBatches(Sampler[list[tuple[int, int]]]):
    """(sample, sequence length) pairs of one micro-batch after another, from a step on, without end."""

    def __init__(self, stages: Sequence[StageConfig], micro_batch_size: int, first_step: int, rank: int, size: int):
        self.stages, self.micro_batch_size, self.first_step = stages, micro_batch_size, first_step
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while True:
            stage, first = stage_at(self.stages, step).stage, samples_before(self.stages, step)
            micro = stage.micro_batch_size or self.micro_batch_size
            for at in range(self.rank * micro, stage.global_batch_size, self.size * micro):
                yield [(first + at + i, stage.seq_length) for i in range(micro)]
            step += 1


class CurriculumSampler(nl.MegatronDataSampler):
    """Deals samples by the stages; keeps Megatron's micro-batch calculator and the schedule's sequence length right.

    Args:
        stages: the curriculum; past its end the last stage goes on.
        micro_batch_size: of stages that have none of their own.
    """

    def __init__(self, stages: Sequence[StageConfig], micro_batch_size: int) -> None:
        first = stages[0]
        super().__init__(
            seq_len=first.seq_length,
            micro_batch_size=first.micro_batch_size or micro_batch_size,
            global_batch_size=first.global_batch_size,
        )
        self.stages, self.default_micro_batch_size = stages, micro_batch_size

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """Training batches by the curriculum; others as NeMo deals them."""
        if getattr(dataloader, "mode", "train") != "train":
            loader = super().transform_dataloader(dataloader, consumed_samples)
            loader.worker_init_fn = leave_signals  # NeMo's own drops it
            return loader
        batches = CurriculumBatches(
            self.stages,
            self.default_micro_batch_size,
            self.init_global_step,
            *data_parallel_rank_and_size(),
        )
        return WrappedDataLoader(
            mode="train",
            dataset=dataloader.dataset,
            batch_sampler=batches,
            num_workers=dataloader.num_workers,
            pin_memory=dataloader.pin_memory,
            collate_fn=dataloader.collate_fn,
            persistent_workers=dataloader.num_workers > 0,
            worker_init_fn=leave_signals,
        )

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Samples of all steps up to now."""
        return samples_before(self.stages, self.init_global_step + int(steps_since_resume))

    def on_megatron_step_start(self, step: Any) -> Any:
        """Tell Megatron the sizes of this step."""
        if step.trainer is None or step.trainer.training:
            self.enter(step.step_i)
        return super().on_megatron_step_start(step)

    def enter(self, step: int) -> None:
        """Take on the sizes of a step's stage."""
        stage = stage_at(self.stages, step).stage
        self.seq_len, self.global_batch_size = stage.seq_length, stage.global_batch_size
        self.micro_batch_size = stage.micro_batch_size or self.default_micro_batch_size
        set_batch_sizes(self.global_batch_size, self.micro_batch_size)
