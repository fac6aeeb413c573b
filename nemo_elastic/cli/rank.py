"""`rank`: importance of widths and layers of a parent, at any parallel layout -> `OUT/importance/`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import configuration, folders, restart_under_torchrun, run_folder, verb_parser
from .console import is_first_rank, progress_bar, quiet_libraries

FOLDER = "importance"
PHASES = {"widths": "rank widths", "depth": "rank layers"}
EXAMPLES = """examples:
  nemo-elastic rank --config conf/tiny_parent.yaml
  nemo-elastic rank --config conf/my_parent.yaml --resume rank.samples=1024 rank.depth=one_shot
  torchrun --nproc-per-node 8 -m nemo_elastic rank --config conf/x.yaml train.tensor_model_parallel_size=8

--resume goes on after an interruption, with the same layout; at most one batch is repeated"""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    flags = ("--config", "--out", "--json", "--resume", "--nproc", "--verbose")
    verb_parser(subparsers, "rank", run, "importance of widths and layers -> OUT/importance/", flags, epilog=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    """Rank as the configuration says."""
    folders(arguments)
    config = configuration(arguments).config
    restart_under_torchrun(arguments)
    quiet_libraries(arguments.verbose)
    out = run_folder(arguments, config.name)
    importance = rank_run(config, out, resume=arguments.resume)
    result = {"importance": str(out / FOLDER), **summary(importance)}
    if arguments.json:
        arguments.answer.json(result)
    else:
        arguments.answer.write(as_text(result))
    return 0


def rank_run(config: Any, out: Path, *, resume: bool = False) -> Any:
    """Rank the parent of a `RunConfig` and save `out/importance/`; returns the `Importance`, the same on every rank.

    Raises:
        ProblemsError: a layout that cannot run, a missing parent, or samples that do not fill the ranks.
    """
    import torch.distributed as dist

    from ..family import family_of, parallel_problems
    from ..importance.run_state import forget_states
    from ..mcore import process_groups
    from ..mcore.build import build_plain_model, load_weights
    from ..mcore.parents import folder_of, open_parent
    from ..mcore.rank import rank_parent
    from ..problems import raise_if_any

    family, train = family_of(config), config.train
    raise_if_any(parallel_problems(family.architecture, train, family.space.ffn_groups))
    reader = open_parent(config.parent.path, family.layout)
    sample, text = calibration(config, folder_of(config.parent.path))
    process_groups.start(train.tensor_model_parallel_size, train.pipeline_model_parallel_size, seed=train.seed)
    model = build_plain_model(family.architecture, **precision(train))
    load_weights(model, reader, family.architecture, ffn_groups=family.space.ffn_groups)
    dims = family.space.dims
    with progress_bar() as bars:
        importance = rank_parent(
            model,
            family.layout,
            config.rank,
            sample,
            min_layers=config.rank.min_layers or dims["num_layers"].choices[-1],
            top_channels=dims["mamba_head_dim"].choices[-1],
            folder=out / FOLDER,
            resume=resume,
            source={"parent": config.parent.path, "weights": weights_digest(reader, family.layout), **text},
            report=lambda phase, done, total: bars.update(PHASES[phase], done, total),
        )
    dist.barrier()  # nobody needs a state any more
    if is_first_rank():
        importance.save(out / FOLDER, family.architecture)
        forget_states(out / FOLDER)
    dist.barrier()
    return importance


def calibration(config: Any, parent: Path) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """(token ids `[s]` of calibration sample i, what the text is): windows of the training split, shuffled by seed."""
    import torch

    from ..data.tokenizer import BPETokenizer
    from ..data.tokens import load_tokens
    from ..data.windows import Windows

    own = parent / "tokenizer.json"
    chosen = config.data.tokenizer or (own if own.is_file() else None)
    tokenizer = BPETokenizer(chosen) if chosen else BPETokenizer()
    stream = load_tokens("train", tokenizer, paths=config.data.paths, cache_dir=config.data.cache_dir)
    windows = Windows(stream, config.rank.seq_length, seed=config.rank.seed)

    def sample(index: int) -> Any:
        return torch.from_numpy(windows.sample(index)[0].astype("int64"))

    text = {"tokens": len(stream), "tokenizer": tokenizer.sha256, "paths": list(config.data.paths) or "shipped corpus"}
    return sample, text


def precision(train: Any) -> dict[str, Any]:
    """Fields of Megatron's config that `train.precision` and the layout decide."""
    import torch

    half = train.precision == "bf16-mixed"
    fields: dict[str, Any] = {"sequence_parallel": train.sequence_parallel}
    return fields | ({"bf16": True, "params_dtype": torch.bfloat16} if half else {})


def weights_digest(reader: Any, layout: Any) -> str:
    """SHA-256 over the parent's small tensors (norms, A_log, ...): tells one parent from another in no time."""
    import hashlib

    from ..checkpoint.writer import tensor_bytes

    digest = hashlib.sha256()
    for name, spec in layout.table.items():
        if spec.numel({}) <= 1 << 16:
            digest.update(name.encode() + tensor_bytes(reader.read(name)))
    return digest.hexdigest()


def summary(importance: Any) -> dict[str, Any]:
    """What `rank` says of its result."""
    kept = ("removed", "layer_forwards", "naive_layer_forwards", "seconds", "parallel")
    return {
        "depth_ranking": list(importance.depth_ranking),
        "depth_scores": {str(layer): score for layer, score in importance.depth_scores.items()},
        **{name: importance.provenance[name] for name in kept if name in importance.provenance},
    }


def as_text(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"importance: {result['importance']} ({result['seconds']} s)",
        f"layers, most important first: {' '.join(map(str, result['depth_ranking']))}",
        f"layers that go first: {' '.join(map(str, result['removed'])) or 'none'}",
    ]
    if "layer_forwards" in result:
        done, naive = result["layer_forwards"], result["naive_layer_forwards"]
        lines.append(f"layer forwards: {done} instead of {naive} ({naive / done:.2f} times fewer)")
    return "\n".join(lines)
