"""The optimizer's groups on the installed line of megatron-core: rates and weight decay of router and network."""

import inspect
import math
import re
import types

import pool_family
import pytest
import torch
from nemo.lightning import io
from torch import nn

from nemo_elastic.mcore import versions
from nemo_elastic.nemo.plain.optimizer import OptimizerModule, apply_multipliers, gather_in_the_schedule
from nemo_elastic.nemo.plain.optimizer_states import dealt
from nemo_elastic.nemo.plain.trainer import build_optimizer
from nemo_elastic.nemo.run.train import decays_not, is_router
from nemo_elastic.problems import ProblemsError

NEW_LINE = pytest.mark.skipif(
    not hasattr(versions.optimizers, "ParamKey"), reason="the installed line has no config_overrides"
)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("distributed", [False, True])
def test_the_router_has_its_own_rate_and_no_weight_decay(distributed: bool) -> None:
    """Group by group of the family's optimizer, after the multipliers, in the words of the installed line."""
    groups = pool_family.optimizer_groups(distributed)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(found) and any(".router." in name for name in names), "every parameter is in one group"
    for name, dimensions in pool_family.parameter_dimensions().items():
        router = ".router." in name
        rate, decay = (1e-2 if router else 1e-3), (0.0 if router or dimensions == 1 else 0.01)
        assert found.pop(name) == pytest.approx((rate, decay)), name
    assert not found
    marks = {(group["pre_lr_mult"], group["pre_wd_mult"]) for group in groups}
    assert marks == {(1.0, 1.0), (1.0, 0.0), (10.0, 0.0)}, "a checkpoint finds the groups again by these"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_are_read_once_a_step(distributed: bool) -> None:
    """Megatron clips by what the guard measured; a step that nobody guards measures again."""
    found = pool_family.guarded_step(distributed)
    (guarded, measured), (_, then) = found["steps"]
    assert guarded == pytest.approx(found["megatron"], rel=1e-6) and guarded == math.hypot(*found["parts"])
    assert (measured, then) == (0, 1) and min(found["parts"]) > 1.0


def test_multipliers_are_applied_once_and_renamed_as_nemo_does() -> None:
    group = {"lr": 0.5, "weight_decay": 0.1, "lr_mult": 4.0, "wd_mult": 0.0}
    for _ in range(2):
        apply_multipliers(group)
        assert group == {"lr": 2.0, "weight_decay": 0.0, "pre_lr_mult": 4.0, "pre_wd_mult": 0.0}


def fake_optimizers(**names: object) -> types.SimpleNamespace:
    """Megatron's optimizer package with a `get_megatron_optimizer` that hands its arguments back."""
    return types.SimpleNamespace(**names)


def test_the_old_line_is_told_in_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(config, modules, no_weight_decay_cond=None, scale_lr_cond=None, lr_mult=1.0, use_gloo_process_groups=True):
        return no_weight_decay_cond, scale_lr_cond, lr_mult

    monkeypatch.setattr(versions, "optimizers", fake_optimizers(get_megatron_optimizer=old))
    found = versions.build_optimizer(None, [], no_weight_decay_cond=decays_not, scale_lr_cond=is_router, lr_mult=10.0)
    assert found == (decays_not, is_router, 10.0)


@NEW_LINE
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("module.router.net.weight", (3, 3), {"wd_mult": 0.0, "lr_mult": 10.0}),
        ("module.decoder.final_norm.weight", (3,), {"wd_mult": 0.0}),
        ("module.decoder.layers.0.mixer.in_proj.weight", (3, 3), {}),
    ],
)
def test_the_new_line_is_told_by_overrides(name: str, shape: tuple[int, ...], expected: dict[str, float]) -> None:
    config = versions.OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.01)
    overrides = versions._overrides(config, decays_not, is_router, 10.0)
    parameter, found = nn.Parameter(torch.zeros(shape)), {}
    for key, override in overrides.items():
        if key.matches(parameter, name):
            found |= override
    assert found == expected
    standard = versions._overrides(config, None, None, 1.0)
    decay = [o for key, o in standard.items() if key.matches(parameter, name)]
    assert decay == ([{"wd_mult": 0.0}] if len(shape) == 1 else [])


@NEW_LINE
def test_no_setting_of_single_groups_is_unknown_here() -> None:
    """What Megatron's own groups are made of; a new one is handed on or refused before it is added."""
    source = inspect.getsource(versions.optimizers.get_standard_config_overrides)
    assert set(re.findall(r"config\.(\w+)", source)) == {"apply_wd_to_qk_layernorm", "decoupled_lr", "decoupled_min_lr"}


