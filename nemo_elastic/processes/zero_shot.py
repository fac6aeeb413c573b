"""`OUT/zero_shot.json`: what children lose before training. Read here, written at the end of a training.

{format, identity: {sorted, text, precision}, budgets: {name: {subnet, loss, sources}}, seconds}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json

FILE, FORMAT = "zero_shot.json", 1


def read_zero_shot(out: Path) -> dict[str, Any]:
    """What is there; nothing of a file that another version or a person wrote."""
    try:
        found = read_json(out / FILE)
        whole = found["format"] == FORMAT and all({"subnet", "loss"} <= set(b) for b in found["budgets"].values())
        return found if whole else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def losses_before(out: Path, subnets: Mapping[str, Any]) -> dict[str, float]:
    """What it says of these subnets (plain values); nothing of a budget that was cut otherwise."""
    budgets = read_zero_shot(out).get("budgets", {})
    return {n: budgets[n]["loss"] for n, subnet in subnets.items() if n in budgets and budgets[n]["subnet"] == subnet}
