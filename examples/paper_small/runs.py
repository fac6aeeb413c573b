"""Every run of the small reproduction, as overrides of a parent's YAML: what the paper claims, and what was tried.

A seed is of everything that is drawn in a run, and belongs to one parent (PARENTS): settings were chosen on the first
hybrid, the second confirms them, later parents ask whether they hold for a transformer and with experts. A step is
2,048 tokens of student text in every run. STEPS are those of the family of three budgets; a child alone gets as many
steps as the family spent on it (equal tokens per child), or as many as the family took (equal total steps).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Seeds = tuple[int, ...]
SHORT = {"seq_length": 128, "global_batch_size": 16}
LONG = {"seq_length": 256, "global_batch_size": 8}
STEPS = (160, 80)  # short, then long
TWICE = (320, 160)
WEIGHTS = {"full": 0.5, "large": 0.3, "small": 0.2}  # of the second stage, the paper's
SMALL_FIRST = {"full": 0.3, "large": 0.25, "small": 0.45}
FULL_FIRST = {"full": 0.55, "large": 0.15, "small": 0.3}
CHILDREN = ("large", "small")  # of the family
BUDGETS = {"full": 1.0, "large": 0.75, "small": 0.5}
FOUR = {"full": 1.0, "b875": 0.875, "large": 0.75, "b625": 0.625, "small": 0.5}
FOUR_WEIGHTS = {"full": 0.35, "b875": 0.18, "large": 0.18, "b625": 0.17, "small": 0.12}
FOUR_CHILDREN = tuple(name for name in FOUR if name != "full")
SCRATCH_STEPS = 1200
SEARCH = 40
LEARNED = "router.shapes=learned"
PER_LAYER_MAMBA = "elastic.dims.mamba_num_heads.per_layer=true"
PER_LAYER = "elastic.dims.ffn_hidden_size.per_layer=true"
EVEN = "router.frozen=true"  # every budget without a subnet of its own is shrunk evenly
TEXT = ("distill.kd_weight=0", "distill.ce_weight=1")
MICRO = ("train.micro_batch_size=2",)  # of 16 and 8 sequences: 8 and 4 draws of a budget a step, not 2 and 1
EARLY = ("router.warmup_fraction=0.05", "router.soft_fraction=0.2", "router.freeze_fraction=0.7")
SHARED = ("distill.budgets_per_batch=3",)
BETTER_RATE = "train.optimizer.lr=7e-4"
OTHER_SHAPES = ("random", "greedy", "explored")  # random:N, a draw; `plan --search greedy`; of `exploring.py`


@dataclass(frozen=True)
class Parent:
    """A parent: what the page calls it, the seeds of the runs on it, its YAML here."""

    name: str
    seeds: Seeds
    config: str = "parent.yaml"

    @property
    def kind(self) -> str:
        """hybrid, as the paper's; transformer; or experts."""
        return "hybrid" if self.config == "parent.yaml" else self.config.removesuffix(".yaml")

    @property
    def hybrid(self) -> bool:
        """As the paper's."""
        return self.kind == "hybrid"


