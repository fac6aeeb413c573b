"""`--nproc`: what the processes see, and the exit code of the whole. Workers here are a few lines without torch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START = """
import sys
from nemo_elastic.cli import launch
launch.GRACE, launch.PATIENCE = float(sys.argv[4]), 0.5
sys.exit(launch.launch([sys.executable, sys.argv[1], sys.argv[3]], int(sys.argv[2])))
"""
READY = "import os, signal, sys, time; rank = int(os.environ['RANK']); open(sys.argv[1] + f'/{rank}', 'w').close()\n"


def start(folder: Path, script: str, count: int = 2, grace: float = 0.5) -> subprocess.Popen:
    """The launcher over `script`; every worker has made a file named by its rank when this returns.

    `grace`: seconds that workers have when one has failed; long where they end by themselves, on a busy machine too.
    """
    (folder / "worker.py").write_text(READY + script)
    ready = folder / "ready"
    ready.mkdir()
    words = [sys.executable, "-c", START, str(folder / "worker.py"), str(count), str(ready), str(grace)]
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while len(list(ready.iterdir())) < count and launcher.poll() is None:
        time.sleep(0.02)
    return launcher


def end(launcher: subprocess.Popen) -> tuple[int, str]:
    out, err = launcher.communicate(timeout=60)
    assert "Traceback" not in err, err
    return launcher.returncode, out + err


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit(3 * rank)", 3, ""),
        ("time.sleep(9 if rank else 0); sys.exit(1)", 1, ""),  # the others are told to end
        ("signal.signal(15, signal.SIG_IGN); time.sleep(99 if rank else 0); sys.exit(1)", 1, ""),  # ... and killed
        ("time.sleep(0.3 * rank); os.kill(os.getpid(), 9 if rank else 15)", 137, "worker 1 of 2 was ended by SIGKILL"),
        ("time.sleep(0.3 * rank); sys.exit(1 if rank else 143)", 1, ""),  # one was stopped, the other failed at it
    ],
)
def test_the_code_is_the_workers_own(tmp_path: Path, script: str, code: int, words: str) -> None:
    found, text = end(start(tmp_path, script, grace=30 if "0.3 * rank" in script else 0.5))
    assert found == code and words in text, text


def test_a_signal_reaches_every_worker_once_and_nobody_is_hurried(tmp_path: Path) -> None:
    script = """
def hear(*_):
    time.sleep(2.0)  # longer than GRACE and PATIENCE: a checkpoint is being saved
    sys.exit(143)
signal.signal(signal.SIGTERM, hear)
open(sys.argv[1] + f'/{rank}-deaf-no-more', 'w').close()
time.sleep(60)
"""
    launcher = start(tmp_path, script)
    while len(list((tmp_path / "ready").iterdir())) < 4:
        time.sleep(0.02)
    launcher.terminate()
    assert end(launcher) == (143, "")


def test_workers_meet_and_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = """
from nemo_elastic.cli.launch import LAUNCHER, end_with_launcher
end_with_launcher()
assert LAUNCHER not in os.environ and os.environ['WORLD_SIZE'] == os.environ['LOCAL_WORLD_SIZE'] == '2'
import torch.distributed as dist
dist.init_process_group('gloo')
everyone = [None, None]
dist.all_gather_object(everyone, os.getpid())
print(*everyone, flush=True) if rank == 0 else None
time.sleep(60)
"""
    launcher = start(tmp_path, script)
    workers = [int(pid) for pid in launcher.stdout.readline().split()]
    assert len(set(workers)) == 2, launcher.stderr.read()
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their launcher"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_under_torchrun_every_worker_leaves_with_our_code_and_one_speaks(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["train", "--config", "tiny_parent.yaml", "--out", str(tmp_path / "out"), "data.paths=[/nope]"]
    command = [*launcher, "-m", "nemo_elastic", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 1  # torchrun's own, documented
    assert done.stderr.count("data.paths: /nope does not exist") == done.stderr.count("to mend") == 1
    codes = set(re.findall(r"exitcode\s*: (-?\d+)", done.stderr))
    assert "2" in codes and codes <= {"2", "-15"}, done.stderr  # -15: torchrun was faster than the second worker
    assert list(tmp_path.iterdir()) == []


def test_nproc_leaves_with_the_workers_code_and_one_message(tmp_path: Path) -> None:
    words = ["rank", "--config", "tiny_parent.yaml", "--out", str(tmp_path / "out"), "--nproc", "2"]
    bad = [sys.executable, "-m", "nemo_elastic", *words, "train.tensor_model_parallel_size=4"]
    done = subprocess.run(bad, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 2 and done.stderr.count("to mend") == 1 and "Traceback" not in done.stderr
    assert "needs a multiple of 4 processes, 2 started" in done.stderr and list(tmp_path.iterdir()) == []
