"""Whatever a configuration or a command line says: exit code 0 or 2, one clear message, never a traceback.

Mutated configurations go through `config` and `plan` in this process (a crash raises here); a sample over all verbs
runs as real processes. Derandomized: every run of the tests sees the same cases.
"""

import contextlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_elastic.cli.main import VERBS, build_parser, main
from nemo_elastic.config import load_config
from nemo_elastic.config.load import leaves

ROOT = Path(__file__).resolve().parent.parent
TINY = (ROOT / "conf" / "tiny_parent.yaml").read_text()
RESOLVED = load_config("tiny_parent.yaml").values
KEYS = sorted({key for key, _ in leaves(RESOLVED)} | {k.rpartition(".")[0] for k, _ in leaves(RESOLVED)} - {""})
MORE_KEYS = (
    "model.fp8", "model.num_layers", "model.kv_channels", "model.share_embeddings_and_output_weights", "base",
    "elastic.subnets.small", "elastic.subnets.full", "elastic.subnets.nobody", "elastic.dims.mamba_head_dim",
    "elastic.dims.hidden_size.per_layer", "elastic.dims.mamba_num_heads.per_layer", "elastic.budgets.new",
    "train.stages.0.budget_probabilities", "train.stages.5", "train.stages.0.tokens", "nobody", "a..b", ".",
    "train.", "elastic.dims.nothing.choices", "report.profile.weights", "data.blend", "1", "train.stages.x",
    "train.stages.-1", "elastic[dims]", "elastic.[", "train.stages[0].steps", "train.stages[0",
)  # fmt: skip
VALUES = (
    "null", "0", "-1", "1", "2", "3", "7", "100000000000000000000000", "0.5", "-0.5", "1.0", "1e-5", ".nan", ".inf",
    "-.inf", "true", "''", "a", "M-M*", "MX", "E", "é☃", "[]", "[1]", "[128, 0.5]", "[.nan]", "[null]", "[[1]]",
    "{}", "{a: 1}", "{kind: memory_gb, value: 0.004}", "{kind: latency_ms, value: 1}", "{kind: x, value: 1}",
    "{hidden_size: 96}", "{layers: [0, 1]}", "{choices: [64, 0.3]}", "{1: 2}", "{null: 1}", "{true: 1}", "???",
    "${a.b}", "${oc.env:NOBODY}", "${name}", "${", "2020-01-01", "0x10", "1_000", "!!binary aGk=", "!!set {a}",
    "!!python/object:os.system {}", "&a [*a]", "[{steps: 3}]", "[{steps: 3, router: soft}]", "[{}]", "[3]",
    "[{steps: 1, budget_probabilities: {small: 0}}]", "[{tokens: 1, steps: 9}]", "fp8", "builtin:corpus", "/",
    "paper", "{weights: 1, kv_cache: -1, state: x}", "nothing.yaml", "/dev", '"\\0"', "a\\\nb", "- 1", "*", "%", "@",
    "\t",
)  # fmt: skip
keys = st.sampled_from([*KEYS, *MORE_KEYS])
values = st.one_of(st.sampled_from(VALUES), st.integers(-3, 600).map(str), st.floats().map(repr), st.text(max_size=6))
overrides = st.lists(st.tuples(keys, values).map("=".join), max_size=4)


def derandomized(examples: int) -> settings:
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=health)


def answer(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command line in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def is_clear(code: int, out: str, err: str, verb: str) -> None:
    """0 says nothing on stderr; 2 has one message of one problem or several, or a plan that holds its problems."""
    assert code in (0, 2)
    assert "Traceback" not in err
    if code == 0 or (out and not err):
        assert err == ""
        return
    head, *rest = err.rstrip("\n").split("\n")
    if head.startswith("usage:"):
        assert sum(line.startswith("nemo-elastic") for line in rest) == 1, err
        return
    assert head.startswith(f"nemo-elastic {verb}: ") and "problem" in head and rest, err
    assert all(line.startswith("  ") and ": " in line for line in rest), err
    assert out == ""


def check(words: list[str]) -> None:
    code, out, err = answer(words)
    is_clear(code, out, err, words[0])
    if words[0] == "plan" and out and "--json" in words:
        found = json.loads(out)
        assert bool(found["problems"]) == (code == 2)
        json.dumps(found, allow_nan=False)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """The tiny parent's file with sections swapped, replaced or spoilt as text."""
    kind = draw(st.sampled_from(["tree", "text", "lines"]))
    if kind == "tree":
        tree = yaml.safe_load(TINY)
        for _ in range(draw(st.integers(1, 4))):
            at, path = tree, draw(keys).split(".")
            for name in path[:-1]:
                at = at.setdefault(name, {}) if isinstance(at, dict) else {}
            with contextlib.suppress(TypeError, yaml.YAMLError):
                at[path[-1]] = yaml.safe_load(draw(values))
        return yaml.safe_dump(tree)
    text = TINY if kind == "text" else TINY.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(text) - 1))
        inserted = draw(st.sampled_from([*"{}[]:#&*!|>-'\"%@`,\n\t\0é", ": ", "- ", "  "]))
        text = text[:i] + (inserted if kind == "text" else [inserted + "\n"]) + text[i + draw(st.integers(0, 2)) :]
    return "".join(text)


