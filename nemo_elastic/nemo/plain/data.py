"""Real text as a NeMo data module: what sample `i` is depends on (seed, i) alone, who reads it on NeMo.

`staged_data` deals sample indices to data-parallel ranks; the global batch of a step is the same for every DP, TP and
PP. The position is the step: a resumed run reads on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from nemo.lightning import io
from nemo.lightning.data import WrappedDataLoader
from torch.utils.data import Dataset

from nemo_elastic.config.load import plain
from nemo_elastic.config.sections import BlendSource, ChatConfig, StageConfig
from nemo_elastic.data.blend import Sample, Source
from nemo_elastic.data.corpus import DEFAULT_LIST
from nemo_elastic.data.sources import open_windows
from nemo_elastic.distill.curriculum import history
from nemo_elastic.nemo.plain.staged_data import CurriculumSampler
from nemo_elastic.nemo.plain.tokenizer import ElasticTokenizer

# Loaders want a length; windows have no end, so this is only "long enough".
_ENDLESS = 2**40


class WindowDataset(Dataset):
    """Windows as the dictionary that NeMo's GPT and SSM models read: tokens, labels, loss_mask, position_ids."""

    def __init__(self, windows: Source, length: int) -> None:
        self.windows, self.length = windows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return as_sample(self.windows.sample(index))


class CurriculumDataset(Dataset):
    """Training windows by (sample, sequence length), as `CurriculumBatches` asks for them."""

    def __init__(self, windows: Mapping[int, Source]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, at: tuple[int, int]) -> dict[str, torch.Tensor]:
        index, seq_length = at
        return as_sample(self.windows[seq_length].sample(index))


def as_sample(arrays: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """(tokens, labels[, mask]) `[s]` as NeMo's models read them."""
    tokens, labels, *mask = (torch.from_numpy(np.array(a)) for a in arrays)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": mask[0] if mask else torch.ones(len(tokens)),
        "position_ids": torch.arange(len(tokens)),
    }


def collate(samples: Sequence[Sample]) -> tuple[torch.Tensor, ...]:
    """(tokens, labels) `[b, s]` of some samples, and the mask as a third when not every label counts."""
    masks = [s[2] if len(s) > 2 else np.ones(len(s[0]), dtype=np.float32) for s in samples]
    pair = tuple(torch.from_numpy(np.stack([s[k] for s in samples]).astype("int64")) for k in (0, 1))
    mask = torch.from_numpy(np.stack(masks))
    return pair if bool(mask.bool().all()) else (*pair, mask)


