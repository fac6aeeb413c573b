"""config.json of a plain model section, by the adapter of a Hugging Face family (`config.parent_hf` reads one)."""

from collections.abc import Mapping
from typing import Any

import torch

from ..config.model_fields import whole_model
from ..config.parent_hf import adapter_of_model
from ..huggingface import NEMOTRON_H, Adapter, config_of, unsayable
from ..problems import Problem, raise_if_any
from .extract import plain_model
from .schemas import PlainChild


def hf_config(
    model: Mapping[str, Any],
    dtype: torch.dtype,
    token_ids: Mapping[str, int | None],
    adapter: Adapter | None = None,
) -> dict[str, Any]:
    """config.json of a plain model section, for old and new readers alike.

    Args:
        adapter: the family; None: that of the model.

    Raises:
        ProblemsError: the model has something that the family cannot say.
    """
    adapter = adapter or adapter_of_model(model)
    return config_of(adapter, whole_model(model), str(dtype).removeprefix("torch."), token_ids)


def check_hf(model: Mapping[str, Any], child: PlainChild) -> None:
    """Refuse a child that the family of its parent cannot say.

    Args:
        model: the parent's model section.

    Raises:
        ProblemsError: naming everything that it cannot.
    """
    adapter = adapter_of_model(model)
    found = unsayable(adapter, whole_model(plain_model(model, child.architecture)))
    if child.config and adapter is not NEMOTRON_H:
        words = f"uniform is the only one that {adapter.words} can be written in: it has one size for all layers"
        found.append(Problem("--hf-schema", words))
    raise_if_any(found)