PARENTS = {  # by a parent's own seed
    1: Parent("first", (1, 2, 3)),
    2: Parent("second", (4, 5, 6)),
    3: Parent("transformer", (7,), "transformer.yaml"),
    4: Parent("experts", (8,), "experts.yaml"),
}
FIRST, SECOND, TRANSFORMER, EXPERTS = (parent.seeds for parent in PARENTS.values())
ALL = (*FIRST, *SECOND, *TRANSFORMER, *EXPERTS)
ONCE, THERE = FIRST[:1], SECOND[:1]  # one seed, on the first parent or on the second


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        name: of its file; the seed is appended.
        group: headline, best, greedy, race, explored, longer, four, shapes, depth, mamba, stages, speed or tries.
        what: a line of the results.
        budgets: `elastic.budgets`.
        stages: `train.stages`.
        words: further overrides.
        shapes_of: a run (of the same seed) whose final subnets are forced here, for the budgets both have; or one of
            OTHER_SHAPES.
        base: which sorted parent it starts from, see `BASES`.
        seeds: those it is done with.
    """

    name: str
    group: str
    what: str
    budgets: Mapping[str, float]
    stages: tuple[Mapping[str, Any], ...]
    words: tuple[str, ...] = ()
    shapes_of: str | None = None
    base: str = "parent"
    seeds: Seeds = ONCE

    def overrides(self, seed: int, subnets: Mapping[str, Any]) -> list[str]:
        """The command line of the run; `subnets` are those of `shapes_of`."""
        words = [f"train.seed={seed}", f"elastic.budgets={json.dumps(dict(self.budgets))}"]
        for name in sorted(set(subnets) & set(self.budgets) - {"full"}):
            words.append(f"elastic.subnets.{name}={json.dumps(subnets[name])}")
        return [*words, f"train.stages={json.dumps([dict(s) for s in self.stages])}", *self.words]


@dataclass(frozen=True)
class Base:
    """A ranked and sorted parent, or the model that nothing has trained; and overrides of the ranking."""

    trained: bool = True
    words: tuple[str, ...] = ()


BASES = {
    "parent": Base(),
    "initial": Base(trained=False, words=("rank.samples=8", "rank.depth_samples=2")),
    "depth_mse": Base(words=("rank.depth_metric=mse",)),
    "depth_cosine": Base(words=("rank.depth=cosine",)),
    "depth_random": Base(words=("rank.depth=random", "rank.seed=1")),
    "mamba_flat": Base(),  # then `flat.py` moves heads across groups
}


def parent_of(seed: int) -> int:
    """The parent that runs with this seed start from."""
    return next(number for number, parent in PARENTS.items() if seed in parent.seeds)


def stages(short: int, long: int, weights: Mapping[str, float] | None = None) -> tuple[dict[str, Any], ...]:
    """Two stages, or the one that has steps."""
    second = {"steps": long, **LONG} | ({"budget_probabilities": dict(weights)} if weights else {})
    return tuple(s for s in ({"steps": short, **SHORT}, second) if s["steps"])


def steps_of(budget: str, family: Mapping[str, float], steps: tuple[int, int], weights: Mapping[str, float]) -> tuple:
    """The steps that a family is expected to spend on one of its budgets."""
    return round(steps[0] / len(family)), round(steps[1] * weights[budget])


GROWN = tuple(round(n * len(FOUR) / len(BUDGETS)) for n in STEPS)  # of the family of four children
FOUR_STEPS = {name: steps_of(name, FOUR, GROWN, FOUR_WEIGHTS) for name in FOUR_CHILDREN}


def compared(
    group: str, prefix: str, steps: tuple[int, int], what: str, seeds: Mapping[str, Seeds], shapes: str | None = None
) -> Iterator[Run]:
    """(a) the family, and (b) each child sorted, cut and distilled alone, with equal tokens and with all steps.

    Args:
        prefix: of their names.
        what: the family's line of the results.
        seeds: of equal tokens and of all steps.
        shapes: one of OTHER_SHAPES for all of them, from the first step; empty: the family learns its own.
    """
    family, fixed = f"{prefix}family", (EVEN,) if shapes else (LEARNED,)
    yield Run(name=family, group=group, what=what, budgets=BUDGETS, stages=stages(*steps, WEIGHTS), words=fixed,
              shapes_of=shapes, seeds=seeds["equal"])  # fmt: skip
    for name in CHILDREN:
        given = {"group": group, "budgets": {name: BUDGETS[name]}, "words": (EVEN,), "shapes_of": shapes or family}
        equal, all_of_them = steps_of(name, BUDGETS, steps, WEIGHTS), steps
        yield Run(name=f"{prefix}alone-{name}", what=f"`{name}` alone, the family's tokens for it",
                  stages=stages(*equal), seeds=seeds["equal"], **given)  # fmt: skip
        if seeds["all"]:
            yield Run(name=f"{prefix}whole-{name}", what=f"`{name}` alone, all of the family's steps",
                      stages=stages(*all_of_them), seeds=seeds["all"], **given)  # fmt: skip


def headline() -> Iterator[Run]:
    """(a) and (b) on all parents, and (c) each child from scratch, in which no parent plays a part."""
    yield from compared("headline", "", STEPS, "elastic family, learned shapes", {"equal": ALL, "all": ALL})
    for name in CHILDREN:
        yield Run(name=f"scratch-{name}", group="headline", what=f"`{name}` from scratch, evenly shrunk, no teacher",
                  budgets={name: BUDGETS[name]}, stages=stages(0, SCRATCH_STEPS),
                  words=(EVEN, *TEXT, "train.optimizer={lr: 3e-3, warmup_steps: 100}",
                         "train.val_every_steps=100"),
                  base="initial", seeds=FIRST)  # fmt: skip


def best() -> Iterator[Run]:
    """What helped of what was tried, together, and each child alone with the same shapes, rate and steps."""
    given = {"group": "best", "budgets": BUDGETS, "words": (EVEN, *SHARED, BETTER_RATE), "shapes_of": "family"}
    what = "shapes from the first step, all budgets in every micro-batch, learning rate 7e-4"
    yield Run(name="best-family", what=what, stages=stages(*STEPS, WEIGHTS), seeds=FIRST, **given)
    what = f"{what}, `small` drawn most"
    yield Run(name="best-small-first", what=what, stages=drawn(SMALL_FIRST), seeds=(*FIRST, *THERE), **given)
    for name in CHILDREN:
        yield Run(name=f"best-whole-{name}", group="best", what=f"`{name}` alone, as many steps, learning rate 7e-4",
                  budgets={name: BUDGETS[name]}, stages=stages(*STEPS), words=(EVEN, BETTER_RATE),
                  shapes_of="family")  # fmt: skip


def drawn(probabilities: Mapping[str, float]) -> tuple[dict[str, Any], ...]:
    """Both stages, with these probabilities of the budgets."""
    return tuple({**stage, "budget_probabilities": dict(probabilities)} for stage in stages(*STEPS))


def searched() -> Iterator[Run]:
    """(a) and (b) with the shapes of `plan --search greedy`, known before any training; longer; with what helped."""
    yield from compared("greedy", "greedy-", STEPS, "greedy search over the ranking's scores (`plan --search`)",
                        {"equal": (*SECOND, *TRANSFORMER, *EXPERTS), "all": (*SECOND, *TRANSFORMER)},
                        "greedy")  # fmt: skip
    given = {"group": "greedy", "budgets": BUDGETS, "shapes_of": "greedy"}
    for name, what, probabilities, rate, seeds in (
        ("best", "`small` drawn most (0.3, 0.25, 0.45), learning rate 7e-4", SMALL_FIRST, 7e-4, THERE),
        ("slow", "`small` drawn most, learning rate 4e-4", SMALL_FIRST, 4e-4, THERE),
        ("full-first", "`full` drawn most (0.55, 0.15, 0.3), learning rate 4e-4", FULL_FIRST, 4e-4, THERE),
        ("gentle", "`full` drawn most, learning rate 3e-4", FULL_FIRST, 3e-4, (*SECOND, *TRANSFORMER)),
    ):
        words = (EVEN, *SHARED, f"train.optimizer.lr={rate:g}")
        what = f"greedy search, all budgets in every micro-batch, {what}"
        yield Run(name=f"greedy-{name}", what=what, stages=drawn(probabilities), words=words, seeds=seeds, **given)
    yield from compared("greedy", "greedy-long-", TWICE, "greedy search, twice the steps",
                        {"equal": THERE, "all": ()}, "greedy")  # fmt: skip


def raced() -> Iterator[Run]:
    """Candidates of a wide search race for their budgets: the default settings; and with the least damage alone."""
    given = {"group": "race", "budgets": BUDGETS, "stages": stages(*STEPS, WEIGHTS)}
    yield Run(name="race-family", what="candidates of a wide search race (default)", words=("router.shapes=race",),
              seeds=SECOND, **given)  # fmt: skip
    yield Run(name="race-lr-7", what="the same at learning rate 7e-4", seeds=SECOND,
              words=("router.shapes=race", "train.optimizer.lr=7e-4"), **given)  # fmt: skip
    for how in ("greedy", "race"):
        yield Run(name=f"{how}-per-layer", what=f"{how}, widths of FFN and Mamba heads per layer", seeds=THERE,
                  words=(f"router.shapes={how}", PER_LAYER, PER_LAYER_MAMBA), **given)  # fmt: skip


def explored() -> Iterator[Run]:
    """Children one by one with the best of the shapes that `exploring.py` has distilled shortly.

    Not done where that is greedy search's: the runs with that shape are the same runs.
    """
    for name in FOUR_CHILDREN:
        given = {"group": "explored", "budgets": {name: FOUR[name]}, "words": (EVEN,), "shapes_of": "explored"}
        steps = steps_of(name, BUDGETS, STEPS, WEIGHTS) if name in CHILDREN else FOUR_STEPS[name]
        yield Run(name=f"explored-alone-{name}", what=f"`{name}` alone, explored, the family's tokens for it",
                  stages=stages(*steps), seeds=SECOND, **given)  # fmt: skip
        yield Run(name=f"explored-whole-{name}", what=f"`{name}` alone, explored, all of the family's steps",
                  stages=stages(*STEPS), seeds=SECOND, **given)  # fmt: skip


def longer() -> Iterator[Run]:
    """(a) and (b) again with twice the steps."""
    yield from compared("longer", "long-", TWICE, "learned shapes, twice the steps", {"equal": ONCE, "all": ()})


def family_of_four() -> Iterator[Run]:
    """Four children, each with the tokens that the children of two have; and those alone that two do not have."""
    given = {"group": "four", "words": (EVEN,), "shapes_of": "greedy", "seeds": SECOND}
    yield Run(name="four-family", what="family of four children, shapes by greedy search", budgets=FOUR,
              stages=stages(*GROWN, FOUR_WEIGHTS), **given)  # fmt: skip
    for name in FOUR_CHILDREN:
        if name not in CHILDREN:
            alone = {**given, "budgets": {name: FOUR[name]}}
            yield Run(name=f"greedy-alone-{name}", what=f"`{name}` alone, the family's tokens for it",
                      stages=stages(*FOUR_STEPS[name]), **alone)  # fmt: skip
            yield Run(name=f"greedy-whole-{name}", what=f"`{name}` alone, the steps of the family of two",
                      stages=stages(*STEPS), **alone)  # fmt: skip


def shapes() -> Iterator[Run]:
    """(d) other shapes, forced from the first step; and the family's own, so that only the shape differs.

    The transformer's family chose those of even shrinking, so that `shapes-even` is both.
    """
    yield Run(name="shapes-own", group="shapes", what="the family's final shapes from the first step", budgets=BUDGETS,
              stages=stages(*STEPS, WEIGHTS), words=(EVEN,), shapes_of="family",
              seeds=(*ONCE, *THERE))  # fmt: skip
    yield Run(name="shapes-even", group="shapes", what="even shrinking", budgets=BUDGETS,
              stages=stages(*STEPS, WEIGHTS), words=(EVEN,), seeds=(*ONCE, *TRANSFORMER))  # fmt: skip
    yield Run(name="shapes-random-1", group="shapes", what="random shapes that fit", budgets=BUDGETS,
              stages=stages(*STEPS, WEIGHTS), words=(EVEN,), shapes_of="random:1")  # fmt: skip
    yield Run(name="shapes-ffn-per-layer", group="shapes", what="learned, FFN width per layer", budgets=BUDGETS,
              stages=stages(*STEPS, WEIGHTS), words=(LEARNED, PER_LAYER))  # fmt: skip


def ablations() -> Iterator[Run]:
    """(e) depth ranking, Mamba trimming, curriculum, how a subnet runs."""
    bases = {"greedy, centred MSE (default)": "parent", "greedy, MSE (the paper's)": "depth_mse",
             "cosine": "depth_cosine", "random": "depth_random"}  # fmt: skip
    for what, base in bases.items():
        yield Run(name=f"depth-{base.removeprefix('depth_')}", group="depth", what=what, budgets={"shallow": 0.8},
                  stages=stages(60, 0), words=("elastic.subnets.shallow={num_layers: 9}", "train.val_every_steps=20"),
                  base=base)  # fmt: skip
    for what, base in {"blocks, greedy (default)": "parent", "blocks, random": "depth_random"}.items():
        yield Run(name=f"depth-blocks-{base.removeprefix('depth_')}", group="depth", what=what,
                  budgets={"shallow": 0.7}, stages=stages(60, 0), base=base, seeds=TRANSFORMER,
                  words=("elastic.subnets.shallow={num_layers: 8}", "train.val_every_steps=20"))  # fmt: skip
    for what, base in {"group by group": "parent", "flat over all heads": "mamba_flat"}.items():
        yield Run(name=f"mamba-{'grouped' if base == 'parent' else 'flat'}", group="mamba", what=what,
                  budgets={"half": 0.9}, stages=stages(60, 0), base=base,
                  words=("elastic.subnets.half={mamba_num_heads: 8}", *TEXT, "train.val_every_steps=20"))  # fmt: skip
    yield Run(name="stages-one", group="stages", what="one stage of short sequences", budgets=BUDGETS,
              words=(LEARNED,), stages=stages(sum(STEPS), 0))  # fmt: skip
    yield Run(name="stages-uniform", group="stages", what="two stages, both uniform", budgets=BUDGETS,
              words=(LEARNED,), stages=stages(*STEPS))  # fmt: skip
    yield Run(name="stages-weighted", group="stages", what="two stages, both weighted", budgets=BUDGETS,
              words=(LEARNED,), stages=drawn(WEIGHTS))  # fmt: skip
    yield Run(name="speed-masked", group="speed", what="hard subnets run masked, the same shapes", budgets=BUDGETS,
              stages=stages(*STEPS, WEIGHTS), words=(EVEN, "train.mode=masked"), shapes_of="family")  # fmt: skip
    yield Run(
        name="speed-masked-small",
        group="speed",
        what="`small` alone, masked, all of the family's steps",
        budgets={"small": BUDGETS["small"]},
        stages=stages(*STEPS),
        words=(EVEN, "train.mode=masked"),
        shapes_of="family",
    )
    yield Run(name="speed-soft", group="speed", what="soft masks to the end (the paper's router)", budgets=BUDGETS,
              stages=stages(*STEPS, WEIGHTS), words=("router.recipe=paper",))  # fmt: skip


def search_first(steps: int) -> tuple[dict[str, Any], ...]:
    """As many steps in all: the router's on children alone, then those of the weights with shapes pinned."""
    pinned = {"router": "frozen"}
    children = {name: 1 / len(CHILDREN) for name in CHILDREN}
    first, second = stages(*STEPS, WEIGHTS)
    return (
        {**first, "steps": steps, "router": "soft", "budget_probabilities": children},
        {**first, "steps": STEPS[0] - steps, "lr": 1e-3, **pinned},
        {**second, **pinned},
    )


