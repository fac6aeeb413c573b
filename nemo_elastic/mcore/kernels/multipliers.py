"""The constants of a Granite, applied at run time: folded into weights they would be rounded to those' dtype.

    x = embedding_multiplier E[token];  x += residual_multiplier sublayer(norm(x));  logits = W norm(x) / logits_scaling

The first acts on the embedding's output, the second in every layer's bias-dropout-add, the third on the final norm's
output before it is rounded, so that whatever multiplies by the output weights (the fused loss, serving) needs not know.
The attention's is Megatron's own `softmax_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

ADDS = ("self_attn_bda", "mlp_bda", "mamba_bda")


def multiplier(config: Any, name: str) -> float:
    """A multiplier of a configuration; 1 where it has no such field."""
    return float(getattr(config, name, 1.0))


def scale_embedding(embedding: nn.Module, config: Any) -> None:
    """Let Megatron's embedding hand out `embedding_multiplier` times its rows."""
    factor = multiplier(config, "embedding_multiplier")
    if factor != 1.0:
        embedding.register_forward_hook(partial(_times, factor))


def scale_residuals(layers: Iterable[nn.Module], config: Any) -> None:
    """Let every layer add `residual_multiplier` times what its sub-layer gives."""
    factor = multiplier(config, "residual_multiplier")
    if factor == 1.0:
        return
    for layer in layers:
        for name in ADDS:
            add = getattr(layer, name, None)
            if add is not None and not isinstance(add, nn.Module):
                setattr(layer, name, partial(_scaled_add, add, factor))


def _times(factor: float, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * factor


def _scaled_add(add: Callable[..., Any], factor: float, training: bool, fused: bool) -> Callable[..., Tensor]:
    stock = add(training, fused)

    def run(out_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        out, bias = out_and_bias
        return stock(((out if bias is None else out + bias) * factor, None), residual, prob)

    return run
