"""What a training step leaves in the log: one record of plain values, and the scalars of it by name.

    record = {step, phase, budgets: {name: {kd, ce, hidden, tokens, budget_loss}},
              expert_load: {name: {tokens: {layer: per expert}, busiest, idle}},
              router: {name: {price, argmax_error, error, entropy: {dim:}, probabilities: {dim: rows}}},
              sizes: {name: {dim:}}, tokens: {name:}, tau, lr, seconds, cpu_seconds, flops,
              tokens_per_second, grad_norm, router_grad_norm}

`budgets` holds the step's own numbers, `tokens` what the run has seen. Pure functions: nothing is read from a trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from nemo_elastic.mcore.family.planner import Planner, StepState
from nemo_elastic.router.model import Router
from nemo_elastic.space.dims import DEPTH, DIMS
from nemo_elastic.space.subnet import Subnet

BUDGET_FIELDS = ("kd", "ce", "hidden", "tokens", "budget_loss")
ROUTER_FIELDS = ("price", "argmax_error", "error")
EXPERT_FIELDS = ("busiest", "idle")
STEP_FIELDS = {  # of a record -> scalar; NeMo logs a plain `lr` and `grad_norm` (of both together) itself
    "tau": "step/tau",
    "lr": "step/lr",
    "seconds": "step/seconds",
    "tokens_per_second": "step/tokens_per_second",
    "grad_norm": "grad_norm/model",
    "router_grad_norm": "grad_norm/router",
}
Probabilities = Mapping[str, Mapping[str, list[list[float]]]]


def step_record(
    step: int,
    state: StepState,
    stats: Mapping[str, Mapping[str, float]],
    *,
    tokens: Mapping[str, int],
    prices: Mapping[str, float],
    subnets: Mapping[str, Subnet],
    probabilities: Probabilities | None = None,
    experts: Mapping[str, Any] | None = None,
    **facts: float,
) -> dict[str, Any]:
    """The record of a step.

    Args:
        step: steps done, this one included.
        stats: per budget of the step `kd`, `ce`, `hidden`, `budget_loss` (means) and `tokens`.
        tokens: per budget, seen by the run.
        prices: per learned budget.
        subnets: what each budget ran.
        probabilities: `router_probabilities`, on the steps that show them.
        experts: per budget, `ExpertLoad.take`, on these steps.
        facts: `lr`, `seconds`, `cpu_seconds` (of this process; neither has validation or saving in it), `flops` (of
            all processes), `grad_norm`, `router_grad_norm`.
    """
    record: dict[str, Any] = {"step": step, "phase": state.phase, "budgets": {}}
    for name, row in stats.items():
        record["budgets"][name] = {key: row[key] for key in BUDGET_FIELDS}
    for name, chosen in state.chosen.items():
        row = {"price": prices[name], "argmax_error": chosen.argmax_error, "error": chosen.error}
        if probabilities and name in probabilities:
            row["entropy"] = {dim: entropy(rows) for dim, rows in probabilities[name].items()}
            row["probabilities"] = dict(probabilities[name])
        record.setdefault("router", {})[name] = row
    record["sizes"] = {name: sizes(subnet) for name, subnet in subnets.items()}
    record["tokens"] = dict(tokens)
    if experts:
        record["expert_load"] = dict(experts)
    speed = sum(s["tokens"] for s in stats.values()) / max(facts.get("seconds", 0.0), 1e-9)
    return record | {"tau": state.point.tau, "tokens_per_second": speed} | facts


@torch.no_grad()
def router_probabilities(router: Router | None, state: StepState, digits: int = 5) -> dict[str, dict[str, list]]:
    """Noise-free choice probabilities at the step's temperature, budget -> dim -> `[rows][choices]`."""
    if router is None or not state.chosen:
        return {}
    found = {}
    for name in state.chosen:
        output = router(router.budget_vector(name), tau=state.point.tau, scale=state.point.scale)
        found[name] = {
            dim: [[round(v, digits) for v in row] for row in p.tolist()] for dim, p in output.probabilities.items()
        }
    return found


def step_subnets(planner: Planner, state: StepState) -> dict[str, Subnet]:
    """What each budget runs in a step: its pinned subnet, the router's choice, or who leads its race."""
    found = {}
    for budget in planner.family.budgets:
        pinned = planner.pinned(budget.name, state.phase)
        if pinned is not None:
            found[budget.name] = pinned
        elif state.phase == "race":
            found[budget.name] = planner.race.leader(budget.name)
        elif budget.name in state.chosen:
            found[budget.name] = planner.subnet_of_choice(budget.name, state.chosen[budget.name])
    return found


def hard_subnets(planner: Planner, state: StepState) -> dict[str, Subnet]:
    """Those of the budgets that ran one hard subnet in a step: no mixture, and no race."""
    other = planner.learned if state.phase == "soft" else planner.family.raced if state.phase == "race" else ()
    return {name: subnet for name, subnet in step_subnets(planner, state).items() if name not in other}


def entropy(rows: list[list[float]]) -> float:
    """Mean over rows of -sum p log p, in nats."""
    return fmean(-sum(p * math.log(p) for p in row if p > 0) for row in rows)


def sizes(subnet: Subnet) -> dict[str, float]:
    """Size per dim, averaged over layers where each has its own; `num_layers` is the number of kept layers."""
    found: dict[str, float] = {DEPTH: float(len(subnet.layers))}
    for dim in DIMS:
        value = None if dim == DEPTH else getattr(subnet, dim)
        if value:
            found[dim] = fmean(value) if isinstance(value, tuple) else float(value)
    return found


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a record by a name with slashes: `budget/small/kd`, `router/small/entropy/hidden_size`."""
    found = {scalar: float(record[name]) for name, scalar in STEP_FIELDS.items() if name in record}
    for name, row in record.get("budgets", {}).items():
        found |= {f"budget/{name}/{key}": float(row[key]) for key in BUDGET_FIELDS if key != "tokens"}
    found |= {f"budget/{name}/tokens": float(n) for name, n in record.get("tokens", {}).items()}
    found |= {f"size/{name}/{dim}": v for name, row in record.get("sizes", {}).items() for dim, v in row.items()}
    for name, row in record.get("expert_load", {}).items():
        found |= {f"experts/{name}/{key}": float(row[key]) for key in EXPERT_FIELDS}
    for name, row in record.get("router", {}).items():
        found |= {f"router/{name}/{key}": float(row[key]) for key in ROUTER_FIELDS}
        found |= {f"router/{name}/entropy/{dim}": value for dim, value in row.get("entropy", {}).items()}
    return found


def scalar_names(budgets: Mapping[str, Subnet], learned: Mapping[str, list[str]]) -> list[str]:
    """Every name that `scalars` and validation can give, in the order of columns.

    Args:
        budgets: any subnet of each budget.
        learned: per learned budget the dims that the router chooses.
    """
    names = list(STEP_FIELDS.values())
    for name in budgets:
        names += [f"budget/{name}/{key}" for key in (*BUDGET_FIELDS, "heldout_loss")]
    names += [f"size/{name}/{dim}" for name, subnet in budgets.items() for dim in sizes(subnet)]
    with_experts = [name for name, subnet in budgets.items() if subnet.num_moe_experts]
    names += [f"experts/{name}/{key}" for name in with_experts for key in EXPERT_FIELDS]
    for name, dims in learned.items():
        names += [f"router/{name}/{key}" for key in ROUTER_FIELDS]
        names += [f"router/{name}/entropy/{dim}" for dim in dims]
    return names