def tries() -> Iterator[Run]:
    """What might bring the family closer to children alone, and its full member closer to the parent."""
    settings = {
        "lr-half": ("learning rate 5e-4", ("train.optimizer.lr=5e-4",)),
        "shared": ("all budgets learn from every micro-batch (one teacher forward)", SHARED),
        "ce": ("KL + 0.3 x cross entropy", ("distill.ce_weight=0.3",)),
        "micro": ("micro-batches of 2 instead of 8 sequences: more budgets a step", MICRO),
        "early": ("router: 5 % warm-up, 20 % soft, the last 70 % with pinned shapes", EARLY),
    }
    for name, (what, words) in settings.items():
        yield Run(name=f"try-{name}", group="tries", what=what, budgets=BUDGETS, stages=stages(*STEPS, WEIGHTS),
                  words=(LEARNED, *words))  # fmt: skip
    for name, (what, words) in {
        "own-shared": ("the family's final shapes from the first step, and all budgets in every micro-batch", SHARED),
        "own-shared-lr": ("the same at learning rate 5e-4", (*SHARED, "train.optimizer.lr=5e-4")),
    }.items():
        yield Run(name=f"try-{name}", group="tries", what=what, budgets=BUDGETS, stages=stages(*STEPS, WEIGHTS),
                  words=(EVEN, *words), shapes_of="family")  # fmt: skip
    yield Run(name="try-search", group="tries", budgets=BUDGETS, words=(LEARNED, "train.optimizer.lr=1e-5"),
              what="the router alone for 40 steps (weights at 1e-5), then its shapes pinned and the weights trained",
              stages=search_first(SEARCH), seeds=THERE)  # fmt: skip
    third = tuple(n // 3 for n in STEPS)
    yield Run(name="try-shared-third", group="tries", what="all budgets in every micro-batch, a third of the steps",
              budgets=BUDGETS, stages=stages(*third, WEIGHTS), words=(LEARNED, *SHARED))  # fmt: skip


RUNS = {
    run.name: run
    for make in (headline, best, searched, raced, explored, longer, family_of_four, shapes, ablations, tries)
    for run in make()
}
GROUPS = tuple(dict.fromkeys(run.group for run in RUNS.values()))
