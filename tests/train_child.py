"""One fine-tuning step of an extracted NeMo child as a plain `llm.MambaModel`; see test_child_trains.py.

    python tests/train_child.py CHILD OUT

Of this package only the CPU platform, the local spec and the trainer's settings are used: the model, its configuration
and its tokenizer are what NeMo's own `io.load_context` builds from the child's context. Writes `OUT/result.json`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo.collections import llm
from nemo.lightning import io
from plain_training import RandomTokenModule

from nemo_elastic.mcore.kernels.layer_specs import hybrid_stack_spec
from nemo_elastic.nemo.plain import cpu
from nemo_elastic.nemo.plain.plain_config import WITHOUT_GPU
from nemo_elastic.nemo.plain.trainer import build_optimizer, build_trainer


class Record(pl.Callback):
    """The loss before the step, and the first weights as NeMo restored them."""

    def __init__(self) -> None:
        self.found: dict = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        state = {n.split("module.")[-1]: p.detach() for n, p in module.named_parameters()}
        self.found["restored"] = {n: float(p.double().sum()) for n, p in state.items()}
        self.found["classes"] = sorted({f"{type(m).__module__}.{type(m).__name__}" for m in module.modules()})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.found.setdefault("losses", []).append(float(trainer.callback_metrics["reduced_train_loss"]))


def main(words: Sequence[str]) -> int:
    child, out = words
    torch.set_num_threads(1)
    cpu.install()
    model = io.load_context(Path(child) / "context", subpath="model")
    assert type(model) is llm.MambaModel and type(model.config) is llm.SSMConfig
    for name, value in WITHOUT_GPU.items():
        setattr(model.config, name, value)
    model.config.mamba_stack_spec = hybrid_stack_spec
    model.optim = build_optimizer(1e-3)
    model.optim.connect(model)
    batch = {"micro_batch_size": 2, "global_batch_size": 4}
    record = Record()
    trainer = build_trainer(Path(out), max_steps=2, restore_from=child, callbacks=[record], **batch)
    trainer.fit(model, RandomTokenModule(model.config.seq_length, **batch))
    (Path(out) / "result.json").write_text(json.dumps(record.found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
