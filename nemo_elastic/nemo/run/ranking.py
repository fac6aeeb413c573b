"""Rank the parent of a run: its weights into the plain model, its text into calibration samples, scores to disk.

Sample i is a function of (`rank.seed`, i) and of the text alone, so the scores do not depend on the parallel layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_elastic.data.of_run import check_text, text_tokenizer

from ...config.load import plain
from ...config.sections import RunConfig, TrainConfig
from ...data.blend import Source
from ...data.sources import open_windows, without_padding
from ...data.tokens import load_tokens
from ...data.windows import Windows
from ...family import Configured, parallel_problems
from ...importance.belongs import foreign_scores
from ...importance.run_state import forget_states
from ...importance.store import Importance
from ...mcore.models.build import build_plain_model, load_weights
from ...mcore.models.parents import open_parent, weights_digest
from ...mcore.ranking.rank import Report, rank_parent
from ...mcore.runtime import process_groups
from ...mcore.runtime.automatic import settled
from ...mcore.runtime.one_run import one_run
from ...problems import raise_if_any

FOLDER = "importance"


def rank_run(run: Configured, out: Path, *, resume: bool = False, report: Report | None = None) -> Importance:
    """Rank the parent of a run and save `out/importance/`; returns what was measured, the same on every rank.

    Args:
        resume: go on from the states that an interrupted call left there.
        report: called with (`widths` or `depth`, done, total).

    Raises:
        ProblemsError: a layout that cannot run, a missing parent, or samples that do not fill the ranks.
    """
    config, family = settled(run.config), run.family()
    train = config.train
    raise_if_any(parallel_problems(family.architecture, train, family.space.groups))
    process_groups.start(
        train.tensor_model_parallel_size,
        train.pipeline_model_parallel_size,
        expert_model_parallel_size=train.expert_model_parallel_size,
        seed=train.seed,
        wait_minutes=train.wait_minutes,
    )
    process_groups.on_first_rank(lambda: check_text(config, trains=False))
    reader = open_parent(config.parent, family.layout)
    sample, text = calibration(config)
    model = build_plain_model(config.model, **precision(train))
    load_weights(model, reader, family.architecture, ffn_groups=family.space.groups)
    process_groups.barrier()  # ranks read a large parent at their own pace
    dims = family.space.dims
    weights = process_groups.on_first_rank(lambda: weights_digest(reader, family.layout))
    with one_run(out):
        importance = rank_parent(
            model,
            family.layout,
            config.rank,
            sample,
            min_layers=config.rank.min_layers or dims["num_layers"].choices[-1],
            top_channels=dims["mamba_head_dim"].choices[-1],
            depth_unit=family.space.depth_unit,
            folder=out / FOLDER,
            resume=resume,
            source={"parent": config.parent.path, "weights": weights, "model": plain(config.model), **text},
            report=report,
        )
        process_groups.barrier()  # nobody needs a state any more
        if process_groups.rank() == 0:
            importance.save(out / FOLDER, family.architecture)
            forget_states(out / FOLDER)
        process_groups.barrier()
    return importance


def calibration(config: RunConfig) -> tuple[Callable[[int], Tensor], dict[str, Any]]:
    """(token ids `[s]` of calibration sample i, what the text is): windows of the training split, shuffled by seed;
    without padding.
    """
    tokenizer = text_tokenizer(config)
    length, seed, cache = config.rank.seq_length, config.rank.seed, config.data.cache_dir
    text: dict[str, Any] = {"tokenizer": tokenizer.sha256}
    if config.data.blend:
        blend, chat, size = config.data.blend, without_padding(config.data.chat), config.model["vocab_size"]
        windows: Source = open_windows(
            "train", tokenizer, length, blend=blend, chat=chat, vocab_size=size, seed=seed, cache_dir=cache
        )
        text["blend"] = plain(blend)
    else:
        stream = load_tokens("train", tokenizer, paths=config.data.paths, cache_dir=cache)
        windows = Windows(stream, length, seed=seed)
        text |= {"tokens": len(stream), "paths": list(config.data.paths) or "shipped corpus"}

    def sample(index: int) -> Tensor:
        return torch.from_numpy(windows.sample(index)[0].astype("int64"))

    return sample, text


def precision(train: TrainConfig) -> dict[str, Any]:
    """Fields of Megatron's config that `train.precision` and the layout decide."""
    half = train.precision == "bf16-mixed"
    fields: dict[str, Any] = {"sequence_parallel": train.sequence_parallel}
    return fields | ({"bf16": True, "params_dtype": torch.bfloat16} if half else {})


def stored_importance(run: Configured, out: Path) -> Importance:
    """What `rank` left in `out/importance/`, if it is of this run's parent, model and settings.

    Raises:
        ProblemsError: nothing there, damaged, or scores of something else; the same on every rank.
    """
    config, family = run.config, run.family()
    importance = Importance.load(out / FOLDER, family.architecture)

    def check() -> None:
        reader = open_parent(config.parent, family.layout)
        raise_if_any(
            foreign_scores(
                importance.provenance,
                config,
                family,
                given=run.resolved.origins,
                digest=weights_digest(reader, family.layout),
                tokenizer=text_tokenizer(config).sha256,
            )
        )

    process_groups.on_first_rank(check)
    return importance
