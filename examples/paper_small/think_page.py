"""Of think.json: the tables and the sentence that docs/serving.md quotes, and the figure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(result: Mapping[str, Any]) -> str:
    """The pairs, in Markdown."""
    kinds = list(next(iter(result["pairs"].values()))["kinds"])
    heads = ["thinks", "answers", "solved", *(kind.replace("_", " ") for kind in kinds), "decoded, MFLOPs"]
    lines = [f"| {' | '.join([*heads, 'filled, MFLOPs'])} |", "|" + "---|" * (len(heads) + 1)]
    for name, row in result["pairs"].items():
        think, answer = name.split(">")
        shares = [f"{share:.1%}" for share in (row["solved"], *row["kinds"].values())]
        costs = [f"{row[part] / 1e6:.1f}" for part in ("decoded", "filled")]
        lines.append(f"| {' | '.join([f'`{think}`', f'`{answer}`', *shares, *costs])} |")
    return "\n".join(lines)


def switch_table(result: Mapping[str, Any]) -> str:
    """What the tokens of the answer are told from, in Markdown."""
    switch = result["switch"]
    again = result["pairs"][f"{switch['think']}>{switch['answer']}"]["solved"]
    stays = result["pairs"][f"{switch['think']}>{switch['think']}"]["solved"]
    rows = {
        f"`{switch['answer']}`, cache filled anew": (0.0, 1.0, again),
        f"`{switch['answer']}`, cache of `{switch['think']}` taken over": (
            *_numbers(switch["reused"]),
            switch["reused"]["solved"],
        ),
        f"`{switch['think']}`, no switch": (*_numbers(switch["no_switch"]), stays),
    }
    lines = ["| answers | KL, nats | same likeliest token | solved |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {kl:.4f} | {top:.1%} | {s:.1%} |" for name, (kl, top, s) in rows.items())])


def sentence(result: Mapping[str, Any]) -> str:
    """What a switch takes, in CPU time."""
    times, think, answer = result["times"], result["switch"]["think"], result["switch"]["answer"]
    filling, token, less = (times[name] for name in (f"{answer}_filling_ms", f"{answer}_token_ms", f"{think}_token_ms"))
    return (
        f"Filling a cache with {times['length']} tokens takes `{answer}` {filling:.1f} ms of CPU time, as "
        f"{filling / token:.1f} decoded tokens do, at {token:.2f} ms; one of `{think}` takes {less:.2f} ms."
    )


def _numbers(row: Mapping[str, float]) -> tuple[float, float]:
    return row["kl"], row["top1"]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Solved against FLOPs: those that a reader waits for, and all of them. The result's hash goes into the file."""
    from figures import STYLE, plt  # slow to import

    colours = dict(zip(result["parameters"], ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#666666"), strict=False))
    dot = {"marker": "o", "s": 70, "lw": 2.5, "zorder": 3}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for axis, parts in zip(axes, (("decoded",), ("decoded", "filled")), strict=True):
            for name, row in result["pairs"].items():
                think, answer = name.split(">")
                x, y = sum(row[part] for part in parts) / 1e6, row["solved"]
                error = (y * (1 - y) / result["problems"]) ** 0.5
                axis.errorbar(x, 100 * y, 100 * error, color="#bbbbbb", lw=1, capsize=2)
                axis.scatter(x, 100 * y, color=colours[think], edgecolor=colours[answer], **dot)
            axis.set_xlim(0)
        for name, colour in colours.items():
            axes[0].scatter([], [], color=colour, edgecolor="none", label=f"{name} thinks", **{**dot, "lw": 0})
            axes[1].scatter([], [], color="none", edgecolor=colour, label=f"{name} answers", **dot)
        axes[0].set(xlabel="MFLOPs of decoded tokens, per problem", ylabel="problems solved, % (± 1 standard error)")
        axes[1].set(xlabel="MFLOPs in all, filling and refilling too")
        for axis in axes:
            axis.legend(loc="lower left", frameon=False)
        axes[0].set_ylim(*limits(result))
        figure.savefig(path, dpi=130, metadata={"Software": None, "Results": digest(result)})
        plt.close(figure)


def limits(result: Mapping[str, Any]) -> tuple[float, float]:
    """Of the percentages that are drawn: twelve more than they span, or a difference of chance fills the figure."""
    found = [100 * row["solved"] for row in result["pairs"].values()]
    return min(found) - 8, max(found) + 4


def digest(result: Mapping[str, Any]) -> str:
    """SHA-256 of what is drawn."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
