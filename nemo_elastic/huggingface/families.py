"""The families that can be read and written, and which of them a model is.

A folder's is its `model_type`, never a name in a path. A model section that came from elsewhere is of the first family,
in the order of `ADAPTERS`, that can say all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError
from .adapter import Adapter, Model
from .bamba import BAMBA
from .granite import GRANITE
from .llama import LLAMA
from .nemotron_h import NEMOTRON_H
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .read import unsayable

ADAPTERS: tuple[Adapter, ...] = (NEMOTRON_H, LLAMA, QWEN2, QWEN3, QWEN3_MOE, BAMBA, GRANITE)


def adapter_of_type(model_type: Any, file: str | Path = "config.json") -> Adapter:
    """The family of a config.json's `model_type`.

    Raises:
        ProblemsError: none; the message lists those there are.
    """
    known = {adapter.model_type: adapter for adapter in ADAPTERS}
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    words = f"{model_type!r} must be one of {', '.join(known)}; docs/extending.md says what another family needs"
    raise ProblemsError([Problem(f"{file}: model_type", words)])


def adapter_for(model: Model) -> Adapter:
    """The family of a whole model section: the first that can say it; else the one that lacks least (`unsayable`).

    A pattern that is no sequence of whole blocks is a NemotronH, whatever else it has.
    """
    pattern = model["hybrid_override_pattern"]
    fits = [a for a in ADAPTERS if not a.pattern_problems(pattern, a.words)] or [NEMOTRON_H]
    return min(fits, key=lambda adapter: len(unsayable(adapter, model)))
