"""What a narrower child gives up: the sorted importance of the units of every width dim, and where budgets cut."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..space.dims import KIND_OF_DIM, WIDTH_DIMS
from .budget_rows import BudgetRow
from .drawing import new_figure, tip
from .palette import KIND_COLOURS, LIGHT, budget_colour
from .run_folder import RunFolder
from .training_curves import SIZE_WORDS

SCORES = Path("importance") / "importance.safetensors"
Scores = Mapping[str, Mapping[int, NDArray[np.float32]]]


def width_scores(run: RunFolder) -> Scores:
    """dim -> layer -> score per unit, as `rank` wrote them; empty when they are absent or torn."""
    try:
        tensors = load_file(run.folder / SCORES)
    except (OSError, SafetensorError, ValueError):
        return {}
    found: dict[str, dict[int, NDArray[np.float32]]] = {}
    for name, scores in tensors.items():
        dim, _, layer = name.rpartition(".")
        if dim in WIDTH_DIMS and layer.isdigit() and scores.ndim in (1, 2) and np.isfinite(scores).all():
            rows = scores if scores.ndim == 1 else np.sort(scores, axis=-1)[:, ::-1].sum(0)  # of every expert in order
            found.setdefault(dim, {})[int(layer)] = rows
    return {dim: dict(sorted(found[dim].items())) for dim in WIDTH_DIMS if dim in found}


def sorted_shares(by_layer: Mapping[int, NDArray[np.float32]]) -> NDArray[np.float64]:
    """`[layers, units]`: scores of every layer from the largest down, in percent of its largest."""
    rows = [np.sort(scores.astype(np.float64))[::-1] for scores in by_layer.values()]
    return np.stack([100 * row / max(row[0], 1e-30) for row in rows])


def widths(run: RunFolder, rows: list[BudgetRow], scores: Scores) -> Figure:
    """A panel per dim: the mean over layers, the range over layers, and a line at the size that each budget keeps."""
    columns = min(3, len(scores))
    lines = -(-len(scores) // columns)
    with new_figure(0.4 + 2.1 * lines) as figure:
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(scores) :]:
            axes.set_visible(False)
        for axes, (dim, by_layer) in zip(grid.flat, scores.items(), strict=False):
            shares = sorted_shares(by_layer)
            x = np.arange(1, shares.shape[1] + 1)
            colour = LIGHT[KIND_COLOURS[KIND_OF_DIM[dim]]] if dim in KIND_OF_DIM else LIGHT["ink"]
            axes.fill_between(x, shares.min(0), shares.max(0), color=colour, alpha=0.18, linewidth=0)
            (line,) = axes.plot(x, shares.mean(0), color=colour, linewidth=1.9)
            tip(line, f"{SIZE_WORDS[dim]}: mean over {len(by_layer)} layers")
            for i, row in enumerate(rows):
                size = (row.subnet or {}).get(dim)
                if size in (None, []):
                    continue
                size = sum(size) / len(size) if isinstance(size, list | tuple) else size
                mark = axes.axvline(size, color=LIGHT[budget_colour(i)], linewidth=1.3, linestyle=(0, (4, 2)))
                tip(mark, f"{row.name} keeps {size:g} of {shares.shape[1]}")
                mark.set_label(row.name)
            axes.set_title(SIZE_WORDS[dim])
            axes.set_ylim(0, 104)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_xlim(0, shares.shape[1] * 1.03)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), labelcolor="linecolor")
    return figure
