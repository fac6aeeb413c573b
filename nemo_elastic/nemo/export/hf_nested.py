"""A nested checkpoint as one folder for Hugging Face users (`checkpoint.hf_nested`), written whole or not at all."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from nemo_elastic.checkpoint.atomic_folder import atomic_folder, check_target
from nemo_elastic.checkpoint.hf_nested import NestedChild, check_family, write_hf_nested
from nemo_elastic.nemo.export.checkpoints import child_card, sayable_child
from nemo_elastic.nemo.export.nested import Nested, open_nested
from nemo_elastic.problems import ProblemsError, raise_if_any

logger = logging.getLogger(__name__)
PARENT = "parent"


def extract_hf_nested(
    nested: str | Path | Nested,
    out: str | Path,
    *,
    hf_schema: str = "uniform",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write the parent as a NemotronH folder from which a script of its own cuts any budget.

    Args:
        hf_schema: how the budgets' folders say sizes that differ per layer (`checkpoint.schemas`).
        dtype: cast to it; None keeps what is stored.

    Raises:
        ProblemsError: a damaged checkpoint, a parent or budget that NemotronH cannot say, or an `out` in the way.
    """
    opened = nested if isinstance(nested, Nested) else open_nested(nested)
    check_target(out, force, opened.path)
    check_family(opened.manifest.model)
    manifest, children, found = opened.manifest, {}, []
    full = manifest.space.full_subnet()
    for name, subnet in manifest.subnets.items():
        try:
            child = sayable_child(opened, subnet, "hf", hf_schema, dtype)
            children[name] = NestedChild(child, child_card(opened, name, subnet, padding=child.padding))
        except ProblemsError as error:
            found += [replace(p, message=f"{p.message} (budget {name})") for p in error.problems]
    raise_if_any(found)
    whole = NestedChild(sayable_child(opened, full, "hf", hf_schema, dtype), child_card(opened, PARENT, full))
    with atomic_folder(out, force=force, needs_bytes=sum(t.nbytes for t in whole.child.tensors)) as folder:
        write_hf_nested(folder, whole, children, manifest, tokenizer=opened.tokenizer)
    logger.info("%s: %s with budgets %s, for Hugging Face", out, opened.path, ", ".join(children))
    return Path(out)
