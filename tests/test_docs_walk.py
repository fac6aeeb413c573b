"""README and the documentation walked: their shell and Python blocks are read out and run as written, in order.

They run in a folder made like a checkout, on a copy of what `make quickstart` left behind (CI runs that first), or on a
short run where there is none. A fence without a language holds commands; output and drawings are ```text. A command
that cannot run here stands in NOT_HERE with the reason, one that runs in another form in OTHERWISE.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_quickstart import SHORT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
SHELL, PYTHON, NO_COMMANDS = ("", "sh", "bash"), "python", ("text", "yaml", "json")
QUICKSTART = ROOT / "runs" / "quickstart"
TRAINED = ("config.json", "importance", "logs", "nested", "sorted")  # what `train` leaves; the walk makes the rest

BENCHMARK = "hours; test_benchmarks.py runs each in a small size"
EIGHT = "eight processes; test_launch.py starts fewer"
RECIPE = "minutes; test_nemo_run.py reads it as NeMo-Run does"
TRAINS = ("api.train(", "run.run(")  # in Python: minutes; test_notebook.py trains, test_nemo_run.py makes the recipe
NOT_HERE = {
    "make quickstart": ".ci/run runs it first",
    "make test": ".ci/run runs it second",
    "TORCH_INDEX_URL=<index of CPU wheels> make setup": "the address is the reader's; test_setup.py runs set-ups",
    "nemo-elastic rank --config conf/tiny_parent.yaml": "minutes; `make quickstart` ranks this parent",
    "torchrun --nproc-per-node 4 -m nemo_elastic rank --config conf/x.yaml "
    "train.tensor_model_parallel_size=2 train.pipeline_model_parallel_size=2 train.sequence_parallel=true": (
        "four processes; test_importance_rank.py ranks at this layout"
    ),
    "python benchmarks/gpu/build.py": "it downloads and compiles for minutes; test_gpu_kit.py builds its parts",
    "benchmarks/gpu/run.sh": "needs a GPU",
    "benchmarks/gpu/run.sh --device cpu --tiny": "minutes; test_gpu_kit.py runs its stages",
    "python benchmarks/gpu/checks.py scan_triton": "needs a GPU; test_gpu_kit.py runs it on the CPU",
    "python benchmarks/gpu/pages.py": "it writes docs/gpu.md and README.md; test_gpu_kit.py runs it elsewhere",
    "python examples/paper_small/run.py --out runs/paper_small": "a day; test_paper_small.py runs it with --quick",
    "python examples/paper_small/run.py --out runs/paper_small --quick": "minutes; test_paper_small.py runs it",
    "python examples/paper_small/run.py --out runs/paper_small --results runs/paper_small/results": (
        "a day; test_paper_small.py runs it with --quick"
    ),
    "python examples/paper_small/run.py --out runs/paper_small --results runs/paper_small/results "
    "--only greedy-best --seeds 4": "ten minutes; test_paper_small.py runs others with --quick",
    "python examples/paper_small/think.py --out runs/paper_small --nested runs/paper_small/nested/greedy-best-4": (
        "it needs that run; test_think.py tests its parts"
    ),
    "python examples/paper_small/think.py --draw": "it draws docs/think.png; test_think.py draws it elsewhere",
    **{
        f"python examples/paper_small/{name}.py --out runs/paper_small": (
            "an hour; test_paper_small.py runs it with --quick"
        )
        for name in ("exploring", "between")
    },
    "python examples/paper_small/results.py": "it writes docs/results.md; test_paper_small.py runs it elsewhere",
    "for name in startup ssd kd_loss ranking serving extract elastic_step expert_step family_cost; do\n"
    "    .venv/bin/python benchmarks/$name.py --output benchmarks/results/$name.json > /dev/null\ndone": BENCHMARK,
    "for name in router_budgets ranking_quality expert_ranking; do\n"
    "    .venv/bin/python benchmarks/$name.py --output benchmarks/results/$name.json > /dev/null\ndone": BENCHMARK,
    ".venv/bin/python benchmarks/router_against_uniform.py --out runs/uniform "
    "--output benchmarks/results/router_against_uniform.json": BENCHMARK,
    ".venv/bin/python benchmarks/self_teacher.py --out runs/self_teacher "
    "--output benchmarks/results/self_teacher.json": BENCHMARK,
    "nemo-elastic train --config my.yaml --out runs/mine train.recipe=last_percent": (
        "minutes; test_recipe.py says what it stands for"
    ),
    "nemo-elastic train --config mended.yaml --out runs/mended train.start_from=runs/mine/nested": (
        "minutes; test_start_from.py does it"
    ),
    "torchrun --nproc-per-node 8 -m nemo_elastic train --config my_parent.yaml --out runs/mine": EIGHT,
    "torchrun --nproc-per-node 8 -m nemo_elastic train --config my_parent.yaml --out runs/try "
    "'train.stages=[{steps: 6, seq_length: 4096, global_batch_size: 32}]'": EIGHT,
    "nemo elastic train config=my_parent.yaml out=runs/mine "
    """'overrides=["train.tensor_model_parallel_size=8"]' --yes""": RECIPE,
    "nemo elastic train --factory tiny_parent --yes": RECIPE,
    "nemo elastic extract nested=runs/mine/nested format=hf out=runs/mine/hf --yes": RECIPE,
    ".venv/bin/python benchmarks/figure.py": "it draws docs/benchmarks.png; test_benchmarks.py draws it elsewhere",
}
ABSOLUTE = ("/models/", "models/")  # the reader's parents lie in the checkout's folder here
OTHERWISE = {  # as documented -> as run
    # As many processes as the run's layout needs: the quickstart's needs one, and eight do not fit here.
    "nemo-elastic verify runs/mine/nested --nproc 8": "nemo-elastic verify runs/mine/nested",
    # The walk trains once.
    "nemo-elastic extract runs/try/nested --all": "nemo-elastic extract runs/mine/nested --all --force",
    "nemo-elastic verify runs/try/nested --nproc 8": "nemo-elastic verify runs/mine/nested",
}


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, indented ones of a list too."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [(language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def is_whole(text: str) -> bool:
    """Whether a shell takes `text` as complete: not the head of a loop, not a line that goes on."""
    return not text.endswith("\\") and subprocess.run(["bash", "-n", "-c", text], capture_output=True).returncode == 0


def commands(block: str) -> list[str]:
    """The commands of a shell block without their comments: a loop, or a line with its continuations, is one.

    A placeholder `<...>` is no shell; such a line stands alone.
    """
    found, open_lines = [], ""
    for line in block.splitlines():
        line = re.sub(r"(^|\s+)# .*$", "", line)
        if not line.strip() and not open_lines:
            continue
        open_lines += ("\n" if open_lines else "") + line
        if is_whole(open_lines) or re.search(r"=<[^>]*>", line):
            found.append(re.sub(r"\s*\\\n\s*", " ", open_lines).strip())
            open_lines = ""
    return found + [open_lines] * bool(open_lines)


def documented() -> list[tuple[str, str, str]]:
    """(page, language, command or program) in the order a reader meets them, each once."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for language, text in fences(page):
            assert language in (*SHELL, PYTHON, *NO_COMMANDS), f"{name}: what is a block of {language!r}?"
            if language in SHELL:
                found += [(name, "shell", command) for command in commands(text)]
            elif language == PYTHON:
                found.append((name, "python", text))
    return list(dict.fromkeys(found))


