"""Two fine-tuning steps of an extracted NeMo child on a GPU: of this package the optimizer's module alone is imported.

NeMo's own cannot build an optimizer on the public Megatron-core 0.16 (docs/engine.md).

    python tests/gpu/train_child_gpu.py CHILD OUT

Writes `OUT/result.json`; see test_child_gpu.py.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.lightning import io
from nemo.lightning.pytorch.strategies.utils import RestoreConfig

from nemo_elastic.nemo.plain.optimizer import OptimizerModule


class Record(pl.Callback):
    """Losses, and the sums of the weights that NeMo restored."""

    def __init__(self) -> None:
        self.found: dict = {"losses": []}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        sums = {n.split("module.")[-1]: float(p.double().sum()) for n, p in module.named_parameters()}
        self.found["restored"] = sums

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.found["losses"].append(float(trainer.callback_metrics["reduced_train_loss"]))


def main(child: str, out: str) -> None:
    model = io.load_context(Path(child) / "context", subpath="model")
    assert type(model) is llm.MambaModel and type(model.config) is llm.SSMConfig
    model.optim = OptimizerModule(config=OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True))
    model.optim.connect(model)
    record = Record()
    trainer = nl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=2,
        strategy=nl.MegatronStrategy(restore_config=RestoreConfig(path=child, load_artifacts=False)),
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed"),
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    batch = {"seq_length": 64, "micro_batch_size": 2, "global_batch_size": 4}
    trainer.fit(model, llm.MockDataModule(tokenizer=model.tokenizer, **batch))  # its own would be downloaded
    record.found["ours"] = sorted(name for name in sys.modules if name.split(".")[0] == "nemo_elastic")
    (Path(out) / "result.json").write_text(json.dumps(record.found))


if __name__ == "__main__":
    torch.manual_seed(1)
    main(*sys.argv[1:])
