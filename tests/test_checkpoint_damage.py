"""Damaged, incomplete and foreign nested checkpoints, full disks and killed extracts: one clear error, and the target
is absent or what it was before.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights

from nemo_elastic.checkpoint import writer
from nemo_elastic.checkpoint.atomic_folder import atomic_folder
from nemo_elastic.checkpoint.manifest import MANIFEST_FILE, check_hashes, load_manifest, manifest_from_dict
from nemo_elastic.checkpoint.reader import LazyTensor
from nemo_elastic.checkpoint.writer import write_safetensors
from nemo_elastic.cli.main import main
from nemo_elastic.nemo.export.checkpoints import extract, open_nested, write_nested
from nemo_elastic.problems import ProblemsError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested checkpoint, to be spoilt in copies."""
    return write_nested(tmp_path_factory.mktemp("family") / "nested", random_weights(), manifest(), tokenizer=TOKENIZER)


@pytest.fixture
def nested(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "nested"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(nested: Path, words: str) -> None:
    """Extracting fails with `words`, and leaves nothing behind."""
    with pytest.raises(ProblemsError, match=words):
        extract(nested, "large", nested.parent / "child", format="hf")
    assert sorted(p.name for p in nested.parent.iterdir()) == ["nested"]


def test_truncated_shard(nested: Path) -> None:
    shard = nested / "weights" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1000)
    refused(nested, r"__0_0\.distcp: has \d+ bytes, its manifest says \d+: truncated")


@pytest.mark.parametrize("name", ["weights/.metadata", "weights/__0_0.distcp", "context/io.json"])
def test_missing_file(nested: Path, name: str) -> None:
    (nested / name).unlink()
    refused(nested, rf"{name}: is missing")


def test_flipped_bytes_never_pass_unseen(nested: Path) -> None:
    """80 single flips anywhere in the shard: an error, or (padding between records) exactly the same child."""
    child = extract(nested, "full", nested.parent / "expected", format="hf")
    expected, shard, generator, errors = contents(child), nested / "weights" / "__0_0.distcp", random.Random(4), 0
    data = shard.read_bytes()
    for number in range(80):
        at = generator.randrange(len(data))
        shard.write_bytes(data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :])
        try:
            got = extract(nested, "full", nested.parent / f"child{number}", format="hf")
        except ProblemsError as error:
            errors += 1
            assert "__0_0.distcp" in str(error)
        else:
            assert contents(got) == expected, at
        with pytest.raises(ProblemsError, match=r"__0_0\.distcp: has SHA-256"):  # `verify` sees every flip
            check_hashes(nested, load_manifest(nested))
    assert errors > 20


@pytest.mark.parametrize("name", ["weights/.metadata", "context/model.yaml", "context/tokenizer/tokenizer.json"])
def test_flipped_byte_in_a_small_file(nested: Path, name: str) -> None:
    data = bytearray((nested / name).read_bytes())
    data[len(data) // 2] ^= 1
    (nested / name).write_bytes(data)
    refused(nested, rf"{name}: has SHA-256 .* damaged, or of another parent")


def test_manifest_of_another_parent(nested: Path, tmp_path: Path) -> None:
    other = write_nested(tmp_path / "nested2", random_weights(seed=9), manifest(), tokenizer=TOKENIZER)
    shutil.copy(other / MANIFEST_FILE, nested / MANIFEST_FILE)
    shutil.rmtree(other)
    refused(nested, "of another parent")
    with pytest.raises(ProblemsError, match=r"weights/__0_0\.distcp: .* of another parent"):
        check_hashes(nested, load_manifest(nested))


def edited(nested: Path, **changes: object) -> None:
    """Rewrite keys of the manifest."""
    path = nested / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 3}, "version: 3 cannot be read here, 1 and 2 can; install a newer"),
        ({"version": "one"}, "version: 'one' cannot be read here"),
        ({"format": "zip"}, r"format: must be 'nemo_elastic\.nested'"),
        ({"subnet": {}}, "subnet: is no key of a manifest; did you mean 'subnets'"),
        ({"subnets": {}}, r"subnets\.full: is missing for this budget"),
        ({"subnets": {"../up": {}}, "budgets": {}, "parameters": {}}, "'../up' is no name for a budget"),
        ({"parameters": {"small": 3}}, r"parameters\.small: 3 is not what its subnet has"),
        ({"model": {**MODEL, "hidden_size": 49}}, r"hidden_size|output_layer|embedding"),
        ({"files": {"../x": {"sha256": "0", "bytes": 1}}}, "leaves the checkpoint's folder"),
        ({"budgets": {"small": {"kind": "fraction"}}}, "manifest: is damaged"),
        ({"space": []}, "manifest: is damaged"),
    ],
)
def test_wrong_manifest(nested: Path, changes: dict, words: str) -> None:
    edited(nested, **changes)
    refused(nested, words)


def test_manifest_that_is_no_json(nested: Path) -> None:
    (nested / MANIFEST_FILE).write_text('{"format": ')
    refused(nested, "is not JSON")
    (nested / MANIFEST_FILE).unlink()
    refused(nested, "not a nested checkpoint")


def test_manifest_survives_the_way_there_and_back(good: Path) -> None:
    first = load_manifest(good)
    again = manifest_from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first and first.subnets == manifest().subnets and first.space == manifest().space


