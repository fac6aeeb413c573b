"""What computes a layer kind: one module per kind (`Kind.module`), found by name, and its place in Megatron's stack.

| name in the module | what |
|---|---|
| `LAYER`, `SUBLAYER` | the elastic layer's class (an `ElasticLayer`) and that of the part behind its norm |
| `plain_layer()` | spec of the plain layer from Megatron's local linears, with our norm |
| `elastic_layer(transformer_engine=...)` | spec of the elastic layer; `True`: with Transformer Engine's linears |
| `OWN_LAYER` | true where no layer of Megatron's has its parameters: it is built in every stack (may be left out) |
| `observe(collector, number, layer)` | hook what ranks a plain layer's dims (`observing.Observer`) |
| `unit_scores(sites, architecture, settings)` | scores by site, as `observe` called them, to dim -> `[units]` |

Megatron's stack has a slot for each of ITS letters. A kind is built in the slot whose letter it names (`Kind.slot`), so
that a kind of our own needs no letter of Megatron's: it borrows one, and the slot builds, by layer number, what the
pattern says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from ...kinds import Kind, kind_of, kinds, kinds_of
from ...problems import Problem, ProblemsError
from ..versions import TESTED, StackSubmodules, installed

# Letter of Megatron's stack -> (its slot, whether it is told the layer's number within the stage or in the net).
SLOTS = {
    letter: slot
    for letter, slot in {
        "M": ("mamba_layer", "net"),
        "*": ("attention_layer", "stage"),
        "-": ("mlp_layer", "stage"),
        "E": ("moe_layer", "stage"),  # from 0.16 on
    }.items()
    if slot[0] in {field.name for field in fields(StackSubmodules)}
}


def module_of(kind: Kind) -> ModuleType:
    """The module that computes a kind."""
    return importlib.import_module(kind.module)


def megatron_pattern(pattern: str) -> str:
    """The pattern that Megatron is given: every layer by the letter of the slot that it is built in.

    Raises:
        ProblemsError: the installed line has no slot for one of them.
    """
    for kind in kinds_of(pattern):
        if kind.slot not in SLOTS:
            words = (
                f"{kind.letter!r} ({kind.words}) needs a newer megatron-core than {installed()}: install {TESTED[-1]}"
            )
            raise ProblemsError([Problem("model.hybrid_override_pattern", words)])
    return "".join(kind_of(letter).slot for letter in pattern)


def stack_submodules(layer_of: Callable[[Kind], ModuleSpec], pattern: str = "", *, others: Any = None) -> Any:
    """Megatron's table of layer specs.

    Args:
        layer_of: the spec of a kind's layer.
        pattern: with kinds in borrowed slots; without one every slot has the kind of its own letter.
        others: a table whose slots are kept where no kind of ours borrows them (Transformer Engine's own layers).
    """
    slots = {}
    for letter, (field, number) in SLOTS.items():
        owner = next(kind for kind in kinds() if kind.letter == kind.slot == letter)
        own_layer = others is None or getattr(module_of(owner), "OWN_LAYER", False)
        own = layer_of(owner) if own_layer else getattr(others, field)
        borrowed = {n: layer_of(kind_of(k)) for n, k in enumerate(pattern) if k != letter and kind_of(k).slot == letter}
        slots[field] = _chosen(own, borrowed, number) if borrowed else own
    return StackSubmodules(**slots)


def _chosen(own: ModuleSpec, borrowed: dict[int, ModuleSpec], number: str) -> ModuleSpec:
    return ModuleSpec(module=ChosenLayer, params={"own": own, "borrowed": borrowed, "number": number})


class ChosenLayer:
    """A slot that several kinds share: makes the layer that the pattern has at that place."""

    def __new__(
        cls, *, own: ModuleSpec, borrowed: dict[int, ModuleSpec], number: str, config: Any, layer_number: int,
        pg_collection: Any, **more: Any
    ) -> Any:  # fmt: skip
        """Arguments are Megatron's for a layer of the slot; `layer_number` starts at 1, in the net or in the stage.

        Later lines (0.19) number in the net everywhere and say so by `add_layer_offset=False`.
        """
        place = layer_number - 1
        if number == "stage" and more.get("add_layer_offset", True):
            place += pg_collection.pp.rank() * (config.num_layers // pg_collection.pp.size())
        spec = borrowed.get(place, own)
        return build_module(spec, config=config, layer_number=layer_number, pg_collection=pg_collection, **more)


def norm_keys(kind: Kind) -> dict[str, str]:
    """`sharded_state_dict_keys_map` of a plain layer: its norm under the name that a stock checkpoint has."""
    own, fused = (name.removesuffix("weight") for name in kind.norm)
    return {own: fused}
