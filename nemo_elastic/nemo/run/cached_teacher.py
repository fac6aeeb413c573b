"""The teacher's cache of a run: what it depends on, when it is filled, which sample a micro-batch begins with."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_elastic.config.load import plain
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.distill.curriculum import samples_before, stage_at
from nemo_elastic.mcore.family.family_model import FamilyModel
from nemo_elastic.mcore.family.teacher_cache import TeacherCache
from nemo_elastic.mcore.models.parents import sorted_parent
from nemo_elastic.mcore.runtime.process_groups import rank
from nemo_elastic.nemo.plain.data import TextDataModule
from nemo_elastic.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)


class CachedTeacher:
    """Fills the cache before the first step when it is not there, and frees the teacher's layers.

    Args:
        data: the run's text.
        sorted_folder: the sorted parent that the teacher is.
        dtype: of the parameters.
    """

    def __init__(self, run: RunConfig, data: TextDataModule, sorted_folder: Path, dtype: torch.dtype) -> None:
        self.stages, self.data, self.micro_batch_size = run.train.stages, data, run.train.micro_batch_size
        identity = {
            "parent": dict(sorted_parent(sorted_folder).description["sha256"]),
            "tokenizer": data.tokenizer.bpe.sha256,
            "seed": run.train.seed,
            "model": plain(run.model),
            "text": self._fingerprint(),
        }
        self.cache = TeacherCache(
            Path(run.distill.teacher_cache),
            self.stages,
            micro_batch_size=run.train.micro_batch_size,
            hidden_size=run.model["hidden_size"],
            dtype=dtype,
            identity=identity,
        )
        if not self.cache.is_whole:  # refuses another run's folder, before anything is built
            self._check_room()

    def _check_room(self) -> None:
        """A memory-mapped file that finds the disk full kills the process without a word."""
        folder = next(p for p in (self.cache.folder, *self.cache.folder.resolve().parents) if p.is_dir())
        free = shutil.disk_usage(folder).free
        if free < self.cache.nbytes:
            words = f"needs {self.cache.nbytes / 1e9:.3g} GB, {folder} has {free / 1e9:.3g}; name another disk"
            raise_if_any([Problem("distill.teacher_cache", words)])

    def prepare(self, model: FamilyModel) -> None:
        """Every process calls it, before the first step."""
        if not self.cache.is_whole:
            if rank() == 0:
                logger.info("teacher cache: filling %s with %.1f MB", self.cache.folder, self.cache.nbytes / 1e6)
            self.cache.fill(model.teacher, self._tokens)
        model.retire_teacher()

    def of_micro_batch(self, step: int, index: int) -> Callable[[], Tensor]:
        """Reads the states `[s, b, h]` of micro-batch `index` (over all replicas) of a step."""
        size = stage_at(self.stages, step).stage.micro_batch_size or self.micro_batch_size
        first = samples_before(self.stages, step) + index * size
        return lambda: self.cache.read(step, first, size)

    def _fingerprint(self) -> str:
        """Of the text itself: of samples spread over every stage, and of the length of an epoch."""
        found, first = hashlib.sha256(), 0
        for stage in self.stages:
            count = stage.steps * stage.global_batch_size
            found.update(str(self.data.windows("train", stage.seq_length).per_epoch).encode())
            for at in range(0, count, max(1, count // 16)):
                found.update(self._tokens(first + at, stage.seq_length).numpy().tobytes())
            first += count
        return found.hexdigest()

    def _tokens(self, sample: int, seq_length: int) -> Tensor:
        tokens: Any = self.data.windows("train", seq_length).sample(sample)[0]
        return torch.from_numpy(tokens.astype("int64"))
