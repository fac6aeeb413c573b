"""What `rank` writes is what is read; torn, foreign and ill-shaped files are refused with a remedy."""

import dataclasses
import json

import pytest
import torch
from test_sorting import LAYOUT, TINY, orders_layers

from nemo_elastic.importance.scores import check_choices
from nemo_elastic.importance.store import DESCRIPTION, TENSORS, Importance
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.dims import WIDTH_DIMS


@pytest.fixture
def importance():
    generator = torch.Generator().manual_seed(1)
    widths = {
        dim: {layer: torch.rand(getattr(TINY, dim), generator=generator) for layer in orders_layers(dim)}
        for dim in WIDTH_DIMS
    }
    widths["hidden_size"][TINY.num_layers] = torch.rand(TINY.hidden_size, generator=generator)
    ranking = (7, 0, 3, 1, 2, 4, 6, 5)
    return Importance(
        widths=widths,
        depth_scores={layer: 1.0 / (1 + place) for place, layer in enumerate(ranking)},
        depth_ranking=ranking,
        provenance={"seed": 3, "settings": {"ffn_site": "linear_fc2_input"}},
    )


def test_round_trip(importance, tmp_path):
    importance.save(tmp_path, TINY)
    again = Importance.load(tmp_path, TINY)
    assert again.depth_ranking == importance.depth_ranking
    assert again.depth_scores == importance.depth_scores
    assert again.provenance == importance.provenance
    for dim, rows in importance.widths.items():
        assert all(torch.equal(again.widths[dim][layer], scores) for layer, scores in rows.items())
    for layer, by_dim in importance.orders(LAYOUT).items():
        assert all(torch.equal(again.orders(LAYOUT)[layer][dim], order) for dim, order in by_dim.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [DESCRIPTION, TENSORS]


def test_missing_and_torn_files_say_what_to_do(importance, tmp_path):
    with pytest.raises(ProblemsError, match="run `nemo-elastic rank` first"):
        Importance.load(tmp_path, TINY)
    importance.save(tmp_path, TINY)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:-8])
    with pytest.raises(ProblemsError, match="rank again"):
        Importance.load(tmp_path, TINY)


def test_scores_of_another_parent_are_refused(importance, tmp_path):
    importance.save(tmp_path, TINY)
    with pytest.raises(ProblemsError, match="hidden_size: was ranked with 48, the parent has 64"):
        Importance.load(tmp_path, dataclasses.replace(TINY, hidden_size=64))


def test_another_format_is_refused(importance, tmp_path):
    importance.save(tmp_path, TINY)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(ProblemsError, match="has format 99, this version reads 1"):
        Importance.load(tmp_path, TINY)


def test_ill_shaped_scores_are_not_saved(importance, tmp_path):
    importance.widths["ffn_hidden_size"][1] = torch.rand(3)
    importance.widths["num_attention_heads"][3] = torch.full((8,), float("nan"))
    with pytest.raises(ProblemsError) as caught:
        importance.save(tmp_path, TINY)
    assert [p.key for p in caught.value.problems] == [
        "importance.ffn_hidden_size.1",
        "importance.num_attention_heads.3",
    ]


def test_unknown_choices_are_all_named_with_the_nearest():
    with pytest.raises(ProblemsError) as caught:
        check_choices(ffn_site="linear_fc2_inputs", aggregation="mean_l3", mamba_site="out_proj_input")
    assert [str(p) for p in caught.value.problems] == [
        "rank.ffn_site: 'linear_fc2_inputs' is no choice; did you mean 'linear_fc2_input'?",
        "rank.aggregation: 'mean_l3' is no choice; did you mean 'mean_l2'?",
    ]
