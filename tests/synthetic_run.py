"""A run folder as a run of the tiny parent leaves it, made up in milliseconds; `python -m tests.synthetic_run OUT`.

Every number is a closed formula of step and budget, so that tests know what a report must say.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nemo_elastic.config.load import load_config
from nemo_elastic.cost.counts import BYTE_PROFILES, memory, parameters
from nemo_elastic.family import family_of
from nemo_elastic.shapes.importance_file import DESCRIPTION, TENSORS
from nemo_elastic.space.dims import KIND_OF_DIM

SUBNETS = {
    "full": {},
    "large": {"hidden_size": 112, "ffn_hidden_size": 384, "num_attention_heads": 12, "num_layers": 15},
    "small": {
        "hidden_size": 96,
        "ffn_hidden_size": (512, 384, 384, 256, 256, 128, 256),
        "mamba_num_heads": 12,
        "num_attention_heads": 8,
        "num_layers": 12,
    },
}
RANKING = (0, 1, 15, 6, 2, 3, 4, 11, 5, 7, 12, 10, 14, 8, 13, 9)
PHASES = ((60, "warmup"), (120, "soft"), (180, "hard"), (300, "frozen"))
PARENT_LOSS = 2.3456
VAL_EVERY, TOKENS_PER_STEP = 25, 2048
SOURCES = {"text/code.jsonl": 1536, "text/chat.jsonl": 512}  # held-out tokens
FLOPS_PER_STEP, PEAK_MEMORY = 1.5e12, 3.2e9
RESUMED = 150


def heldout(name: str, step: int) -> float:
    """Held-out loss of a budget after a step."""
    floor, zero_shot = {"full": (0.0, 0.0), "large": (0.055, 0.9), "small": (0.21, 3.4)}[name]
    return PARENT_LOSS + floor + (zero_shot - floor) * math.exp(-step / 55)


def sources(name: str, step: int) -> dict[str, dict[str, float]]:
    """Of `heldout`, what each source has: code below it, chat above it."""
    code, chat = SOURCES.values()
    return {
        source: {"loss": heldout(name, step) + shift, "tokens": tokens}
        for (source, tokens), shift in zip(SOURCES.items(), (-0.1, 0.1 * code / chat), strict=True)
    }


def train_record(step: int) -> dict[str, Any]:
    """One line of train.jsonl."""
    phase = next(name for end, name in PHASES if step <= end)
    shares = {"full": 1024, "large": 512, "small": 512} if step % 2 else {"large": 1024, "small": 1024}
    budgets = {
        name: {
            "kd": (heldout(name, step) - PARENT_LOSS) * (1 + 0.08 * math.sin(7 * step)) + 0.002,
            "ce": heldout(name, step) + 0.1,
            "hidden": 0.0,
            "tokens": tokens,
            "budget_loss": 0.5 * math.exp(-step / 80) if name != "full" else 0.0,
        }
        for name, tokens in shares.items()
    }
    record = {
        "step": step,
        "phase": phase,
        "budgets": budgets,
        "tau": max(0.05, 1 - step / 200),
        "lr": 1e-3,
        "seconds": 0.25,
        "flops": FLOPS_PER_STEP,
    }
    if phase in ("soft", "hard"):
        record["router"] = {
            name: {
                "price": 5 * (1 + 0.004 * (step - 60) * k),
                "argmax_error": 0.25 * k * math.exp(-(step - 60) / 40) * math.cos((step - 60) / 17),
                "error": -0.002 * k,
                **({"probabilities": probabilities(step, k)} if step % 10 == 0 else {}),
            }
            for k, name in ((1, "large"), (2, "small"))
        }
    return record


def probabilities(step: int, budget: int) -> dict[str, list[list[float]]]:
    """Choice probabilities that move from even to the k-th choice; FFN has two rows."""
    sharp = min(1.0, (step - 60) / 120)
    one = {"hidden_size": 3, "mamba_num_heads": 3, "num_layers": 5, "ffn_hidden_size": 4}
    rows = {d: [(1 - sharp) / n + sharp * (i == min(budget, n - 1)) for i in range(n)] for d, n in one.items()}
    return {dim: [row, row[::-1]] if dim == "ffn_hidden_size" else [row] for dim, row in rows.items()}


def width_score(layer: int, unit: int) -> float:
    """Importance of a unit, not sorted."""
    return 1.0 + (unit * 7 + layer) % 16


def write_run(out: Path, *, steps: int = 300, results: bool = True, importance: bool = True) -> Path:
    """Write OUT as it is after `steps` of 300 steps."""
    # The run that is pretended here: its own stages, whatever the shipped file says.
    resolved = load_config("tiny_parent.yaml", ["train.stages=[{steps: 200}, {steps: 100}]"])
    family = family_of(resolved.config, RANKING)
    subnets = {name: family.space.subnet(**sizes) for name, sizes in SUBNETS.items()}
    (out / "logs").mkdir(parents=True, exist_ok=True)
    origins = {key: "conf/tiny_parent.yaml" for key in resolved.origins}
    _write(out / "config.json", {"values": resolved.values, "origins": origins})
    seen = dict.fromkeys(SUBNETS, 0)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for step in range(steps + 1):
        if step:
            lines["train"].append(train_record(step))
            for name, budget in lines["train"][-1]["budgets"].items():
                seen[name] += budget["tokens"]
        if step % VAL_EVERY == 0:
            chosen = {
                n: (s if step > 60 or n == "full" else family.space.subnet(num_layers=14 if n == "large" else 12))
                for n, s in subnets.items()
            }
            lines["validation"].append(
                {
                    "step": step,
                    "losses": {n: heldout(n, step) for n in SUBNETS},
                    "tokens": dict(seen),
                    "subnets": {n: s.to_dict() for n, s in chosen.items()},
                    "sources": {n: sources(n, step) for n in SUBNETS},
                    "seconds": 2.0,
                    "peak_memory_bytes": PEAK_MEMORY + step,
                }
            )
    lines["saves"] = [{"step": s, "seconds": 1.5} for s in range(50, steps + 1, 50)]
    lines["sessions"] = [session(0), *([session(RESUMED)] if steps > RESUMED else [])]
    if steps == 300:
        _write(out / "zero_shot.json", zero_shot(subnets))
    for kind, records in lines.items():
        (out / "logs" / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    if importance:
        _write_importance(out, family)
    if results:
        _write(out / "results.json", make_results(family, subnets))
    return out


def session(step: int, device: str = "cpu") -> dict[str, Any]:
    """A start or a resume; the plan's FLOPs are those of 300 steps and a tenth more."""
    planned = {"steps": 300, "tokens": 300 * TOKENS_PER_STEP, "flops": 330 * FLOPS_PER_STEP}
    planned |= {"gpu_hours": 0.001, "memory_bytes": 4e9}
    return {"step": step, "processes": 2, "device": device, "time": "2026-01-01T00:00:00Z", "planned": planned}


