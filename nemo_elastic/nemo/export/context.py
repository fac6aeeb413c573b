"""Writes the `context/` of a plain NeMo checkpoint: `io.json`, `model.yaml` and the tokenizer.

Everything in it is NeMo's own class (`llm.MambaModel`, `llm.SSMConfig`, NeMo's `AutoTokenizer` over local files), so a
NeMo without this package loads it; a model that `SSMConfig` cannot say has a class of ours (`plain.hybrid_config`).
Configurations are described, not built: no trainer and no model is made here.
The padded vocabulary must come out as the embedding's rows in every layout, or NeMo loads it silently wrong:

    ceil(v / (d TP)) d TP == vocab_size,   d = make_vocab_size_divisible_by
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo.lightning as nl
import torch
from fiddle.experimental import serialization
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.io.pl import TrainerContext

from nemo_elastic.checkpoint.tokenizer_files import TOKENIZER_FILE, write_tokenizer
from nemo_elastic.config.special_tokens import row_problems
from nemo_elastic.mcore.models.build import ACTIVATIONS
from nemo_elastic.nemo.plain.hybrid_config import config_class, fields_of
from nemo_elastic.problems import raise_if_any

logger = logging.getLogger(__name__)
TOKENIZER_FOLDER = "tokenizer"


def vocab_divisor(vocab_size: int, tokenizer_vocab_size: int | None) -> int:
    """`make_vocab_size_divisible_by` that pads the tokenizer's vocabulary to `vocab_size`, at TP 1 to 8 if possible.

    NeMo's tokenizer counts its tokens, whatever their ids; so does this.
    """
    tokens = tokenizer_vocab_size or vocab_size
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, more than model.vocab_size={vocab_size}; give the parent's own"
        )

    def holds(step: int) -> bool:
        return -(-tokens // step) * step == vocab_size

    candidates = [d for d in (128, 64, 32, 16, 8, 4, 2, 1) if holds(d)]
    if not candidates:  # an odd vocabulary: little is added at other TP
        return next(d for d in range(1, vocab_size + 1) if holds(d))
    return max(candidates, key=lambda d: sum(holds(d * tp) for tp in (1, 2, 4, 8)))


def write_context(
    checkpoint: Path,
    model: Mapping[str, Any],
    tokenizer: str | Path | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    end_of_text: str | None = None,
) -> None:
    """Write `checkpoint/context`.

    Args:
        model: a plain model section (`SSMConfig` fields; `vocab_size` is the embedding's rows).
        tokenizer: a tokenizer.json or tokenizer folder; without one NeMo cannot build the model by itself.
        dtype: of the weights beside it.
        end_of_text: the token that ends a text, where `tokenizer` does not say it.

    Raises:
        ProblemsError: the tokenizer has an id that the embedding has no row for.
    """
    folder = checkpoint / "context"
    folder.mkdir(parents=True)
    of_class = config_class(model)
    fields = {n: v for n, v in fields_of(model, of_class).items() if n != "vocab_size"}
    fields["num_layers"] = len(fields["hybrid_override_pattern"])
    activation = fields.get("activation_func", "squared_relu")
    fields["activation_func"] = ACTIVATIONS.get(activation, activation)
    fields["apply_rope_fusion"] = False  # a matter of speed, and asking for it needs Transformer Engine
    tokens, tokenizer_config = None, None
    if tokenizer is None:
        logger.warning("no tokenizer for %s: NeMo needs one passed beside the checkpoint", checkpoint)
    else:
        tokens = write_tokenizer(folder / TOKENIZER_FOLDER, tokenizer, end_of_text)["tokens"]
        raise_if_any(row_problems(folder / TOKENIZER_FOLDER / TOKENIZER_FILE, model["vocab_size"]))
        tokenizer_config = fdl.Config(AutoTokenizer, pretrained_model_name=TOKENIZER_FOLDER)
    is_bf16 = dtype is torch.bfloat16
    config = fdl.Config(
        of_class,
        **fields,
        is_hybrid_model=True,
        make_vocab_size_divisible_by=vocab_divisor(model["vocab_size"], tokens),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=is_bf16,
    )
    context = fdl.Config(
        TrainerContext,
        model=fdl.Config(llm.MambaModel, config=config, tokenizer=tokenizer_config),
        trainer=fdl.Config(nl.Trainer, devices=1, num_nodes=1, strategy=fdl.Config(nl.MegatronStrategy)),
        extra={},
    )
    (folder / "io.json").write_text(serialization.dump_json(context))
    for name, text in IOMixin._io_dump_yaml(None, context, attrs=["model"]).items():
        (folder / f"{name}.yaml").write_text(text)