def write(folder: Path, text: str) -> str:
    path = folder / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return str(path)


@pytest.mark.slow
@derandomized(700)
@given(verb=st.sampled_from(["plan", "plan", "config"]), words=overrides, as_json=st.booleans(), train=st.booleans())
def test_overrides(verb: str, words: list[str], as_json: bool, train: bool) -> None:
    flags = ["--json"] * as_json + ["--train"] * (train and verb == "plan")
    check([verb, "--config", "tiny_parent.yaml", *flags, "--", *words])


@pytest.mark.slow
@derandomized(500)
@given(text=documents(), verb=st.sampled_from(["plan", "config"]))
def test_files(text: str, verb: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check([verb, "--config", write(tmp_path_factory.getbasetemp(), text), "--json"])


@derandomized(60)
@given(words=overrides, text=documents())
def test_a_few_of_both(words: list[str], text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(["plan", "--config", write(tmp_path_factory.getbasetemp(), text), "--json", "--", *words])


FLAGS = (
    "--config", "--out", "--json", "--budget", "--all", "--format", "--resume", "--force", "--nproc", "--verbose",
    "--train", "--search", "--ranking", "--score", "--output", "--help", "--version", "-h", "--", "-x", "--no",
)  # fmt: skip


@derandomized(400)
@given(
    words=st.lists(
        st.one_of(st.sampled_from([*VERBS, *FLAGS, "hf", "nemo", "1", "-1", "a=b", "="]), st.text(max_size=5)),
        max_size=6,
    )
)
def test_the_parser(words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            build_parser().parse_args(words)
            code = 0
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 2)
    assert (code == 2) == err.getvalue().startswith("usage:")
    assert not (out.getvalue() and err.getvalue())


@derandomized(150)
@given(
    verb=st.sampled_from(["plan", "config"]),
    words=st.lists(st.one_of(st.sampled_from([*FLAGS, *VALUES, "tiny_parent.yaml"]), st.text(max_size=5)), max_size=5),
)
def test_command_lines(verb: str, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    with contextlib.chdir(tmp_path_factory.getbasetemp()):
        code, out, err = answer([verb, *words])
        if "usage:" in out:
            assert code == 0 and err == ""
        else:
            is_clear(code, out, err, verb)


def wild_commands() -> list[list[str]]:
    """Two of each verb with something that cannot be, drawn from a fixed seed."""
    rng, found = random.Random(8), []
    for verb in (*VERBS, *VERBS):
        folder = verb in ("nest", "extract", "verify", "report")
        words = [rng.choice(["/no/such/folder", "", "é", "/dev/null"])] if folder else []
        words += ["/no/such/child"] if verb == "verify" else []
        if verb in ("plan", "config", "rank", "sort", "train", "profile"):
            words += ["--config", rng.choice(["tiny_parent.yaml", "nobody.yaml", "/dev", "tiny_parent.yml"])]
        bad = ("model.hidden_size=x", "train.stages=3", "nobody=1", "elastic.dims=[1]", "parent.path=3")
        words += [] if folder else [rng.choice(bad)]
        found.append([verb, *words])
    return found


@pytest.mark.slow
@pytest.mark.sweep(8)
@pytest.mark.parametrize("words", wild_commands(), ids=" ".join)
def test_real_processes(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nemo_elastic", *words], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    is_clear(done.returncode, done.stdout, done.stderr, words[0])
    assert not any(tmp_path.iterdir())


def test_a_traceback_would_be_seen() -> None:
    with pytest.raises(AssertionError):
        is_clear(2, "", "Traceback (most recent call last):\n  x: y\n", "plan")
    with pytest.raises(AssertionError):
        is_clear(1, "", "nemo-elastic plan: a problem to mend\n  a: b\n", "plan")
    with pytest.raises(AssertionError):
        is_clear(2, "", "nemo-elastic plan: list index out of range\n", "plan")
