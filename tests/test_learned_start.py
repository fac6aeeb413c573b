"""What scores tell a learned run: a price, a warm-up shape, and what is pinned where the router's choice loses more."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_proposals import importance

from nemo_elastic.config import load_config
from nemo_elastic.cost.conditions import serving_of
from nemo_elastic.family import family_of
from nemo_elastic.mcore.family.budget_notes import notes_at
from nemo_elastic.mcore.family.planner import Planner
from nemo_elastic.plan.proposals import Start, racing, starts
from nemo_elastic.report.race_rounds import fallbacks
from nemo_elastic.report.run_folder import RunFolder
from nemo_elastic.router.model import Router
from nemo_elastic.router.schedule import Timeline
from nemo_elastic.shapes.damage import Damage, read_scores
from nemo_elastic.shapes.search import propose_random
from nemo_elastic.shapes.shadow_price import shadow_price

LEARNED = "router.shapes=learned"


def started(tolerance: float = 0.05) -> tuple[Planner, Router]:
    """A planner of the shipped parent whose budgets have a shape, drawn at random, and a price."""
    run = load_config("tiny_parent.yaml", [LEARNED, f"router.tolerance={tolerance}"]).config
    family, config = family_of(run), run.router
    timeline = Timeline(2, 4, 6, 10)
    plain = Planner(family, config, family.layout, timeline=timeline, seed=1)
    found = {
        name: Start(propose_random(plain.costs[name], 1, seed=3, tolerance=tolerance)[0], price)
        for name, price in (("large", 0.25), ("small", 0.75))
    }
    planner = Planner(family, config, family.layout, timeline=timeline, seed=1, starts=found)
    return planner, Router(family.space, planner.learned, config, seed=1)


def test_a_budget_warms_up_on_its_searchs_shape_at_its_price():
    planner, _ = started()
    for name in ("large", "small"):
        assert planner.pinned(name, "warmup") == planner.starts[name].shape != planner.uniform[name]
    assert {n: planner.state.steering.price(n) for n in ("large", "small")} == {"large": 0.25, "small": 0.75}
    bare = Planner(planner.family, planner.config, planner.layout, timeline=planner.timeline, seed=1)
    assert bare.pinned("large", "warmup") == bare.uniform["large"] and bare.state.steering.price("large") == 0


def test_what_loses_less_is_pinned_and_the_log_keeps_to_it():
    planner, router = started()
    assert not planner.rivals(planner.begin_step(router, 5))
    state = planner.begin_step(router, 6)
    learned = dict(planner.state.frozen)
    rivals = planner.rivals(state)
    assert rivals == {n: {"learned": learned[n], "search": planner.starts[n].shape} for n in ("large", "small")}
    losses = {"large": {"learned": 2.0, "search": 2.0}, "small": {"learned": 3.0, "search": 2.9}}
    assert planner.fall_back(losses) == ["small"]
    assert planner.state.frozen == {"large": learned["large"], "small": planner.starts["small"].shape}
    assert planner.pinned("small", "frozen") == planner.current_subnets(router, 6)["small"]
    assert not [note for note in notes_at(planner, state, first=False) if note.startswith("small")]
    other, _ = started()
    other.load_state_dict(planner.state_dict())
    assert not other.rivals(other.begin_step(router, 7)) and other.state.frozen == planner.state.frozen


def test_nothing_is_compared_where_the_router_chose_the_searchs_shape():
    planner, router = started()
    state = planner.begin_step(router, 6)
    planner.starts["large"] = replace(planner.starts["large"], shape=planner.state.frozen["large"])
    assert list(planner.rivals(state)) == ["small"]


@pytest.mark.parametrize("words", [[LEARNED], ["router.recipe=paper"], ["router.shapes=race"]])
def test_without_scores_or_a_router_there_is_no_start(tmp_path, words):
    run = load_config("tiny_parent.yaml", words).config
    assert starts(run, family_of(run), str(tmp_path)) == {}


def test_scores_give_the_searchs_shape_and_the_shadow_price(tmp_path):
    run = load_config("tiny_parent.yaml", [LEARNED]).config
    family = family_of(run)
    importance(family.architecture).save(tmp_path / "importance", family.architecture)
    found = starts(run, family, str(tmp_path))
    raced = load_config("tiny_parent.yaml", ["router.shapes=race"]).config
    first = {name: row[0].subnet for name, row in racing(raced, family_of(raced), str(tmp_path)).items()}
    assert {name: start.shape for name, start in found.items()} == first
    damage = Damage(family.space, read_scores(tmp_path, family.architecture))
    conditions = serving_of(run.report, family.architecture).conditions
    planner = Planner(family, run.router, family.layout, timeline=Timeline(2, 4, 6, 10), seed=1, **conditions)
    for name, start in found.items():
        assert start.price == pytest.approx(shadow_price(planner.costs[name], damage)) and start.price > 0
    assert starts(replace(run, router=replace(run.router, recipe="paper")), family, str(tmp_path)) == {}


def test_the_report_says_who_was_pinned():
    record = {"step": 6, "losses": {"a": {"learned": 2.0, "search": 1.0}, "b": {"learned": 1.0, "search": 2.0}}}
    run = RunFolder(folder=Path(), fallback=({**record, "fallen_back": ["a"]},))
    assert [(name, pinned) for name, _, pinned in fallbacks(run)] == [("a", "search"), ("b", "learned")]
    assert fallbacks(RunFolder(folder=Path())) == []
