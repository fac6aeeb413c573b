"""torch_dist weights against stock Megatron, in both directions and at any layout.

read(stock save at TP x PP) == weights == stock load(write(weights)) at TP' x PP', bit by bit
"""

from pathlib import Path

import pool_checkpoint
import pytest
import torch
from checkpoint_family import MODEL, random_weights
from worker_pool import WorkerPool

from nemo_elastic.checkpoint.reader import MemoryReader, check_against_layout, lazy_tensors
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.config.sections import ParentConfig
from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.checkpoint.dist_save import write_torch_dist
from nemo_elastic.mcore.checkpoint.held_checkpoint import refuse_hostile
from nemo_elastic.mcore.checkpoint.preflight import read_metadata
from nemo_elastic.mcore.models.parents import open_parent
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.slicing import unshard

LAYOUT = ParamLayout(architecture_of(MODEL))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (torch.equal takes -0.0 for 0.0)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def assemble(ranks: list[dict[str, tuple[int, torch.Tensor]]], tp: int) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's shards."""
    layout, parts = ParamLayout(architecture_of(MODEL), tp_size=tp), {}
    for rank in ranks:
        for name, (number, shard) in rank.items():
            parts.setdefault(name, {})[number] = shard
    return {name: unshard([by[n] for n in range(tp)], layout.table[name]) for name, by in parts.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, written by us."""
    folder = tmp_path_factory.mktemp("written") / "weights"
    write_torch_dist(folder, lazy_tensors(MemoryReader(random_weights(seed=3))), LAYOUT)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, pool4: WorkerPool) -> Path:
    """The same weights, saved by stock Megatron at TP2 x PP2."""
    folder = tmp_path_factory.mktemp("stock") / "weights"
    pool4.run(pool_checkpoint.stock_save, str(folder), 3, tp=2, pp=2)
    return folder


def test_stock_checkpoint_of_two_by_two_is_read_whole(stock: Path) -> None:
    weights = random_weights(seed=3)
    with TorchDistReader(stock) as reader:
        check_against_layout(reader, LAYOUT, "stock")
        assert all(same_bytes(reader.read(name), value) for name, value in weights.items())
        assert {n: reader.shape(n) for n in weights} == {n: tuple(v.shape) for n, v in weights.items()}
        chunks = read_metadata(stock).tensors["module.decoder.layers.0.mixer.in_proj.weight.z"].chunks
        assert len(chunks) == 2  # or this test would not have put anything together


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (4, 1), (1, 4)])
def test_stock_megatron_loads_what_we_write(written: Path, pool4: WorkerPool, tp: int, pp: int) -> None:
    loaded = assemble(pool4.run(pool_checkpoint.stock_load, str(written), tp=tp, pp=pp), tp)
    weights = random_weights(seed=3)
    assert set(loaded) == set(weights)
    assert all(same_bytes(loaded[name], weights[name]) for name in weights)


def test_saved_at_two_by_two_loads_the_same_at_one(stock: Path, one_rank: None) -> None:
    loaded = {name: value for name, (_, value) in pool_checkpoint.stock_load(str(stock)).items()}
    assert all(same_bytes(loaded[name], value) for name, value in random_weights(seed=3).items())


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (1, 4)])
def test_there_and_back_through_another_layout(
    stock: Path, tmp_path: Path, pool4: WorkerPool, tp: int, pp: int
) -> None:
    """TP2 x PP2 -> stock load and save at another layout -> our reader -> our writer -> stock load at TP2 x PP2."""
    pool4.run(pool_checkpoint.stock_copy, str(stock), str(tmp_path / "there"), tp=tp, pp=pp)
    with TorchDistReader(tmp_path / "there") as reader:
        weights = random_weights(seed=3)
        assert all(same_bytes(reader.read(name), value) for name, value in weights.items())
        write_torch_dist(tmp_path / "ours", lazy_tensors(reader), LAYOUT)
    for folder in ("there", "ours"):
        loaded = assemble(pool4.run(pool_checkpoint.stock_load, str(tmp_path / folder), tp=2, pp=2), 2)
        assert set(loaded) == set(weights) and all(same_bytes(loaded[name], weights[name]) for name in weights)


def test_keys_are_exactly_those_of_stock_megatron(written: Path, one_rank: None) -> None:
    metadata = read_metadata(written)
    ours, theirs = set(metadata.tensors) | set(metadata.objects), pool_checkpoint.stock_keys()
    assert theirs <= ours
    # What else is there are states that some versions of Transformer Engine ask for and others ignore.
    assert {k.split(".")[-2] for k in ours - theirs} == {"core_attention", "final_norm"}
    assert set(metadata.tensors) == {k for k in theirs if "_extra_state" not in k}


def test_stock_to_ours_to_stock_keeps_every_byte(stock: Path, tmp_path: Path) -> None:
    reader = TorchDistReader(stock)
    hashes = write_torch_dist(tmp_path / "w", lazy_tensors(reader), LAYOUT, shard_bytes=100_000)
    assert sum(name.endswith(".distcp") for name in hashes) > 2
    again = TorchDistReader(tmp_path / "w")
    assert all(same_bytes(again.read(name), reader.read(name)) for name in LAYOUT.table)
    refuse_hostile(tmp_path / "w")
    refuse_hostile(stock)


def test_bfloat16_and_views_survive(tmp_path: Path) -> None:
    weights = {n: v.to(torch.bfloat16) for n, v in random_weights().items()}
    wide = torch.randn(4, 7, 96, dtype=torch.float32)
    weights["decoder.final_norm.weight"] = wide[1, 2, ::2].to(torch.bfloat16)
    write_torch_dist(tmp_path / "w", lazy_tensors(MemoryReader(weights)), LAYOUT)
    reader = TorchDistReader(tmp_path / "w")
    assert all(same_bytes(reader.read(name), value) for name, value in weights.items())


def test_nemo_training_keys_that_are_no_weights_are_kept_apart(tmp_path: Path) -> None:
    from nemo_elastic.checkpoint.reader import LazyTensor

    extra = LazyTensor("module.router.hidden_size.weight", torch.float32, (3, 2), lambda: torch.ones(3, 2))
    write_torch_dist(tmp_path / "w", lazy_tensors(MemoryReader(random_weights())), LAYOUT, extra=[extra])
    reader = TorchDistReader(tmp_path / "w")
    assert set(reader.names()) == set(LAYOUT.table)
    assert reader.other_keys() == [extra.name]
    assert torch.equal(reader.read_key(extra.name), torch.ones(3, 2))


def test_a_tied_parent_with_another_output_layer(written: Path, tmp_path: Path) -> None:
    """Said, and refused unless told which one counts; the same matrix twice is no contradiction."""
    tied = ParamLayout(architecture_of({**MODEL, "share_embeddings_and_output_weights": True}))
    with pytest.raises(ProblemsError, match=r"output_layer\.weight is not embedding\..*; say which one counts"):
        open_parent(str(written), tied)
    reader = open_parent(ParentConfig(path=str(written), output_weights="embedding"), tied)
    assert set(reader.names()) == set(tied.table)
    untied = open_parent(ParentConfig(path=str(written), output_weights="lm_head"), LAYOUT)
    assert same_bytes(untied.read("output_layer.weight"), random_weights(seed=3)["output_layer.weight"])
    weights = random_weights(seed=3)
    weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"].clone()
    write_torch_dist(tmp_path / "weights", lazy_tensors(MemoryReader(weights)), LAYOUT)
    assert "output_layer.weight" not in open_parent(str(tmp_path), tied).names()
