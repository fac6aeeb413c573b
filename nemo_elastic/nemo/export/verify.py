"""`verify`: every child on disk against the nested subnet it was read from, each built on its own.

    configuration(child) == configuration(subnet),   tensors(child) == tensors(subnet), bit by bit
    logits(child) == logits(subnet) on real text,    numel(child) == cost(subnet)

The nested side runs elastic modules at the run's parallel layout. The child side is the plain model that its folder
describes, without any elastic class: a NeMo child in one process per replica, a Hugging Face child in transformers, a
GGUF child in llama.cpp (`gguf_check`).

Weights are judged, not kernels: both sides have Megatron's local linears and fp32 products in fp32. Transformer
Engine's would be TF32, 3e-4 to 1e-3 from the products of a cut weight, above any tolerance that finds a wrong one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_elastic.checkpoint.comparison import NOTHING, ChildCheck, Comparison, compare_logits
from nemo_elastic.checkpoint.extract import plain_model
from nemo_elastic.checkpoint.manifest import check_hashes
from nemo_elastic.config.parent_hf import adapter_of_model
from nemo_elastic.config.sections import RunConfig
from nemo_elastic.cost.counts import parameters
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
from nemo_elastic.mcore.models.evaluate import heldout_loss, whole_logits
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.nemo.export.checkpoints import FORMATS, Nested, open_nested
from nemo_elastic.nemo.export.first_difference import (
    hidden_difference,
    nested_trace,
    plain_trace,
)
from nemo_elastic.nemo.export.gguf_check import check_children, open_gguf
from nemo_elastic.nemo.export.gguf_side import gguf_python
from nemo_elastic.nemo.export.hf_side import hf_python, run_transformers
from nemo_elastic.nemo.export.opened_child import Child, open_child, written_difference
from nemo_elastic.problems import Problem, ProblemsError

logger = logging.getLogger(__name__)
LOGIT_BATCHES = 2
# What computed the two sides, said in the output.
KERNELS = {
    "nemo": "Megatron's local linears and fp32 products on both sides",
    "hf": "Megatron's local linears and fp32 products on the nested side, transformers' on the child's",
    "gguf": "Megatron's local linears and fp32 products on the nested side, llama.cpp's on the child's",
}
Batches = Sequence[tuple[Tensor, ...]]


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, not TF32, which some images allow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@exact_products()
def verify(
    nested_folder: str | Path,
    children: Mapping[str, Path],
    run: RunConfig,
    batches: list[tuple[Tensor, ...]],
    *,
    format: str = "nemo",
    python: str | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> list[ChildCheck]:
    """Compare children with their nested subnets.

    Args:
        children: budget -> folder of an extracted child.
        run: parallel layout of the nested side, mode.
        batches: real (tokens, labels[, mask]). The losses of Hugging Face children are of the first two alone, those of
            GGUF children of the first row.
        format: `nemo`, `hf` or `gguf`, of the children.
        python: a Python whose transformers knows the family, for `hf`, or that has xllamacpp, for `gguf`; None: this
            one, if it does.

    Raises:
        ProblemsError: damaged files, an unknown budget, a child that is missing or of another family.
    """
    if format not in FORMATS:
        raise ProblemsError([Problem("--format", f"{format!r} must be one of {', '.join(FORMATS)}")])
    nested = open_nested(nested_folder)
    if format == "hf":
        python = hf_python(python, adapter_of_model(nested.manifest.model))
    else:
        python = gguf_python(python) if format == "gguf" else None
    check_hashes(nested.path, nested.manifest)
    if format == "gguf":
        files = [open_gguf(name, Path(folder), nested) for name, folder in children.items()]
    else:
        opened = [open_child(name, Path(folder), nested, format) for name, folder in children.items()]
    report, total = report or (lambda what, done, total: None), 2 * len(children)
    sizes = (run.train.tensor_model_parallel_size, run.train.pipeline_model_parallel_size)
    experts, wait = run.train.expert_model_parallel_size, run.train.wait_minutes
    process_groups.start(*sizes, expert_model_parallel_size=experts, seed=run.train.seed, wait_minutes=wait)
    # Greedy choice for llama.cpp's comparison runs prompts of every length, which sequence parallelism cannot split.
    model = elastic_from(nested, sequence_parallel=run.train.sequence_parallel and format != "gguf")
    if format == "gguf":
        return check_children(nested, files, model, run.train.mode, batches, python, report)
    ours: dict[str, tuple[list[Tensor], float]] = {}
    for done, child in enumerate(opened):
        report("verify", done, total)
        plan = hard_plan(model.layout, child.subnet, run.train.mode)
        logits = [whole_logits(model, tokens, plan) for tokens, *_ in batches[:LOGIT_BATCHES]]
        loss = heldout_loss(model, batches, plan) if format == "nemo" else _loss(logits, batches)
        ours[child.name] = logits, loss
    del model
    process_groups.start(1, 1, seed=run.train.seed)
    checks = []
    for done, child in enumerate(opened, start=len(opened)):
        report("verify", done, total)
        if python is None:
            check = _nemo_check(nested, child, *ours[child.name], batches)
        else:
            check = process_groups.on_first_rank(lambda c=child: _hf_check(nested, c, *ours[c.name], batches, python))
        checks.append(check)
    report("verify", total, total)
    return checks


def elastic_from(nested: Nested, *, sequence_parallel: bool = False) -> Any:
    """The elastic model of this rank with a nested checkpoint's weights, fp32."""
    architecture, groups = nested.layout.architecture, nested.layout.groups
    model = build_elastic_model(
        nested.manifest.model,
        ffn_groups=groups,
        local=True,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float32,
    )
    load_weights(model, nested.reader, architecture, ffn_groups=groups)
    return model


