"""Depth scores by ablation at any parallel layout: what the final logits lose when layers are left out.

    s_R = sum_{b,s} |M - M_R|^2 / sum_{b,s} |M|^2,     M = W x the logits, x the final norm's output
        = sum (x - x_R)^T G (x - x_R) / sum x^T G x,   G = W^T W

(METHOD section 3). With the Gram matrix `G` `[h, h]`, summed once over the vocabulary's shards, the score is exactly
that of the logits while no logits are ever made. `centred_mse` takes the mean row from `W` first: logits that move
together change no probability, so their error should not count. An ablation restarts at the nearest kept activation
(`importance.reuse`) and runs through the pipeline from that stage on: while a later stage works on one candidate, an
earlier one is at the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...importance.depth import DEPTH_METRICS, DepthProgress, DepthRules, rank_by, rank_greedy, rounds
from ...importance.reuse import BASE, CANDIDATE, ActivationIndex, Entry, entry_of
from ...problems import did_you_mean
from .stack_forward import Groups, StackForward

COUNTS = ("layer_forwards", "naive_forwards", "batches_done", "candidates_done")


class DepthAblation:
    """Scores of left-out layers over fixed calibration batches.

    Args:
        batches: token ids `[b, s]`, all of one shape (this data-parallel rank's own).
        metric: one of `DEPTH_METRICS`.
        memory_bytes: for kept activations, per rank; the full model's final states are kept besides.
        on_batch: called after every batch of a round, to save `state()`; `on_candidate` after every ablation.

    Attributes:
        layer_forwards: layers run so far on one micro-batch each, over all stages of this replica.
        naive_forwards: what the same scores cost without reuse.
        batches_done, candidates_done: batches of a round, and ablations, made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        rules: DepthRules,
        *,
        memory_bytes: float,
        metric: str = "centred_mse",
        groups: Groups | None = None,
        on_batch: Callable[[DepthAblation], None] | None = None,
        on_candidate: Callable[[DepthAblation], None] | None = None,
    ) -> None:
        if not batches:
            raise ValueError("rank.depth_samples must be at least one per data-parallel rank")
        if metric not in DEPTH_METRICS:
            raise ValueError(f"rank.depth_metric={metric!r} is no choice{did_you_mean(metric, DEPTH_METRICS)}")
        self.groups = groups or Groups.from_megatron()
        self.stack = StackForward(model, self.groups)
        self.batches, self.rules, self.depth = batches, rules, len(rules.pattern)
        self.index = ActivationIndex(self.stack.stage_of, int(memory_bytes // self._entry_bytes()), rules.unit)
        self.progress = DepthProgress()
        self.layer_forwards = self.naive_forwards = self.batches_done = self.candidates_done = 0
        self.on_batch, self.on_candidate = on_batch, on_candidate
        self._kept: dict[Entry, Tensor] = {}
        self._full: dict[int, Tensor] = {}  # batch -> the full model's x, last stage only
        self._sums: dict[int, Tensor | float] = {}  # on the last stage fp64 scalars of the device
        self._next_batch = 0
        self._iterates = False  # whether a candidate's activations can serve a next round
        self._gram = self._gram_of_output(centred=metric == "centred_mse") if self.stack.is_last else None

    def one_shot(self) -> DepthProgress:
        """Score every layer once against the full model."""
        self.progress = rank_by(self.score((), range(0, self.depth, self.rules.unit)), self.rules)
        return self.progress

    def greedy(self) -> DepthProgress:
        """Remove the least important layer and score the rest again, until `rules` stop it. Goes on after a stop."""
        self._iterates = True
        return rank_greedy(self.score, self.rules, self.progress)

    def score(self, removed: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """Normalized error without `removed` and without one candidate more, per candidate; the same on every rank."""
        self.index.next_round(removed)
        self._free()
        if not self._sums:
            self._sums = dict.fromkeys((*candidates, self.depth), 0.0)  # key `depth`: the denominator
        left, unit = self.depth - len(removed), self.rules.unit
        again = self._iterates and left - 2 * unit >= self.rules.min_layers
        for batch in range(self._next_batch, len(self.batches)):
            self._score_batch(batch, tuple(removed), sorted(candidates, reverse=True), keep=again)
            self.naive_forwards += len(candidates) * (left - unit) + (0 if removed else self.depth)
            self._next_batch, self.batches_done = batch + 1, self.batches_done + 1
            if self.on_batch is not None:
                self.on_batch(self)
        sums = self._reduced()
        self._sums, self._next_batch = {}, 0
        return {layer: sums[layer] / sums[self.depth] for layer in candidates}

    def state(self) -> dict[str, Any]:
        """JSON-ready: what `load_state` needs to lose no more than the batch at hand. Per rank, for one layout."""
        return {
            "removed": list(self.progress.removed),
            "scores": {str(k): v for k, v in self.progress.scores.items()},
            "sums": {str(k): float(v) for k, v in self._sums.items()},
            "next_batch": self._next_batch,
            "counts": {name: getattr(self, name) for name in COUNTS},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        scores = {int(k): v for k, v in state["scores"].items()}
        self.progress = DepthProgress(list(state["removed"]), scores)
        self._sums = {int(k): v for k, v in state["sums"].items()}
        self._next_batch = state["next_batch"]
        for name in COUNTS:
            setattr(self, name, state["counts"][name])

    def _score_batch(self, batch: int, removed: tuple[int, ...], candidates: Sequence[int], keep: bool) -> None:
        if batch not in self._full:
            full = self._run(batch, (), self.index.restart(batch, ()), self.depth, BASE)
            self._full[batch] = self.stack.final_norm(full) if self.stack.is_last else torch.empty(0)
        self._fill(batch, removed)
        if self.stack.is_last:
            self._sums[self.depth] = self._sums[self.depth] + self._energy(self._full[batch])
        for candidate in candidates:
            without = (*removed, *self.rules.layers_of(candidate))
            hidden = self._run(
                batch, without, self.index.restart(batch, without), self.depth, CANDIDATE if keep else None
            )
            if self.stack.is_last:
                self._sums[candidate] = self._sums[candidate] + self._energy(
                    self._full[batch], self.stack.final_norm(hidden)
                )
            self.candidates_done += 1
            if self.on_candidate is not None:
                self.on_candidate(self)
        self.stack.wait()

    def _fill(self, batch: int, removed: tuple[int, ...]) -> None:
        """Make the missing activations of this round's network, running only the stretches that lack some."""
        if not self.index.capacity:
            return
        stride, start, stop = self.index.stride(removed), 0, 0
        for layer in (n for n in range(1, self.depth) if n not in removed):
            if entry_of(batch, removed, layer) in self.index:
                if stop:
                    self._run(batch, removed, start, stop, BASE, stride)
                start, stop = layer, 0
            elif layer % stride == 0:
                stop = layer
        if stop:
            self._run(batch, removed, start, stop, BASE, stride)

    def _run(
        self, batch: int, removed: Sequence[int], start: int, stop: int, keep: str | None, stride: int = 1
    ) -> Tensor | None:
        """From the activation that enters `start` to the one that enters `stop`; on the stage that holds it."""
        stage_of, here = self.stack.stage_of, self.stack.stage
        at = stage_of[start]
        hidden = self._entering(batch, removed, start) if at == here else None
        for number in range(start, min(stop + 1, self.depth)):
            if stage_of[number] != at:
                hidden, at = self._hand_over(hidden, at, batch), stage_of[number]
            if number in removed:
                continue
            if number > start and keep is not None:
                self._offer(entry_of(batch, removed, number), hidden, keep, stride)
            if number == stop:
                break
            self.layer_forwards += 1
            if at == here:
                hidden = self.stack.layer(number, hidden)
        return hidden

    def _entering(self, batch: int, removed: Sequence[int], layer: int) -> Tensor:
        return self._kept[entry_of(batch, removed, layer)] if layer else self.stack.embed(self.batches[batch])

    def _hand_over(self, hidden: Tensor | None, stage: int, batch: int) -> Tensor | None:
        if self.stack.stage == stage:
            self.stack.send(hidden)
        elif self.stack.stage == stage + 1:
            return self.stack.receive(self.batches[batch])
        return None

    def _offer(self, entry: Entry, hidden: Tensor | None, kind: str, stride: int) -> None:
        if self.index.wants(entry, kind, stride) and self.stack.stage_of[entry.layer] == self.stack.stage:
            self._kept[entry] = hidden
        self._free()

    def _free(self) -> None:
        for entry in self.index.take_evicted():
            self._kept.pop(entry, None)

    def _energy(self, x: Tensor, minus: Tensor | None = None) -> Tensor:
        """`sum d^T G d` of `d = x - minus`, `[s, b, h]`, in the precision of `G`; an fp64 scalar."""
        d = x.to(self._gram.dtype).flatten(0, -2)
        d = d if minus is None else d - minus.to(self._gram.dtype).flatten(0, -2)
        return ((d @ self._gram) * d).sum(dtype=torch.float64)

    def _gram_of_output(self, centred: bool) -> Tensor:
        weight = self.stack.output_weight().detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        if centred:
            total = torch.cat([weight.sum(0), weight.new_tensor([len(weight)])])  # ranks may differ by padding
            dist.all_reduce(total, group=self.groups.tp)
            weight = weight - total[:-1] / total[-1]
        gram = weight.t() @ weight
        dist.all_reduce(gram, group=self.groups.tp)
        return gram

    def _reduced(self) -> dict[int, float]:
        """Sums over the sequence's parts, data-parallel ranks; then from the last stage to all."""
        device = self.batches[0].device
        keys = list(self._sums)
        sums = [torch.as_tensor(self._sums[key], dtype=torch.float64) for key in keys]
        values = torch.stack([s.to(device) for s in sums])
        if self.stack.sequence_is_split:
            dist.all_reduce(values, group=self.groups.tp)
        dist.all_reduce(values, group=self.groups.dp)
        for group in (self.groups.tp, self.groups.ep):
            dist.broadcast(values, dist.get_global_rank(group, 0), group=group)
        dist.broadcast(values, dist.get_global_rank(self.groups.pp, self.stack.stages - 1), group=self.groups.pp)
        return dict(zip(keys, values.tolist(), strict=True))

    def _entry_bytes(self) -> int:
        tokens = self.batches[0].numel() // (self.groups.tp.size() if self.stack.sequence_is_split else 1)
        config = self.stack.config
        wide = torch.float32 if config.fp32_residual_connection else config.params_dtype
        return tokens * config.hidden_size * wide.itemsize


def total_candidates(rules: DepthRules, method: str, batches: int) -> int:
    """Ablations that a ranking will make, for a progress bar."""
    per_round = rounds(rules) if method == "greedy" else [len(rules.pattern) // rules.unit]
    return batches * sum(per_round)
