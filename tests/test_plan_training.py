"""What `plan` says of training: costs against a step-by-step count, schedules against the run's own functions."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.cost.counts import flops, parameters
from nemo_elastic.distill.curriculum import learning_rate, stage_at, total_steps
from nemo_elastic.distill.training_cost import checkpoint_bytes, training_cost
from nemo_elastic.distill.training_plan import router_parameters, training_plan
from nemo_elastic.family import family_of
from nemo_elastic.plan.of_run import plan
from nemo_elastic.problems import ProblemsError
from nemo_elastic.router.schedule import Timeline, resolve_recipe

ROOT = Path(__file__).resolve().parent.parent
LEARNED = "router.shapes=learned"
TINY = "tiny_parent.yaml"


def planned(*overrides: str) -> tuple:
    """A run whose shapes a router learns, unless it says something else."""
    given = any(word.startswith(("router.frozen", "router.shapes")) for word in overrides)
    run = load_config(TINY, overrides if given else [LEARNED, *overrides]).config
    family = family_of(run)
    rows = plan(run)["budgets"]
    return run, family, {b["name"]: family.space.subnet_from_dict(b["subnet"]) for b in rows}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_flops_are_those_of_a_run_counted_micro_batch_by_micro_batch(count: int, mode: str) -> None:
    """The run's own draws, phases and subnets; at three even budgets in three students every draw is the same."""
    from nemo_elastic.router.sampling import sample_budgets

    even = "train.stages=[{steps: 40, seq_length: 64, global_batch_size: 32}]"
    weighted = even.replace("}", ", budget_probabilities: {full: 5, large: 3, small: 2}}")
    for stages in (even, weighted):
        run, family, subnets = planned(f"distill.budgets_per_batch={count}", f"train.mode={mode}", stages)
        full = family.space.full_subnet()
        timeline = Timeline.of(run.router, 40)
        (stage,) = run.train.stages
        weights = stage.budget_probabilities or dict.fromkeys(subnets, 1.0)
        wide = {True: full}
        students = 0.0
        for step in range(40):
            for micro in range(32):
                for name in sample_budgets(weights, 1, step, micro, count):
                    soft = timeline.phase(step) == "soft" and name != "full"
                    subnet = wide.get(soft, subnets[name])
                    if mode == "masked":
                        subnet = family.space.subnet(layers=subnet.layers)
                    students += 3 * flops(family.layout, subnet, sequence_length=64)
        found = training_cost(run, family, subnets)
        exact = count == 3 and stages == even
        assert found["flops"]["students"] == pytest.approx(students, rel=1e-9 if exact else 0.02)
        assert found["flops"]["teacher"] == 40 * 32 * flops(family.layout, full, sequence_length=64)
        assert found["tokens"] == 40 * 32 * 64


def test_gpu_hours_of_the_published_curriculum() -> None:
    """By hand: a parent alone costs one teacher forward and three of its own; 6 N D is near 3/4 of that."""
    words = "train.stages=[{tokens: 65000000000, seq_length: 8192, global_batch_size: 1536}]"
    run = load_config("nemotron_nano_9b_v2.yaml", [words]).config
    family = family_of(run)
    subnets = {b.name: family.space.full_subnet() for b in family.budgets}
    found = training_cost(run, family, subnets)
    forward = flops(family.layout, family.space.full_subnet(), sequence_length=8192) / 8192
    assert found["tokens"] == pytest.approx(65e9, rel=1e-3) and found["tokens"] >= 65e9
    assert found["flops"]["total"] == pytest.approx(4 * forward * found["tokens"], rel=1e-12)
    count = parameters(family.layout, family.space.full_subnet()) - 131072 * 4480  # the embedding multiplies nothing
    assert found["flops"]["total"] == pytest.approx(8 * count * found["tokens"], rel=0.1)
    assert found["gpu_hours"] == pytest.approx(found["flops"]["total"] / (0.35 * 989e12) / 3600, rel=1e-12)
    faster = training_cost(load_config("nemotron_nano_9b_v2.yaml", [words, "report.mfu=0.7"]).config, family, subnets)
    assert faster["gpu_hours"] == pytest.approx(found["gpu_hours"] / 2)


