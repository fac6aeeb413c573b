"""`rank`: importance of widths and layers of a parent, at any parallel layout -> `OUT/importance/`.

nemo-elastic rank --config conf/tiny_parent.yaml
nemo-elastic rank --config conf/x.yaml rank.samples=1024 rank.depth=one_shot --resume
torchrun --nproc-per-node 8 -m nemo_elastic rank --config conf/x.yaml train.tensor_model_parallel_size=8
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
FOLDER = "importance"
PHASES = {"widths": "widths", "depth": "layers"}


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    words = {"help": "importance of widths and layers -> OUT/importance/", "description": __doc__}
    parser = subparsers.add_parser("rank", formatter_class=argparse.RawDescriptionHelpFormatter, **words)
    parser.add_argument("--config", required=True, help="YAML file, or the name of a shipped one")
    parser.add_argument("--out", help="folder of the run (default: runs/<name>)")
    parser.add_argument("--resume", action="store_true", help="go on after an interruption; loses at most one batch")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Rank as the configuration says."""
    from ..config.load import load_config

    config = load_config(args.config, args.overrides).config
    out = Path(args.out or f"runs/{config.name}")
    importance = rank_run(config, out, resume=args.resume)
    if os.environ.get("RANK", "0") != "0":
        return 0
    result = {"importance": str(out / FOLDER), **summary(importance)}
    sys.stdout.write((json.dumps(result, indent=2) if args.json else as_text(result)) + "\n")
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
    first = process_groups.start(
        train.tensor_model_parallel_size, train.pipeline_model_parallel_size, seed=train.seed
    ) == 0  # fmt: skip
    model = build_plain_model(family.architecture, **precision(train))
    load_weights(model, reader, family.architecture, ffn_groups=family.space.ffn_groups)
    dims = family.space.dims
    with progress_bars(first) as report:
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
            report=report,
        )
    dist.barrier()  # nobody needs a state any more
    if first:
        importance.save(out / FOLDER, family.architecture)
        forget_states(out / FOLDER)
        logger.info("importance written to %s", out / FOLDER)
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


@contextmanager
def progress_bars(show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Bars with the time left on a terminal's stderr; elsewhere a log line per tenth."""
    if not (show and sys.stderr.isatty()):
        yield log_tenths if show else lambda phase, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("rank {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(PHASES[phase], total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


def log_tenths(phase: str, done: int, total: int) -> None:
    """One line per tenth of a phase."""
    if done and done * 10 // total != (done - 1) * 10 // total:
        logger.info("rank %s: %d of %d", PHASES[phase], done, total)


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
