"""The frozen teacher's final hidden states on disk: filled once by a forward-only schedule, then no teacher runs.

    stage-K.npy    [samples of the stage, s, h]    in the dtype the stages exchange (bf16 as its bits)

Hidden states rather than logits: KL, top-k and hidden-state losses stay exact, and `h` is far below the vocabulary. A
token costs `2 h` bytes in bf16 (8,960 for the 12B parent). A run's samples are all different, so this pays over several
runs of one curriculum (seeds, ablations), not within one. Files are written under another name and renamed when whole;
what they are the states of (parent, text, stages) stands in `teacher.json` and is compared before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ...config.sections import StageConfig
from ...distill.curriculum import samples_before, stage_at
from ...files import read_json, write_json
from ...problems import Problem, ProblemsError
from ..kernels.context import own_positions
from ..runtime.process_groups import barrier, rank
from .heads import Head, teacher_head

DESCRIPTION = "teacher.json"
# (sample, sequence length) -> token ids [s]
ReadTokens = Callable[[int, int], Tensor]


class TeacherCache:
    """Hidden states `[s, b, h]` of the samples of a curriculum.

    Args:
        folder: shared by all processes.
        stages: the curriculum; its samples are numbered through.
        micro_batch_size: of the forwards that fill it, where a stage has none of its own.
        hidden_size: of the teacher.
        dtype: of the states (`params_dtype`).
        identity: what the states depend on, as plain values.
    """

    def __init__(
        self,
        folder: Path,
        stages: Sequence[StageConfig],
        *,
        micro_batch_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        identity: dict[str, Any],
    ) -> None:
        self.folder, self.stages, self.hidden_size, self.dtype = folder, tuple(stages), hidden_size, dtype
        self.micro_batch_size = micro_batch_size
        sizes = [[s.steps, s.seq_length, s.global_batch_size] for s in self.stages]
        self.identity = {**identity, "stages": sizes, "hidden_size": hidden_size, "dtype": str(dtype)}
        self._open: dict[int, np.memmap] = {}

    @property
    def nbytes(self) -> int:
        """Size on disk when whole."""
        tokens = sum(s.steps * s.global_batch_size * s.seq_length for s in self.stages)
        return tokens * self.hidden_size * self._numpy.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether it was filled for exactly this run.

        Raises:
            ProblemsError: it was filled for another one.
        """
        file, named = self.folder / DESCRIPTION, "distill.teacher_cache"
        if self.folder.exists() and not self.folder.is_dir():
            raise ProblemsError([Problem(named, f"{self.folder} is not a folder; name another")])
        if not file.is_file():
            return False
        try:
            found = dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise ProblemsError([Problem(named, f"{file} cannot be read ({error}); delete the folder")]) from error
        wrong = sorted(k for k in self.identity.keys() | found.keys() if self.identity.get(k) != found.get(k))
        if wrong:
            words = f"{self.folder} holds another run's teacher ({', '.join(wrong)} differ); name another folder"
            raise ProblemsError([Problem(named, words)])
        for number in range(len(self.stages)):
            size = int(np.prod(self._shape(number))) * self._numpy.itemsize
            states = self._file(number)
            if not states.is_file() or states.stat().st_size < size:
                raise ProblemsError([Problem(named, f"{states} is missing or cut short; delete the folder")])
        return True

    def fill(self, teacher: nn.Module, read_tokens: ReadTokens) -> None:
        """Run the teacher over all samples; every process calls it.

        Replicas share the samples out; the first tensor-parallel rank of the last stage writes, and of context-parallel
        ranks each its own positions: what is kept is the same in every layout.
        """
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number in range(len(self.stages)):
                np.lib.format.open_memmap(self._partial(number), "w+", self._numpy, self._shape(number)).flush()
        barrier()
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        experts = parallel_state.get_expert_model_parallel_world_size() > 1
        for number, stage in enumerate(self.stages):
            count = stage.steps * stage.global_batch_size
            size = stage.micro_batch_size or self.micro_batch_size
            every = [range(a, min(a + size, count)) for a in range(0, count, size)]
            batches = every[replica::replicas]
            if experts and len(batches) * replicas < len(every):
                batches.append(range(0))  # runs the last one, for the others' tokens, and writes nothing
            states = np.load(self._partial(number), mmap_mode="r+", allow_pickle=False)
            for batch in batches:
                hidden = self._run(teacher, number, batch or every[-1], read_tokens)
                if hidden is not None and batch:
                    states[batch.start : batch.stop, self._positions(number)] = self._to_numpy(hidden.transpose(0, 1))
            states.flush()
        barrier()
        if rank() == 0:
            for number in range(len(self.stages)):
                self._partial(number).rename(self._file(number))
            write_json(self.folder / DESCRIPTION, self.identity)
        barrier()

    def read(self, step: int, first: int, count: int) -> Tensor:
        """Hidden states `[s, count, h]` of samples `first ..` (numbered over the run) of the stage of `step`.

        Under context parallelism of this rank's positions.
        """
        number = stage_at(self.stages, step).index
        if number not in self._open:
            self._open[number] = np.load(self._file(number), mmap_mode="r", allow_pickle=False)
        at = first - self._begin(number)
        found = torch.from_numpy(np.array(self._open[number][at : at + count][:, self._positions(number)]))
        states = (found.view(self.dtype) if self.dtype is torch.bfloat16 else found).transpose(0, 1).contiguous()
        return states.pin_memory() if torch.cuda.is_available() else states  # `cached_head` copies without waiting

    def _run(self, teacher: nn.Module, number: int, batch: range, read_tokens: ReadTokens) -> Tensor | None:
        """Final hidden states `[s, b, h]` on the rank that writes them."""
        stage, first = self.stages[number], self._begin(number)
        device, found = next(teacher.parameters()).device, []

        def forward_step(iterator: Iterator[range], model: nn.Module) -> tuple[Any, Callable]:
            whole = torch.stack([read_tokens(first + i, stage.seq_length) for i in next(iterator)])
            own = torch.from_numpy(self._positions(number))
            ids, positions = whole[:, own].to(device), own.to(device).expand(len(whole), -1)

            def keep(head: Head) -> tuple[Tensor, dict]:
                found.append(head.hidden.detach())
                return torch.zeros((), device=device), {}

            return teacher_head(model, ids, positions), keep

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([batch]),
                model=[teacher],
                num_microbatches=1,
                seq_length=stage.seq_length,
                micro_batch_size=len(batch),
                forward_only=True,
            )
        writes = found and parallel_state.get_tensor_model_parallel_rank() == 0
        return found[0] if writes else None

    def _positions(self, number: int) -> np.ndarray:
        """`[s]` of a sample of stage `number` that this rank has: all of them without context parallelism."""
        return own_positions(self.stages[number].seq_length, parallel_state.get_context_parallel_group()).numpy()

    @property
    def _numpy(self) -> np.dtype:
        return np.dtype(np.uint16 if self.dtype is torch.bfloat16 else np.float32)

    def _to_numpy(self, hidden: Tensor) -> np.ndarray:
        hidden = hidden.to(self.dtype).cpu().contiguous()
        return hidden.view(torch.uint16).numpy() if self.dtype is torch.bfloat16 else hidden.float().numpy()

    def _shape(self, number: int) -> tuple[int, int, int]:
        stage = self.stages[number]
        return stage.steps * stage.global_batch_size, stage.seq_length, self.hidden_size

    def _begin(self, number: int) -> int:
        """The first sample of a stage."""
        return samples_before(self.stages, sum(stage.steps for stage in self.stages[:number]))

    def _file(self, number: int) -> Path:
        return self.folder / f"stage-{number}.npy"

    def _partial(self, number: int) -> Path:
        return self.folder / f"stage-{number}.partial"
