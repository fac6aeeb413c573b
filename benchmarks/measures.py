"""What of a benchmark's JSON is shown in its table and figure: a path to the numbers, and one to their limit.

A measure with a limit is met when every value is on the right side of it. Its share of the limit is value / limit, or
limit / value where the limit is a least one, so that under 1 is within it in both cases. Without a limit the value
itself is shown, which is then a ratio of ours over an alternative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness import values

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A row of the table and of the figure.

    Args:
        path: of the values, as `harness.values` reads it, or a function of the result.
        limit: path of the one number that they are held against.
        least: the limit is what they must reach, not what they must not exceed.
        unit: `x` a ratio, `%` a share shown in percent, or a unit that is printed behind.
    """

    benchmark: str
    what: str
    path: str | Callable[[Result], list[float]]
    limit: str | None = None
    least: bool = False
    unit: str = "x"


@dataclass(frozen=True)
class Shown:
    """A measure of one result: its values in words, and as shares of the limit."""

    text: str
    limit_text: str
    met: bool | None
    shares: list[float]


def shown(measure: Measure, result: Result) -> Shown:
    """What a result says.

    Raises:
        KeyError: the file lacks what the measure names.
    """
    if callable(measure.path):
        found = list(measure.path(result))
    else:
        found = [value for _, value in values(result, measure.path)]
    text = span(found, measure.unit)
    if measure.limit is None:
        return Shown(text, "", None, found)
    ((_, limit),) = values(result, measure.limit)
    shares = [limit / value if measure.least else value / limit for value in found]
    words = ("at least " if measure.least else "") + written(limit, measure.unit)
    return Shown(text, words, all(share <= 1 for share in shares), shares)


def span(found: list[float], unit: str) -> str:
    """`0.02 to 0.041 (4)`: the least and the most of so many values; up to two are given each."""
    if len(found) <= 2:
        return " and ".join(dict.fromkeys(written(value, unit) for value in sorted(found)))
    return f"{written(min(found), unit)} to {written(max(found), unit)} ({len(found)})"


def written(value: float, unit: str) -> str:
    """`0.041`, `0.6 %`, `35.1 ms`."""
    if unit == "%":
        return f"{100 * value:.2g} %"
    number = f"{value:.3f}" if value < 0.1 or 0.99 < value < 1.02 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return number if unit == "x" else f"{number} {unit}"


def of_recipe(key: str) -> Callable[[Result], list[float]]:
    """Absolute errors of the default recipe's routers, worst of their seeds."""
    return lambda result: [abs(row[key]) for row in result["results"] if row["recipe"] == "default"]


def of_twins(result: Result) -> list[float]:
    """Loss of a router with a run's own settings over the best search's, worst of its seeds."""
    return [row["over_best"] for row in result["joint"] if row["objective"] == "twins" and row["priced"]]


def sorted_over_random(result: Result) -> list[float]:
    """Loss of the child by `rank`'s own scores over the mean of random orders, per dim and fraction."""
    rows = [row for by_fraction in result["widths"].values() for row in by_fraction.values()]
    return [next(iter(row["sorted"].values())) / row["random_mean"] for row in rows]


def router_over(mode: str, budget: str) -> Callable[[Result], list[float]]:
    """Held-out loss of a learned member over that of the one with a fixed shape, where both were trained."""

    def of(result: Result) -> list[float]:
        runs = {(run["kind"], run["seed"], run["mode"]): run["budgets"] for run in result["runs"]}
        return [
            budgets[budget]["loss"] / runs[kind, seed, mode][budget]["loss"]
            for (kind, seed, ours), budgets in runs.items()
            if ours == "router" and (kind, seed, mode) in runs
        ]

    return of


def over_modelopt(result: Result) -> list[float]:
    """CPU time of our loss over that of ModelOpt's, where it was installed."""
    cases = result["cases"]
    return [case["time_ratio"] / case["modelopt_time_ratio"] for case in cases if "modelopt_time_ratio" in case]


def inverse(path: str) -> Callable[[Result], list[float]]:
    """1 / values."""
    return lambda result: [1 / value for _, value in values(result, path)]


def compact_over_views(result: Result) -> list[float]:
    """Time of a decoded token of the shipped parent's children."""
    rows = [row for name, row in result["tiny"]["budgets"].items() if name != "full"]
    return [row["compact_token_ms"] / row["views_token_ms"] for row in rows]


def child_shares(result: Result) -> list[float]:
    """Tokens per second of the wide parent's children over the parent's, as shares of what FLOPs promise."""
    return [row["compact_share"] for name, row in result["wide"]["decoding"].items() if name != "full"]


