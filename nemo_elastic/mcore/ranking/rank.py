"""Rank a parent: width scores, then depth, on this rank's part of the calibration samples; resumable after any batch.

Every rank ends with the same `Importance`. Samples are dealt so that their set, and so every score, is the same for
every number of data-parallel ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...config.sections import RankConfig
from ...importance.depth import DepthProgress, DepthRules, rank_by, rank_randomly
from ...importance.run_state import RunState
from ...importance.store import Importance
from ...problems import Problem, ProblemsError
from ...space.layout import ParamLayout
from .collect import WidthCollector, WidthSettings
from .cosine import cosine_scores
from .depth import DepthAblation, total_candidates
from .stack_forward import Groups

GIB = 1024**3
Report = Callable[[str, int, int], None]  # phase ("widths", "depth"), done, total


def rank_parent(
    model: nn.Module,
    layout: ParamLayout,
    config: RankConfig,
    sample: Callable[[int], Tensor],
    *,
    min_layers: int,
    top_channels: int | None = None,
    depth_unit: int = 1,
    folder: str | Path | None = None,
    resume: bool = False,
    source: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> Importance:
    """Scores of `model` (the plain parent on this rank) as `config` says.

    Args:
        layout: the table of the whole parent (`tp_size` 1).
        sample: token ids `[s]` of calibration sample i, the same on every rank.
        min_layers: depth at which ranking stops.
        top_channels: Mamba head channels that count for a head's score (the smallest choice of head_dim).
        depth_unit: layers that depth drops as one.
        folder: where states are kept for `resume`; None keeps none.
        source: what the scores belong to (parent's hash, data); part of the fingerprint and of the provenance.
        report: called after every batch and ablation.
    """
    started, groups, report = time.monotonic(), Groups.from_megatron(), report or (lambda phase, done, total: None)
    settings = WidthSettings(
        ffn_site=config.ffn_site,
        mamba_site=config.mamba_site,
        aggregation=config.aggregation,
        top_channels=top_channels,
    )
    rules = DepthRules(
        pattern=layout.architecture.hybrid_override_pattern,
        min_layers=min_layers,
        protected_layers=tuple(config.protected_layers),
        min_attention_layers=config.min_attention_layers,
        unit=depth_unit,
    )
    parallel = {"tp": groups.tp.size(), "pp": groups.pp.size(), "dp": groups.dp.size()}
    parallel |= {"ep": groups.ep.size()} if groups.ep.size() > 1 else {}
    provenance = {
        "config": asdict(config) | {"min_layers": min_layers, "top_channels": top_channels, "depth_unit": depth_unit},
        "source": dict(source or {}),
        "parallel": parallel,
    }
    state = RunState(folder, dist.get_rank(), provenance) if folder is not None else None
    device = next(model.parameters()).device
    width_batches = [b.to(device) for b in own_batches(sample, config.samples, config, groups, "samples")]
    depth_batches = [b.to(device) for b in own_batches(sample, config.depth_samples, config, groups, "depth_samples")]
    step, tensors, values = _latest(state) if resume and state else (0, {}, {})
    was_training = model.training
    model.eval()
    with WidthCollector(model, layout, settings, groups) as collector:
        if tensors:
            collector.load_state(tensors)
        for number, tokens in enumerate(width_batches):
            if number >= step:
                collector.observe(tokens)
                if state:
                    state.save(number + 1, collector.state(), {})
            report("widths", number + 1, len(width_batches))
    widths = collector.widths()

    def save(ranker: DepthAblation) -> None:
        if state:
            state.save(len(width_batches) + ranker.batches_done, collector.state(), ranker.state())

    progress, counts = _rank_depth(model, depth_batches, rules, config, groups, report, values, save)
    model.train(was_training)
    ranking = progress.ranking(rules)
    seconds = round(time.monotonic() - started, 3)
    return Importance(
        widths=widths,
        depth_scores=dict(sorted(progress.scores.items())),
        depth_ranking=ranking,
        provenance=provenance | {"removed": progress.removed, "seconds": seconds, **counts},
    )


def own_batches(
    sample: Callable[[int], Tensor], samples: int, config: RankConfig, groups: Groups, field: str
) -> list[Tensor]:
    """This data-parallel rank's micro-batches `[b, s]` of samples 0 .. samples - 1; the set is the same for every DP.

    `b` is the largest divisor of the rank's share that is at most `rank.micro_batch_size`.
    """
    share, rest = divmod(samples, groups.dp.size())
    if rest or not share:
        words = f"{samples} must be a multiple of the {groups.dp.size()} data-parallel ranks"
        raise ProblemsError([Problem(f"rank.{field}", words)])
    size = next(b for b in range(min(config.micro_batch_size, share), 0, -1) if share % b == 0)
    first = groups.dp.rank() * share
    return [torch.stack([sample(first + k) for k in range(at, at + size)]) for at in range(0, share, size)]


def _rank_depth(
    model: nn.Module,
    batches: Sequence[Tensor],
    rules: DepthRules,
    config: RankConfig,
    groups: Groups,
    report: Report,
    values: Mapping[str, Any],
    save: Callable[[DepthAblation], None] | None,
) -> tuple[DepthProgress, dict[str, int]]:
    """(ranking, layer forwards done and naive) by `config.depth`."""
    if config.depth == "random":
        return rank_randomly(rules, config.seed), {}
    if config.depth == "cosine":
        return rank_by(cosine_scores(model, batches, groups, rules.unit), rules), {}
    method = config.depth if rules.removable(()) else "one_shot"  # nothing may go: score the layers all the same
    total = total_candidates(rules, method, len(batches))
    ranker = DepthAblation(
        model,
        batches,
        rules,
        memory_bytes=config.activation_memory_gb * GIB,
        metric=config.depth_metric,
        groups=groups,
        on_batch=save,
        on_candidate=lambda ranker: report("depth", min(ranker.candidates_done, total), total),
    )
    if values:
        ranker.load_state(values)
    progress = ranker.one_shot() if method == "one_shot" else ranker.greedy()
    if ranker.candidates_done < total:  # fewer candidates than foreseen, where attention layers had to stay
        report("depth", total, total)
    return progress, {"layer_forwards": ranker.layer_forwards, "naive_layer_forwards": ranker.naive_forwards}


def _latest(state: RunState) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """(step, tensors, values) to go on from; nothing when no rank, or not every rank, has a state."""

    def gather(mine: list[int]) -> list[list[int]]:
        everywhere: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        return everywhere

    step = state.latest(gather)
    return (0, {}, {}) if step is None else (step, *state.load(step))
