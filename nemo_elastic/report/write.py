"""`write_report`: run folder in, `report/` out. Figures without data are left out; the page says why."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure

from ..kinds import kinds
from . import (
    expert_figures,
    layer_figures,
    router_figures,
    source_losses,
    spending,
    trade_off,
    training_curves,
    width_figures,
)
from .budget_rows import BudgetRow, budget_rows
from .csv_files import sheets
from .drawing import inline_svg, save_png
from .page import Picture, render
from .run_folder import RunFolder, read_run

FOLDER, PAGE = "report", "report.html"


def write_report(out: Path, evaluations: Path | None = None) -> Path:
    """Write `out/report/` (report.html, *.png, *.csv); returns the page. The same run gives the same bytes.

    Raises:
        ProblemsError: `out` holds nothing of a run, or `evaluations` no results of lm-evaluation-harness.
    """
    run = read_run(out, evaluations)
    rows = budget_rows(run)
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pictures, files = [], []
    for name, heading, caption, draw in figures(run, rows):
        figure = draw()
        files.append(save_png(figure, folder / f"{name}.png").name)
        pictures.append(Picture(name, heading, caption, inline_svg(figure, name, f"{heading}. {caption}")))
    files += [sheet.write(folder).name for sheet in sheets(run, rows)]
    for stale in {*folder.glob("*.png"), *folder.glob("*.csv")} - {folder / name for name in files}:
        stale.unlink()  # of an earlier report: this run's page does not speak of it
    page = folder / PAGE
    temporary = folder / f".{PAGE}.{os.getpid()}"
    temporary.write_text(render(run, rows, pictures, files), encoding="utf-8")
    os.replace(temporary, page)
    return page


def figures(run: RunFolder, rows: list[BudgetRow]) -> Iterator[tuple[str, str, str, Callable[[], Figure]]]:
    """(file name, heading, caption, drawing) of every figure this run has data for."""
    if run.layout and any(run.subnet(row.subnet) for row in rows):
        legend = ", ".join(f"{kind.letter} {kind.words}" for kind in kinds())
        caption = (
            f"A cell for each layer of the parent: {legend}. The fill is the kept share of the "
            "layer's inner width; a struck-out cell is a layer that the child does not have."
        )
        yield "children", "Map of the family", caption, lambda: layer_figures.children(run, rows)
    if run.validation:
        caption = (
            "Held-out loss of the subnet that would be extracted at that moment. Hollow marks are zero-shot, before "
            "the first step; bands are the phases of the router's schedule; the dashed line is the parent."
        ) + (" Dotted lines: the run was resumed there." if run.resumes else "")
        yield "loss", "Loss per budget over tokens", caption, lambda: training_curves.losses(run)
    if any(True for _ in source_losses.source_series(run)):
        caption = "The same on the held-out text of each source alone; weighted by tokens, they give the loss above."
        yield "sources", "Loss per budget and source", caption, lambda: source_losses.curves(run)
    if any(r.final is not None and (r.parameters is not None or r.memory_bytes is not None) for r in rows):
        caption = "What each budget costs and what it loses. The dotted line is what training won back."
        caption += " Crosses are models outside the family (baselines.json)." if run.baselines else ""
        yield "pareto", "Quality against cost", caption, lambda: trade_off.pareto(run, rows)
    scores = layer_figures.layer_scores(run)
    if scores and run.architecture:
        caption = (
            "Each layer's score when the depth ranking last looked at it; below it, the layers that each child keeps."
        )
        yield "layer_importance", "Layer importance", caption, lambda: layer_figures.importance(run, rows)
    widths = width_figures.width_scores(run)
    if widths:
        caption = (
            "Scores of the units from the largest down, in percent of the largest: mean over layers, and their range. "
            "Dashed lines: the units that each budget keeps (the mean, where layers differ)."
        )
        yield "width_importance", "Width importance", caption, lambda: width_figures.widths(run, rows, widths)
    if any(True for _ in training_curves.router_series(run)):
        caption = (
            "Cost error of the router's most likely choice before it is repaired to fit (the green band is the "
            "tolerance), and the weight that steers it."
        )
        yield "router", "Router", caption, lambda: training_curves.router(run)
    if expert_figures.load_series(run):
        caption = (
            "How evenly tokens meet experts: 1 is every expert alike. Below, the last logged steps: a row per layer, a "
            "cell per expert, the stronger the more tokens it had; dots are experts that the budget does not keep."
        )
        yield "expert_load", "Load of experts", caption, lambda: expert_figures.load(run)
    series = router_figures.probability_series(run)
    if series:
        caption = (
            "Probability of every choice without noise, mean over layers; the strongest tone is the parent's own size, "
            "lighter tones are smaller sizes."
        )
        draw = router_figures.probabilities
        yield "router_probabilities", "Router probabilities", caption, lambda: draw(run, series)
    if run.architecture and len(run.validation) > 1 and any(r.get("subnets") for r in run.validation):
        caption = "Kept share of the parent per elastic dim: the subnet that would be extracted at each validation."
        yield "choices", "What was chosen over time", caption, lambda: training_curves.choices(run)
    if len(spending.speed_series(run)) > 1:
        caption = "Tokens of all students per second of a step, without validations and saves."
        caption += " Below, the share of the GPUs' peak." if spending.utilisation_series(run) else ""
        yield "throughput", "Throughput", caption, lambda: training_curves.speed(run)
