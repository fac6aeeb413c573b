"""What Bamba and Granite share: a Mamba mixer in a block, whose inner size is said as a multiple of `hidden_size`.

mamba_expand x hidden_size  ==  mamba_n_heads x mamba_d_head          mamba_expand is a whole number, and checked
"""

from __future__ import annotations

from typing import Any

from ..problems import Problem
from .adapter import Field, Model, Only
from .blocks import mixers
from .said import Said
from .scan import NO_STEP_ABOVE

MAMBA = {
    "norm.weight": ("input_layernorm.weight",),
    **{
        f"mixer.{name}": (f"mamba.{name}",)
        for name in (
            "in_proj.weight",
            "conv1d.weight",
            "conv1d.bias",
            "dt_bias",
            "A_log",
            "D",
            "norm.weight",
            "out_proj.weight",
        )
    },
}
EXPAND = 2  # of the configuration classes


def _expand(said: Said) -> Any:
    value = said.config.get("mamba_expand")
    return EXPAND if value is None else value


def _auto(said: Said, model: Model) -> int | None:
    """What `mamba_d_head: auto` means."""
    hidden, heads, expand = model.get("hidden_size"), model.get("mamba_num_heads"), _expand(said)
    known = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (hidden, heads, expand))
    return expand * hidden // heads if known else None


MAMBA_SIZES = (
    Field(ours="mamba_num_heads", keys=("mamba_n_heads",), default=128),
    Field(ours="mamba_head_dim", keys=("mamba_d_head",), derived=_auto),
    Field(ours="mamba_num_groups", keys=("mamba_n_groups",), default=1),
    Field(ours="mamba_state_dim", keys=("mamba_d_state",), default=256),
)
TOGETHER = {"mamba_num_heads": "hidden_size"}  # by mamba_expand, a whole number
MAMBA_ONLY = (
    Only(keys=("mamba_d_conv",), allowed=(4,), why="as Megatron has it"),
    Only(keys=("mamba_conv_bias",), allowed=(True,), why="Megatron's convolution always has a bias"),
    Only(keys=("mamba_proj_bias",), allowed=(False,), why="parameters that no row of the table has"),
)
MAMBA_FIXED = {"mamba_chunk_size": 256, "time_step_limit": [0.0, NO_STEP_ABOVE]}


def expansion_problems(model: Model, family: str) -> list[Problem]:
    """The inner size of Mamba is said as a whole multiple of `hidden_size` (`mamba_expand`), and checked there."""
    inner, hidden = model["mamba_num_heads"] * model["mamba_head_dim"], model["hidden_size"]
    if inner % hidden == 0 or not has_mamba(model):
        return []
    heads, channels = model["mamba_num_heads"], model["mamba_head_dim"]
    words = (
        f"{heads} x mamba_head_dim {channels} = {inner} must be a multiple of hidden_size {hidden}: {family} says it "
    )
    words += "by mamba_expand, a whole number"
    return [Problem("model.mamba_num_heads", words)]


def read_expansion(said: Said, model: Model) -> None:
    """Note a `mamba_expand` that says another inner size than heads and their channels."""
    sizes = [model.get(name) for name in ("mamba_num_heads", "mamba_head_dim", "hidden_size")]
    if not all(isinstance(size, int) for size in sizes) or not has_mamba(model):
        return
    (heads, channels, hidden), expand = sizes, _expand(said)
    if not isinstance(expand, int) or isinstance(expand, bool) or expand < 1:
        said.wrong("mamba_expand", f"{repr(expand)[:40]} must be a positive integer")
    elif heads * channels != expand * hidden:
        words = f"{expand!r} x {hidden} is not the inner size of {heads} heads x {channels}; one of them is stale"
        said.wrong("mamba_expand", words)


def has_mamba(model: Model) -> bool:
    """Whether there is a layer of Mamba."""
    return bool(set(model["hybrid_override_pattern"] or "") & set(mixers(MAMBA).values()))


def without_mamba(model: Model) -> dict[str, None]:
    """Sizes that a file says and no layer has."""
    return {} if has_mamba(model) else {size.ours: None for size in MAMBA_SIZES}


def write_expansion(model: Model) -> dict[str, Any]:
    """`mamba_expand`; of a model without Mamba sizes that a reader's check lets pass."""
    if not has_mamba(model):
        return {"mamba_expand": EXPAND, "mamba_n_heads": 1, "mamba_d_head": EXPAND * model["hidden_size"]}
    return {"mamba_expand": model["mamba_num_heads"] * model["mamba_head_dim"] // model["hidden_size"]}
