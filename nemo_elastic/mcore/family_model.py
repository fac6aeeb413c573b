"""Student, router and frozen teacher as one Megatron model, so that one schedule runs all of them.

    first stage .. last stage:   student at its subnet's width  |  teacher at full width

Between pipeline stages both travel in one tensor, concatenated on the hidden axis (`[s, b, k + h]`, variable shapes):
no second schedule, no stored logits, one pipeline fill. The teacher is kept outside the module tree: no gradients, no
optimizer state, not in checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..router.model import Router
from .elastic.model import ElasticMambaModel
from .elastic.plan import Plan
from .router_module import RouterModule


class FamilyModel(ElasticMambaModel):
    """An `ElasticMambaModel` with a router (or none, when every budget is forced) and a teacher."""

    def attach(self, router: Router | None, teacher: torch.nn.Module | None) -> None:
        """Give the model its router and its teacher (a plain or elastic model of the same layout, frozen here)."""
        self.router = None if router is None else RouterModule(router, next(self.decoder.parameters()).device)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        object.__setattr__(self, "teacher", teacher)

    @property
    def policy(self) -> Router | None:
        """The router itself."""
        return None if self.router is None else self.router.net

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, *args: Any,
                elastic: Plan | None = None, distill: bool = False, **kwargs: Any) -> Any:  # fmt: skip
        """With `distill`: (student logits, teacher logits) on the last stage, both `[b, s, v/tp]`.

        Else the elastic model's forward.
        """
        if not distill:
            return super().forward(input_ids, position_ids, attention_mask, *args, elastic=elastic, **kwargs)
        if not self.pre_process:
            self._split(elastic)
        with torch.no_grad():
            teacher = self.teacher(input_ids, position_ids, attention_mask)
        student = super().forward(input_ids, position_ids, attention_mask, elastic=elastic)
        if self.post_process:
            return student, teacher
        return torch.cat([student, teacher], dim=-1)

    def _split(self, elastic: Plan | None) -> None:
        both = self.decoder.input_tensor
        sliced = elastic is not None and elastic.mode == "sliced"
        width = elastic.width if sliced else self.config.hidden_size
        student, teacher = both.split([width, both.shape[-1] - width], dim=-1)
        self.decoder.set_input_tensor(student.contiguous())
        self.teacher.decoder.set_input_tensor(teacher.detach().contiguous())
