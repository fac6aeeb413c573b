"""Real text as a NeMo data module: what sample `i` is depends on (seed, i) alone, who reads it on NeMo.

NeMo's sampler deals sample indices to data-parallel ranks, `micro_batch_size` at a time:

    micro-batch k of rank r  =  samples  (k DP + r) b .. (k DP + r) b + b - 1,   b = micro_batch_size

so the global batch of a step is the same for every DP, TP and PP. The position is `consumed_samples`, saved
with every checkpoint and given back to the sampler: a resumed run reads on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import numpy as np
import torch
from nemo.lightning import io
from nemo.lightning.data import WrappedDataLoader
from torch.utils.data import Dataset

from nemo_elastic.config.sections import BlendSource, ChatConfig
from nemo_elastic.data.blend import Source
from nemo_elastic.data.corpus import DEFAULT_LIST
from nemo_elastic.data.tokens import load_tokens
from nemo_elastic.data.windows import Windows
from nemo_elastic.nemo.sources import open_windows
from nemo_elastic.nemo.tokenizer import ElasticTokenizer

# The sampler counts samples in a dataset of some length; windows have no end, so this is only "long enough".
_ENDLESS = 2**40


class WindowDataset(Dataset):
    """Windows as the dictionary that NeMo's GPT and SSM models read: tokens, labels, loss_mask, position_ids."""

    def __init__(self, windows: Source, length: int) -> None:
        self.windows, self.length = windows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, labels, *mask = (torch.from_numpy(np.array(a)) for a in self.windows.sample(index))
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask[0] if mask else torch.ones(len(tokens)),
            "position_ids": torch.arange(len(tokens)),
        }


class TextDataModule(pl.LightningDataModule, io.IOMixin):
    """The standard-library corpus, or a user's text, for training and validation.

    Args:
        tokenizer: its file decides the tokens.
        seq_length: tokens per sample.
        micro_batch_size: samples per forward of one data-parallel rank.
        global_batch_size: samples per step over all ranks.
        seed: of the order of training samples.
        paths: `.txt` and `.jsonl` files or folders of them; empty means the standard-library corpus.
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
        self.data_sampler = nl.MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )
        self._windows: dict[str, Source] = {}

    def windows(self, split: str) -> Source:
        """Windows of `train` (shuffled) or `heldout` (in order), tokenizing the text at first use."""
        if split not in self._windows and self.blend:
            self._windows[split] = open_windows(
                split, self.tokenizer.bpe, self.seq_length, blend=self.blend, chat=self.chat,
                vocab_size=self.vocab_size, seed=self.seed, shuffle=split == "train", cache_dir=self.cache_dir,
            )  # fmt: skip
        if split not in self._windows:
            stream = load_tokens(
                split, self.tokenizer.bpe, paths=self.paths, corpus_list=self.corpus_list, cache_dir=self.cache_dir
            )
            shuffle = split == "train"
            self._windows[split] = Windows(stream, self.seq_length, seed=self.seed, shuffle=shuffle)
        return self._windows[split]

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
        return self._loader("train", WindowDataset(self.windows("train"), _ENDLESS))

    def val_dataloader(self) -> WrappedDataLoader:
        """Micro-batches of held-out text, the same ones in the same order every time."""
        length = self.heldout_batches * self.global_batch_size
        return self._loader("validation", WindowDataset(self.windows("heldout"), length))

    def state_dict(self) -> dict[str, Any]:
        """Position and what it is a position in."""
        steps = self.trainer.global_step - self.data_sampler.init_global_step
        consumed = self.data_sampler.compute_consumed_samples(steps)
        blend = [[b.path, b.weight] for b in self.blend]
        return {"consumed_samples": consumed, "seed": self.seed, "seq_length": self.seq_length, "blend": blend}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read on after the last consumed sample.

        Raises:
            ValueError: the checkpoint was made with another `data.seed` or `data.seq_length`, where the position
                would mean other text.
        """
        blend = [[b.path, b.weight] for b in self.blend]
        if state_dict.get("blend", blend) != blend:
            raise ValueError(f"data.blend differs from the checkpoint's {state_dict['blend']}; keep it or start anew")
        for key in ("seed", "seq_length"):
            if state_dict.get(key, getattr(self, key)) != getattr(self, key):
                raise ValueError(
                    f"data.{key}={getattr(self, key)} differs from the checkpoint's {state_dict[key]}; a resumed run "
                    f"must keep it: set data.{key}={state_dict[key]} or start anew"
                )
        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1

    def _loader(self, mode: str, dataset: WindowDataset) -> WrappedDataLoader:
        return WrappedDataLoader(mode=mode, dataset=dataset, num_workers=self.num_workers)