@NEW_LINE
def test_weight_decay_of_the_norms_of_q_and_k_is_handed_on() -> None:
    config = versions.OptimizerConfig(lr=1e-3, apply_wd_to_qk_layernorm=True)
    ((key, override),) = versions._overrides(config, None, None, 1.0).items()
    vector = nn.Parameter(torch.zeros(3))
    assert override == {"wd_mult": 0.0}
    assert key.matches(vector, "norm.weight") and not key.matches(vector, "self_attention.q_layernorm.weight")
    with pytest.raises(ProblemsError, match=r"apply_wd_to_qk_layernorm: True and no_weight_decay_cond both say"):
        versions.build_optimizer(config, [], no_weight_decay_cond=decays_not)


def test_a_rate_that_only_megatrons_scheduler_reads_is_refused() -> None:
    """Under NeMo's schedulers the embeddings would be trained at `lr`, silently, on every line."""
    config = versions.OptimizerConfig(lr=1e-3, decoupled_lr=2e-4, decoupled_min_lr=0.0)
    with pytest.raises(ProblemsError) as caught:
        versions.build_optimizer(config, [])
    first, second = str(caught.value).splitlines()
    assert first.startswith("optimizer.config.decoupled_lr: 0.0002 is read by") and "scale_lr_cond" in first
    assert second.startswith("optimizer.config.decoupled_min_lr: 0.0 is read by")


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("overlap", "align"), [(True, True), (True, False), (False, True)])
def test_parameters_are_gathered_by_the_schedule_where_both_settings_ask(
    chunks: int, overlap: bool, align: bool
) -> None:
    """One function for a stage in one piece, a list of them for an interleaved one, as Megatron's schedules take it."""
    pieces = [types.SimpleNamespace(config=types.SimpleNamespace(), start_param_sync=object()) for _ in range(chunks)]

    class Model(list):
        ddp_config = versions.DistributedDataParallelConfig(overlap_param_gather=overlap, align_param_gather=align)

    gather_in_the_schedule(Model(pieces))
    starts = [piece.start_param_sync for piece in pieces]
    wanted = {"param_sync_func": starts if chunks > 1 else starts[0]} if overlap and align else {}
    assert [vars(piece.config) for piece in pieces] == [wanted] * chunks


def test_a_context_holds_the_module_and_gives_it_back(tmp_path) -> None:
    """As a training checkpoint's `context/` does; NeMo's arguments, and none of our own."""
    made = build_optimizer(1e-3, scale_lr_cond=is_router, lr_mult=10.0, no_weight_decay_cond=decays_not)
    assert type(made) is OptimizerModule
    made.io_dump(tmp_path, [])
    again = io.load(tmp_path, OptimizerModule)
    assert type(again) is OptimizerModule and again.config == made.config
    assert (again.scale_lr_cond, again.no_weight_decay_cond, again.lr_mult) == (is_router, decays_not, 10.0)


def test_a_state_is_dealt_to_as_many_optimizers_as_there_are() -> None:
    """Experts that ranks share out have one of their own: settings follow, tensors stay where they were read."""

    def group(decay: float, experts: bool, **more: object) -> dict:
        return {
            "pre_wd_mult": decay,
            "pre_lr_mult": 1.0,
            "is_decoupled_lr": False,
            "is_expert_parallel": experts,
            **more,
        }

    def optimizer(*groups: dict) -> types.SimpleNamespace:
        return types.SimpleNamespace(optimizer=types.SimpleNamespace(state_dict=lambda: {"param_groups": list(groups)}))

    dense = optimizer(group(0.0, False, params=[0, 1]), group(1.0, False, params=[2]))
    shared = optimizer(group(1.0, True, params=[0]))
    alone = optimizer(group(0.0, False, params=[0, 1]), group(1.0, False, params=[2, 3]))
    saved = [group(0.0, False, lr=0.1, step=7), group(1.0, False, lr=0.2, step=7)]
    one = {
        "optimizer": {"param_groups": saved},
        "kind": "x",
        0: {"param_state": {0: "a"}},
        1: {"param_state": {0: "b"}},
    }
    first, second = dealt(one, [dense, shared]).values()
    assert (first["param_state"], second["param_state"]) == ({0: "a"}, {0: "b"})
    assert [g["lr"] for g in first["optimizer"]["param_groups"]] == [0.1, 0.2]
    (own,) = second["optimizer"]["param_groups"]
    assert (own["lr"], own["step"], own["is_expert_parallel"], own["params"]) == (0.2, 7, True, [0])
    several = {0: {"optimizer": {"param_groups": saved}}, 1: {"optimizer": {"param_groups": [saved[1]]}},
               "param_state": {0: "c"}}  # fmt: skip
    found = dealt(several, [alone])
    assert found["param_state"] == {0: "c"} and 0 not in found
    assert [g["params"] for g in found["optimizer"]["param_groups"]] == [[0, 1], [2, 3]]
    plain = {0: {"param_groups": saved, "state": {"common_step": 5, 9: "old"}}, 1: {}, "state": {0: "d"}}
    assert dealt(plain, [alone])["state"] == {"common_step": 5, 0: "d"}
    untouched = {0: {"optimizer": {}}, 1: {"optimizer": {}}}
    assert dealt(untouched, [dense, shared]) is untouched
