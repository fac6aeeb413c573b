"""Student, router and frozen teacher as one Megatron model, so that one schedule runs all of them.

    first stage .. last stage:   student at its subnet's width  |  more students  |  teacher at full width

Between pipeline stages they travel in one tensor, concatenated on the hidden axis (`[s, b, k + h]`, variable shapes):
no second schedule, no stored logits, one pipeline fill. One teacher forward serves all students of a micro-batch.
The teacher is kept outside the module tree: no gradients, no optimizer state, not in checkpoints.

`distill.teacher: self` has no second model. The whole network as it stands teaches: by the forward of its own student
where the micro-batch has it, else by one without gradients, in the teacher's lane. It learns from the text, or from a
parent that a cache keeps.
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
from .heads import Head, Heads, cached_head, student_head, teacher_head
from .router_module import RouterModule

Cached = Callable[[], Tensor]  # reads the teacher's final hidden states; called on the last stage only


class FamilyModel(ElasticMambaModel):
    """An `ElasticMambaModel` with a router (or none, when every budget is forced) and a teacher.

    Attributes:
        load: counts the tokens of experts, where somebody wants them.
        self_taught: the whole network teaches the others; `teacher` is its own, and runs only to fill a cache.
    """

    load: ExpertLoad | None = None
    self_taught: bool = False

    def attach(self, router: Router | None, teacher: torch.nn.Module | None, *, self_taught: bool = False) -> None:
        """Give the model its router and its teacher (a plain or elastic model of the same layout, frozen here)."""
        self.self_taught = self_taught
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

        `cached` reads the parent's final hidden states `[s, b, h]`: then it does not run, and has no lane.

        Else the elastic model's forward.
        """
        if not distill:
            return super().forward(input_ids, position_ids, attention_mask, *args, elastic=elastic, **kwargs)
        plans: Sequence[Plan | None] = elastic
        lanes, lane_of_teacher = ([None] * len(plans), None) if self.pre_process else self._split(plans)
        teacher = None
        if self._runs_teacher(plans, cached):
            with torch.no_grad():
                teacher = self._teacher(input_ids, position_ids, lane_of_teacher)
        students = []
        for number, (plan, lane) in enumerate(zip(plans, lanes, strict=True)):
            if lane is not None:
                self.decoder.set_input_tensor(lane)
            with nullcontext() if self.load is None else self.load.counting(budgets[number]):
                x = super().forward(input_ids, position_ids, attention_mask, elastic=plan, hidden_only=True)
            students.append(student_head(self, x, plan) if self.post_process else x)
        if self.post_process:
            return Heads(tuple(students), self._teachers(plans, students, teacher, cached))
        return torch.cat(students if teacher is None else [*students, teacher], dim=-1)

    def _runs_teacher(self, plans: Sequence[Plan | None], cached: Cached | None) -> bool:
        """Whether a forward beside the students' is needed."""
        if self.self_taught:
            return all(plan is not None for plan in plans)
        return self.teacher is not None and cached is None

    def _teacher(self, ids: Tensor, positions: Tensor | None, lane: Tensor | None) -> Head | Tensor:
        """The teacher's head on the last stage; its hidden states for the next one elsewhere."""
        model = self if self.self_taught else self.teacher
        if lane is not None:
            model.decoder.set_input_tensor(lane.detach().contiguous())
        if model is not self:
            return teacher_head(model, ids, positions)
        x = super().forward(ids, positions, None, hidden_only=True)
        return student_head(self, x, None).detached() if self.post_process else x

    def _teachers(
        self, plans: Sequence[Plan | None], students: Sequence[Head], teacher: Head | None, cached: Cached | None
    ) -> tuple[Head | None, ...]:
        """Each student's. `teacher`: what has run beside them."""
        whole = [plan is None for plan in plans]
        parent = None
        if cached is not None and (not self.self_taught or any(whole)):
            parent = cached_head(self.teacher, cached())
        if not self.self_taught:
            return (teacher if parent is None else parent,) * len(plans)
        own = students[whole.index(True)].detached() if teacher is None else teacher
        return tuple(parent if is_whole else own for is_whole in whole)

    def _split(self, plans: Sequence[Plan | None]) -> tuple[list[Tensor], Tensor | None]:
        """The students' lanes of what the stage before sent, and the teacher's, where it has one."""
        both, whole = self.decoder.input_tensor, self.config.hidden_size
        widths = [p.width if p is not None and p.mode == "sliced" else whole for p in plans]
        *students, teacher = both.split([*widths, both.shape[-1] - sum(widths)], dim=-1)
        return [lane.contiguous() for lane in students], teacher if teacher.shape[-1] else None