def test_full_disk_is_foreseen_or_cleaned_up(nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProblemsError, match=r"--out: the disk of .* is full: .* MiB are needed"):
        with atomic_folder(nested.parent / "x", needs_bytes=1 << 60):
            raise AssertionError("not reached")
    stock = writer.HashingFile.write

    def fill(self: writer.HashingFile, data: bytes) -> int:
        if self.size > 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return stock(self, data)

    monkeypatch.setattr(writer.HashingFile, "write", fill)
    refused(nested, r"filled up while writing \(No space left on device\); nothing was changed")


def test_full_disk_for_real(nested: Path, tmp_path: Path) -> None:
    small = tmp_path.parent / f"{tmp_path.name}-tmpfs"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", small], capture_output=True).returncode:
        small.rmdir()
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        for format in ("hf", "nemo"):
            with pytest.raises(ProblemsError, match=r"the disk of .* is full"):
                extract(nested, "full", small / "child", format=format)
            assert not list(small.iterdir())
        old = extract(nested, "small", small / "child", format="hf")  # this one fits
        before = contents(old)
        with pytest.raises(ProblemsError, match=r"the disk of .* is full"):
            extract(nested, "small", old, format="hf", force=True)
        assert contents(old) == before and [p.name for p in small.iterdir()] == ["child"]
    finally:
        subprocess.run(["umount", small], check=True)
        small.rmdir()


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from nemo_elastic.cli.main import main
sys.exit(main(["extract", sys.argv[1], "--budget", "large", "--out", sys.argv[2], "--format", sys.argv[3]]))
"""


@pytest.mark.parametrize("format", ["nemo", "hf"])
def test_a_write_that_the_system_refuses_leaves_nothing(nested: Path, format: str) -> None:
    """As a user without the right to mount meets it: a limit on the size of a file, in both formats."""
    command = [sys.executable, "-c", LIMITED, str(nested), str(nested.parent / "child"), format]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "is full: it filled up while writing" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and [p.name for p in nested.parent.iterdir()] == ["nested"]


def truncated(nested: Path) -> None:
    shard = nested / "weights" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1000)


def flipped(nested: Path) -> None:
    shard = nested / "weights" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


DAMAGES = {
    "truncated shard": truncated,
    "flipped byte": flipped,
    "missing file": lambda nested: (nested / "weights" / ".metadata").unlink(),
    "wrong version": lambda nested: edited(nested, version=99),
    "other parent": lambda nested: edited(nested, model={**MODEL, "hidden_size": 64}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_message_and_exit_code_2(nested: Path, damage: str, capsys: pytest.CaptureFixture) -> None:
    """By the command; `verify` leaves with 1 where only a hash differs (tests/test_verify.py)."""
    DAMAGES[damage](nested)
    target = str(nested.parent / "child")
    assert main(["extract", str(nested), "--budget", "full", "--out", target, "--format", "hf"]) == 2
    shown = capsys.readouterr()
    assert str(nested) in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert sorted(p.name for p in nested.parent.iterdir()) == ["nested"]


KILLED = """
import os, signal, sys
from nemo_elastic.checkpoint import writer
from nemo_elastic.nemo.export.checkpoints import extract
stock = writer.HashingFile.write
def write(self, data):
    if self.size > 40_000:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, data)
writer.HashingFile.write = write
extract(sys.argv[1], "large", sys.argv[2], format=sys.argv[3], force=True)
"""


@pytest.mark.parametrize("format", ["nemo", "hf"])
def test_killed_extract_leaves_the_target_as_it_was(nested: Path, format: str) -> None:
    target = nested.parent / "child"

    def kill() -> None:
        command = [sys.executable, "-c", KILLED, str(nested), str(target), format]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr

    kill()
    assert not target.exists()
    extract(nested, "small", target, format="hf")
    before = contents(target)
    kill()
    assert contents(target) == before
    left = [p for p in nested.parent.iterdir() if p.name.startswith(".child.partial-")]
    assert left  # what the killed run was writing
    extract(nested, "large", target, format="hf", force=True)  # the next run removes it
    assert not [p for p in nested.parent.iterdir() if p.name.startswith(".")]


def test_a_file_in_the_way_is_never_replaced(nested: Path) -> None:
    (nested.parent / "child").write_text("mine")
    with pytest.raises(ProblemsError, match="exists and is not a folder"):
        extract(nested, "large", nested.parent / "child", format="hf", force=True)
    assert (nested.parent / "child").read_text() == "mine"


def test_shards_are_planned_by_size(tmp_path: Path) -> None:
    tensors = [
        LazyTensor(f"t{i}", torch.float32, (n,), lambda n=n: torch.ones(n)) for i, n in enumerate((10, 5, 30, 1))
    ]
    hashes = write_safetensors(tmp_path, tensors, shard_bytes=64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [index["weight_map"][f"t{i}"][6:11] for i in range(4)] == ["00001", "00001", "00002", "00003"]
    assert index["metadata"]["total_size"] == 46 * 4 and len(hashes) == 4
    assert all(hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() == digest for n, digest in hashes.items())


def test_open_nested_holds_what_was_written(good: Path) -> None:
    opened = open_nested(good)
    weights = random_weights()
    assert all(torch.equal(opened.reader.read(name), value) for name, value in weights.items())
    assert opened.tokenizer == good / "context" / "tokenizer"
