"""A vocabulary that TP does not divide: runs and resumes at TP 2 are those at TP 1, and what is kept has no padding.

2,049 rows: 2,050 in the training checkpoints of TP 2, 2,049 in all that is made of them. The rate is low, as Adam
makes full steps of the signs of tiny gradients, and runs at two layouts would drift apart (docs/numerics.md). Gradients
and steps of full size are compared in `test_family_parallel.py`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_family import MODEL
from small_run import Server, records

from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.importance.store import Importance

pytest.importorskip("nemo.lightning")
pytestmark = pytest.mark.slow
ROWS, TP2 = 2049, "train.tensor_model_parallel_size=2"
MORE = (
    "train.use_distributed_optimizer=true", "train.save_every_steps=3", "train.val_every_steps=3",
    "train.optimizer.lr=1.0e-5", "train.optimizer.min_lr=1.0e-6",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`whole` was ranked and ran at TP 1, `tp2` at TP 2, six steps each."""
    server = Server(tmp_path_factory.mktemp("odd"), steps=6, vocab_size=ROWS)
    server.run(server.folder / "whole", *MORE)
    server.run(server.folder / "tp2", TP2, *MORE, size=2)
    yield server
    server.close()


def assert_same(found: Path, expected: Path, steps: range) -> None:
    """Losses of every step, held-out losses, and the nested weights."""
    ours, theirs = ({r["step"]: r for r in records(out, "train")} for out in (found, expected))
    assert [*ours] == [*steps]
    for step, record in ours.items():
        for name, budget in record["budgets"].items():
            assert budget["kd"] == pytest.approx(theirs[step]["budgets"][name]["kd"], rel=1e-5, abs=1e-6)
    mine, other = (records(out, "validation")[-1] for out in (found, expected))
    assert mine["losses"] == pytest.approx(other["losses"], rel=1e-5)
    left, right = (weights(out / "nested") for out in (found, expected))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor - right[name]).norm() <= 1e-5 * right[name].norm(), name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

    with TorchDistReader(folder) as reader:
        return {name: reader.read(name) for name in reader.names()}


def vocabularies(folder: Path) -> set[int]:
    """Rows of embedding and output layer, and of their optimizer state."""
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

    with TorchDistReader(folder) as reader:
        keys = [k for k in reader._stored if k.endswith(("word_embeddings.weight", "output_layer.weight"))]
        assert len(keys) in (2, 8)  # with fp32 weights and two moments, or without
        return {reader._stored[k].shape[0] for k in keys}


def depth_scores(out: Path) -> dict[int, float]:
    architecture = architecture_of(MODEL | {"vocab_size": ROWS})
    return dict(Importance.load(out / "importance", architecture).depth_scores)


def test_tp_2_is_tp_1(runs: Server) -> None:
    assert depth_scores(runs.folder / "tp2") == pytest.approx(depth_scores(runs.folder / "whole"), rel=1e-5)
    assert_same(runs.folder / "tp2", runs.folder / "whole", range(1, 7))
    assert vocabularies(runs.folder / "tp2" / "checkpoints" / "step=5") == {ROWS + 1}
    assert vocabularies(runs.folder / "whole" / "checkpoints" / "step=5") == {ROWS}
    assert vocabularies(runs.folder / "tp2" / "nested") == {ROWS}


@pytest.mark.parametrize(("begun", "overrides"), [("tp2", ()), ("whole", (TP2,))], ids=["2_to_1", "1_to_2"])
def test_a_resume_at_the_other_layout(runs: Server, begun: str, overrides: tuple[str, ...]) -> None:
    out = runs.folder / f"{begun}_again"
    shutil.copytree(runs.folder / begun, out)
    shutil.rmtree(out / "checkpoints" / "step=5")
    shutil.rmtree(out / "nested")
    (out / "logs" / "train.jsonl").unlink()
    runs.run(out, *overrides, *MORE, resume=True, size=1 + len(overrides))
    assert_same(out, runs.folder / "whole", range(4, 7))


def test_children_have_no_padding(runs: Server, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from nemo_elastic.nemo.export.checkpoints import extract

    nested = runs.folder / "tp2" / "nested"
    assert vocabularies(extract(nested, "full", tmp_path / "nemo")) == {ROWS}
    child = extract(nested, "small", tmp_path / "hf", format="hf", hf_schema="per_layer_config")
    tensors = load_file(child / "model.safetensors")
    assert {tensors[name].shape[0] for name in ("backbone.embeddings.weight", "lm_head.weight")} == {ROWS}
    assert json.loads((child / "config.json").read_text())["vocab_size"] == ROWS