class TextDataModule(pl.LightningDataModule, io.IOMixin):
    """The standard-library corpus, or a user's text, for training and validation.

    Args:
        tokenizer: its file decides the tokens.
        seq_length: tokens per sample, of validation too.
        micro_batch_size: samples per forward of one data-parallel rank.
        global_batch_size: samples per step over all ranks.
        stages: a curriculum, `StageConfig` values as plain mappings; empty: one stage of the two sizes above.
        seed: of the order of training samples.
        paths: text files or folders of them; empty means the standard-library corpus.
        corpus_list: another list of the corpus' files than the shipped one.
        cache_dir: folder of tokenized text; None is the user's cache folder.
        num_workers: processes that read ahead.
        blend: weighted sources instead of `paths`: `data.blend` as plain values.
        chat: `data.chat` as plain values.
        vocab_size: rows of the model's embedding, that tokenized sources must fit; None: the tokenizer's.

    Raises:
        ValueError: at `setup`, when the text is missing or too short.
    """

    def __init__(
        self,
        tokenizer: ElasticTokenizer,
        seq_length: int = 256,
        micro_batch_size: int = 4,
        global_batch_size: int = 8,
        stages: Sequence[Mapping[str, Any]] = (),
        seed: int = 1234,
        paths: Sequence[str] = (),
        corpus_list: str | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        blend: Sequence[Mapping[str, Any]] = (),
        chat: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.seq_length, self.seed = tokenizer, seq_length, seed
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.paths, self.corpus_list = tuple(paths), str(corpus_list or DEFAULT_LIST)
        self.cache_dir, self.num_workers = cache_dir, num_workers
        self.blend, self.chat = tuple(BlendSource(**dict(b)) for b in blend), ChatConfig(**dict(chat or {}))
        self.vocab_size = vocab_size or tokenizer.vocab_size
        only = StageConfig(steps=1, seq_length=seq_length, global_batch_size=global_batch_size)
        self.stages = tuple(StageConfig(**s) for s in stages) or (only,)
        self.data_sampler = CurriculumSampler(self.stages, micro_batch_size)
        self._windows: dict[tuple[str, int], Source] = {}

    def windows(self, split: str, seq_length: int | None = None) -> Source:
        """Windows of `train` (shuffled) or `heldout` (in order), tokenizing the text at first use."""
        length = seq_length or self.seq_length
        if (split, length) not in self._windows:
            self._windows[split, length] = open_windows(
                split, self.tokenizer.bpe, length, blend=self.blend, chat=self.chat, paths=self.paths,
                vocab_size=self.vocab_size, seed=self.seed, shuffle=split == "train", corpus_list=self.corpus_list,
                cache_dir=self.cache_dir,
            )  # fmt: skip
        return self._windows[split, length]

    @property
    def heldout_batches(self) -> int:
        """Whole global batches in the held-out text (at least one: a short text is then read more than once)."""
        return max(1, self.windows("heldout").per_epoch // self.global_batch_size)

    def prepare_data(self) -> None:
        """Tokenize on one process per node, so that the others find the cache."""
        for split in ("train", "heldout"):
            self.windows(split)

    def train_dataloader(self) -> WrappedDataLoader:
        """Micro-batches of training text without end, from the first sample that is not consumed yet."""
        self.data_sampler.init_global_step = self.trainer.global_step if self.trainer else 0
        lengths = {stage.seq_length for stage in self.stages}
        return self._loader("train", CurriculumDataset({n: self.windows("train", n) for n in lengths}))

    def val_dataloader(self) -> WrappedDataLoader:
        """Micro-batches of held-out text, the same ones in the same order every time."""
        length = self.heldout_batches * self.global_batch_size
        return self._loader("validation", WindowDataset(self.windows("heldout"), length))

    def state_dict(self) -> dict[str, Any]:
        """Position, and what it is a position in."""
        step = self.trainer.global_step
        consumed = self.data_sampler.compute_consumed_samples(step - self.data_sampler.init_global_step)
        position = {"step": step, "consumed_samples": consumed, "stages": plain(self.stages)}
        return {**position, "seed": self.seed, "text": self._text()}

    def _text(self) -> dict[str, Any]:
        """What samples are drawn from, by the keys of the `data` section."""
        blend = [[source.path, source.weight] for source in self.blend]
        return {"paths": list(self.paths), "blend": blend, "chat": plain(self.chat)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read on after the last consumed sample; the stages to come may differ from those of the checkpoint.

        Raises:
            ValueError: the checkpoint was made with another seed, or its steps had other sizes: the position would
                mean other text.
        """
        for key, now in self._text().items():
            before = state_dict["text"][key]
            if before != now:
                raise ValueError(f"data.{key}={now} differs from the checkpoint's {before}; keep it or start anew")
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"train.seed={self.seed} differs from the checkpoint's {state_dict['seed']}; a resumed run must keep "
                f"it: set train.seed={state_dict['seed']} or start anew"
            )
        step = state_dict["step"]
        before = history([StageConfig(**s) for s in state_dict["stages"]], step)
        if history(self.stages, step) != before:
            raise ValueError(
                f"train.stages differs from the checkpoint's in its first {step} steps, which read (steps, seq_length, "
                f"global_batch_size) {before}; keep them, change later stages only, or start anew"
            )
        self.data_sampler.init_global_step = step
        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.prev_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.if_first_step = 1

    def _loader(self, mode: str, dataset: Dataset) -> WrappedDataLoader:
        pinned = torch.cuda.is_available()  # NeMo copies batches `non_blocking`
        return WrappedDataLoader(mode=mode, dataset=dataset, num_workers=self.num_workers, pin_memory=pinned)
