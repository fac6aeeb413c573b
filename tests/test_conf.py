"""Every parent in conf/: what `plan` counts against the Megatron model that is built, and against published totals.

Identity: plan(conf)["parent"]["parameters"] == sum(p.numel()) of `MambaModel` on the meta device.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from expert_features import skip_without_slot

from nemo_elastic.config import load_config
from nemo_elastic.config.load import leaves
from nemo_elastic.plan.of_run import plan
from nemo_elastic.problems import ProblemsError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
PARENTS = sorted(path.name for path in CONF.glob("*.yaml"))
GROUPS = sorted(str(path.relative_to(CONF)) for path in CONF.glob("*/*.yaml"))
PUBLISHED = {  # integers: elements of the released weights; otherwise the makers' rounded totals. The 4B is not listed:
    "nemotron_nano_12b_v2.yaml": 12_310_001_152,  # "4B" is too coarse a figure to compare 4.49e9 with
    "nemotron_elastic_paper.yaml": 12_310_001_152,
    "nemotron_nano_9b_v2.yaml": 8_888_227_328,
    "nemotron_h_8b.yaml": 8.1e9,
    "nemotron_h_47b.yaml": 47e9,
    "nemotron_h_56b.yaml": 56e9,
    "nemotron_3_nano_4b.yaml": 3_973_556_832,
    "nemotron_nano_9b_to_4b.yaml": 8_888_227_328,
    "llama_3_2_1b.yaml": 1_235_814_400,
    "llama_3_1_8b.yaml": 8_030_261_248,
    "qwen3_4b.yaml": 4_022_468_096,
    "qwen3_8b.yaml": 8_190_735_360,
    "qwen2_5_7b.yaml": 7_615_616_512,
    "bamba_9b.yaml": 9_780_235_392,  # the makers round; the formula's
    "granite_4_h_micro.yaml": 3_191_396_096,  # likewise
    "nemotron_3_nano_30b_a3b.yaml": 31_577_940_288,
    "star_elastic.yaml": 31_577_940_288,
    "granite_4_h_small.yaml": 32_207_337_984,
    "qwen3_30b_a3b.yaml": 30_532_122_624,
}
ACTIVE = {  # what one token passes through
    "nemotron_3_nano_30b_a3b.yaml": 3_580_076_352,
    "star_elastic.yaml": 3_580_076_352,
    "granite_4_h_small.yaml": 8_803_121_664,
    "qwen3_30b_a3b.yaml": 3_353_032_704,
    "tiny_experts.yaml": 1_154_404,
}
KINDS = {  # Mamba, attention, MLP, experts layers
    "nemotron_nano_12b_v2.yaml": (28, 6, 28),
    "nemotron_elastic_paper.yaml": (28, 6, 28),
    "nemotron_nano_9b_v2.yaml": (27, 4, 25),
    "nemotron_h_4b.yaml": (24, 4, 24),
    "nemotron_h_8b.yaml": (24, 4, 24),
    "nemotron_h_47b.yaml": (45, 5, 48),
    "nemotron_h_56b.yaml": (54, 10, 54),
    "nemotron_3_nano_4b.yaml": (21, 4, 17),
    "nemotron_nano_9b_to_4b.yaml": (27, 4, 25),
    "llama_3_2_1b.yaml": (0, 16, 16),
    "llama_3_1_8b.yaml": (0, 32, 32),
    "qwen3_4b.yaml": (0, 36, 36),
    "qwen3_8b.yaml": (0, 36, 36),
    "qwen2_5_7b.yaml": (0, 28, 28),
    "bamba_9b.yaml": (29, 3, 32),
    "granite_4_h_micro.yaml": (36, 4, 40),
    "nemotron_3_nano_30b_a3b.yaml": (23, 6, 0, 23),
    "star_elastic.yaml": (23, 6, 0, 23),
    "granite_4_h_small.yaml": (36, 4, 0, 40),
    "qwen3_30b_a3b.yaml": (0, 48, 0, 48),
    "tiny_parent.yaml": (7, 2, 7),
    "tiny_experts.yaml": (5, 2, 0, 5),
}
HUGGING_FACE = {"llama": "Llama", "qwen3": "Qwen3", "qwen2": "Qwen2", "bamba": "Bamba", "granite": "Granite"}
NEMO = {  # NeMo's own class of the same model
    "nemotron_nano_12b_v2.yaml": "NemotronNano12Bv2",
    "nemotron_nano_9b_v2.yaml": "NemotronNano9Bv2",
    "nemotron_h_4b.yaml": "NemotronHConfig4B",
    "nemotron_h_8b.yaml": "NemotronHConfig8B",
    "nemotron_h_47b.yaml": "NemotronHConfig47B",
    "nemotron_h_56b.yaml": "NemotronHConfig56B",
}


@pytest.fixture
def on_meta(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron allocates on the current device: here that is the one without memory."""
    import torch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    with torch.device("meta"):
        yield


