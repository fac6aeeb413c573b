"""From a drawing to a PNG file (light paper) and to SVG inside the page (both themes), from the same figure.

Identity: the SVG differs from matplotlib's only in that palette colours are `var(--name)`, ids carry the figure's
name, and what names other files or the time is gone; so the page is self-contained and the output deterministic.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .palette import LIGHT

WIDTH = 9.6  # inches of every figure
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["faint"],
    "grid.linewidth": 0.9,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": LIGHT["ink"],
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": "none",
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "path.simplify": True,
}
TICKS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # of a decade, thinning
MOST_TICKS = 7


@contextmanager
def new_figure(height: float) -> Iterator[Figure]:
    """A figure in the house style; axes must be made and filled inside the block."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.07, hspace=0.03)
        FigureCanvasAgg(figure)
        yield figure


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure as it is; its layout is final then, so that the SVG need not find it again."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None})
    figure.set_layout_engine("none")
    return path


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element in theme colours, with `description` for who cannot see it."""
    text = io.StringIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', svg).group(1)
    head = f'<svg class="figure" viewBox="{view}" role="img" aria-label="{escape(description)}">'
    svg = re.sub(r"^<svg[^>]*>", lambda _: head, svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{colour})")
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--font)", svg)
    return svg.strip()


def tip(artist: Any, words: str) -> None:
    """Words that the page shows when the pointer rests on an artist."""
    artist.set_gid("tip:" + words.replace('"', ""))


def loss_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis in plain nats: losses before and after training differ by factors."""
    values = [v for v in values if v is not None and v == v and 0 < v < float("inf")]
    if not values:
        return
    low, high = min(values), max(values)
    low, high = low / (high / low) ** 0.06 / 1.01, high * (high / low) ** 0.06 * 1.01
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    for mantissas in TICKS:
        ticks = [t * 10.0**e for e in range(-9, 6) for t in mantissas if low <= t * 10.0**e <= high]
        if len(ticks) <= MOST_TICKS:
            break
    if len(ticks) < 3:  # under a factor of about 1.3: a linear axis says the same and has ticks of its own
        axes.set_yscale("linear")
        axes.set_ylim(low, high)
        return
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)


def spread(positions: Sequence[float], distance: float) -> list[float]:
    """Positions moved apart for labels: `distance` between neighbours, order kept, within 0 to 1 if they fit."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = [min(max(p, 0.0), 1.0) for p in positions]
    for _ in range(200):
        worst = 0.0
        for a, b in pairwise(order):
            overlap = distance - (moved[b] - moved[a])
            if overlap > 1e-9:
                moved[a] -= overlap / 2
                moved[b] += overlap / 2
                worst = max(worst, overlap)
        under, over = max(0.0, -min(moved, default=0.0)), max(0.0, max(moved, default=0.0) - 1)
        if under or over:
            moved = [p + under - over for p in moved]
        if worst < distance * 1e-3:
            break
    return moved


def short_count(value: float) -> str:
    """12.3B, 8.6M, 4k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"
