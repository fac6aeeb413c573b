"""A family with experts on its way: nested, read out, opened by NeMo, verified; refused where none can say experts."""

from dataclasses import replace
from pathlib import Path

import expert_features
import pool_experts
import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights
from pool_elastic import random_weights as weights_of
from test_dense_checkpoints import batches
from worker_pool import WorkerPool

from nemo_elastic.config import load_config
from nemo_elastic.config.load import plain
from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.nemo.export.checkpoints import extract_all, write_nested
from nemo_elastic.problems import ProblemsError

pytestmark = pytest.mark.usefixtures("one_rank")


def nested_family(folder: Path, feature: str) -> Path:
    """`small` has half of the neurons of each expert, and lacks two layers."""
    expert_features.skip_without_slot()
    said = expert_features.SIZES | expert_features.FEATURES[feature]
    model = {**MODEL, "hybrid_override_pattern": "ME*-MEM*", **{name: value for name, value in said.items() if value}}
    config = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    family = replace(manifest(model), provenance={"config": plain(config)})
    small = family.space.subnet(hidden_size=32, moe_ffn_hidden_size=8, mamba_num_heads=8, num_layers=6)
    family = replace(family, subnets=family.subnets | {"small": small})
    return write_nested(folder / "nested", random_weights(model), family, tokenizer=TOKENIZER)


@pytest.mark.parametrize("feature", ["nemotron", "granite", "qwen"])
def test_nemo_opens_a_child_as_the_function_that_was_trained(tmp_path: Path, feature: str) -> None:
    from nemo_elastic.nemo.export.verify import verify

    nested = nested_family(tmp_path, feature)
    extract_all(nested, tmp_path / "children")
    config = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    children = {name: tmp_path / "children" / name for name in ("large", "small")}
    for check in verify(nested, children, config, batches()):
        assert check.ok and check.difference is None, check
        assert check.comparison.relative < 1e-6


def test_who_cannot_say_experts_refuses_them(tmp_path: Path) -> None:
    nested = nested_family(tmp_path, "nemotron")
    with pytest.raises(ProblemsError) as error:
        extract_all(nested, tmp_path / "out", format="gguf")
    assert "'E' (mixture of experts) cannot be said in llama.cpp's nemotron_h" in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("feature", ["granite", "latent"])
def test_megatrons_checkpoints_hold_whole_experts_at_any_layout(
    tmp_path: Path, pool2: WorkerPool, pool4: WorkerPool, feature: str
) -> None:
    """Saved at TP 2 (gate and up apart), EP 2 and both; read by offsets, and loaded by Megatron at other layouts."""
    arch, _ = expert_features.parts(feature)
    wanted = weights_of(arch, torch.float64)
    saves = ((pool2, "two", {"tp": 2}), (pool2, "shared", {"ep": 2}), (pool4, "four", {"tp": 2, "pp": 2}),
             (pool4, "both", {"tp": 2, "ep": 2}))  # fmt: skip
    for pool, name, layout in saves:
        pool.run(pool_experts.save, str(tmp_path / name), feature, **layout)
        reader = TorchDistReader(tmp_path / name)
        assert set(reader.names()) == set(wanted)
        assert all(
            torch.equal(reader.read(n).to(w.dtype), w.to(reader.dtype(n)).to(w.dtype)) for n, w in wanted.items()
        )
    loads = (("four", {"tp": 2}), ("two", {"pp": 2}), ("both", {"pp": 2}), ("four", {"ep": 2}), ("shared", {"tp": 2}))
    for folder, layout in loads:
        for rank in pool2.run(pool_experts.load, str(tmp_path / folder), feature, **layout):
            assert rank and all(torch.equal(w, wanted[n].to(w.dtype)) for n, w in rank.items())