def _nemo_check(nested: Nested, child: Child, logits: list[Tensor], loss: float, batches: Batches) -> ChildCheck:
    difference = written_difference(nested, child)
    architecture = child.expected.architecture
    plain = build_plain_model(plain_model(child.model, architecture), local=True, params_dtype=torch.float32)
    numel = sum(p.numel() for p in plain.parameters())
    try:
        load_weights(plain, child.reader, architecture, ffn_groups=1)
    except ProblemsError:
        if difference is None:
            raise
        return _check(nested, child, numel, None, loss, float("nan"), difference)
    theirs = [whole_logits(plain, tokens) for tokens, *_ in batches[:LOGIT_BATCHES]]
    check = _check(nested, child, numel, (logits, theirs), loss, heldout_loss(plain, batches), difference)
    if difference is None and not check.same_logits:
        check = replace(check, difference=_hidden(nested, child, plain_trace(plain, batches[0][0]), batches))
    return check


def _hf_check(
    nested: Nested, child: Child, logits: list[Tensor], loss: float, batches: Batches, python: str
) -> ChildCheck:
    difference = written_difference(nested, child)
    tokens = [t for t, *_ in batches[:LOGIT_BATCHES]]
    (side,) = run_transformers(python, [child.folder], tokens)
    theirs = _loss(side.logits, batches)
    check = _check(nested, child, side.parameters, (logits, side.logits), loss, theirs, difference)
    if difference is None and not check.same_logits:
        (traced,) = run_transformers(python, [child.folder], tokens[:1], trace=True)
        scale = nested.manifest.model.get("logits_scaling") or 1.0  # ours is in the final norm
        check = replace(check, difference=_hidden(nested, child, [h / scale for h in traced.hidden], batches))
    return replace(check, format="hf")


def _hidden(nested: Nested, child: Child, theirs: list[Tensor], batches: Batches) -> str:
    ours = nested_trace(elastic_from(nested).eval(), batches[0][0], child.subnet)
    return hidden_difference(ours, theirs, child.subnet, nested.layout.architecture.hybrid_override_pattern)


def _check(
    nested: Nested,
    child: Child,
    numel: int,
    logits: tuple[list[Tensor], list[Tensor]] | None,
    loss_nested: float,
    loss_child: float,
    difference: str | None,
) -> ChildCheck:
    larger = [n for n, s in nested.manifest.subnets.items() if n != child.name and child.subnet.is_nested_in(s)]
    return ChildCheck(
        budget=child.name,
        comparison=_worst([compare_logits(a, b) for a, b in zip(*logits, strict=True)]) if logits else NOTHING,
        loss_nested=loss_nested,
        loss_child=loss_child,
        parameters=parameters(nested.layout, child.subnet) + child.expected.padding,
        numel=numel,
        nested_in=tuple(larger),
        dtype=child.dtype,
        difference=difference,
    )


def _loss(logits: list[Tensor], batches: Batches) -> float:
    """Nats per token with loss, over the batches that there are logits of."""
    total, tokens = 0.0, 0.0
    for values, (_, labels, *mask) in zip(logits, batches, strict=False):
        losses = F.cross_entropy(values.double().flatten(0, 1), labels.flatten(), reduction="none")
        weights = mask[0].flatten().double() if mask else torch.ones_like(losses)
        total, tokens = total + float((losses * weights).sum()), tokens + float(weights.sum())
    return total / tokens if tokens else math.nan


def _worst(found: list[Comparison]) -> Comparison:
    rows = torch.tensor([list(c.to_dict().values()) for c in found], dtype=torch.float64)  # a NaN stays one
    return Comparison(*rows[:, :3].amax(0).tolist(), float(rows[:, 3].amin()))
