"""The router inside a Megatron model: replicated on every rank, fp32, saved once.

Its gradient on a pipeline stage is that of the stage's layers, so it is summed over stages: Megatron does that in
`finalize_model_grads` for parameters marked `pipeline_parallel` when the config says `has_cond_embedder`. Copies on
later stages are marked `shared`, so that the gradient norm counts them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from ...router.model import Router


class RouterModule(nn.Module):
    """Wraps a `Router` for Megatron's optimizer, gradient reduction and checkpoints."""

    def __init__(self, net: Router, device: torch.device | int | str) -> None:
        super().__init__()
        self.net = net.to(device)
        for parameter in self.net.parameters():
            parameter.pipeline_parallel = True
            parameter.shared = parallel_state.get_pipeline_model_parallel_rank() > 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> RouterModule:
        """Follow the model to its device, but stay fp32 when the model becomes bf16."""
        super()._apply(fn, recurse)
        for parameter in self.net.parameters():
            parameter.data = parameter.data.float()
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Whole tensors; of the copies on tensor-parallel ranks and stages, the first is written."""
        whole = make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return {key: replace(t, replica_id=(stage, *t.replica_id[1:])) for key, t in whole.items()}
