"""`verify`: every child on disk against the nested subnet it was read from, on real text, each built on its own.

The nested side runs elastic modules at the run's parallel layout; the child side is the plain model that its folder
describes, without any elastic class, in one process per replica.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_elastic.checkpoint.comparison import ChildCheck, Comparison, compare_logits
from nemo_elastic.checkpoint.extract import child_architecture
from nemo_elastic.checkpoint.manifest import check_hashes
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.cost import parameters
from nemo_elastic.layout import ParamLayout
from nemo_elastic.mcore import process_groups
from nemo_elastic.mcore.build import build_elastic_model, build_plain_model, load_weights
from nemo_elastic.mcore.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.evaluate import heldout_loss, whole_logits
from nemo_elastic.nemo.checkpoints import Nested, open_nested
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.space import Subnet

logger = logging.getLogger(__name__)
LOGIT_BATCHES = 2


def verify(
    nested_folder: str | Path,
    children: Mapping[str, Path],
    run: RunConfig,
    batches: list[tuple[torch.Tensor, ...]],
    *,
    report: Callable[[str, int, int], None] | None = None,
) -> list[ChildCheck]:
    """Compare children with their nested subnets.

    Args:
        children: budget -> folder of an extracted NeMo child.
        run: parallel layout of the nested side, mode.
        batches: real (tokens, labels[, mask]).

    Raises:
        ProblemsError: damaged files, an unknown budget, a child that is missing or of another family.
    """
    nested = open_nested(nested_folder)
    check_hashes(nested.path, nested.manifest)
    report = report or (lambda what, done, total: None)
    total = 2 * len(children)
    layout_sizes = (run.train.tensor_model_parallel_size, run.train.pipeline_model_parallel_size)
    process_groups.start(*layout_sizes, seed=run.train.seed)
    ours: dict[str, tuple[list[torch.Tensor], float]] = {}
    model = elastic_from(nested, sequence_parallel=run.train.sequence_parallel)
    for done, name in enumerate(children):
        report("verify", done, total)
        subnet = nested.manifest.subnet(name)
        plan = hard_plan(model.layout, subnet, run.train.mode)
        logits = [whole_logits(model, tokens, plan) for tokens, *_ in batches[:LOGIT_BATCHES]]
        ours[name] = logits, heldout_loss(model, batches, plan)
    del model
    process_groups.start(1, 1, seed=run.train.seed)
    checks = []
    for done, (name, folder) in enumerate(children.items(), start=len(children)):
        report("verify", done, total)
        subnet = nested.manifest.subnet(name)
        child, numel = _child(folder, nested, subnet)
        logits, loss = ours[name]
        comparisons = [
            compare_logits(left, whole_logits(child, tokens))
            for left, (tokens, *_) in zip(logits, batches[:LOGIT_BATCHES], strict=True)
        ]
        larger = {n: s for n, s in nested.manifest.subnets.items() if n != name and subnet.is_nested_in(s)}
        checks.append(
            ChildCheck(
                budget=name,
                comparison=_worst(comparisons),
                loss_nested=loss,
                loss_child=heldout_loss(child, batches),
                parameters=parameters(nested.layout, subnet),
                numel=numel,
                nested_in=tuple(larger),
                dtype=torch.float32,
            )
        )
    report("verify", total, total)
    return checks


def elastic_from(nested: Nested, *, sequence_parallel: bool = False) -> Any:
    """The elastic model of this rank with a nested checkpoint's weights, fp32."""
    architecture, groups = nested.layout.architecture, nested.layout.ffn_groups
    model = build_elastic_model(
        architecture, ffn_groups=groups, sequence_parallel=sequence_parallel, params_dtype=torch.float32
    )
    load_weights(model, nested.reader, architecture, ffn_groups=groups)
    return model


def _child(folder: Path, nested: Nested, subnet: Subnet) -> tuple[torch.nn.Module, int]:
    """The plain child model from its own folder, and its parameter count."""
    if not (folder / "weights").is_dir():
        words = f"no NeMo child at {str(folder)!r}; run `nemo-elastic extract` first"
        raise ProblemsError([Problem(str(folder), words)])
    architecture = child_architecture(nested.layout.architecture, subnet)
    model = build_plain_model(architecture, params_dtype=torch.float32)
    with TorchDistReader(folder) as reader:
        load_weights(model, reader, architecture, ffn_groups=1)
    names = set(ParamLayout(architecture, ffn_groups=1).table)
    numel = sum(p.numel() for p in model.parameters())
    logger.info("%s: %d tensors, %d parameters", folder, len(names), numel)
    return model, numel


def _worst(found: list[Comparison]) -> Comparison:
    return Comparison(
        max(c.max_abs for c in found),
        max(c.relative for c in found),
        max(c.kl for c in found),
        min(c.top1_agreement for c in found),
    )
