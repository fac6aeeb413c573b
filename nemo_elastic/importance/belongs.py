"""Whether scores on disk belong to the run that is about to use them.

Scores are a function of (weights, model section, `rank` section, tokenizer, smallest choices). What the run's own
configuration says of these must be what the scores were measured with; a setting that the configuration leaves at its
default is taken as it was measured, so that `rank rank.samples=1024` and `train` after it need not repeat themselves.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ..config.load import plain
from ..config.sections import RunConfig
from ..family import Family
from ..problems import Problem
from ..space.blocks import DEPTH_UNITS

# Settings of `rank` that no score depends on, and lengths that the model's function does not depend on.
OF_NO_MATTER = frozenset({"micro_batch_size", "activation_memory_gb", "min_layers"})
LENGTHS = frozenset({"seq_length", "max_sequence_length", "max_position_embeddings"})
REMEDY = "rank again (`nemo-elastic rank`) in another --out"


def foreign_scores(
    provenance: Mapping[str, Any],
    config: RunConfig,
    family: Family,
    *,
    given: Collection[str] = (),
    digest: str | None = None,
    tokenizer: str | None = None,
) -> list[Problem]:
    """Everything in which stored scores and a run disagree.

    Args:
        provenance: of `Importance`.
        given: dotted keys that the configuration sets itself.
        digest: of the parent's weights as they are now; None: not compared.
        tokenizer: SHA-256 of the tokenizer's file; None: not compared.
    """
    source, settings = provenance.get("source", {}), provenance.get("config", {})
    found = []
    parent = source.get("parent")
    if digest is not None and source.get("weights") != digest:
        other = "than when it was ranked" if parent == config.parent.path else f"than {parent!r}, which was ranked"
        words = f"{config.parent.path!r} has other weights {other}: these scores would cut it in the wrong places"
        found.append(Problem("parent.path", f"{words}; {REMEDY}"))
    if tokenizer is not None and source.get("tokenizer", tokenizer) != tokenizer:
        found.append(Problem("data.tokenizer", f"is another one than the parent was ranked with; {REMEDY}"))
    model = source.get("model", {})
    for key in sorted({*model, *config.model} - LENGTHS) if model else ():
        before, now = model.get(key), plain(config.model.get(key))
        if now != before:
            was = f"with {before!r}" if key in model else "without it"
            found.append(Problem(f"model.{key}", f"{now!r}, but the parent was ranked {was}; {REMEDY}"))
    for key, now in plain(config.rank).items():
        before = plain(settings.get(key, now))
        if before != now and key not in OF_NO_MATTER and f"rank.{key}" in given:
            words = f"{now!r}, but the parent was ranked with {before!r}; give that, or {REMEDY}"
            found.append(Problem(f"rank.{key}", words))
    dims = family.space.dims
    fewest, channels = dims["num_layers"].choices[-1], dims["mamba_head_dim"].choices[-1]
    if fewest < settings.get("min_layers", fewest):
        words = f"go down to {fewest} layers, but the parent was ranked down to {settings['min_layers']}; {REMEDY}"
        found.append(Problem("elastic.dims.num_layers.choices", words))
    if family.space.depth_unit != settings.get("depth_unit", 1):
        names = {layers: name for name, layers in DEPTH_UNITS.items()}
        before, now = names[settings.get("depth_unit", 1)], names[family.space.depth_unit]
        words = f"{now}, but depth was ranked by {before}; give that, or {REMEDY}"
        found.append(Problem("elastic.depth_unit", words))
    if channels != (settings.get("top_channels") or channels):
        words = f"go down to {channels}, but heads were ranked by their first {settings['top_channels']}; {REMEDY}"
        found.append(Problem("elastic.dims.mamba_head_dim.choices", words))
    return found
