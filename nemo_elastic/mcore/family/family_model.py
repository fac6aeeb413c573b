"""Student, router and frozen teacher as one Megatron model, so that one schedule runs all of them.

    first stage .. last stage:   student at its subnet's width  |  more students  |  teacher at full width

Between pipeline stages they travel in one tensor, concatenated on the hidden axis (`[s, b, k + h]`, variable shapes):
no second schedule, no stored logits, one pipeline fill. One teacher forward serves all students of a micro-batch.
The teacher is kept outside the module tree: no gradients, no optimizer state, not in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...router.model import Router
from ..elastic.model import ElasticMambaModel
from ..elastic.plan import Plan
from .expert_load import ExpertLoad, load_of
from .heads import Heads, cached_head, student_head, teacher_head
from .router_module import RouterModule

Cached = Callable[[], Tensor]  # reads the teacher's final hidden states; called on the last stage only


class FamilyModel(ElasticMambaModel):
    """An `ElasticMambaModel` with a router (or none, when every budget is forced) and a teacher.

    Attributes:
        load: counts the tokens of experts, where somebody wants them.
    """

    load: ExpertLoad | None = None

    def attach(self, router: Router | None, teacher: torch.nn.Module | None) -> None:
        """Give the model its router and its teacher (a plain or elastic model of the same layout, frozen here)."""
        self.router = None if router is None else RouterModule(router, next(self.decoder.parameters()).device)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        object.__setattr__(self, "teacher", teacher)

    def count_experts(self, budgets: Sequence[str]) -> ExpertLoad | None:
        """Count the tokens of experts by budget from now on; None where there are no experts."""
        self.load = load_of(self, budgets)
        return self.load

    def retire_teacher(self) -> None:
        """Free all but its output weights: a cache has the results."""
        teacher = self.teacher
        teacher.decoder = None
        if teacher.pre_process and not (teacher.post_process and teacher.share_embeddings_and_output_weights):
            teacher.embedding = None

    @property
    def policy(self) -> Router | None:
        """The router itself."""
        return None if self.router is None else self.router.net

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, *args: Any,
                elastic: Any = None, distill: bool = False, cached: Cached | None = None, budgets: Sequence[str] = (),
                **kwargs: Any) -> Any:  # fmt: skip
        """With `distill`: `elastic` is a sequence of plans, one per student; `Heads` on the last stage, lanes before.

        `budgets` are the students', for `load`.

        `cached` reads the teacher's final hidden states `[s, b, h]`: then it does not run, and has no lane.

        Else the elastic model's forward.
        """
        if not distill:
            return super().forward(input_ids, position_ids, attention_mask, *args, elastic=elastic, **kwargs)
        plans: Sequence[Plan | None] = elastic
        runs = self.teacher is not None and cached is None
        lanes = [None] * len(plans) if self.pre_process else self._split(plans, with_teacher=runs)
        with torch.no_grad():
            teacher = self._teacher(input_ids, position_ids, cached)
        students = []
        for number, (plan, lane) in enumerate(zip(plans, lanes, strict=True)):
            if lane is not None:
                self.decoder.set_input_tensor(lane)
            with nullcontext() if self.load is None else self.load.counting(budgets[number]):
                x = super().forward(input_ids, position_ids, attention_mask, elastic=plan, hidden_only=True)
            students.append(student_head(self, x, plan) if self.post_process else x)
        if self.post_process:
            return Heads(tuple(students), teacher)
        return torch.cat(students if teacher is None else [*students, teacher], dim=-1)

    def _teacher(self, ids: Tensor, positions: Tensor | None, cached: Cached | None) -> Any:
        if self.teacher is None:
            return None
        if cached is None:
            return teacher_head(self.teacher, ids, positions)
        return cached_head(self.teacher, cached()) if self.post_process else None

    def _split(self, plans: Sequence[Plan | None], *, with_teacher: bool) -> list[Tensor]:
        """The students' lanes of what the stage before sent; the teacher is given its own."""
        both, whole = self.decoder.input_tensor, self.config.hidden_size
        widths = [p.width if p is not None and p.mode == "sliced" else whole for p in plans]
        *students, teacher = both.split([*widths, both.shape[-1] - sum(widths)], dim=-1)
        if with_teacher:
            self.teacher.decoder.set_input_tensor(teacher.detach().contiguous())
        return [lane.contiguous() for lane in students]
