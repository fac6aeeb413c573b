"""From numbers to NeMo's objects: one vocabulary in every layout, and errors in the user's own keys."""

import dataclasses
import os

import lightning.pytorch as pl
import plain_training
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from nemo.collections import llm
from small_parent import FFN_GROUPS, SMALL, architecture

from nemo_elastic.config.function_fields import OWN
from nemo_elastic.config.model_fields import known_fields
from nemo_elastic.mcore import versions
from nemo_elastic.mcore.kernels import layer_specs
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model
from nemo_elastic.mcore.versions import AttnBackend
from nemo_elastic.nemo.export.context import vocab_divisor
from nemo_elastic.nemo.plain import plain_config, trainer

MODEL = plain_training.TINY_PARENT


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_vocabulary_is_the_same_in_every_layout(tp: int) -> None:
    config = plain_config.plain_model_config(MODEL, tensor_model_parallel_size=tp)
    assert plain_config.check_vocabulary(config, 2000) == 2048
    assert plain_config.check_vocabulary(config, 2048) == 2048
    with pytest.raises(ValueError, match=r"2049 tokens, more than model\.vocab_size=2048"):
        plain_config.check_vocabulary(config, 2049)


@pytest.mark.parametrize(("tp", "rows"), [(1, 2045), (2, 2046), (4, 2048)])
def test_tp_adds_no_more_rows_than_divide_it(tp: int, rows: int) -> None:
    config = plain_config.plain_model_config(MODEL | {"vocab_size": 2045}, tensor_model_parallel_size=tp)
    for tokens in (1000, 2045):
        assert plain_config.check_vocabulary(config, tokens) == rows


@pytest.mark.parametrize(
    ("rows", "tokens", "divisor"),
    [(2048, 2000, 128), (2049, 2049, 1), (2049, 2048, 3), (2053, 2000, 2053), (8, None, 1)],
)
def test_a_context_pads_the_tokenizer_to_the_embedding(rows: int, tokens: int | None, divisor: int) -> None:
    """At TP 1 exactly; at others as little is added as can be."""
    assert vocab_divisor(rows, tokens) == divisor
    assert -(-(tokens or rows) // divisor) * divisor == rows


def test_config_holds_the_users_fields_and_what_a_cpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = plain_config.plain_model_config(MODEL, precision="bf16-mixed", sequence_parallel=True, mamba_state_dim=64)
    assert (config.num_layers, config.hidden_size, config.mamba_num_heads) == (16, 128, 16)
    assert config.mamba_state_dim == 64
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert config.sequence_parallel is False  # one tensor-parallel rank has nothing to divide
    assert config.attention_backend is AttnBackend.local
    assert config.is_hybrid_model and not config.bias_dropout_fusion and not config.cross_entropy_loss_fusion
    torch.testing.assert_close(config.activation_func(torch.tensor([-2.0, 3.0])), torch.tensor([0.0, 9.0]))
    for module in (plain_config, layer_specs):
        monkeypatch.setattr(module, "have_transformer_engine", lambda: True)
    with_gpu = plain_config.plain_model_config(MODEL, apply_rope_fusion=False)  # this fusion checks for itself
    assert with_gpu.attention_backend is AttnBackend.auto and with_gpu.bias_dropout_fusion


def test_with_transformer_engine_all_models_of_a_process_leave_attention_to_it(
    monkeypatch: pytest.MonkeyPatch, one_rank: None
) -> None:
    """Rank, train and verify build in one process, and Megatron keeps the setting in the environment."""
    switches = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    for name in switches:
        monkeypatch.setenv(name, "1")  # and back again afterwards
        monkeypatch.delenv(name)
    for module in (plain_config, layer_specs):  # the elastic stack's own stays: Transformer Engine is not there
        monkeypatch.setattr(module, "have_transformer_engine", lambda: True)
    local = layer_specs.local_stack_spec
    monkeypatch.setattr(layer_specs, "transformer_engine_stack_spec", lambda pattern, stock: local(pattern))
    arch = architecture()
    ranked = build_plain_model(arch)
    fields = {name: getattr(arch, name) for name in SMALL} | {"hybrid_override_pattern": arch.hybrid_override_pattern}
    trained = build_plain_model(arch, config=plain_config.plain_model_config(fields, apply_rope_fusion=False))
    nested, child = build_elastic_model(arch, ffn_groups=FFN_GROUPS), build_plain_model(arch)
    assert {m.config.attention_backend for m in (ranked, trained, nested, child)} == {AttnBackend.auto}
    assert {os.environ[name] for name in switches} == {"1"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL | {"hiden_size": 3}, r"model\.hiden_size is not a field of SSMConfig; hidden_size\?"),
        (MODEL | {"activation_func": "tanh"}, r"model\.activation_func='tanh' must be one of squared_relu"),
    ],
)
def test_config_errors_name_the_users_keys(model: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain_config.plain_model_config(model, tensor_model_parallel_size=2)


def test_the_known_fields_are_those_of_the_installed_nemo() -> None:
    """SSMConfig takes up Megatron's fields, so an older line has fewer of them."""
    installed = {field.name for field in dataclasses.fields(llm.SSMConfig)} | {"vocab_size"}
    if versions.installed() == versions.TESTED[-1]:
        assert installed == known_fields() - {*OWN}
    assert installed <= known_fields()


def test_layout_is_checked_against_the_processes_that_were_started() -> None:
    assert trainer.check_layout(8, 2, 2, global_batch_size=8, micro_batch_size=2) == 2
    with pytest.raises(
        ValueError, match=r"multiple of 4 processes, 6 started; use torchrun --nproc-per-node or --nproc"
    ):
        trainer.check_layout(6, 2, 2, global_batch_size=8, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"train\.global_batch_size=6 must be a multiple of .*=2 x 2 data-parallel"):
        trainer.check_layout(2, 1, 1, global_batch_size=6, micro_batch_size=2)


def test_started_processes_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert trainer.lightning_layout()[:2] == (1, 1)
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "11", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert trainer.lightning_layout()[:2] == (2, 8)


@pytest.mark.parametrize(("visible", "nodes", "devices", "device"), [(8, 2, 8, 3), (1, 16, 1, 0)])
def test_lightning_takes_the_gpu_that_a_process_sees(
    monkeypatch: pytest.MonkeyPatch, visible: int, nodes: int, devices: int, device: int
) -> None:
    """All of a machine's, or by CUDA_VISIBLE_DEVICES one of them each. The counts are made up: no GPU is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: visible)
    torchrun = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "11", "LOCAL_RANK": "3", "GROUP_RANK": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    *counts, environment = trainer.lightning_layout()
    assert counts == [nodes, devices]
    made = pl.Trainer(
        accelerator="gpu", devices=devices, num_nodes=nodes, strategy=DDPStrategy(), plugins=[environment], logger=False
    )
    assert made.strategy.root_device == torch.device("cuda", device)
    assert (made.world_size, made.global_rank) == (16, 11)


def test_cosine_needs_its_end_and_the_distributed_optimizer_is_for_gpus() -> None:
    with pytest.raises(ValueError, match=r"train\.min_lr needs train\.max_steps"):
        trainer.build_optimizer(1e-3, min_lr=1e-5)
    optimizer = trainer.build_optimizer(1e-3, min_lr=1e-5, max_steps=10, warmup_steps=2)
    assert optimizer.config.use_distributed_optimizer is torch.cuda.is_available()
    assert optimizer.lr_scheduler.max_steps == 10
