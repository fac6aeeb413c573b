"""What is refused before a long verb starts: by key, in one message, with nothing written and nothing started."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.problems import ProblemsError
from nemo_elastic.processes import runlock
from nemo_elastic.processes.launchers import launcher_problems
from nemo_elastic.processes.runlock import lock_problems, locked
from nemo_elastic.space.budget import name_problems

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}


NOT_WORDS = ["", ".", "..", "6b/12b", "/tmp", "a\\b", ".hidden", "-f", "a b", "a=b", "x" * 65, "ä\n"]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that no launcher has touched."""
    for name in [n for n in os.environ if n in TORCHRUN or n.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    return monkeypatch


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The message of a verb that is refused."""
    assert main([words[0], "--config", "tiny_parent.yaml", *words[1:]]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.count("to mend") == 1, told
    return told


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, None),
        (TORCHRUN, None),
        (SLURM | {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),  # a shell in an allocation
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, "srun starts this program 2 times"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"} | TORCHRUN, None),  # torchrun in a task
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}, "mpirun starts this program 8 times"),
        ({"RANK": "1"}, "unset RANK"),
        ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "a"}, "unset WORLD_SIZE"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "cannot be"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "whole numbers"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "without MASTER_PORT"),
    ],
)
def test_half_of_a_launchers_variables_is_refused_with_a_remedy(environment: dict[str, str], words: str | None) -> None:
    found = launcher_problems(environment)
    assert (words is None) == (found == []) and all(words in str(problem) for problem in found), found


def test_a_process_that_seems_not_to_be_the_first_still_says_why(bare: pytest.MonkeyPatch, capsys) -> None:
    bare.setenv("RANK", "1")
    assert "unset RANK" in refused(capsys, "rank")
    assert "unset RANK" in refused(capsys, "plan")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "6b/12b", "/tmp", "a\\b", ".hidden", "-f", "a b", "a=b", "x" * 65, "ä\n"]
)
@pytest.mark.parametrize("verb", ["config", "plan", "train"])
def test_a_budget_is_called_by_a_plain_word(name: str, verb: str, bare, tmp_path: Path, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: tiny_parent.yaml\nelastic:\n  budgets: " + json.dumps({"full": 1.0, name: 0.75}) + "\n")
    assert main([verb, "--config", str(file), *(["--out", str(tmp_path / "out")] if verb == "train" else [])]) == 2
    told = capsys.readouterr()
    assert "is no name for a budget" in told.err + told.out and [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("name", ["full", "6b", "1.5b", "small-2", "A_b", "0.6", "9e+9"])
def test_names_that_make_good_folders_pass(name: str) -> None:
    assert name_problems(name) == []


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
@pytest.mark.parametrize("key", ["train.seed", "rank.seed"])
def test_seeds_have_32_bits(seed: int, key: str) -> None:
    with pytest.raises(ProblemsError, match=f"^{key}: {seed} must be from 0 to 4294967295$"):
        load_config("tiny_parent.yaml", [f"{key}={seed}"])
    load_config("tiny_parent.yaml", [f"{key}=4294967295"])


def test_all_that_is_wrong_around_a_run_is_said_at_once(bare, tmp_path: Path, capsys) -> None:
    long = tmp_path / ("t" * 140)
    long.mkdir()
    (tmp_path / "file").write_text("")
    bare.setattr("tempfile.tempdir", str(long))
    words = ["train.pipeline_model_parallel_size=3", "data.num_workers=1", f"data.cache_dir={tmp_path / 'file'}"]
    told = refused(capsys, "train", "--out", str(tmp_path / "out"), *words, "data.paths=[/nope]")
    for part in (
        "3 must divide the parent's 16 layers", "needs a TMPDIR of at most 75 bytes", "export TMPDIR=/tmp",
        "data.cache_dir: ", "is a file, not a folder", "data.paths: /nope does not exist",
    ):  # fmt: skip
        assert part in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", long.name]


@pytest.mark.parametrize("verb", ["rank", "train"])
def test_a_cache_that_cannot_be_written_is_refused_before_text_is_read(verb: str, bare, tmp_path: Path, capsys) -> None:
    for name in ("NEMO_ELASTIC_CACHE", "XDG_CACHE_HOME"):
        bare.delenv(name, raising=False)
    bare.setenv("HOME", "/dev/null")
    assert "data.cache_dir: " in refused(capsys, verb, "--out", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_an_equals_sign_is_told_how_to_be_written(bare, capsys) -> None:
    for words in (
        ["extract", "lr=0.1,seed=3/nested", "--all"],
        ["plan", "lr=0.1,seed=3/nested"],
        ["report", "a=b/run"],
    ):
        assert main(words) == 2
        assert f"./{words[1]}" in capsys.readouterr().err


def test_the_users_folder_is_found_behind_an_equals_sign(bare, tmp_path: Path, capsys) -> None:
    bare.setenv("HOME", str(tmp_path))
    config = load_config(
        "tiny_parent.yaml", ["data.paths=[~/text]", "parent.path=~/p", "data.tokenizer=~/t.json"]
    ).config
    assert config.data.paths == (f"{tmp_path}/text",) and config.parent.path == f"{tmp_path}/p"
    assert config.data.tokenizer == f"{tmp_path}/t.json"
    assert main(["plan", "~/nested"]) == 2 and f"{tmp_path}/nested" in capsys.readouterr().err


def test_a_pipe_that_nobody_reads_is_no_error() -> None:
    words = [sys.executable, "-m", "nemo_elastic", "config", "--config", "conf/tiny_parent.yaml"]
    ours = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    ours.stdout.close()
    assert ours.stderr.read() == b"" and ours.wait(60) == 0


HOLD = """
import sys, time
from pathlib import Path
from nemo_elastic.processes.runlock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_has_one_run_and_a_dead_one_keeps_nothing(bare, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    here = f"{out} is being written by process {holder.pid} on {os.uname().nodename}"
    assert here in refused(capsys, "train", "--out", str(out))
    assert here in refused(capsys, "rank", "--out", str(out))
    with pytest.raises(ProblemsError, match="is being written by process"), locked(out):
        pass
    holder.kill()
    holder.wait()
    assert lock_problems(out) == []
    with locked(out), locked(out):
        assert lock_problems(out) == []  # our own
        assert _other(out) != []
    assert _other(out) == []


def _other(out: Path) -> list[str]:
    """What another process is told."""
    code = "import sys; from pathlib import Path; from nemo_elastic.processes.runlock import lock_problems as p; "
    code += "print(*p(Path(sys.argv[1])), end='')"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.splitlines()


def test_force_gives_up_one_checkpoint_and_never_a_folder_of_them(tmp_path: Path) -> None:
    from nemo_elastic.checkpoint.atomic_folder import check_target

    children = tmp_path / "children"
    (children / "small" / "weights").mkdir(parents=True)
    (children / "small" / "weights" / "metadata.json").write_text("{}")
    check_target(children / "small", force=True)
    for target, why in (
        (children, "is no checkpoint or child"),
        (tmp_path, "is no checkpoint or child"),
    ):
        with pytest.raises(ProblemsError, match=why):
            check_target(target, force=True)
    (tmp_path / "nested" / "elastic").mkdir(parents=True)
    (tmp_path / "nested" / "elastic" / "manifest.json").write_text("{}")
    check_target(tmp_path / "nested", force=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ProblemsError, match="is a run folder"):
        check_target(tmp_path, force=True)
    for target in (tmp_path / "nested", tmp_path, tmp_path / "nested" / "child"):
        with pytest.raises(ProblemsError, match="which is read"):
            check_target(target, force=True, source=tmp_path / "nested")


def test_train_starts_over_only_in_a_run_of_ours(bare, tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "logs").mkdir()
    assert "no run of this program" in refused(capsys, "train", "--out", str(tmp_path), "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "logs"]


RUN = ["elastic.budgets={full: 1.0, half: 0.5}", "train.stages=[{steps: 100}]", "router.shapes=learned"]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run folder as `resume` looks at it: 40 of 100 steps done, in the router's soft phase."""
    resolved = load_config("tiny_parent.yaml", [*RUN, "train.precision='32'"])  # as a run without a GPU settles it
    for name in ("weights/.metadata", "weights/common.pt", "weights/metadata.json"):
        file = tmp_path / "checkpoints" / "step=39" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (tmp_path / "config.json").write_text(json.dumps({"values": resolved.values, "origins": resolved.origins}))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], None),
        (["train.precision=auto"], None),
        (["train.optimizer.lr=1.0e-4", "distill.ce_weight=0.1", "router.lr=0.001", "train.val_samples=8"], None),
        (["train.stages=[{steps: 100}, {steps: 50}]"], None),
        (["elastic.budgets={other: 0.6}"], "elastic.budgets.other: 0.6, but the run in"),
        (["elastic.budgets.half=0.6"], "elastic.budgets.half: 0.6, but the run in"),
        (["elastic.ffn_groups=4"], "elastic.ffn_groups: 4, but"),
        (["train.precision=bf16-mixed"], "train.precision: 'bf16-mixed', but the run in"),
        (["train.seed=7"], "train.seed: 7, but"),
        (["data.blend=[{path: other.jsonl}]"], "data.blend.0.path: 'other.jsonl', but"),
        (["data.chat.layout=packed"], "data.chat.layout: 'packed', but"),
        (["router.shapes=even"], "router.shapes: 'even', but"),
        (["router.soft_fraction=0.1"], "router.soft_fraction: 0.1, but"),
        (["model.layernorm_epsilon=1.0e-6"], "model.layernorm_epsilon: 1e-06, but"),
        (["train.stages=[{steps: 100, seq_length: 64}]"], "train.stages: say other lengths or batches of the 40 steps"),
        (
            ["train.stages=[{steps: 100, seq_length: 64}]", "router.shapes=even"],
            "train.stages: say other lengths or batches of the 40 steps",
        ),
        (["train.stages=[{steps: 60}]"], "train.stages: would lead into the router's phase 'frozen' at step 41"),
        (
            ["train.stages=[{steps: 90}]"],
            "train.stages.0.steps: 90 shortens a stage that is being read",
        ),
    ],
)
def test_a_resumed_run_keeps_what_its_steps_were_a_function_of(
    stopped: Path, words: list[str], told: str | None
) -> None:
    from nemo_elastic.distill.resume import changed_keys, stage_problems

    resolved = load_config("tiny_parent.yaml", [*RUN, *words])
    found = [
        *changed_keys(stopped, resolved.config, resolved.values),
        *stage_problems(stopped, resolved.config, 40),
    ]
    assert (found == []) == (told is None), found
    assert told is None or told in "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", "--config", "tiny_parent.yaml", "--force"], "--force: replaces what --output names"),
        (["extract", "nested", "--all", "--hf-schema", "list"], "--hf-schema: says how a Hugging Face folder"),
        (["verify", "nested", "--hf-python", "python"], "--hf-python: runs children of --format hf"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(words: list[str], told: str, bare, capsys) -> None:
    assert main(words) == 2 and told in capsys.readouterr().err


def test_a_run_is_resumed_or_replaced(stopped: Path, bare, capsys) -> None:
    before = sorted(stopped.rglob("*"))
    told = refused(capsys, "train", "--out", str(stopped), "--resume", "--force", *RUN, "train.seed=7")
    assert "--resume: goes on with the run that --force would remove" in told and "train.seed: 7, but" in told
    assert sorted(stopped.rglob("*")) == before


def test_a_resume_is_refused_by_the_command(stopped: Path, bare, capsys) -> None:
    before = sorted(stopped.rglob("*"))
    words = ["--out", str(stopped), "--resume", *RUN, "train.precision=bf16-mixed", "train.stages=[{steps: 60}]"]
    told = refused(capsys, "train", *words)
    assert "train.precision: " in told and "train.stages: " in told and sorted(stopped.rglob("*")) == before


def test_who_only_looks_whether_a_run_is_at_work_is_in_nobodys_way(tmp_path: Path) -> None:
    """As ranks of one run do at the same moment."""
    (tmp_path / ".lock").write_text("{}")
    look = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_SH); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", look, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        assert lock_problems(tmp_path) == []
        other.stdin.write("\n")