MEASURES = (
    Measure("ssd", "time / transformers' torch path", "cases.*.time_ratio", "required_time_ratio"),
    Measure(
        "elastic_step", "sliced / extracted child", "budgets.*.sliced_over_extracted", "limits.sliced_over_extracted"
    ),
    Measure(
        "expert_step", "sliced / extracted child", "budgets.*.sliced_over_extracted", "limits.sliced_over_extracted"
    ),
    Measure("elastic_step", "elastic / plain, full width", "full.elastic_over_plain", "limits.elastic_over_plain"),
    Measure("elastic_step", "sliced / full model", "budgets.*.sliced_time_ratio"),
    Measure("elastic_step", "masked / full model", "budgets.*.masked_time_ratio"),
    Measure("kd_loss", "memory / plain formula", "cases.*.memory_ratio", "goals.memory_ratio"),
    Measure("kd_loss", "time / plain formula", "cases.*.time_ratio", "goals.time_ratio"),
    Measure("kd_loss", "fused memory / plain", "cases.*.fused_memory_ratio", "goals.fused_memory_ratio"),
    Measure("kd_loss", "time / ModelOpt's", over_modelopt),
    Measure(
        "ranking",
        "layer forwards, naive / one shot",
        "one_shot.layer_forwards_ratio",
        "required_layer_forwards_ratio",
        True,
    ),
    Measure(
        "ranking",
        "layer forwards, naive / greedy",
        "greedy.layer_forwards_ratio",
        "required_layer_forwards_ratio",
        True,
    ),
    Measure("ranking", "CPU time, greedy / naive", inverse("greedy.cpu_time_ratio")),
    Measure("ranking_quality", "loss, sorted / random orders", sorted_over_random),
    Measure("expert_ranking", "loss, REAP / random orders", "counts.*.reap_over_random", "limits.reap_over_others"),
    Measure("expert_ranking", "loss, REAP / frequency", "counts.*.reap_over_frequency", "limits.reap_over_others"),
    Measure("router_budgets", "error before repair", of_recipe("before"), "limits.before", unit="%"),
    Measure("router_budgets", "error after repair", of_recipe("after"), "limits.after", unit="%"),
    Measure("router_budgets", "loss, router / best search, twins", of_twins, "limits.twins"),
    *(
        Measure("router_against_uniform", f"loss, router / {mode}, {budget}", router_over(mode, budget))
        for mode in ("uniform", "greedy", "race")
        for budget in ("full", "large", "small")
    ),
    Measure("family_cost", "CPU, routed / full and children alone", "ratios.family.cpu"),
    Measure("family_cost", "CPU, fixed subnets / the same", "ratios.family_fixed.cpu"),
    Measure("family_cost", "CPU, shared teacher / the same", "ratios.family_shared.cpu"),
    Measure("family_cost", "wall clock, the three / the same", "ratios.*.wall"),
    Measure("family_cost", "FLOPs, the three / the same", "ratios.*.flops"),
    Measure("family_cost", "CPU, the three / children alone", "ratios_to_children.*.cpu"),
    Measure("family_cost", "FLOPs, the three / children alone", "ratios_to_children.*.flops"),
    *(
        Measure(
            "self_teacher",
            f"loss, {teacher} / parent-taught, {budget}",
            f"summary.shipped.{teacher}.loss_over_parent.{budget}.*",
        )
        for teacher in ("text", "cached")
        for budget in ("full", "large", "small")
    ),
    Measure("self_teacher", "CPU of a step, text / parent-taught", "summary.shipped.text.cpu_over_parent.*"),
    Measure("serving", "memory / parent", "memory_ratio_to_parent", "goals.memory_ratio_to_parent"),
    Measure("serving", "switch with its first token", "switch_ms", "goals.switch_ms", unit="ms"),
    Measure("serving", "decoding, compact / views", compact_over_views),
    Measure("serving", "child / parent, over FLOPs", child_shares, "goals.decode_share", least=True),
    Measure("extract", "time / copy", "children.*.time_ratio_to_copy", "goals.time_ratio_to_copy"),
    Measure(
        "extract",
        "memory above the import",
        "peak_rss_above_baseline_mb",
        "goals.peak_rss_above_baseline_mb",
        unit="MB",
    ),
    Measure("startup", "plan, seconds", "plan_s", "limits.plan_s", unit="s"),
    Measure("startup", "CPU, plan / import torch", "ratios.plan.cpu_to_import_torch"),
    Measure("startup", "CPU to first step / plain NeMo", "first_step.train_to_plain_cpu_ratio"),
)
