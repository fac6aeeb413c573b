"""`mcore/versions.py` is the only door to what differs between lines of megatron-core, and says it right for each."""

import ast
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_elastic.mcore import versions

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemo_elastic"
DOOR, SHIMS = PACKAGE / "mcore/versions.py", PACKAGE / "mcore/runtime/cpu.py"
# What every line from 0.15.3 to 0.19.2 has under this name. An import that is not here goes through the door, or is
# added after a look at all of these lines.
STABLE = {
    "megatron.core": {"num_microbatches_calculator", "parallel_state", "tensor_parallel"},
    "megatron.core.datasets.indexed_dataset": {"IndexedDataset"},
    "megatron.core.extensions.transformer_engine": {
        "TEColumnParallelLinear",
        "TEDotProductAttention",
        "TERowParallelLinear",
    },
    "megatron.core.dist_checkpointing.mapping": {"ShardedTensor", "ShardedTensorFactory"},
    "megatron.core.fusions.fused_bias_dropout": {"get_bias_dropout_add"},
    "megatron.core.optimizer.clip_grads": {"get_grad_norm_fp32"},
    "megatron.core.optimizer.distrib_optimizer": {"DistributedOptimizer"},
    "megatron.core.pipeline_parallel": {"get_forward_backward_func"},
    "megatron.core.process_groups_config": {"ProcessGroupCollection"},
    "megatron.core.models.common.embeddings.rope_utils": {"apply_rotary_pos_emb"},
    "megatron.core.models.common.embeddings.rotary_pos_embedding": {"RotaryEmbedding"},
    "megatron.core.ssm.mamba_layer": {"MambaLayer", "MambaLayerSubmodules"},
    "megatron.core.ssm.mamba_mixer": {"MambaMixer", "MambaMixerSubmodules"},
    "megatron.core.ssm.mlp_layer": {"MLPLayer"},
    "megatron.core.tensor_parallel": {"param_is_not_tensor_parallel_duplicate"},
    "megatron.core.tensor_parallel.layers": {"ColumnParallelLinear", "RowParallelLinear"},
    "megatron.core.tensor_parallel.mappings": {
        "copy_to_tensor_model_parallel_region",
        "gather_from_sequence_parallel_region",
        "gather_from_tensor_model_parallel_region",
        "reduce_from_tensor_model_parallel_region",
        "reduce_scatter_to_sequence_parallel_region",
        "scatter_to_sequence_parallel_region",
    },
    "megatron.core.tensor_parallel.random": {"model_parallel_cuda_manual_seed"},
    "megatron.core.transformer": {"transformer_layer"},
    "megatron.core.transformer.attention": {"SelfAttention", "SelfAttentionSubmodules"},
    "megatron.core.transformer.enums": {"AttnBackend", "AttnMaskType"},
    "megatron.core.transformer.mlp": {"MLP", "MLPSubmodules", "apply_swiglu_sharded_factory"},
    "megatron.core.transformer.module": {"MegatronModule", "param_is_not_shared"},
    "megatron.core.transformer.spec_utils": {"ModuleSpec", "build_module"},
    "megatron.core.transformer.transformer_config": {"TransformerConfig"},
    "megatron.core.transformer.transformer_layer": {"TransformerLayer", "TransformerLayerSubmodules"},
    "megatron.core.transformer.utils": {"make_sharded_tensors_for_checkpoint"},
    "megatron.core.utils": {"make_viewless_tensor"},
}
# Keywords that some lines take and others do not, and who outside Megatron takes them by the same name: our own
# configurations, and the optimizer's builders of the door and of NeMo's side.
KEYWORDS = {"hybrid_override_pattern", "hybrid_layer_pattern", "mamba_stack_spec", "hybrid_stack_spec"}
KEYWORDS |= {"no_weight_decay_cond", "scale_lr_cond", "lr_mult", "config_overrides", "layer_type_list"}
OURS = {"Architecture", "replace", "build_optimizer"}
# Only these packages reach Megatron; what this module fills is NeMo's configuration.
REACH, OF_NEMO = ("mcore/", "nemo/"), "nemo/plain/plain_config.py"
ATTRIBUTES = {"conv1d", "conv1d_weight", "conv1d_bias", "ssm_training", "_ssm_training", "get_megatron_optimizer"}


def violations(path: Path, source: str | None = None) -> Iterator[str]:
    """What of one file depends on the line of megatron-core, as `file:line: what`."""
    name = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (f"{place}: {a.name}" for a in node.names if a.name.startswith("megatron") and path != DOOR)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
            known = STABLE.get(node.module, set())
            yield from (f"{place}: {node.module}.{a.name}" for a in node.names if a.name not in known)
        elif isinstance(node, ast.Call):
            callee = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if callee not in OURS:
                yield from (f"{place}: {callee}({k.arg}=...)" for k in node.keywords if k.arg in KEYWORDS)
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if path != SHIMS and callee == "import_module":
                yield from (f"{place}: import_module({s!r})" for s in strings if s.startswith("megatron"))
        elif isinstance(node, ast.Dict) and name.startswith(REACH) and name != OF_NEMO:
            keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
            yield from (f"{place}: {{{key!r}: ...}}" for key in keys if key in KEYWORDS)
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield f"{place}: .{node.attr}"


