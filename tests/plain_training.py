"""The tiny plain hybrid model through `nl.Trainer` on tokens that are a function of the sample's index.

Run by `train_plain.py`. Writes `OUT/losses.json` (the reduced training loss of every step) and a checkpoint after the
last step.
"""

import argparse
import json
from pathlib import Path

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from nemo.collections import llm
from torch.utils.data import DataLoader, Dataset

from nemo_elastic.nemo.plain.plain_config import check_vocabulary, plain_model_config
from nemo_elastic.nemo.plain.trainer import build_optimizer, build_trainer

TINY_PARENT = {
    "hybrid_override_pattern": "M-M-M*-M-M-M*-M-",
    "hidden_size": 128,
    "ffn_hidden_size": 512,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "kv_channels": 16,
    "mamba_num_heads": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 4,
    "mamba_state_dim": 32,
    "vocab_size": 2048,
    "seq_length": 64,
}


class Vocabulary:
    """What NeMo asks of a tokenizer when it only trains on tokens."""

    vocab_size = 2000  # padded to 2048


class RandomTokens(Dataset):
    """Sample i depends on i alone; the second half of each sample repeats the first, so there is something to learn."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        half = self.seq_length // 2 + 1
        once = torch.randint(0, 64, (half,), generator=torch.Generator().manual_seed(index))
        tokens = torch.cat([once, once])[: self.seq_length + 1]
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


class RandomTokenModule(pl.LightningDataModule):
    """NeMo's sampler over `RandomTokens`: the same global batch in every layout."""

    def __init__(self, seq_length: int, micro_batch_size: int, global_batch_size: int) -> None:
        super().__init__()
        self.seq_length = seq_length
        self.data_sampler = nl.MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomTokens(self.seq_length), num_workers=0)


class Losses(pl.Callback):
    """Collects the reduced loss, which exists on the last pipeline stage only."""

    def __init__(self, out: Path) -> None:
        self.out, self.losses = out, []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if "reduced_train_loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

    def on_train_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            (self.out / "losses.json").write_text(json.dumps(self.losses))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--restore", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--precision", default="32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layout = {
        "tensor_model_parallel_size": arguments.tp,
        "pipeline_model_parallel_size": arguments.pp,
        "sequence_parallel": arguments.sp,
    }
    batch = {"micro_batch_size": 2, "global_batch_size": 8}
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = plain_model_config(TINY_PARENT, precision=arguments.precision, **layout)
    check_vocabulary(config, Vocabulary.vocab_size)
    trainer = build_trainer(
        arguments.out,
        max_steps=arguments.steps,
        checkpoint_every=arguments.steps,
        restore_from=arguments.restore,
        callbacks=[Losses(arguments.out)],
        precision=arguments.precision,
        **layout,
        **batch,
    )
    optimizer = build_optimizer(arguments.lr, precision=arguments.precision)
    model = llm.MambaModel(config, optim=optimizer, tokenizer=Vocabulary())
    trainer.fit(model, RandomTokenModule(config.seq_length, **batch), ckpt_path=arguments.resume)
