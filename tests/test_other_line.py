"""A family trained and saved under one line of megatron-core goes on under another, in both directions.

Run by `make test-engine`, which names the Python of the other line (`NEMO_ELASTIC_OTHER_LINE`); skipped elsewhere.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_run import write_run

from nemo_elastic.mcore.dist_checkpoint import TorchDistReader

OTHER = os.environ.get("NEMO_ELASTIC_OTHER_LINE", "")
TESTS = Path(__file__).parent
VERSION = "import megatron.core; print(megatron.core.__version__)"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not OTHER, reason="only with a second line: make test-engine")]


def run(python: str, *words: str) -> str:
    """What a command says on stdout; its stderr where it fails."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [python, "-W", "ignore", *words], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def nemo_elastic(python: str, *words: object) -> str:
    return run(python, "-m", "nemo_elastic", *map(str, words))


@dataclass(frozen=True)
class Family:
    """A small run of one line, its nested checkpoint and a child, and the Pythons of that line and of the other."""

    made_by: str
    other: str
    config: Path
    run: Path
    child: Path


@pytest.fixture(scope="module", params=["old to new", "new to old"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    made_by, other = (sys.executable, OTHER) if request.param == "old to new" else (OTHER, sys.executable)
    assert run(made_by, "-c", VERSION) != run(other, "-c", VERSION)
    folder = tmp_path_factory.mktemp("made")
    config, out, child = write_run(folder), folder / "run", folder / "run" / "children" / "small"
    config.write_text(config.read_text().replace(", per_layer: true", ""))  # a NeMo child has one size for all layers
    nemo_elastic(made_by, "train", "--config", config, "--out", out)
    nemo_elastic(made_by, "extract", out / "nested", "--budget", "small", "--out", child)
    return Family(made_by, other, config, out, child)


def test_a_child_verifies_under_the_other_line(family: Family) -> None:
    result = json.loads(nemo_elastic(family.other, "verify", "--json", family.run / "nested", family.child))
    assert result["verified"] is True


def test_a_child_trains_on_under_the_other_line(family: Family, tmp_path: Path) -> None:
    """From the very weights, to the same losses as under the line that made it."""
    found = []
    for name, python in (("own", family.made_by), ("other", family.other)):
        (tmp_path / name).mkdir()
        run(python, str(TESTS / "train_child.py"), str(family.child), str(tmp_path / name))
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    own, other = found
    assert other["restored"] == own["restored"]
    assert other["losses"] == pytest.approx(own["losses"], rel=1e-5)


def test_a_run_is_resumed_under_the_other_line(family: Family, tmp_path: Path) -> None:
    """Weights, router and the optimizer's states: the last four steps end where they ended."""
    again = tmp_path / "run"
    shutil.copytree(family.run, again)
    shutil.rmtree(again / "nested")
    shutil.rmtree(again / "checkpoints" / "step=15")
    nemo_elastic(family.other, "train", "--config", family.config, "--out", again, "--resume")
    ends = [TorchDistReader(out / "checkpoints" / "step=15") for out in (family.run, again)]
    with ends[0] as whole, ends[1] as resumed:
        assert set(whole.names()) == set(resumed.names()) and set(whole.other_keys()) == set(resumed.other_keys())
        for name in whole.names():
            torch.testing.assert_close(resumed.read(name), whole.read(name), rtol=1e-4, atol=1e-6, msg=name)
        for key in whole.other_keys():
            torch.testing.assert_close(resumed.read_key(key), whole.read_key(key), rtol=1e-3, atol=1e-6, msg=key)