def test_recomputation_costs_the_layers_once_more() -> None:
    run, family, subnets = planned()
    again = load_config(TINY, ["train.recompute_granularity=full"]).config
    whole = family.space.full_subnet()
    subnets = dict.fromkeys(subnets, whole)
    extra = [training_cost(r, family, subnets)["flops"]["students"] for r in (run, again)]
    layers = flops(family.layout, whole, sequence_length=256) - 2 * 256 * 128 * 2048
    assert extra[1] - extra[0] == pytest.approx(160 * 8 * layers, rel=1e-9)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_the_schedule_is_the_runs_own(recipe: str) -> None:
    run, family, _ = planned(f"router.recipe={recipe}")
    found = training_plan(run, family)
    config = resolve_recipe(run.router)
    steps = total_steps(run.train.stages)
    timeline = Timeline.of(config, steps, run.train.stages)
    assert found["steps"] == steps == 160 and found["tokens"] == 160 * 8 * 256
    assert sum(p["steps"] for p in found["phases"]) == steps
    for phase in found["phases"]:
        assert timeline.phase(phase["first_step"]) == timeline.phase(phase["first_step"] + phase["steps"] - 1)
        assert timeline.phase(phase["first_step"]) == phase["phase"]
    shown = {p["step"]: p for p in found["schedule"]}
    assert {0, 20, 110, 159} <= set(shown) and len(shown) >= 8
    for step, p in shown.items():
        at = timeline.point(step, config)
        assert (p["phase"], p["tau"], p["scale"], p["settle"]) == (at.phase, at.tau, at.scale, at.settle)
        assert p["lr"] == learning_rate(run.train.stages, run.train.optimizer, step)
        assert p["router_lr"] == pytest.approx(p["lr"] * 10)
        assert p["stage"] == stage_at(run.train.stages, step).index
        assert p["tokens_before"] == step * 8 * 256
    assert shown[20]["lr"] == 1e-3 and shown[159]["lr"] < 1.2e-5
    total = Counter()
    for stage in training_cost(run, family, {b.name: family.space.full_subnet() for b in family.budgets})["stages"]:
        total.update(stage["router_steps"])
    assert total == Counter(timeline.phase(step) for step in range(steps)) and set(total) <= set(run.router.phases)


def test_stages_that_name_their_phase() -> None:
    words = "train.stages=[{steps: 3, router: warmup}, {steps: 5, router: soft}, {steps: 7, router: frozen}]"
    run, family, subnets = planned(words)
    assert [(p["phase"], p["steps"]) for p in training_plan(run, family)["phases"]] == [
        ("warmup", 3), ("soft", 5), ("frozen", 7)]  # fmt: skip
    found = [{k: v for k, v in s["router_steps"].items() if v} for s in training_cost(run, family, subnets)["stages"]]
    assert found == [{"warmup": 3}, {"soft": 5}, {"frozen": 7}]


@pytest.mark.parametrize("words", [[], ["elastic.dims.mamba_num_heads.per_layer=true", "router.hidden_size=32"]])
def test_what_is_trained_is_counted(words: list[str]) -> None:
    from nemo_elastic.router.model import Router

    run, family, _ = planned(*words)
    router = Router(family.space, ["large", "small"], run.router)
    assert router_parameters(family, run.router) == sum(p.numel() for p in router.parameters())
    weights, head = training_plan(run, family)["trained"]
    assert weights["parameters"] == 2_559_696 and weights["lr"] == 1e-3
    assert head["parameters"] == router_parameters(family, run.router) and head["lr"] == 1e-2
    frozen, family, _ = planned(*words, "router.frozen=true")
    found = training_plan(frozen, family)
    assert len(found["trained"]) == 1 and found["phases"] == [] and "tau" not in found["schedule"][0]
    assert found["budgets"] == {"full": "parent", "large": "forced", "small": "forced"}
    assert "teacher" in found["frozen"][0]["what"]


