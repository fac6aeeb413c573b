"""A child's folder as `verify` judges it: sizes, tensors by canonical name, how they differ from its subnet's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_elastic.checkpoint.extract import child_architecture, plain_model
from nemo_elastic.checkpoint.huggingface import HuggingFaceReader
from nemo_elastic.checkpoint.reader import TensorReader, check_against_layout
from nemo_elastic.checkpoint.schemas import PlainChild, plain_child
from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.nemo.export.checkpoints import Nested, describe_parent
from nemo_elastic.nemo.export.first_difference import (
    configuration_difference,
    tensor_difference,
)
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.space.subnet import Subnet


@dataclass(frozen=True)
class Child:
    """A child's folder, and what it should be."""

    name: str
    folder: Path
    subnet: Subnet
    expected: PlainChild
    reader: TensorReader
    model: Mapping[str, Any]
    dtype: torch.dtype


def open_child(name: str, folder: Path, nested: Nested, format: str) -> Child:
    """A child's folder, whose tensors have the names and shapes of its subnet's."""
    subnet = nested.manifest.subnet(name)
    if not (folder / ("weights" if format == "nemo" else "config.json")).exists():
        words = f"no child of format {format} here; run `nemo-elastic extract --format {format}` first"
        raise ProblemsError([Problem(str(folder), words)])
    if format == "nemo":
        child_architecture(nested.layout.architecture, subnet)  # refuses what a plain config cannot say
    expected = plain_child(nested.reader, nested.layout, subnet)
    reader = TorchDistReader(folder) if format == "nemo" else HuggingFaceReader(folder)
    model = describe_parent(str(folder)).model if format == "nemo" else reader.model
    check_against_layout(reader, expected.layout, str(folder))
    cast = {reader.dtype(t.name) for t in expected.tensors if reader.dtype(t.name) != t.dtype}
    dtype = torch.bfloat16 if cast & {torch.bfloat16, torch.float16} else torch.float32
    return Child(name, folder, subnet, expected, reader, model or {}, dtype)


def written_difference(nested: Nested, child: Child) -> str | None:
    """The first difference in what a NeMo child's files say or hold; None: there is none."""
    wanted = plain_model(nested.manifest.model, child.expected.architecture)
    pattern = nested.layout.architecture.hybrid_override_pattern
    return configuration_difference(child.model, wanted) or tensor_difference(
        child.reader, child.expected.tensors, child.subnet, pattern
    )
