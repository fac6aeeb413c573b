"""An optimizer's state from a run that shared out experts otherwise.

Megatron has one more optimizer for experts that ranks share out, and saves states by the number of an optimizer.
Tensors are found by the names of their parameters whatever that number is; the settings beside them (groups with their
rate, decay and step) are dealt here to the optimizers that there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALIKE = ("wd_mult", "lr_mult", "is_decoupled_lr")  # what a group of parameters is found again by


def dealt(state: Mapping[Any, Any], optimizers: Sequence[Any]) -> Mapping[Any, Any]:
    """What `ChainedOptimizer.load_state_dict` takes of a loaded `state`; `state` itself where as many had saved it."""
    numbered = {key: value for key, value in state.items() if isinstance(key, int)}
    rest = {key: value for key, value in state.items() if not isinstance(key, int)}
    if len(optimizers) == 1:
        return _joined(numbered[0], rest, optimizers[0]) if numbered else state
    if not {"optimizer", "param_groups"} & rest.keys():
        return state
    return {i: _joined(rest, numbered.get(i, {}), optimizer) for i, optimizer in enumerate(optimizers)}


def _joined(saved: Mapping[str, Any], own: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Settings of one that saved, tensors of `own`."""
    found = {key: value for key, value in saved.items() if key not in ("state", "param_state")} | dict(own)
    if "optimizer" in saved:  # the distributed one
        inner = saved["optimizer"]
        moments = dict(dict(own.get("optimizer", {})).get("state", {}))
        if moments:
            inner = {**inner, "state": {**inner.get("state", {}), **moments}}
        return found | {"optimizer": {**inner, "param_groups": _groups(inner["param_groups"], optimizer)}}
    steps = {key: value for key, value in saved.get("state", {}).items() if key == "common_step"}
    state = steps | dict(own.get("state", {}))
    return found | {"param_groups": _groups(saved["param_groups"], optimizer), "state": state}


def _groups(saved: Sequence[Mapping[str, Any]], optimizer: Any) -> list[dict[str, Any]]:
    by_settings = {_settings(group): group for group in saved}
    return [
        {
            **by_settings[_settings(group)],
            "is_expert_parallel": group["is_expert_parallel"],
            "params": list(group["params"]),
        }
        for group in optimizer.optimizer.state_dict()["param_groups"]
    ]


def _settings(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in ALIKE)
