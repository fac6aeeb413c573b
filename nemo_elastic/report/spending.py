"""What a run took: wall time by what it went into, throughput, peak memory, and the share of the GPUs' peak it reached.

    tokens/s  = sum of the steps' tokens / sum of the steps' seconds        tokens of students: a text that k budgets
                                                                            train on counts k times
    MFU       = FLOPs of the steps / (their seconds x GPUs x report.peak_tflops)
    FLOPs     = 2 per multiply-add of the matrix products, teacher and students (cost/), as every step logged them

No share is given for a CPU: report.peak_tflops is a GPU's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .run_folder import RunFolder

TOTALS = ("total", "all")
STEPS, REST = "training steps", "start and rest of training"
LEAST_REST = 0.005  # of a training, that is worth a row


@dataclass(frozen=True)
class Part:
    """Seconds of one thing; `part_of`: the row whose seconds these are among."""

    name: str
    seconds: float
    part_of: str | None = None


def parts(run: RunFolder) -> list[Part]:
    """Every known part, in the order of a run; parts of training stand behind it."""
    said = run.results.get("seconds")
    known = {str(n): s for n, s in said.items() if _number(s)} if isinstance(said, Mapping) else {}
    ranked = (run.importance.get("provenance") or {}).get("seconds")
    if "rank" not in known and _number(ranked):
        known = {"rank": ranked, **known}
    inner = training_parts(run)
    if inner and "train" not in known:
        after = {n: known.pop(n) for n in list(known) if n not in ("rank", "sort")}
        known |= {"train": sum(inner.values()), **after}
    found = []
    for name, seconds in known.items():
        found.append(Part(name, seconds))
        if name == "train":
            rest = seconds - sum(inner.values())
            if inner and rest > LEAST_REST * seconds:
                inner[REST] = rest
            found += [Part(of, s, "train") for of, s in inner.items()]
    return found


def training_parts(run: RunFolder) -> dict[str, float]:
    """Seconds of a training by what they went into, from its log."""
    logged = {
        STEPS: _sum(run.train, "seconds"),
        "validation": _sum(run.validation, "seconds"),
        "comparing candidates": _sum(run.race, "seconds"),
        "saving checkpoints": _sum(run.saves, "seconds"),
        "children before training": run.zero_shot.get("seconds"),
    }
    return {name: seconds for name, seconds in logged.items() if seconds}


def shares(run: RunFolder) -> list[tuple[str, float]]:
    """(name, percent of all) of the smallest parts that are known."""
    found = parts(run)
    split = {part.part_of for part in found}
    leaves = [part for part in found if part.name not in split and part.name not in TOTALS]
    total = sum(part.seconds for part in leaves)
    return [(part.name, 100 * part.seconds / total) for part in leaves] if total else []


def speed_series(run: RunFolder) -> list[tuple[int, float]]:
    """(step, tokens of students per second) of every logged step."""
    return [(r["step"], _tokens(r) / r["seconds"]) for r in run.train if _number(r.get("seconds")) and r["seconds"] > 0]


def throughput(run: RunFolder) -> float | None:
    """Tokens of students per second over all logged steps."""
    timed = [r for r in run.train if _number(r.get("seconds")) and r["seconds"] > 0]
    return sum(map(_tokens, timed)) / sum(r["seconds"] for r in timed) if timed else None


def peak_memory(run: RunFolder) -> float | None:
    """Bytes of the process that had most: allocated on its GPU, or resident without one."""
    return max((r["peak_memory_bytes"] for r in run.validation if _number(r.get("peak_memory_bytes"))), default=None)


def logged_flops(run: RunFolder) -> float | None:
    """FLOPs of all logged steps."""
    return _sum(run.train, "flops") or None


def utilisation(run: RunFolder) -> float | None:
    """Percent of the GPUs' peak over all logged steps; None where it ran on no GPU or nothing says."""
    series = [mfu for _, mfu in utilisation_series(run)]
    seconds = [r["seconds"] for r in run.train if _number(r.get("flops")) and r.get("seconds")]
    return sum(m * s for m, s in zip(series, seconds, strict=True)) / sum(seconds) if series else None


def utilisation_series(run: RunFolder) -> list[tuple[int, float]]:
    """(step, percent of the GPUs' peak), by the processes of the session that a step belongs to."""
    if run.device in (None, "cpu"):
        return []
    found = []
    for r in run.train:
        if _number(r.get("flops")) and r.get("seconds"):
            gpus = [s["processes"] for s in run.sessions if s["step"] < r["step"]][-1:] or [1]
            peak = gpus[0] * run.conditions.peak_tflops * 1e12
            found.append((r["step"], 100 * r["flops"] / (r["seconds"] * peak)))
    return found


def _tokens(record: Mapping[str, Any]) -> int:
    return sum(row.get("tokens", 0) for row in record.get("budgets", {}).values())


def _sum(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(r[key] for r in records if _number(r.get(key)))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
