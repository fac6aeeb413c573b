"""Counting what Megatron built: a stage whose layers are not all elastic is an error, never a silently plain layer.

    elastic layers of the built stage, by kind  ==  layers of that stage in the parameter table, by kind

Megatron decides by its own names which spec becomes which layer, and how many layers a pipeline stage has. After a
renamed class or field upstream, a spec that was meant to be elastic may be left out and the stock layer built instead.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...kinds import kind_of
from ...problems import Problem, ProblemsError
from ...space.architecture import KIND_NAMES
from ...space.layout import ParamLayout
from ..kernels.kind_modules import module_of
from ..versions import TESTED, installed
from .norm import ElasticRMSNorm


def refuse_plain_layers(layers: Sequence[nn.Module], layout: ParamLayout, pp_group: Any) -> None:
    """Compare the built layers of this rank's pipeline stage with the table.

    Raises:
        ProblemsError: naming what was found and expected, and the first layer that is not elastic.
    """
    pattern = layout.architecture.hybrid_override_pattern
    stage, stages = pp_group.rank(), pp_group.size()
    size, left_over = divmod(len(pattern), stages)
    expected = range(stage * size, (stage + 1) * size)
    numbers = [layer.layer_number - 1 for layer in layers]
    here = {n: layer for n, layer in zip(numbers, layers, strict=True) if n in expected}
    plain = {n: layer for n, layer in here.items() if not _is_elastic(layer, pattern[n])}
    if numbers == list(expected) and not plain and not left_over:
        return
    wanted = Counter(pattern[n] for n in expected)
    found = Counter(pattern[n] for n in here if n not in plain)
    kinds = ", ".join(f"{found[kind]} of {wanted[kind]} {KIND_NAMES[kind]}" for kind in wanted)
    words = f"pipeline stage {stage} of {stages} was built with {found.total()} of {size} elastic layers ({kinds})"
    if plain:
        n, layer = next(iter(plain.items()))
        words += f"; layer {n} is a {type(layer).__name__} of {', '.join(type(m).__name__ for m in layer.children())}"
    elif numbers != list(expected):
        words += f"; it has layers {numbers}, not {list(expected)}"
    if left_over:
        words += f"; {left_over} of all {len(pattern)} layers are on no stage: take as many stages as divide them"
    else:
        words += f": megatron-core {installed()} does not build what the table says; install {' or '.join(TESTED)}"
    raise ProblemsError([Problem("model", words)])


def _is_elastic(layer: nn.Module, kind: str) -> bool:
    module = module_of(kind_of(kind))
    if not isinstance(layer, module.LAYER):
        return False
    norm, inner, _ = (getattr(layer, name) for name in layer.part_names)
    return isinstance(norm, ElasticRMSNorm) and isinstance(inner, module.SUBLAYER)