def zero_shot(subnets: dict[str, Any]) -> dict[str, Any]:
    """What the end of a training measures; the learned shapes are not those that the first validation saw."""
    budgets = {
        name: {"subnet": s.to_dict(), "loss": heldout(name, 0) + 0.01, "sources": sources(name, 0)}
        for name, s in subnets.items()
    }
    return {"format": 1, "identity": {}, "budgets": budgets, "seconds": 4.0}


def depth_score(layer: int) -> float:
    """Importance of a layer: falls along the ranking."""
    return 3.2 * math.exp(-RANKING.index(layer) / 4.5) + 0.01


def _write_importance(out: Path, family: Any) -> None:
    from dataclasses import asdict

    description = {
        "format": 1,
        "architecture": asdict(family.architecture),
        "depth_ranking": list(RANKING),
        "depth_scores": {str(layer): depth_score(layer) for layer in range(len(RANKING))},
        "provenance": {"samples": 64, "seed": 0, "seconds": 21.5},
    }
    (out / "importance").mkdir(parents=True, exist_ok=True)
    architecture = family.architecture
    layers = {"hidden_size": range(17)} | {d: architecture.layers_of(k) for d, k in KIND_OF_DIM.items()}
    tensors = {
        f"{dim}.{layer}": np.array([width_score(layer, u) for u in range(getattr(architecture, dim))], np.float32)
        for dim, numbers in layers.items()
        for layer in numbers
    }
    save_file(tensors, out / "importance" / TENSORS)
    description["sha256"] = {TENSORS: hashlib.sha256((out / "importance" / TENSORS).read_bytes()).hexdigest()}
    _write(out / "importance" / DESCRIPTION, description)


def make_results(family: Any, subnets: dict[str, Any]) -> dict[str, Any]:
    """What `verify` writes."""
    layout, full = family.layout, parameters(family.layout, family.space.full_subnet())
    serving = {"batch_size": 1, "sequence_length": 8192, "profile": BYTE_PROFILES["bf16"]}
    targets = {"full": 1.0, "large": 0.75, "small": 0.5}
    budgets = [
        {
            "name": name,
            "target": {"kind": "fraction", "value": targets[name]},
            "subnet": subnet.to_dict(),
            "parameters": parameters(layout, subnet),
            "percent_of_parent": 100 * parameters(layout, subnet) / full,
            "memory_bytes": memory(layout, subnet, **serving).to_dict(),
            "heldout_nested": heldout(name, 300),
            "heldout_child": heldout(name, 300) + 1e-7,
            "heldout_before": heldout(name, 0),
            "verified": True,
            "max_abs_difference": 1e-7,
        }
        for name, subnet in subnets.items()
    ]
    return {
        "parent": {"parameters": full, "heldout_loss": PARENT_LOSS},
        "budgets": budgets,
        "verified": True,
        "seconds": {"rank": 21.5, "train": 187.25, "extract": 2.5, "verify": 9.75, "total": 221.0},
        "provenance": {
            "nemo_elastic": "0.1.0",
            "torch": "2.13.0",
            "seed": 1234,
            "git": "0123abc",
            "config": {"name": "run again"},
            "python": "3.11.2",
        },
    }


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
