"""The hybrid stack without Transformer Engine: its checkpoint keys, marks and norm; and the choice between the two."""

from types import SimpleNamespace

import pool_plain
import pytest
import torch
from worker_pool import WorkerPool

from nemo_elastic.mcore import versions
from nemo_elastic.mcore.kernels import layer_specs
from nemo_elastic.mcore.kernels.norm import RMSNorm
from nemo_elastic.mcore.runtime import cpu

# What NeMo writes for its Transformer Engine stack, layer by layer: the layer norms live in the linear behind them.
MAMBA_KEYS = {
    "mixer.in_proj.layer_norm_weight": (128,),
    "mixer.in_proj.weight.z": (256, 128),
    "mixer.in_proj.weight.x": (256, 128),
    "mixer.in_proj.weight.B": (128, 128),
    "mixer.in_proj.weight.C": (128, 128),
    "mixer.in_proj.weight.dt": (16, 128),
    "mixer.conv1d.weight.x": (256, 1, 4),
    "mixer.conv1d.weight.B": (128, 1, 4),
    "mixer.conv1d.weight.C": (128, 1, 4),
    "mixer.conv1d.bias.x": (256,),
    "mixer.conv1d.bias.B": (128,),
    "mixer.conv1d.bias.C": (128,),
    "mixer.A_log": (16,),
    "mixer.D": (16,),
    "mixer.dt_bias": (16,),
    "mixer.norm.weight": (256,),
    "mixer.out_proj.weight": (128, 256),
}
MLP_KEYS = {
    "mlp.linear_fc1.layer_norm_weight": (128,),
    "mlp.linear_fc1.weight": (512, 128),
    "mlp.linear_fc2.weight": (128, 512),
}
ATTENTION_KEYS = {
    "self_attention.linear_qkv.layer_norm_weight": (128,),
    "self_attention.linear_qkv.weight": (384, 128),
    "self_attention.linear_proj.weight": (128, 256),
}
OUTER_KEYS = {
    "embedding.word_embeddings.weight": (2048, 128),
    "decoder.final_norm.weight": (128,),
    "output_layer.weight": (2048, 128),
}


@pytest.mark.parametrize("tp", [1, 2])
def test_checkpoint_keys_and_global_shapes_are_those_of_nemo(pool2: WorkerPool, tp: int) -> None:
    expected = dict(OUTER_KEYS)
    for index, keys in enumerate([MAMBA_KEYS, MLP_KEYS, ATTENTION_KEYS]):
        expected |= {f"decoder.layers.{index}.{key}": shape for key, shape in keys.items()}
    for found in pool2.run(pool_plain.checkpoint_keys, "M-*", tp=tp):
        assert found == expected


def test_pipeline_stages_number_their_layers_globally(pool2: WorkerPool) -> None:
    first, second = pool2.run(pool_plain.checkpoint_keys, "M-*-", pp=2)
    layers = lambda keys: {int(key.split(".")[2]) for key in keys if ".layers." in key}  # noqa: E731
    assert layers(first) == {0, 1}
    assert layers(second) == {2, 3}
    assert "decoder.final_norm.weight" in second and "decoder.final_norm.weight" not in first


def test_every_split_parameter_counts_as_split_in_the_gradient_norm(pool2: WorkerPool) -> None:
    replicated = {"norm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight", "final_norm.weight"}
    for marks in pool2.run(pool_plain.split_marks, "M-*", tp=2):
        for name, split in marks.items():
            expected = name.split("layers.")[-1].partition(".")[2] not in replicated and "final_norm" not in name
            assert split is expected, name


@pytest.mark.parametrize("sp", [False, True])
def test_only_replicated_norms_are_marked_for_sequence_parallelism(pool2: WorkerPool, sp: bool) -> None:
    for marks in pool2.run(pool_plain.shared_marks, "M-*", tp=2, sp=sp):
        marked = {name for name, mark in marks.items() if mark}
        norms = {
            "decoder.layers.0.norm.weight",
            "decoder.layers.1.pre_mlp_layernorm.weight",
            "decoder.layers.2.input_layernorm.weight",
            "decoder.final_norm.weight",
        }
        assert marked == (norms if sp else set())


def norm_config(**changes: object) -> SimpleNamespace:
    settings = {
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "layernorm_epsilon": 1e-3,
        "params_dtype": torch.float64,
        "sequence_parallel": False,
        "use_cpu_initialization": False,
    }
    return SimpleNamespace(**settings | changes)


def test_norm_is_torchs_with_the_epsilon_of_the_config(one_rank: None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 32, generator=generator) * 0.1  # small, so that epsilon matters
    norm = RMSNorm(norm_config(params_dtype=torch.float32), 32)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=generator))
    expected = torch.nn.functional.rms_norm(x, (32,), norm.weight, eps=1e-3)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)
    assert RMSNorm(norm_config(), 32, eps=1e-6).eps == 1e-6


def test_norm_of_bf16_is_computed_in_fp32(one_rank: None) -> None:
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = RMSNorm(norm_config(params_dtype=torch.bfloat16), 64)(x)
    assert y.dtype is torch.bfloat16
    exact = torch.nn.functional.rms_norm(x.double(), (64,), eps=1e-3)
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("change", [{"normalization": "LayerNorm"}, {"layernorm_zero_centered_gamma": True}])
def test_norm_refuses_what_it_does_not_compute(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs Transformer Engine"):
        RMSNorm(norm_config(**change), 8)


def test_the_spec_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.install()
    assert layer_specs.hybrid_stack_spec().module is layer_specs.LocalStack
    monkeypatch.setattr(layer_specs, "have_transformer_engine", lambda: True)
    fused = layer_specs.hybrid_stack_spec()
    assert fused.module is versions.HybridStack
    mixer = fused.submodules.mamba_layer.submodules.mixer
    stack = versions.transformer_engine_spec().submodules
    stock = stack.mamba_layer.submodules.mixer
    assert mixer.module is layer_specs.Mixer
    assert mixer.submodules is stock.submodules
    assert stock.module is layer_specs.MambaMixer, "megatron's own spec must stay as it is"
    assert fused.submodules.attention_layer is stack.attention_layer
    assert fused.submodules.mlp_layer is stack.mlp_layer
