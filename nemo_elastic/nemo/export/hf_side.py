"""Children in Hugging Face format, run by transformers in the Python that has it, as a process of its own.

NeMo's pins exclude the transformers that knows NemotronH, so the reference usually lives in a venv of its own
(`make setup-hf`). Tokens and logits travel as files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_elastic.checkpoint import hf_reference
from nemo_elastic.config.parent_files import read_json
from nemo_elastic.config.parent_hf import family_of_hf
from nemo_elastic.huggingface import Adapter
from nemo_elastic.nemo.export.other_python import python_that, run_script
from nemo_elastic.problems import Problem, ProblemsError

KEY = "--hf-python"
FINAL_NORM = "decoder.final_norm.weight"
KNOWS = (
    "from importlib.util import find_spec as f; from importlib.metadata import version as v; "
    "exit(not (f(t := 'transformers') and f(t + '.models.{}') and int(v(t).split('.')[0]) >= {}))"
)


@dataclass(frozen=True)
class HfSide:
    """What transformers says of a folder: logits `[b, s, v]` per batch, or normed hidden states `[s, k]` per layer."""

    logits: list[Tensor]
    hidden: list[Tensor]
    parameters: int


def hf_python(given: str | None, adapter: Adapter) -> str:
    """The Python to ask, whose transformers knows the family: `given`, or this one.

    Raises:
        ProblemsError: it is no program, or no such Python.
    """
    remedy = (
        f"it must be one whose transformers (5) knows {adapter.words}; `make setup-hf` makes one, .venv-hf/bin/python"
    )
    return python_that(
        KEY, given, KNOWS.format(adapter.model_type, adapter.transformers), lacks="'s is older", remedy=remedy
    )


def run_transformers(
    python: str, folders: Sequence[Path], batches: Sequence[Tensor], *, trace: bool = False
) -> list[HfSide]:
    """Logits of every folder for every batch of tokens `[b, s]`.

    Args:
        trace: give the hidden states of the first row of the first batch instead.

    Raises:
        ProblemsError: that Python lacks transformers, or it could not load a folder whole.
    """
    tokens = [batch.tolist() for batch in batches]
    described, tensors = _ask(python, folders, {"tokens": tokens, "trace": trace})
    sides = []
    for number, said in enumerate(described["folders"]):
        logits = [tensors[f"logits.{number}.{n}"] for n in range(len(batches))] if not trace else []
        layers = sum(name.startswith(f"hidden.{number}.") for name in tensors)
        hidden = [tensors[f"hidden.{number}.{n}"] for n in range(layers)]
        sides.append(HfSide(logits, hidden, said["parameters"]))
    return sides


@dataclass(frozen=True)
class HfLoss:
    """Mean cross entropy of a folder in nats per token, and its parameters."""

    loss: float
    parameters: int


def transformers_loss(python: str, folder: Path, batches: Sequence[tuple[Tensor, ...]]) -> HfLoss:
    """The loss of a folder over (tokens, labels[, mask]) `[b, s]`, a batch at a time.

    Raises:
        ProblemsError: as `run_transformers`.
    """
    tokens, labels = ([batch[part].tolist() for batch in batches] for part in (0, 1))
    masks = [(batch[2] if len(batch) > 2 else torch.ones(batch[1].shape)).tolist() for batch in batches]
    described, tensors = _ask(python, [folder], {"tokens": tokens, "labels": labels, "masks": masks, "trace": False})
    total = sum(tensors[f"loss.0.{n}"] for n in range(len(batches)))
    return HfLoss(float(total[0] / total[1]), described["folders"][0]["parameters"])


def _ask(python: str, folders: Sequence[Path], wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(ANSWER, OUT) of `hf_reference` for a REQUEST about `folders`.

    Raises:
        ProblemsError: that Python lacks transformers, or it could not load a folder whole.
    """
    families = [family_of_hf(read_json(folder / "config.json"), folder / "config.json") for folder in folders]
    norms = [[a.outer[FINAL_NORM].split(".")[-2], a.between] for a in families]
    with tempfile.TemporaryDirectory(prefix="nemo-elastic-hf-") as place:
        request, out, answer = (Path(place) / name for name in ("request.json", "out.safetensors", "answer.json"))
        request.write_text(json.dumps({"folders": [str(f) for f in folders], "norms": norms, **wanted}))
        what = ", ".join(str(f) for f in folders)
        run_script(KEY, python, hf_reference.__file__, [request, out, answer], hf_reference.OFFLINE, what)
        described: dict[str, Any] = json.loads(answer.read_text())
        tensors = load_file(out)
    for folder, family, said in zip(folders, families, described["folders"], strict=True):
        if said["loading"] or not said["class"].startswith(f"transformers.models.{family.model_type}."):
            words = (
                f"transformers {described['transformers']} does not load it whole: {said['class']} {said['loading']}"
            )
            raise ProblemsError([Problem(str(folder), words[:600])])
    return described, tensors
