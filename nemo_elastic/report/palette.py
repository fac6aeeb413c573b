"""Colours by name, once for light and once for dark paper.

Figures are drawn in the light colours; in the page every colour is a CSS variable, so that one drawing serves both.
Each light value is unique: it is the key by which `drawing.py` finds the variable again.
"""

from ..kinds import kinds

LIGHT = {
    "paper": "#fffffe",
    "ink": "#1b1f27",
    "muted": "#626b7a",
    "line": "#c9ced8",
    "faint": "#eceef2",
    "good": "#15803d",
    "bad": "#c81e32",
    **{kind.name: kind.colours[0] for kind in kinds()},
    "budget-0": "#3a4252",
    "budget-1": "#2463d6",
    "budget-2": "#cf2a72",
    "budget-3": "#3f8f1f",
    "budget-4": "#b07d00",
    "budget-5": "#7a3fd0",
}
DARK = {
    "paper": "#14171d",
    "ink": "#e8eaef",
    "muted": "#9aa3b2",
    "line": "#3b424e",
    "faint": "#22262e",
    "good": "#4ade80",
    "bad": "#fb7185",
    **{kind.name: kind.colours[1] for kind in kinds()},
    "budget-0": "#c9d0dc",
    "budget-1": "#72a4ff",
    "budget-2": "#ff78ad",
    "budget-3": "#86d65c",
    "budget-4": "#efc04a",
    "budget-5": "#c39bff",
}
KIND_COLOURS = {kind.letter: kind.name for kind in kinds()}
MARKERS = ("D", "o", "s", "^", "v", "P")
BUDGETS = len(MARKERS)


def budget_colour(index: int) -> str:
    """Palette name of the i-th budget; the first is neutral, as it is usually the parent itself."""
    return f"budget-{index % BUDGETS}"


def part_colour(index: int) -> str:
    """Palette name of the i-th part of a whole: those of budgets, then those of kinds."""
    names = [*map(budget_colour, range(BUDGETS)), *KIND_COLOURS.values()]
    return names[index % len(names)]


def budget_marker(index: int) -> str:
    """Marker of the i-th budget: shape says what colour says."""
    return MARKERS[index % BUDGETS]
