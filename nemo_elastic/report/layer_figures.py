"""Figures with a column per layer of the parent: importance of each, and the map of every child."""

from collections.abc import Mapping
from math import inf

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from ..kinds import kind_of
from ..space.architecture import KIND_NAMES, Architecture
from ..space.dims import parent_size
from ..space.subnet import Subnet, layer_sizes
from .budget_rows import BudgetRow
from .drawing import new_figure, tip
from .palette import KIND_COLOURS, LIGHT, budget_colour
from .run_folder import RunFolder

COLUMNS = 64  # layers side by side in the map; deeper parents go on below
LOG_FROM = 30.0  # ratio of scores from which the axis is logarithmic


def layer_scores(run: RunFolder) -> dict[int, float]:
    """What the output loses without a layer, by layer."""
    found: Mapping[str, float] = run.importance.get("depth_scores") or {}
    return {int(layer): float(score) for layer, score in sorted(found.items(), key=lambda item: int(item[0]))}


def importance(run: RunFolder, rows: list[BudgetRow]) -> Figure:
    """A bar per layer coloured by kind; below, a strip per budget with the layers it keeps."""
    pattern, scores = run.architecture.hybrid_override_pattern, layer_scores(run)
    rows = [row for row in rows if row.layers]
    strip = 0.22 * len(rows) + 0.1
    with new_figure(2.9 + strip) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.7, max(strip, 0.1)])
        upper.set_title("Importance of each layer: what the output loses without it")
        for layer, score in scores.items():
            colour = LIGHT[KIND_COLOURS[pattern[layer]]]
            (bar,) = upper.bar(layer, score, width=0.76, color=colour)
            tip(bar, f"layer {layer} ({KIND_NAMES[pattern[layer]]}): {score:.4g}")
        positive = [s for s in scores.values() if 0 < s < inf]
        if positive and len(positive) == len(scores) and max(positive) / min(positive) > LOG_FROM:
            upper.set_yscale("log")
            upper.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            upper.set_ylim(min(positive) / 1.8)
        upper.tick_params(bottom=False)
        kinds = [k for k in KIND_NAMES if k in pattern]
        handles = [Patch(color=LIGHT[KIND_COLOURS[k]], label=f"{k} {kind_of(k).words}") for k in kinds]
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 3}
        upper.legend(handles=handles, labelcolor=LIGHT["muted"], fontsize=8.5, handlelength=1, **place)
        colours = {name: LIGHT[budget_colour(i)] for i, name in enumerate(run.budget_names)}
        _strips(lower, rows, colours, len(pattern))
        step = -(-len(pattern) // 32)
        ticks = range(0, len(pattern), step)
        lower.set_xticks(ticks, [f"{i}\n{pattern[i]}" for i in ticks])
        lower.set_xlabel("layer of the parent and its kind")
        upper.set_xlim(-0.7, len(pattern) - 0.3)
    return figure


def _strips(axes: Axes, rows: list[BudgetRow], colours: Mapping[str, str], layers: int) -> None:
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    for y, row in enumerate(rows):
        for layer in range(layers):
            kept = layer in row.layers
            box = Rectangle((layer - 0.38, y - 0.34), 0.76, 0.68, linewidth=0)
            box.set_facecolor(colours[row.name] if kept else LIGHT["faint"])
            axes.add_patch(box)
            tip(box, f"{row.name}: layer {layer} {'kept' if kept else 'dropped'}")
            if not kept:
                axes.plot([layer - 0.2, layer + 0.2], [y - 0.2, y + 0.2], color=LIGHT["bad"], linewidth=1.4)
                axes.plot([layer - 0.2, layer + 0.2], [y + 0.2, y - 0.2], color=LIGHT["bad"], linewidth=1.4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(color=colours[row.name], fontweight="bold")
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.tick_params(bottom=False)


def kept_share(architecture: Architecture, subnet: Subnet, layer: int) -> float:
    """Kept part of a layer's inner width, 0 to 1: the product over the dims of its kind."""
    share = 1.0
    for name, size in layer_sizes(architecture, subnet, layer).items():
        if name != "hidden_size":
            share *= size / parent_size(architecture, name)
    return share


def children(run: RunFolder, rows: list[BudgetRow]) -> Figure:
    """Parent and children, a cell per layer: kind letter, filled to the kept share of its width, dropped struck out."""
    arch = run.architecture
    full = run.subnet({})
    nets = [(row.name, budget_colour(i), run.subnet(row.subnet)) for i, row in enumerate(rows)]
    nets = [(name, colour, subnet) for name, colour, subnet in nets if subnet is not None]
    if full not in [subnet for _, _, subnet in nets]:
        nets.insert(0, ("parent", "muted", full))
    columns = min(COLUMNS, arch.num_layers)
    lines = -(-arch.num_layers // COLUMNS)
    label = 0.13 * columns + 0.8
    tall = max(1.35, columns / 24)
    row_height = lines * (tall + 0.18) + 0.42
    height = row_height * len(nets)
    with new_figure(0.2 + 9.4 * (height + 0.55) / (columns + 1.9 * label)) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-label, columns + label * 0.9)
        axes.set_ylim(height, -0.55)
        axes.set_aspect("equal")
        for n, (name, colour, subnet) in enumerate(nets):
            top = n * row_height
            middle = top + (lines * (tall + 0.18) - 0.18) / 2
            axes.text(-0.45, middle, name, ha="right", va="center", fontweight="bold", color=LIGHT[colour], fontsize=10)
            words = f"{subnet.num_layers} of {arch.num_layers} layers\n"
            words += f"hidden {subnet.hidden_size:,} of {arch.hidden_size:,}"
            axes.text(columns + 0.35, middle, words, va="center", fontsize=8.5, color=LIGHT["muted"], linespacing=1.4)
            for layer in range(arch.num_layers):
                at = (layer % COLUMNS, top + layer // COLUMNS * (tall + 0.18))
                _cell(axes, at, tall, arch, subnet, layer, 12.5 * min(1, 20 / columns) + 2, name)
    return figure


def _cell(
    axes: Axes,
    at: tuple[float, float],
    tall: float,
    arch: Architecture,
    subnet: Subnet,
    layer: int,
    size: float,
    net: str,
) -> None:
    kind = arch.hybrid_override_pattern[layer]
    colour, kept = LIGHT[KIND_COLOURS[kind]], layer in subnet.layers
    x, y, width = at[0] + 0.06, at[1], 0.88
    shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 0}
    frame = FancyBboxPatch((x, y), width, tall, facecolor=LIGHT["faint"], **shape)
    axes.add_patch(frame)
    sizes = {n: v for n, v in layer_sizes(arch, subnet, layer).items() if n != "hidden_size"}
    words = ", ".join(f"{n} {v} of {parent_size(arch, n)}" for n, v in sizes.items())
    tip(frame, f"{net}, layer {layer} ({KIND_NAMES[kind]}): {words if kept else 'dropped'}")
    if not kept:
        axes.text(x + width / 2, y + tall / 2, kind, ha="center", va="center", fontsize=size, color=LIGHT["muted"])
        axes.plot([x + 0.08, x + width - 0.08], [y + tall - 0.08, y + 0.08], color=LIGHT["bad"], linewidth=1.5)
        return
    share = kept_share(arch, subnet, layer)
    filled = FancyBboxPatch((x, y + tall * (1 - share)), width, tall * share, facecolor=colour, **shape)
    axes.add_patch(filled)
    tip(filled, f"{net}, layer {layer} ({KIND_NAMES[kind]}): {words}")
    inside = tall * share > 0.55
    place, ink = (1 - share / 2, LIGHT["paper"]) if inside else ((1 - share) / 2, colour)
    axes.text(x + width / 2, y + tall * place, kind, ha="center", va="center", fontsize=size, color=ink, weight="bold")
