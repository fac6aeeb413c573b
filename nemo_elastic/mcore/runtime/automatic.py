"""What `auto` means on this machine: decided once, when a run starts, and written into `OUT/config.json`.

| | GPU | CPU |
|---|---|---|
| `train.precision` | `bf16-mixed`: Transformer Engine's flash attention takes no fp32 | `32` |
| `distill.chunk_tokens` | 2048: below, the output layer's products do not fill a GPU | 256 |

A run that goes on takes what it began with, wherever it goes on: `auto` must not change numbers half-way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...config.load import Resolved, plain
from ...config.sections import AUTO, RunConfig
from ...distill.losses import CHUNK_TOKENS

ON_GPU: dict[str, Any] = {"train.precision": "bf16-mixed", "distill.chunk_tokens": CHUNK_TOKENS["gpu"]}
ON_CPU: dict[str, Any] = {"train.precision": "32", "distill.chunk_tokens": CHUNK_TOKENS["cpu"]}


def settled(config: RunConfig, kept: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration without `auto`.

    Args:
        kept: plain values that a run has begun with; they win over what this machine would say.
    """
    for key, value in (ON_GPU if torch.cuda.is_available() else ON_CPU).items():
        section, name = key.split(".")
        part = getattr(config, section)
        if getattr(part, name) != AUTO:
            continue
        before = (kept or {}).get(section, {}).get(name, AUTO)
        config = replace(config, **{section: replace(part, **{name: value if before == AUTO else before})})
    return config


def settled_run(resolved: Resolved, out: Path, *, begins: bool) -> Resolved:
    """The same for a run in `out`, with origins; `begins`: whatever an earlier run left there is over."""
    kept = None if begins else _begun_with(out / "config.json")
    config, origins = settled(resolved.config, kept), dict(resolved.origins)
    machine = "on a GPU" if torch.cuda.is_available() else "without a GPU"
    for key in ON_CPU:
        section, name = key.split(".")
        if getattr(getattr(resolved.config, section), name) == AUTO:
            origins[key] = f"auto, {machine}" if kept is None else f"auto, {out / 'config.json'}"
    return Resolved(config, plain(config), origins)


def _begun_with(path: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["values"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing has begun here
