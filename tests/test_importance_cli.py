"""`rank` and `sort` on the shipped parent, as a user calls them."""

import json

import pytest
import torch

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.family import family_of
from nemo_elastic.importance.store import Importance

SMALL = ["rank.samples=4", "rank.depth_samples=2", "rank.seq_length=32", "elastic.dims.num_layers.choices=[16,14]"]


@pytest.fixture(scope="module")
def ranked(one_rank, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert main(["rank", "--config", "tiny_parent.yaml", "--out", str(out), "--json", *SMALL]) == 0
    return out


def test_rank_writes_scores_that_load(ranked):
    family = family_of(load_config("tiny_parent.yaml", SMALL).config)
    importance = Importance.load(ranked / "importance", family.architecture)
    assert len(importance.provenance["removed"]) == 2
    assert importance.depth_ranking[-2:] == tuple(reversed(importance.provenance["removed"]))
    assert importance.provenance["source"]["parent"] == "builtin:tiny_parent"
    assert sorted(p.name for p in (ranked / "importance").iterdir()) == ["importance.json", "importance.safetensors"]


def test_sort_writes_the_parent_in_order(ranked, capsys):
    from nemo_elastic.importance.sorting import sort_tensor
    from nemo_elastic.mcore.parents import open_parent, sorted_parent

    assert main(["sort", "--config", "tiny_parent.yaml", "--out", str(ranked), "--json", *SMALL]) == 0
    assert json.loads(capsys.readouterr().out) == {"sorted": str(ranked / "sorted")}
    family = family_of(load_config("tiny_parent.yaml", SMALL).config)
    importance = Importance.load(ranked / "importance", family.architecture)
    parent, found = open_parent("builtin:tiny_parent", family.layout), sorted_parent(ranked / "sorted")
    orders = importance.orders(family.layout)
    for name in ("embedding.word_embeddings.weight", "decoder.layers.0.mixer.in_proj.weight"):
        assert torch.equal(found.reader.read(name), sort_tensor(name, parent.read(name), family.layout, orders))
    assert found.depth_ranking == importance.depth_ranking
    assert main(["sort", "--config", "tiny_parent.yaml", "--out", str(ranked), *SMALL]) == 2  # exists, no --force


def test_sort_before_rank_says_what_is_missing(tmp_path, capsys):
    assert main(["sort", "--config", "tiny_parent.yaml", "--out", str(tmp_path)]) == 2
    assert "run `nemo-elastic rank` first" in capsys.readouterr().err


def test_a_layout_that_cannot_run_is_refused(tmp_path, capsys):
    words = ["train.pipeline_model_parallel_size=3"]
    assert main(["rank", "--config", "tiny_parent.yaml", "--out", str(tmp_path), *words]) == 2
    assert "3 must divide the parent's 16 layers" in capsys.readouterr().err
