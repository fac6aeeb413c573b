"""Sort the weights of a live model in place, at any parallel layout.

Dealing moves neurons between tensor-parallel and experts between expert-parallel ranks, so each parameter is gathered
whole, sorted, and cut again: one whole parameter is alive at a time. Optimizer state is not touched: sort before an
optimizer is made.
"""

from __future__ import annotations

import torch
from torch import nn

from ...importance.ranking import Orders
from ...importance.sorting import sort_tensor
from ...space.layout import ParamLayout
from ...space.slicing import shard
from ..models.build import model_parallel_ranks, named_global_parameters, of_this_rank, whole_tensors


@torch.no_grad()
def sort_model(model: nn.Module, layout: ParamLayout, orders: Orders, *, inverse: bool = False) -> None:
    """Permute every parameter of this rank; collective over tensor- and expert-parallel ranks.

    Args:
        layout: the table of the whole parent (`tp_size` 1).
    """
    local, ranks = of_this_rank(layout.architecture, layout.groups), model_parallel_ranks()
    for name, parameter in named_global_parameters(model, local):
        ((_, whole),) = whole_tensors([(name, parameter.detach())], local)
        in_order = sort_tensor(name, whole, layout, orders, inverse=inverse)
        parameter.copy_(shard(in_order, local.table[name], *ranks))
