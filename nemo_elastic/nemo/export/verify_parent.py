"""A first proof that a parent was understood: its loss here is its loss in transformers, before anything is trained.

    loss(plain Megatron model with the parent's weights) == loss(transformers' own class on the parent's folder)

on the same held-out tokens, in fp32. transformers is shown a NemotronH with `time_step_min` at 1e-30, as the kernels
that trained the parent do not clamp the step (docs/checkpoints.md); nothing else is changed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_elastic.config.parent_files import folder_of, is_hugging_face, read_json
from nemo_elastic.config.parent_hf import family_of_hf
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.family import family_of
from nemo_elastic.huggingface import Adapter
from nemo_elastic.mcore.models.build import build_plain_model, load_weights
from nemo_elastic.mcore.models.evaluate import heldout_loss
from nemo_elastic.mcore.models.parents import open_parent
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.nemo.export.hf_side import hf_python, transformers_loss
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.processes.progress import silent

TOLERANCE = 1e-4  # nats per token, fp32


@dataclass(frozen=True)
class ParentCheck:
    """Losses in nats per token over `tokens` tokens, and parameters, here and in transformers."""

    loss: float
    loss_transformers: float
    parameters: int
    parameters_transformers: int
    tokens: int

    @property
    def ok(self) -> bool:
        return abs(self.loss - self.loss_transformers) <= TOLERANCE and self.parameters == self.parameters_transformers


def verify_parent(
    run: RunConfig,
    batches: Sequence[tuple[Tensor, ...]],
    python: str | None = None,
    report: Callable[[str, int, int, str], None] | None = None,
) -> ParentCheck:
    """Compare a Hugging Face parent with itself in transformers.

    Args:
        batches: real (tokens, labels[, mask]) `[b, s]`.
        python: a Python whose transformers knows its family; None: this one, if it does.

    Raises:
        ProblemsError: no Hugging Face folder, no such Python, or a folder that transformers does not load whole.
    """
    folder = folder_of(str(run.parent.path))
    if not (folder / "config.json").is_file() or not is_hugging_face(read_json(folder / "config.json")):
        words = f"{str(folder)!r} is no Hugging Face folder, which is what transformers can be asked about"
        raise ProblemsError([Problem("--parent", words)])
    adapter = family_of_hf(read_json(folder / "config.json"), folder / "config.json")
    python = hf_python(python, adapter)
    family = family_of(run)
    reader = open_parent(run.parent, family.layout)
    process_groups.start(1, 1, seed=run.train.seed)
    report = report or silent
    report("verify", 0, 2, "here")
    model = build_plain_model(run.model, params_dtype=torch.float32)
    load_weights(model, reader, family.architecture)
    ours, parameters = heldout_loss(model, batches), sum(p.numel() for p in model.parameters())
    del model
    report("verify", 1, 2, "in transformers")
    with tempfile.TemporaryDirectory(prefix="nemo-elastic-parent-") as place:
        theirs = transformers_loss(python, _unclamped(folder, Path(place), adapter), batches)
    report("verify", 2, 2, "")
    tokens = sum(labels.numel() for _, labels, *_ in batches)
    return ParentCheck(ours, theirs.loss, parameters, theirs.parameters, tokens)


def _unclamped(folder: Path, place: Path, adapter: Adapter) -> Path:
    """The parent's weights under a config.json that clamps nothing and names no code."""
    for file in folder.glob("*.safetensors*"):
        (place / file.name).symlink_to(file.resolve())
    config = {name: value for name, value in read_json(folder / "config.json").items() if name != "auto_map"}
    (place / "config.json").write_text(json.dumps({**config, **adapter.unclamped}))
    return place