def test_text_alone_needs_no_teacher() -> None:
    """No forward of the parent, nothing frozen, and no cache to be filled with its states."""
    words = ("distill.kd_weight=0", "distill.ce_weight=1")
    (run, family, subnets), (_, _, same) = planned(*words), planned()
    cost = training_cost(run, family, subnets)["flops"]
    assert cost["teacher"] == 0 and cost["total"] == cost["students"] > 0 and subnets == same
    assert training_plan(run, family)["frozen"] == []
    assert planned("distill.kd_weight=0", "distill.hidden_weight=1")[0].distill.needs_teacher
    with pytest.raises(ProblemsError, match=r"distill\.teacher_cache: has no use with distill\.kd_weight=0"):
        load_config(TINY, [*words, "distill.teacher_cache=/tmp/cache"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_self_taught_family_runs_a_teacher_where_no_student_is_whole(count: int) -> None:
    """Counted over the draws of a run; a cache is filled once, and read where the full member is a student."""
    from nemo_elastic.router.sampling import sample_budgets

    stages = "train.stages=[{steps: 200, seq_length: 64, global_batch_size: 32}]"
    words = (f"distill.budgets_per_batch={count}", "distill.teacher=self", stages, "train.micro_batch_size=1")
    run, family, subnets = planned(*words)
    without = sum(
        "full" not in sample_budgets(dict.fromkeys(subnets, 1.0), 1, step, micro, count)
        for step in range(200)
        for micro in range(32)
    )
    forward = flops(family.layout, family.space.full_subnet(), sequence_length=64)
    found = training_cost(run, family, subnets)["flops"]
    assert found["teacher"] == pytest.approx(without * forward, rel=0.03)
    assert found["students"] == training_cost(*planned(*words[:1], *words[2:]))["flops"]["students"]
    assert training_plan(run, family)["frozen"] == []
    run, family, subnets = planned(*words, "distill.teacher_cache=/tmp/states")
    more = training_cost(run, family, subnets)["flops"]["teacher"]
    assert more == pytest.approx(found["teacher"] + 200 * 32 * forward)
    assert training_plan(run, family)["frozen"][0]["what"].endswith("for the full member alone")


def test_bytes_on_disk() -> None:
    """12 bytes a parameter in fp32, 14 in bf16 with fp32 weights of the optimizer; children as exported."""
    run, family, subnets = planned("train.precision='32'")
    n = 2_559_696
    assert checkpoint_bytes(run, family, subnets)["training"] == 12 * n
    bf16, _, _ = planned("train.precision=bf16-mixed", "export.dtype=float32")
    found = checkpoint_bytes(bf16, family, subnets)
    assert found["training"] == 14 * n and found["nested"] == 2 * n and found["children"]["full"] == 4 * n
    auto, _, _ = planned()
    found = checkpoint_bytes(auto, family, subnets)
    assert found["training"] == 14 * n and found["nested"] == 4 * n  # the most it can be
    sharded, _, _ = planned("train.use_distributed_optimizer=true")
    assert checkpoint_bytes(sharded, family, subnets)["training"] == 16 * n


@pytest.mark.slow
def test_a_training_checkpoint_has_the_bytes_that_plan_says(small_runs) -> None:
    whole = small_runs.folder / "whole"
    config = json.loads((whole / "config.json").read_text())
    run = load_config(None, [], base=config.get("values", config)).config
    family = family_of(run)
    said = checkpoint_bytes(run, family, {})["training"] + 12 * router_parameters(family, run.router)
    for folder in sorted((whole / "checkpoints").glob("step=*")):
        there = sum(p.stat().st_size for p in (folder / "weights").glob("*.distcp"))
        assert said <= there < 1.2 * said + 2e5


def keys(value: object, prefix: str = "") -> set[str]:
    """Dotted keys; names that the user chose are `*`, list items `[]`."""
    if isinstance(value, dict):
        found = set()
        for name, inner in value.items():
            chosen = prefix.endswith(("children", "budget_probabilities", "run.budgets"))
            dotted = f"{prefix}.{'*' if chosen else name}" if prefix else name
            found |= {dotted} | keys(inner, dotted)
        return found
    if isinstance(value, list):
        return set().union(*(keys(v, prefix + "[]") for v in value), set())
    return set()


def test_the_json_has_the_documented_keys_and_no_others(capsys: pytest.CaptureFixture) -> None:
    table = (ROOT / "docs" / "plan.md").read_text().split("## JSON")[1]
    documented = {key for line in table.splitlines() if line.startswith("| `")
                  for key in re.findall(r"`([^`]+)`", line.split("|")[1])}  # fmt: skip
    with_a_latency_table = {"serving.latency", "parent.latency_ms", "budgets[].latency_ms"}
    seen = set()
    for words in (["--gpus", "2", LEARNED], [], ["elastic.budgets.small=0.01"]):
        main(["plan", "--config", TINY, "--json", "--train", *words])
        seen |= keys(json.loads(capsys.readouterr().out))
    leaves = {k for k in seen if not any(other.startswith((f"{k}.", f"{k}[]")) for other in seen)}
    assert documented == leaves | with_a_latency_table


def test_a_plan_with_problems_says_no_cost(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", TINY, "--json", "--train", "elastic.budgets.small=0.01"]) == 2
    assert json.loads(capsys.readouterr().out)["training"] is None
    assert main(["plan", "--config", TINY, "--json", "train.stages=[]"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"] is None and "run" not in found
    assert main(["plan", "--config", TINY, "--train", "--search", "uniform"]) == 2
    assert "leave out --search" in capsys.readouterr().err


def test_tables_say_cost_and_schedules(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", "nemotron_nano_12b_v2.yaml", "--train"]) == 0
    shown = capsys.readouterr().out
    for words in ("65.0 B", "GPU-hours at 35% of 989 TFLOP/s", "172.3 GB", "teacher: a copy of the parent",
                  "12b parent, 9b raced, 6b raced", "race 695 steps from 0",
                  "TP 1,2,4,8; PP 1,2; FP8; loads as NemotronH"):  # fmt: skip
        assert words in shown, words
    assert main(["plan", "--config", TINY, "--train", LEARNED]) == 0
    assert "router lr" in capsys.readouterr().out
    assert main(["plan", "--config", TINY, LEARNED]) == 0
    shown = capsys.readouterr().out
    assert "GPU-hours" in shown and "router lr" not in shown


def test_the_training_part_loads_no_torch() -> None:
    code = (
        "import sys; from nemo_elastic.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 3 * bool({'torch', 'megatron', 'nemo', 'lightning'} & set(sys.modules)))"
    )
    words = ["plan", "--config", TINY, "--json", "--train"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
