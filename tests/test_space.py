"""What may vary and what is legal: choices, ratios, subnets, nestedness, and every problem in one error."""

import random

import pytest

from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.dims import DEPTH, ElasticDim, dim_groups, present_dims, resolve_choices
from nemo_elastic.space.elastic_space import ElasticSpace, even_thinning

SIZES = {
    "hidden_size": 48,
    "ffn_hidden_size": 64,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 8,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "mamba_num_groups": 4,
    "mamba_state_dim": 8,
    "vocab_size": 64,
}


def architecture(pattern: str = "M-M*M-*-", **more: int) -> Architecture:
    return Architecture(hybrid_override_pattern=pattern, **(SIZES | more))


USUAL_WIDTHS = present_dims(architecture())


@pytest.fixture
def space() -> ElasticSpace:
    return ElasticSpace(architecture=architecture(), ffn_groups=4, depth_ranking=(0, 7, 3, 1, 4, 6, 2, 5))


def problems_of(error: ProblemsError) -> dict[str, str]:
    return {p.key: p.message for p in error.problems}


@pytest.mark.parametrize("letter", list("GD+/|"))
def test_unsupported_layers_are_named_by_number(letter: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        architecture(f"M-{letter}M-{letter}")
    (problem,) = caught.value.problems
    assert problem.key == "model.hybrid_override_pattern" and problem.message.startswith("layers 2, 5 of 6: ")
    assert "not supported yet" in problem.message and "M (Mamba), * (attention), - (MLP)" in problem.message
    with pytest.raises(ProblemsError) as caught:
        architecture(f"M-{letter}" * 9 + "x")
    one, other = (p.message for p in caught.value.problems)
    assert one.startswith("layers 2, 5, 8, 11, ... (9 of them) of 28: ") and other.startswith("layer 27 of 28: 'x'")


def test_an_unknown_letter_is_no_layer_kind() -> None:
    with pytest.raises(ProblemsError, match="layer 1 of 3: 'x' is no layer kind"):
        architecture("Mx-")


def test_an_architecture_reports_every_bad_size() -> None:
    with pytest.raises(ProblemsError) as caught:
        architecture(mamba_num_heads=10, num_attention_heads=6)
    assert set(problems_of(caught.value)) == {"model.mamba_num_heads", "model.num_attention_heads"}
    with pytest.raises(ProblemsError) as caught:
        architecture(hidden_size=0, vocab_size=-1)
    assert set(problems_of(caught.value)) == {"model.hidden_size", "model.vocab_size"}


def test_illegal_choices_come_with_their_legal_neighbours() -> None:
    with pytest.raises(ProblemsError) as caught:
        ElasticDim(name="mamba_num_heads", full=128, groups=8, choices=(50, 64, 200, 0))
    messages = [p.message for p in caught.value.problems]
    assert messages[0] == "50 must be a multiple of 8; nearest: 48, 56"
    assert [m.split()[0] for m in messages] == ["50", "200", "0"]


def test_only_dims_of_layers_can_be_per_layer() -> None:
    with pytest.raises(ProblemsError, match="hidden_size has one value per net"):
        ElasticDim(name="hidden_size", full=48, groups=1, choices=(24,), per_layer=True)


def test_choices_hold_the_parent_first_and_descend() -> None:
    dim = ElasticDim(name="ffn_hidden_size", full=64, groups=4, choices=(16, 48, 16))
    assert dim.choices == (64, 48, 16)


@pytest.mark.parametrize(
    ("ratio", "full", "groups", "size"),
    [(0.29, 100, 1, 29), (0.57, 100, 1, 57), (0.714, 20480, 8, 14624), (0.01, 128, 8, 8), (1.0, 128, 8, 128)],
)
def test_ratios_are_rounded_once_to_the_nearest_legal_size(ratio: float, full: int, groups: int, size: int) -> None:
    """int(0.29 * 100) is 28 (METHOD trap 7)."""
    (found,), _ = resolve_choices("hidden_size", [ratio], full, groups)
    assert found == size
    assert not any(abs(n - ratio * full) < abs(found - ratio * full) for n in range(groups, full + 1, groups))


def test_rounding_is_reported() -> None:
    _, notes = resolve_choices("mamba_num_heads", [0.7, 0.5, 56], 128, 8)
    assert notes == ["mamba_num_heads: ratio 0.7 of 128 rounded to 88 (multiple of 8)"]


def test_every_unreadable_choice_is_reported() -> None:
    with pytest.raises(ProblemsError) as caught:
        resolve_choices("hidden_size", [1.5, True, "x", -0.5, 24], 48, 1)
    assert len(caught.value.problems) == 4


def test_all_problems_of_a_subnet_at_once(space: ElasticSpace) -> None:
    with pytest.raises(ProblemsError) as caught:
        space.subnet(
            hidden_size=96,
            ffn_hidden_size=[64, 30, 16],
            mamba_num_heads=10,
            num_attention_heads=[4, 4, 4],
            layers=[3, 1, 8],
        )
    found = problems_of(caught.value)
    assert set(found) == {"hidden_size", "ffn_hidden_size", "mamba_num_heads", "num_attention_heads", "layers"}
    assert found["ffn_hidden_size"] == "30 must be a multiple of 4; nearest: 28, 32"
    assert found["num_attention_heads"] == "3 sizes given, the parent has 2 such layers"


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"hidden_sise": 24}, "hidden_sise"),
        ({"hidden_size": 24.0}, "hidden_size"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"mamba_head_dim": [8, 8, 8]}, "mamba_head_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": -1}, "num_layers"),
        ({"num_layers": 9}, "num_layers"),
        ({"num_layers": 3, "layers": [0, 1]}, "num_layers"),
        ({"layers": []}, "layers"),
        ({"layers": [0, 0]}, "layers"),
        ({"layers": "01"}, "layers"),
    ],
)
def test_what_is_no_subnet_is_refused(space: ElasticSpace, sizes: dict, key: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        space.subnet(**sizes)
    assert set(problems_of(caught.value)) == {key}


def test_an_unknown_dim_suggests_the_known_one(space: ElasticSpace) -> None:
    with pytest.raises(ProblemsError, match="did you mean 'hidden_size'"):
        space.subnet_from_dict({"hidden_sise": 24})


def test_depth_keeps_the_first_of_the_ranking(space: ElasticSpace) -> None:
    for n in range(1, 9):
        assert set(space.kept_layers(n)) == set((0, 7, 3, 1, 4, 6, 2, 5)[:n])
        assert space.subnet(num_layers=n).layers == tuple(sorted(space.kept_layers(n)))


@pytest.mark.parametrize("ranking", [(0, 1, 2), (0, 0, 1, 2, 3, 4, 5, 6), tuple(range(1, 9))])
def test_a_ranking_names_every_layer_once(ranking: tuple[int, ...]) -> None:
    with pytest.raises(ProblemsError, match="each of the 8 layers once"):
        ElasticSpace(architecture=architecture(), ffn_groups=4, depth_ranking=ranking)


@pytest.mark.parametrize("pattern", ["M", "M-", "M-*", "M-M*M-*-", "M-" * 31])
def test_the_assumed_ranking_names_every_layer_once(pattern: str) -> None:
    ranking = even_thinning(architecture(pattern))
    assert sorted(ranking) == list(range(len(pattern)))
    assert ElasticSpace(architecture=architecture(pattern), ffn_groups=4).depth_is_assumed


def test_ffn_groups_must_divide() -> None:
    with pytest.raises(ProblemsError, match=r"must divide model\.ffn_hidden_size=64"):
        ElasticSpace(architecture=architecture(), ffn_groups=7)


def random_subnet(space: ElasticSpace, rng: random.Random) -> dict:
    arch, groups = space.architecture, dim_groups(space.architecture, space.ffn_groups)

    def size(name: str) -> int:
        return groups[name] * rng.randint(1, getattr(arch, name) // groups[name])

    counts = {"ffn_hidden_size": "-", "mamba_num_heads": "M", "num_attention_heads": "*"}
    sizes: dict = {n: [size(n) for _ in arch.layers_of(counts[n])] if n in counts else size(n) for n in USUAL_WIDTHS}
    sizes["layers"] = sorted(rng.sample(range(arch.num_layers), rng.randint(1, arch.num_layers)))
    return sizes


def test_subnets_survive_their_dict(space: ElasticSpace) -> None:
    rng = random.Random(0)
    for _ in range(50):
        subnet = space.subnet(**random_subnet(space, rng))
        assert space.subnet_from_dict(subnet.to_dict()) == subnet


def test_nestedness_is_a_partial_order_by_units(space: ElasticSpace) -> None:
    """Nested means: the kept (dim, layer, unit) sets are subsets, written out here unit by unit."""
    rng = random.Random(1)

    def units(sizes: dict) -> set:
        kept = {("layer", i) for i in sizes["layers"]}
        for name in USUAL_WIDTHS:
            row = sizes[name] if isinstance(sizes[name], list) else [sizes[name]]
            per_group = dim_groups(space.architecture, 4)[name]
            kept |= {
                (name, i, g, u) for i, n in enumerate(row) for g in range(per_group) for u in range(n // per_group)
            }
        return kept

    seen = {True: 0, False: 0}
    for _ in range(200):
        a = random_subnet(space, rng)
        b = random_subnet(space, rng)
        if rng.random() < 0.5:  # make b larger than a
            for name in USUAL_WIDTHS:
                both = (a[name], b[name])
                b[name] = [max(p) for p in zip(*both, strict=True)] if isinstance(a[name], list) else max(both)
            b["layers"] = sorted({*a["layers"], *b["layers"]})
        nested = space.subnet(**a).is_nested_in(space.subnet(**b))
        assert nested == (units(a) <= units(b))
        seen[nested] += 1
    assert min(seen.values()) > 50


def test_smaller_choices_nest(space: ElasticSpace) -> None:
    full = space.full_subnet()
    for name in (*USUAL_WIDTHS, DEPTH):
        groups = dim_groups(space.architecture, 4)[name]
        small, large = (space.subnet(**{name: k * groups}) for k in (1, 2))
        assert small.is_nested_in(large) and large.is_nested_in(full) and not large.is_nested_in(small)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("fraction", 1.5), ("fraction", 0), ("parameters", -1), ("memory_gb", float("nan")), ("flops", 1)],
)
def test_budgets_that_cannot_be(kind: str, value: float) -> None:
    with pytest.raises(ProblemsError, match=r"elastic\.budgets\.small"):
        Budget(name="small", kind=kind, value=value)


def test_only_the_whole_fraction_is_the_full_budget() -> None:
    assert Budget(name="a", kind="fraction", value=1.0).is_full
    assert not Budget(name="a", kind="fraction", value=0.999).is_full
    assert not Budget(name="a", kind="memory_gb", value=1.0).is_full