DOCUMENTED = documented()
TO_RUN = [entry for entry in DOCUMENTED if entry[2] not in NOT_HERE and not any(word in entry[2] for word in TRAINS)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reader's files (`my.yaml`, `runs/mine`, ...), from which every command runs."""
    here = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "examples", "nemo_elastic", "Makefile", *(venv.name for venv in ROOT.glob(".venv*"))):
        (here / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "conf", here / "conf")
    mine = here / "runs" / "mine"
    if all((QUICKSTART / name).exists() for name in (*TRAINED, "results.json")):
        mine.mkdir(parents=True)
        for name in TRAINED:
            source = QUICKSTART / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, mine / name)
    else:
        words = ["quickstart", "--out", str(mine), *SHORT]
        run("shell", shlex.join([sys.executable, "-m", "nemo_elastic", *words]), here)
        shutil.rmtree(mine / "children")
        shutil.rmtree(mine / "report")
        (mine / "results.json").unlink()
    (here / "runs" / "quickstart").symlink_to("mine")
    (here / "models").mkdir()
    (here / "models" / "mine").symlink_to(mine / "hf" / "full")  # a Hugging Face parent, once README has made it
    # The reader's own configuration is that of the run; `x` has been ranked, too.
    values = json.loads((mine / "config.json").read_text())["values"]
    for path, name in (("my.yaml", "my"), ("my_parent.yaml", "my_parent"), ("conf/x.yaml", "x")):
        (here / path).write_text(yaml.safe_dump(values | {"name": name}))
    shutil.copytree(mine / "importance", here / "runs" / "x" / "importance")
    return here


def run(language: str, text: str, here: Path) -> str:
    """Run as a reader would who has activated the venv; returns what it printed. Fails on any other code than 0."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(program, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("page", "language", "text"), TO_RUN, ids=[f"{page}: {text.splitlines()[0]}" for page, _, text in TO_RUN]
)
def test_a_documented_command_does_what_it_is_for(page: str, language: str, text: str, checkout: Path) -> None:
    venv = re.search(r"\.venv-\w+", text)
    if venv and not (ROOT / venv[0] / "bin" / "python").exists():
        pytest.skip(f"{venv[0]} is not here; `make setup{venv[0].removeprefix('.venv')}` makes it")
    said = run(language, OTHERWISE.get(text, text).replace(*ABSOLUTE), checkout)
    if " verify runs/mine/nested" in text:
        assert "verification passed" in said and "DIFFERS" not in said
        family = json.loads((checkout / "runs" / "mine" / "config.json").read_text())["values"]["elastic"]["budgets"]
        assert all(re.search(rf"\b{name} .*\bsame\b", said) for name in family), said  # a row for every budget


def test_what_is_listed_is_documented() -> None:
    texts = {text for _, _, text in DOCUMENTED}
    assert set(NOT_HERE) | set(OTHERWISE) <= texts
    assert {"README.md", "docs/plan.md", "docs/router.md", "docs/serving.md"} <= {page for page, _, _ in TO_RUN}


def test_a_loop_and_a_line_that_goes_on_are_one_command() -> None:
    block = "make a  # why\n\nfor x in 1 2; do\n    echo $x\ndone\nb --c \\\n    d=1\nX=<your x> make e\n"
    assert commands(block) == ["make a", "for x in 1 2; do\n    echo $x\ndone", "b --c d=1", "X=<your x> make e"]