def test_nothing_that_differs_between_lines_stands_outside_the_door() -> None:
    assert [text for path in PACKAGE.rglob("*.py") if path != DOOR for text in violations(path)] == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("from megatron.core.models.mamba import MambaModel", "megatron.core.models.mamba.MambaModel"),
        ("from megatron.core.transformer import moe", "megatron.core.transformer.moe"),
        ("import megatron.core", "megatron.core"),
        ("import importlib\nimportlib.import_module('megatron.core.ssm.mamba_block')", "import_module"),
        ("HybridModel(config, hybrid_override_pattern='M')", "HybridModel(hybrid_override_pattern=...)"),
        ("arguments = {'hybrid_layer_pattern': 'M'}", "hybrid_layer_pattern"),
        ("get_megatron_optimizer(c, m, lr_mult=2.0)", "get_megatron_optimizer(lr_mult=...)"),
        ("weight = mixer.conv1d.weight", ".conv1d"),
    ],
)
def test_the_rule_sees_what_goes_past_the_door(source: str, what: str) -> None:
    (text,) = violations(PACKAGE / "mcore/models/build.py", source)
    assert what in text


def test_our_own_pattern_key_stays() -> None:
    source = "replace(a, hybrid_override_pattern='M'); a.hybrid_override_pattern; model['hybrid_override_pattern']"
    assert list(violations(PACKAGE / "mcore/models/build.py", source)) == []


class Old:
    def __init__(self, config: object, hybrid_override_pattern: str | None = None) -> None: ...


class Between:
    def __init__(self, hybrid_layer_pattern: str | None = None, hybrid_override_pattern: str | None = None) -> None: ...


@pytest.mark.parametrize(("model", "keyword"), [(Old, "hybrid_override_pattern"), (Between, "hybrid_layer_pattern")])
def test_the_pattern_goes_by_the_newest_name(monkeypatch: pytest.MonkeyPatch, model: type, keyword: str) -> None:
    monkeypatch.setattr(versions, "HybridModel", model)
    assert versions.layer_pattern("M-*") == {keyword: "M-*"}
    assert versions.pattern_of(types.SimpleNamespace(**versions.layer_pattern("M-*"))) == "M-*"


def test_a_new_class_goes_before_the_wrapper_of_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.18 has both, and exports the new one from its module only."""

    class Wrapper(Between):
        def __init__(self, *args: object, **kwargs: object) -> None: ...

    modules = {"megatron.core.models.mamba": types.SimpleNamespace(MambaModel=Wrapper)}
    modules["megatron.core.models.hybrid"] = types.SimpleNamespace()
    modules["megatron.core.models.hybrid.hybrid_model"] = types.SimpleNamespace(HybridModel=Between)

    def import_module(name: str) -> object:
        if name not in modules:
            raise ModuleNotFoundError(name, name=name.rpartition(".")[0])  # as when its package is not there
        return modules[name]

    monkeypatch.setattr(versions.importlib, "import_module", import_module)
    places = (("models.hybrid.hybrid_model", "HybridModel"), ("models.mamba", "MambaModel"))
    assert versions.first_of(*places) is Between
    del modules["megatron.core.models.hybrid.hybrid_model"]
    assert versions.first_of(*places) is Wrapper
    modules.clear()
    with pytest.raises(ImportError, match=r"neither models\.hybrid\.hybrid_model\.HybridModel nor models\.mamba"):
        versions.first_of(*places)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("import a_package_that_nobody_has", "No module named 'a_package_that_nobody_has'"),
        ("from os import a_name_that_it_has_not", "cannot import name 'a_name_that_it_has_not'"),
        ("raise AttributeError('of its own')", "of its own"),
    ],
)
def test_a_module_that_is_there_and_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, cause: str
) -> None:
    """It is not passed over for the next place, whose absence would then be the message."""
    (tmp_path / "broken_line.py").write_text(body)
    monkeypatch.setattr(versions.megatron.core, "__path__", [*versions.megatron.core.__path__, str(tmp_path)])
    with pytest.raises((ImportError, AttributeError), match=cause):
        versions.first_of(("broken_line", "HybridModel"), ("models.mamba", "MambaModel"))


def test_an_mlp_is_given_the_group_that_it_takes() -> None:
    handed = {"config": 1, "pg_collection": types.SimpleNamespace(tp="group"), "is_mtp_layer": False, "name": "mlp"}
    assert versions.mlp_arguments(handed) == {"config": 1, "tp_group": "group", "name": "mlp"}
    assert versions.mlp_arguments({"config": 1}) == {"config": 1}


def test_conv_parameters_under_both_names() -> None:
    new = types.SimpleNamespace(conv1d_weight="weight", conv1d_bias="bias")
    old = types.SimpleNamespace(conv1d=types.SimpleNamespace(weight="weight", bias="bias"))
    assert versions.conv_parameters(new) == versions.conv_parameters(old) == ("weight", "bias")
    for name in ("mixer.conv1d_bias", "mixer.conv1d.bias"):
        assert versions.parameter_name(f"decoder.layers.3.{name}") == "decoder.layers.3.mixer.conv1d.bias"
