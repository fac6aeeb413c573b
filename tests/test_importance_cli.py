"""`rank` and `sort` on the shipped parent, as a user calls them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.config.parent_files import ASSETS
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
    from nemo_elastic.mcore.models.parents import open_parent, sorted_parent

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


@pytest.fixture(scope="module")
def own(one_rank, tmp_path_factory):
    """A parent of one's own, ranked: (folder of the run, its words)."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(ASSETS / "tiny_parent", folder / "parent")
    words = ["--config", "tiny_parent.yaml", "--out", str(folder / "run"), f"parent.path={folder / 'parent'}"]
    words.append(f"data.tokenizer={folder / 'parent' / 'tokenizer.json'}")
    assert main(["rank", *words, *SMALL]) == 0
    return folder, words


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("decoder.layers.0.mixer.in_proj.weight", 1.5),  # a large tensor, of which a part is looked at
        ("decoder.layers.0.mixer.in_proj.weight", 1.01),
        ("decoder.final_norm.weight", 1.5),
    ],
)
def test_scores_of_other_weights_are_refused(own, name, by, capsys):
    folder, words = own
    file = folder / "parent" / "model.safetensors"
    stock = file.read_bytes()
    tensors = load_file(file)
    tensors[name] *= by
    save_file(tensors, file)
    try:
        assert main(["sort", *words, *SMALL]) == 2
        told = capsys.readouterr().err
        assert "has other weights than when it was ranked" in told and "rank again" in told
        assert not (folder / "run" / "sorted").exists()
    finally:
        file.write_bytes(stock)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rank.samples=8"], "rank.samples: 8, but the parent was ranked with 4; give that, or"),
        (["rank.ffn_site=linear_fc1_output"], "rank.ffn_site: 'linear_fc1_output', but"),
        (["model.layernorm_epsilon=1.0e-3"], "model.layernorm_epsilon: 0.001, but the parent was ranked without it"),
        (["elastic.dims.num_layers.choices=[16,10]"], "go down to 10 layers, but the parent was ranked down to 14"),
        (["elastic.dims.mamba_head_dim.choices=[16,8]"], "by their first 16"),
    ],
)
def test_scores_that_were_measured_otherwise_are_refused_by_key(own, words, told, capsys):
    assert main(["sort", *own[1], *SMALL, *words]) == 2
    assert told in capsys.readouterr().err


def test_what_a_configuration_leaves_open_is_taken_as_it_was_ranked(own, tmp_path, capsys):
    from nemo_elastic.importance.belongs import foreign_scores

    resolved = load_config("tiny_parent.yaml", [*own[1][4:], SMALL[-1]])
    family = family_of(resolved.config)
    provenance = json.loads((own[0] / "run" / "importance" / "importance.json").read_text())["provenance"]
    assert resolved.config.rank.samples != provenance["config"]["samples"] == 4
    assert foreign_scores(provenance, resolved.config, family, given={"rank.seed"}) == []
    (found,) = foreign_scores(provenance, resolved.config, family, given={"rank.samples"})
    assert found.key == "rank.samples"


def test_a_sorted_parent_must_be_sorted_by_these_scores(own, capfd):
    from nemo_elastic.config import load_config as load
    from nemo_elastic.family import Configured
    from nemo_elastic.nemo.pipeline import Run
    from nemo_elastic.nemo.run.ranking import stored_importance
    from nemo_elastic.problems import ProblemsError

    folder, words = own
    run = folder / "run"
    assert main(["sort", *words, *SMALL]) == 0
    moved = ["parent.path=builtin:tiny_parent"]  # the same weights at another place
    for more, fits in (([], True), (moved, True), (["elastic.ffn_groups=16"], False)):
        resolved = load("tiny_parent.yaml", [*words[4:], *SMALL, *more])
        configured = Configured(resolved)
        work, importance = Run(configured, run), stored_importance(configured, run)
        if fits:
            assert work.sort(importance) == run / "sorted"
        else:
            with pytest.raises(ProblemsError, match="is sorted by other scores, ffn_groups or expert_groups"):
                work.sort(importance)
    (run / "checkpoints" / "step=9").mkdir(parents=True)
    assert main(["sort", *words, *SMALL, "--force"]) == 2
    assert "has checkpoints that were trained from its sorted parent" in capfd.readouterr().err
    assert main(["rank", *words, *SMALL]) == 2
    assert "has checkpoints that were trained by its scores" in capfd.readouterr().err
