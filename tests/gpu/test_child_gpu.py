"""An extracted child trains on under plain NeMo and Transformer Engine, in a process without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_family import TOKENIZER, manifest, random_weights

from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.kernels.layer_specs import have_transformer_engine
from nemo_elastic.nemo.export.checkpoints import extract, write_nested

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not have_transformer_engine(), reason="needs NeMo's GPU stack"),
]


def test_child_is_fine_tuned_without_this_package(tmp_path: Path) -> None:
    weights = random_weights(dtype=torch.bfloat16)
    nested = write_nested(tmp_path / "nested", weights, manifest(), tokenizer=TOKENIZER)
    child, out = extract(nested, "small", tmp_path / "child"), tmp_path / "run"
    out.mkdir()
    script = Path(__file__).parent / "train_child_gpu.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script), str(child), str(out)]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["ours"] == [] and len(result["losses"]) == 2 and all(0 < loss < 20 for loss in result["losses"])
    with TorchDistReader(child) as reader:
        sums = sorted(float(reader.read(name).double().sum()) for name in reader.names())
    assert all(abs(a - b) < 1e-6 for a, b in zip(sums, sorted(result["restored"].values()), strict=True))
