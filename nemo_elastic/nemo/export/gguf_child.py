"""A child of a nested checkpoint as what its GGUF file holds: keys and tensors, for the writer and for the proof."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_elastic.checkpoint.gguf_model import FILE_TYPES, gguf_keys, gguf_tensors
from nemo_elastic.checkpoint.gguf_tokenizer import tokenizer_keys
from nemo_elastic.checkpoint.reader import LazyTensor
from nemo_elastic.checkpoint.schemas import PlainChild
from nemo_elastic.nemo.export.nested import Nested, main_dtype
from nemo_elastic.space.subnet import Subnet


@dataclass(frozen=True)
class GgufChild:
    """What a child's GGUF file holds; the tensors are read when their turn comes."""

    keys: Mapping[str, Any]
    tensors: list[LazyTensor]


def gguf_child(
    nested: Nested, subnet: Subnet, child: PlainChild, card: Mapping[str, Any], dtype: torch.dtype | None = None
) -> GgufChild:
    """Keys and tensors of a child's GGUF file.

    Args:
        child: its own tensors, without padding.
        card: what a model card says of it (`checkpoints.child_card`).
        dtype: of the matrices; None: what most of the nested weights are stored in.

    Raises:
        ProblemsError: a tokenizer that llama.cpp would run otherwise.
    """
    architecture, kept = nested.layout.architecture, dtype or main_dtype(child.tensors)
    keys = {
        "general.name": card["name"],
        "general.description": f"a child of {card['parameters']:,} parameters, read out of a nested checkpoint",
        "general.file_type": FILE_TYPES[kept],
        "nemo_elastic.provenance": json.dumps(card["provenance"], default=str),
        **gguf_keys(nested.manifest.model, architecture, subnet, child.architecture),
        **(tokenizer_keys(nested.tokenizer, child.architecture.vocab_size) if nested.tokenizer else {}),
    }
    return GgufChild(keys, list(gguf_tensors(child.tensors, child.layout, kept)))
