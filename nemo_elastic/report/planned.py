"""The plan beside what became of it: parameters and serving memory per budget; tokens, FLOPs, memory and time in all.

Planned is what `plan` says of the same configuration and what the run itself expected when it started. Figures of a GPU
are compared with a GPU's only: a run on a CPU says what was planned and that nothing is compared.
"""

from dataclasses import dataclass
from typing import Any

from ..plan.of_run import plan
from ..problems import ProblemsError
from .budget_rows import BudgetRow
from .run_folder import RunFolder
from .spending import logged_flops, peak_memory

ON_CPU = "not compared: it ran on a CPU"
BYTES, COUNT, HOURS, FLOPS = "bytes", "count", "GPU-hours", "FLOPs"


@dataclass(frozen=True)
class Compared:
    """One quantity. `kind`: how it is written; `note`: why there is nothing to compare, or how it was planned."""

    what: str
    kind: str
    planned: float | None
    actual: float | None
    note: str = ""

    @property
    def percent(self) -> float | None:
        """Actual against planned."""
        return 100 * (self.actual / self.planned - 1) if self.planned and self.actual is not None else None


def planned_budgets(run: RunFolder, rows: list[BudgetRow]) -> list[tuple[str, list[Compared]]]:
    """(budget, its parameters and serving memory); empty where the configuration cannot be planned."""
    if run.config is None:
        return []
    ranking = tuple(run.importance.get("depth_ranking") or ()) or None
    try:
        budgets = {b["name"]: b for b in plan(run.config, ranking)["budgets"]}
    except ProblemsError:
        return []
    found = []
    for row in rows:
        if row.name in budgets and row.parameters is not None:
            said = budgets[row.name]
            note = "by an even shrink" if said["origin"] == "proposed" else ""
            counted = _counted(run, row.name) or row.parameters
            memory = Compared("memory to serve", BYTES, said["memory_bytes"]["total"], row.memory_bytes)
            found.append((row.name, [Compared("parameters", COUNT, said["parameters"], counted, note), memory]))
    return found


def planned_run(run: RunFolder) -> list[Compared]:
    """Steps, tokens, FLOPs, memory and time of the training; empty where its log does not say what was planned."""
    planned = run.sessions[-1].get("planned") if run.sessions else None
    if not planned:
        return []
    on_cpu = run.device == "cpu"
    seconds = sum(r["seconds"] for r in run.train if r.get("seconds"))
    hours = None if on_cpu else seconds * run.sessions[-1]["processes"] / 3600
    at = f"at {run.conditions.mfu:.0%} of {run.conditions.peak_tflops:g} TFLOP/s"
    memory = None if on_cpu else peak_memory(run)
    found = [
        Compared("steps", COUNT, planned.get("steps"), run.last_step),
        Compared("tokens of text", COUNT, planned.get("tokens"), _tokens_of_text(run)),
        Compared("FLOPs", FLOPS, planned.get("flops"), logged_flops(run), "which budgets a batch draws is chance"),
        Compared("memory of the fullest GPU", BYTES, planned.get("memory_bytes"), memory, ON_CPU if on_cpu else ""),
        Compared("GPU-hours of the steps", HOURS, planned.get("gpu_hours"), hours, ON_CPU if on_cpu else at),
    ]
    return [one for one in found if one.planned is not None]


def _tokens_of_text(run: RunFolder) -> int | None:
    """Of the steps that are done, however many budgets trained on each."""
    if run.config is None or run.last_step is None:
        return None
    left, total = run.last_step, 0
    for stage in run.config.train.stages:
        total += min(left, stage.steps) * stage.seq_length * stage.global_batch_size
        left = max(0, left - stage.steps)
    return total


def _counted(run: RunFolder, name: str) -> int | None:
    """Values of all tensors of the extracted child, as `verify` counted them."""
    entries: list[Any] = [b for b in run.results.get("budgets", ()) if isinstance(b, dict) and b.get("name") == name]
    check = entries[0].get("check") if entries else None
    return check.get("numel") if isinstance(check, dict) else None