def test_every_parent_is_here() -> None:
    assert set(PARENTS) == set(KINDS) and set(PUBLISHED) | set(NEMO) <= set(PARENTS)


@pytest.mark.parametrize("name", PARENTS)
def test_plan_counts_what_megatron_builds(name: str, on_meta: None) -> None:
    from nemo_elastic.mcore.models.build import build_plain_model

    run = load_config(CONF / name).config
    found = plan(run)
    assert found["problems"] == []
    if name in ACTIVE:
        skip_without_slot()
    model = build_plain_model(run.model, perform_initialization=False)
    devices = {p.device.type for p in model.parameters()}
    assert devices == {"meta"}
    assert found["parent"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parent"]["active_parameters"] == ACTIVE.get(name, found["parent"]["parameters"])
    if name in PUBLISHED:
        exact = isinstance(PUBLISHED[name], int)
        assert found["parent"]["parameters"] == pytest.approx(PUBLISHED[name], rel=0 if exact else 0.02)


OTHERS = {  # of published models that no file of conf/ describes: sizes, parameters, active ones
    "granite_4_h_tiny": (
        {"hybrid_override_pattern": "MEMEMEMEME*EMEMEMEMEMEMEMEMEME*EMEMEMEMEMEMEMEMEME*EMEMEMEMEMEMEMEMEME*EMEMEMEME",
         "hidden_size": 1536, "num_attention_heads": 12, "num_query_groups": 4, "kv_channels": 128,
         "mamba_num_heads": 48, "mamba_head_dim": 64, "mamba_num_groups": 1, "mamba_state_dim": 128,
         "num_moe_experts": 64, "moe_router_topk": 6, "moe_ffn_hidden_size": 512,
         "moe_shared_expert_intermediate_size": 1024, "gated_linear_unit": True,
         "share_embeddings_and_output_weights": True, "vocab_size": 100352},
        6_939_037_248, 1_465_470_528,
    ),
    "nemotron_3_super_without_mtp": (
        {"hybrid_override_pattern": "M" * 40 + "E" * 40 + "*" * 8, "hidden_size": 4096, "num_attention_heads": 32,
         "num_query_groups": 2, "kv_channels": 128, "mamba_num_heads": 128, "mamba_head_dim": 64,
         "mamba_num_groups": 8, "mamba_state_dim": 128, "num_moe_experts": 512, "moe_router_topk": 22,
         "moe_ffn_hidden_size": 2688, "moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376,
         "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "vocab_size": 131072},
        120_668_707_840, 12_770_237_440,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
def test_counts_of_other_published_models(name: str) -> None:
    from nemo_elastic.config.model_fields import architecture_of
    from nemo_elastic.cost.counts import active_parameters, parameters
    from nemo_elastic.space.elastic_space import ElasticSpace
    from nemo_elastic.space.layout import ParamLayout

    model, count, active = OTHERS[name]
    arch = architecture_of(model)
    layout, full = ParamLayout(arch), ElasticSpace(architecture=arch).full_subnet()
    assert (parameters(layout, full), active_parameters(layout, full)) == (count, active)


@pytest.mark.parametrize("name", PARENTS)
def test_plan_of_every_parent_meets_its_budgets(name: str) -> None:
    run = load_config(CONF / name).config
    found = plan(run)
    assert [b["name"] for b in found["budgets"]] == list(run.elastic.budgets) and len(found["budgets"]) == 3
    for budget in found["budgets"]:
        assert abs(budget["error"]) < 0.011, budget["name"]
        note = budget["deployment"]["hugging_face"]
        family = HUGGING_FACE.get(name.split("_")[0], "NemotronH")
        assert note == f"loads as {family}{'-MoE' if family == 'Qwen3' and name in ACTIVE else ''}"
        tp = run.train.tensor_model_parallel_size
        assert tp in budget["deployment"]["tensor_parallel"]
    pattern = run.model["hybrid_override_pattern"]
    assert tuple(pattern.count(kind) for kind in "M*-E"[: len(KINDS[name])]) == KINDS[name]
    names = set(run.elastic.budgets)
    for stage in run.train.stages:
        assert stage.budget_probabilities is None or set(stage.budget_probabilities) == names


def test_the_published_4b_is_a_child_of_the_9b() -> None:
    child = plan(load_config(CONF / "nemotron_nano_9b_to_4b.yaml").config)["budgets"][-1]
    model = load_config(CONF / "nemotron_3_nano_4b.yaml").config.model
    pattern = load_config(CONF / "nemotron_nano_9b_v2.yaml").config.model["hybrid_override_pattern"]
    assert child["parameters"] == PUBLISHED["nemotron_3_nano_4b.yaml"] and child["error"] == 0
    assert "".join(pattern[i] for i in child["subnet"]["layers"]) == model["hybrid_override_pattern"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NEMO))
def test_sizes_are_those_of_nemo(name: str) -> None:
    """Field defaults of NeMo's class, which cannot be built without Transformer Engine."""
    from nemo.collections.llm.gpt.model import ssm

    model = load_config(CONF / name).config.model
    stock = {field.name: field.default for field in dataclasses.fields(getattr(ssm, NEMO[name]))}
    if stock["mamba_num_heads"] is None:  # Megatron's own defaults: twice the hidden size in heads, ...
        stock["mamba_num_heads"] = 2 * stock["hidden_size"] // stock["mamba_head_dim"]
    if stock["kv_channels"] is None:  # ... and the hidden size dealt to the attention heads
        stock["kv_channels"] = stock["hidden_size"] // stock["num_attention_heads"]
    assert dict(model) == {key: stock[key] for key in model}
    assert len(model["hybrid_override_pattern"]) == stock["num_layers"]


@pytest.mark.parametrize("name", PARENTS)
def test_every_value_names_the_file_it_came_from(name: str) -> None:
    """The file itself wins over what it builds on; what neither says is a default."""
    from nemo_elastic.cli.config import origin_of

    resolved = load_config(CONF / name, ["train.seed=7"])
    files = {Path(origin).resolve() for origin in resolved.origins.values() if origin != "command line"}
    assert (CONF / name).resolve() in files and files <= set(CONF.resolve().rglob("*.yaml"))
    assert origin_of("train.seed", resolved.origins) == "command line"
    assert origin_of("train.preemption", resolved.origins) == "default"
    import yaml

    written = {file: dict(leaves(yaml.safe_load(file.read_text()))) for file in files}
    for key, value in leaves(resolved.values):
        origin = origin_of(key, resolved.origins)
        if origin not in ("default", "command line"):
            said = written[Path(origin).resolve()].get(key, "another leaf")
            assert said == value or said == "another leaf" or float(said) == float(value), key


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_explains_its_keys(name: str) -> None:
    """A group is small, opens with what it is, and its keys have comments; a group alone is no parent."""
    lines = (CONF / name).read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) < 30
    keys = [line for line in lines[1:] if ":" in line and not line.rstrip().endswith(":") and not line.startswith("#")]
    assert sum("#" in line for line in keys) >= len(keys) / 2


def test_every_key_of_a_parent_is_explained_somewhere() -> None:
    explained = set()
    for path in CONF.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            key, hash_, _ = line.partition("#")
            if hash_ and ":" in key:
                explained.add(key.split(":")[0].strip(" -{"))
    assert {"num_query_groups", "mamba_state_dim", "ffn_groups", "global_batch_size", "profile", "samples"} <= explained


@pytest.mark.slow
def test_the_wheel_carries_the_configurations(tmp_path: Path) -> None:
    """Built, installed alone into an empty folder and run from another: shipped parents are found by name."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path / "source"
    copy = ["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={source}/"]
    subprocess.run(copy, check=True)
    wheels, installed, elsewhere = tmp_path / "wheels", tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    for name in (*PARENTS, *GROUPS):
        assert (installed / "nemo_elastic" / "conf" / name).read_text() == (CONF / name).read_text()
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    for name in ("tiny_parent.yaml", "tiny_experts.yaml", "nemotron_h_47b.yaml"):
        done = subprocess.run(
            [sys.executable, "-m", "nemo_elastic", "plan", "--config", name, "--json"],
            capture_output=True,
            text=True,
            cwd=elsewhere,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == Path(name).stem
    where = [sys.executable, "-c", "import nemo_elastic; print(nemo_elastic.__file__)"]
    shown = subprocess.run(where, capture_output=True, text=True, cwd=elsewhere, env=environment).stdout
    assert shown.startswith(str(installed))


@pytest.mark.parametrize(
    "word",
    [
        "rotary_interleaved=true",
        "position_embedding_type=learned_absolute",
        "window_size=[16,0]",
        "moe_z_loss_coeff=1e-3",
    ],
)
def test_what_would_be_counted_wrongly_is_refused(word: str) -> None:
    with pytest.raises(ProblemsError, match=f"model.{word.partition('=')[0]}: .*not supported"):
        load_config("tiny_parent.yaml", [f"model.{word}"])
    load_config("tiny_parent.yaml", ["model.gated_linear_unit=false", "model.position_embedding_type=none"])


def test_a_shipped_file_can_be_copied_anywhere(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text((CONF / "nemotron_nano_12b_v2.yaml").read_text())
    assert load_config(copy).config == load_config("nemotron_nano_12b_v2.yaml").config
    (tmp_path / "model").mkdir()  # what lies beside the copy comes first
    beside = (CONF / "model" / "nemotron_h.yaml").read_text().replace("vocab_size: 131072", "vocab_size: 4096")
    (tmp_path / "model" / "nemotron_h.yaml").write_text(beside)
    assert load_config(copy).config.model["vocab_size"] == 4096
    copy.write_text("base: nothing.yaml")
    with pytest.raises(ProblemsError, match=r"base: no file 'nothing\.yaml' beside it or in the shipped conf/"):
        load_config(copy)


def test_bf16_runs_take_the_optimizer_that_can_save_them() -> None:
    """Megatron's plain optimizer dies at the first checkpoint of a bf16 model that has fp32 parameters."""
    train = load_config("tiny_parent.yaml", ["train.precision=bf16-mixed"]).config.train
    assert train.distributed_optimizer and train.use_distributed_optimizer is None
    assert not load_config("tiny_parent.yaml").config.train.distributed_optimizer
    assert load_config("nemotron_nano_12b_v2.yaml").config.train.distributed_optimizer
    load_config("tiny_parent.yaml", ["train.precision=32", "train.use_distributed_optimizer=false"])
    for precision in ("bf16-mixed", "auto"):  # auto is bf16 on a GPU
        words = [f"train.precision={precision}", "train.use_distributed_optimizer=false"]
        with pytest.raises(ProblemsError, match=r"train\.use_distributed_optimizer: false needs train\.precision=32"):
            load_config("tiny_parent.yaml", words)


def test_items_of_a_replaced_list_are_of_who_replaced_it() -> None:
    from nemo_elastic.cli.config import origin_of

    by_file = load_config(CONF / "star_elastic.yaml")
    assert by_file.values["train"]["stages"][0]["tokens"] == 94.5e9
    assert not [key for key in by_file.origins if key == "train.stages.0.steps"]
    word = "train.stages=[{steps: 3, seq_length: 64, global_batch_size: 8}]"
    by_word = load_config(CONF / "nemotron_nano_12b_v2.yaml", [word])
    assert origin_of("train.stages.0.steps", by_word.origins) == "command line"


NAMED = {  # override -> whose, and the key that is named
    "elastic.ffn_groups=256": ("qwen3_30b_a3b", "elastic.ffn_groups"),
    "elastic.ffn_groups=16384": ("llama_3_2_1b", "elastic.ffn_groups"),
    "model.moe_router_topk=1": ("qwen3_30b_a3b", "model.moe_router_topk"),
    "model.moe_router_score_function=softmax": ("nemotron_3_nano_30b_a3b", "model.moe_router_enable_expert_bias"),
    "model.moe_router_load_balancing_type=sinkhorn": ("qwen3_30b_a3b", "model.moe_router_load_balancing_type"),
    "elastic.dims.num_moe_experts.choices=[128,4]": ("qwen3_30b_a3b", "elastic.dims.num_moe_experts.choices"),
    "model.rotary_base=.inf": ("llama_3_2_1b", "model.rotary_base"),
}


@pytest.mark.parametrize("word", list(NAMED))
def test_what_cannot_be_is_named_by_its_key(word: str) -> None:
    name, key = NAMED[word]
    try:
        found = plan(load_config(CONF / f"{name}.yaml", [word]).config)["problems"]
    except ProblemsError as error:
        found = [{"key": problem.key} for problem in error.problems]
    assert key in {problem["key"] for problem in found}