def test_a_lock_goes_with_its_block_and_takes_what_it_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), locked(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / ".lock").is_file()
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "written").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["written"]


def test_a_lock_whose_file_went_away_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened while another holds it, locked when that one is gone: a file without a name guards nothing."""
    hold = (
        "import sys; from pathlib import Path; from nemo_elastic.processes.runlock import locked\n"
        "with locked(Path(sys.argv[1])): print(1, flush=True); input()"
    )
    command, take, seen = [sys.executable, "-c", hold, str(tmp_path)], runlock._take, []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"

        def late(file: int, out: Path, *kind: int) -> list:
            if not seen:
                other.communicate("\n", timeout=60)
            seen.append(os.fstat(file).st_nlink)
            return take(file, out, *kind)

        monkeypatch.setattr(runlock, "_take", late)
        with locked(tmp_path):
            assert seen == [0, 1] and (tmp_path / ".lock").is_file()
            second = subprocess.run(command, input="\n", capture_output=True, text=True)
            assert second.returncode and f"is being written by process {os.getpid()} on" in second.stderr
    assert not (tmp_path / ".lock").exists()


def test_a_full_disk_is_one_message(monkeypatch: pytest.MonkeyPatch, bare, capsys) -> None:
    def full(arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nemo_elastic.cli.config.run", full)
    assert main(["config", "--config", "tiny_parent.yaml"]) == 2
    assert "--out: No space left on device" in capsys.readouterr().err
