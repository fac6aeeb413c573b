"""Hugging Face families: how config.json and tensors of each say a model, one file a family; `ADAPTERS` in order."""

from .adapter import Adapter, Each, Stacked
from .families import ADAPTERS, adapter_for, adapter_of_type
from .nemotron_h import NEMOTRON_H
from .read import config_of, model_of, unsayable

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Each",
    "Stacked",
    "NEMOTRON_H",
    "adapter_for",
    "adapter_of_type",
    "config_of",
    "model_of",
    "unsayable",
]
