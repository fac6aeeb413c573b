"""How long a layer of each kind and width takes on this machine: builds plain layers and times their forward.

    table[kind][sizes] = median over rounds of the median over repeats of the wall time of
                         norm + sub-layer + residual on `[s, b, h]`

All points are measured once per round, there and back, so that a machine that slows down for a while slows down points
of every size, and the median drops that round. One process, no tensor parallelism, forward only, a whole sequence at
once (prefill). What is timed is the plain layer a child will have, with the kernels this machine takes, not a slice of
the parent. `nemo-elastic profile` is the verb.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...cost.latency import OUTER, Grid, LatencyTable, fixed_sizes
from ...space.architecture import KIND_NAMES, Architecture
from ...space.choices import layers_of_dim
from ...space.dims import KIND_OF_DIM
from ...space.elastic_space import ElasticSpace
from ..runtime import process_groups
from .build import build_plain_model

HIDDEN = "hidden_size"
SMALL_VOCABULARY = 64
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How a point is measured. `function`: activation and routing, which take part of a layer's time."""

    batch_size: int
    sequence_length: int
    dtype: torch.dtype = torch.float32
    function: Mapping[str, Any] = field(default_factory=dict)
    warm_up: int = 3
    repeats: int = 5
    rounds: int = 3


def profile(space: ElasticSpace, timing: Timing, *, points: int = 5, report: Report | None = None) -> LatencyTable:
    """Measure every kind of layer of a parent over the choices of the dims that cut it.

    Args:
        points: sizes measured per dim, the smallest and the largest choice among them; the rest is interpolated.
        report: called with (kind, points done, all points).
    """
    process_groups.start(1, 1)
    report = report or (lambda kind, done, total: None)
    work = list(_points(space, points))
    found: list[list[float]] = [[] for _ in work]
    total = len(work) * timing.rounds
    for turn in range(timing.rounds):
        order = range(len(work)) if turn % 2 == 0 else reversed(range(len(work)))
        for done, i in enumerate(order, start=turn * len(work)):
            report(work[i][0], done, total)
            found[i].append(measure(space.architecture, *work[i], timing))
    report("done", total, total)
    measured: dict[str, list[float]] = {}
    for (kind, _), times in zip(work, found, strict=True):
        measured.setdefault(kind, []).append(float(f"{median(times):.4g}"))  # the clock knows no more
    grids = {}
    for kind, values in measured.items():
        rows = _rows(space, kind, points)
        grids[kind] = Grid(tuple(rows), tuple(tuple(row) for row in rows.values()), tuple(values))
    return LatencyTable(grids, origin(space.architecture, timing))


def measure(architecture: Architecture, kind: str, sizes: dict[str, int], timing: Timing) -> float:
    """Milliseconds of one layer of `kind` (a value of `KIND_NAMES`, or `latency.OUTER`) at `sizes`."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    run = (
        _outer(architecture, sizes, timing, device)
        if kind == OUTER
        else _layer(architecture, kind, sizes, timing, device)
    )
    with torch.no_grad():
        for _ in range(timing.warm_up):
            run()
        times = []
        for _ in range(timing.repeats):
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - started)
    return 1000 * median(times)


def _layer(
    architecture: Architecture, kind: str, sizes: dict[str, int], timing: Timing, device: torch.device
) -> Callable[[], Any]:
    (letter,) = (letter for letter, name in KIND_NAMES.items() if name == kind)
    model = _model(replace(architecture, hybrid_override_pattern=letter, vocab_size=SMALL_VOCABULARY, **sizes), timing)
    layer = model.decoder.layers[0].to(device, timing.dtype)
    shape = (timing.sequence_length, timing.batch_size, sizes[HIDDEN])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, timing.dtype)
    return lambda: layer(hidden_states=x, attention_mask=None)


def _outer(
    architecture: Architecture, sizes: dict[str, int], timing: Timing, device: torch.device
) -> Callable[[], Any]:
    one_layer = replace(architecture, hybrid_override_pattern=architecture.hybrid_override_pattern[0], **sizes)
    model = _model(one_layer, timing).to(device, timing.dtype)
    shape = (timing.batch_size, timing.sequence_length)
    ids = torch.randint(0, architecture.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    tied = model.shared_embedding_or_output_weight() if architecture.share_embeddings_and_output_weights else None

    def run() -> Tensor:
        x = model.embedding(input_ids=ids, position_ids=None)
        return model.output_layer(model.decoder.final_norm(x), weight=tied)[0]

    return run


def _model(architecture: Architecture, timing: Timing) -> torch.nn.Module:
    bf16 = timing.dtype == torch.bfloat16
    section = {**vars(architecture), **timing.function}
    return build_plain_model(section, params_dtype=timing.dtype, bf16=bf16).eval()


def _points(space: ElasticSpace, points: int) -> Iterable[tuple[str, dict[str, int]]]:
    for kind in (*KIND_NAMES.values(), OUTER):
        rows = _rows(space, kind, points)
        if rows:
            for sizes in product(*rows.values()):
                yield kind, dict(zip(rows, sizes, strict=True))


def _rows(space: ElasticSpace, kind: str, points: int) -> dict[str, list[int]]:
    """Dim -> sizes to measure, ascending; {} for a kind that this parent has no layer of."""
    letters = {name: letter for letter, name in KIND_NAMES.items()}
    cut = [n for n, of_kind in KIND_OF_DIM.items() if of_kind == letters.get(kind)]
    if kind != OUTER and not space.architecture.layers_of(letters[kind]):
        return {}
    assert all(layers_of_dim(space, n) for n in cut)
    return {name: thinned(sorted(space.dims[name].choices), points) for name in (HIDDEN, *cut)}


def thinned(sizes: Sequence[int], points: int) -> list[int]:
    """At most `points` of ascending sizes, evenly taken, first and last always."""
    if len(sizes) <= points:
        return list(sizes)
    last, steps = len(sizes) - 1, max(1, points - 1)
    return sorted({sizes[round(i * last / steps)] for i in range(steps + 1)})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def origin(architecture: Architecture, timing: Timing) -> dict[str, Any]:
    """What a table must say of itself."""
    machine: dict[str, Any] = {
        "device": _device_name(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }
    if not torch.cuda.is_available():
        machine |= {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    return {
        "nemo_elastic": __version__,
        "machine": machine,
        "conditions": {
            "batch_size": timing.batch_size,
            "sequence_length": timing.sequence_length,
            "dtype": str(timing.dtype).removeprefix("torch."),
            "warm_up": timing.warm_up,
            "repeats": timing.repeats,
            "rounds": timing.rounds,
            "measures": "forward of a whole sequence, one process",
        },
        "model": fixed_sizes(architecture),
    }


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "cpu"
