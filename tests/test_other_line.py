"""A family trained and saved under one line of megatron-core goes on under another, in both directions.

Run by `make test-engine` and `make smoke-engine`, which name the Python of the other line (`NEMO_ELASTIC_OTHER_LINE`);
skipped elsewhere. Each line has one process that imports NeMo and forks (small_run.Server).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_run import Server

from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

OTHER = os.environ.get("NEMO_ELASTIC_OTHER_LINE", "")
VERSION = "import megatron.core; print(megatron.core.__version__)"
pytestmark = pytest.mark.skipif(not OTHER, reason="only with a second line: make test-engine, make smoke-engine")


@dataclass(frozen=True)
class Family:
    """A small run of one line, its nested checkpoint and a child, and the servers of that line and of the other."""

    made_by: Server
    other: Server
    run: Path
    child: Path


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """A server of the line under test, and one of the other."""
    found = [subprocess.check_output([python, "-W", "ignore", "-c", VERSION]) for python in (sys.executable, OTHER)]
    assert found[0] != found[1]
    servers = [Server(tmp_path_factory.mktemp("line"), python=python) for python in (sys.executable, OTHER)]
    for server in servers:  # a NeMo child has one size for all layers
        server.config.write_text(server.config.read_text().replace(", per_layer: true", ""))
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module", params=["old to new", "new to old"])
def family(request: pytest.FixtureRequest, lines: list[Server]) -> Family:
    made_by, other = lines if request.param == "old to new" else reversed(lines)
    run = made_by.folder / "run"
    child = run / "children" / "small"
    made_by.call("train", "--config", made_by.config, "--out", run, log=made_by.folder / "train.log")
    made_by.call("extract", run / "nested", "--budget", "small", "--out", child, log=made_by.folder / "extract.log")
    return Family(made_by, other, run, child)


def test_a_child_verifies_under_the_other_line(family: Family, tmp_path: Path) -> None:
    text = family.other.call("verify", "--json", family.run / "nested", family.child, log=tmp_path / "log")
    assert '"verified": true' in text


def test_a_child_trains_on_under_the_other_line(family: Family, tmp_path: Path) -> None:
    """From the very weights, to the same losses as under the line that made it."""
    found = []
    for name, line in (("own", family.made_by), ("other", family.other)):
        (tmp_path / name).mkdir()
        line.call(family.child, tmp_path / name, log=tmp_path / f"{name}.log", module="train_child")
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    own, other = found
    assert other["restored"] == own["restored"]
    assert len(own["losses"]) == 2 and other["losses"] == pytest.approx(own["losses"], rel=1e-5)


def test_a_run_is_resumed_under_the_other_line(family: Family, tmp_path: Path) -> None:
    """Weights, router and the optimizer's states: the last four steps end where they ended."""
    again = tmp_path / "run"
    shutil.copytree(family.run, again)
    shutil.rmtree(again / "nested")
    shutil.rmtree(again / "checkpoints" / "step=15")
    config = family.made_by.config
    family.other.call("train", "--config", config, "--out", again, "--resume", log=tmp_path / "resume.log")
    ends = [TorchDistReader(out / "checkpoints" / "step=15") for out in (family.run, again)]
    with ends[0] as whole, ends[1] as resumed:
        assert set(whole.names()) == set(resumed.names()) and set(whole.other_keys()) == set(resumed.other_keys())
        for name in whole.names():
            torch.testing.assert_close(resumed.read(name), whole.read(name), rtol=1e-4, atol=1e-6, msg=name)
        for key in whole.other_keys():
            torch.testing.assert_close(resumed.read_key(key), whole.read_key(key), rtol=1e-3, atol=1e-6, msg=key)
