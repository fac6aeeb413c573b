"""An extracted NeMo child trains on as a plain `llm.MambaModel`, restored by NeMo itself from weights and context."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_family import TOKENIZER, manifest, random_weights

from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.nemo.export.checkpoints import extract, write_nested

TESTS = Path(__file__).parent
# What a machine without Transformer Engine needs: the local spec's stack, mixer, attention and norms.
LOCAL = {"LocalStack", "Mixer", "CausalAttention", "RMSNorm", "MixerNorm"}


@pytest.mark.slow
def test_child_is_fine_tuned_by_plain_nemo(tmp_path: Path) -> None:
    nested = write_nested(tmp_path / "nested", random_weights(), manifest(), tokenizer=TOKENIZER)
    child, out = extract(nested, "small", tmp_path / "child"), tmp_path / "run"
    out.mkdir()
    command = [sys.executable, str(TESTS / "train_child.py"), str(child), str(out)]
    # Megatron leaves its choice of attention in the environment of the tests that ran before.
    own = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    environment = {**own, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result, reader = json.loads((out / "result.json").read_text()), TorchDistReader(child)
    sums = {name: float(reader.read(name).double().sum()) for name in reader.names()}
    assert result["restored"].keys() == sums.keys()
    assert all(abs(result["restored"][name] - total) < 1e-9 for name, total in sums.items())
    first, second = result["losses"]
    assert second < first < 12
    ours = {name for name in result["classes"] if name.startswith("nemo_elastic")}
    assert {name.rsplit(".", 1)[1] for name in ours} <= LOCAL and not [n for n in ours if ".elastic" in n[12:]]
