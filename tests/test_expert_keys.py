"""Mixtures in checkpoints of Megatron's own: whichever of its experts wrote them, the reader finds `[E, f, h]`.

read(save(SequentialMLP)) == read(save(TEGroupedMLP's tensors)) == the experts, put together or each on its own
"""

from pathlib import Path
from typing import Any

import expert_features
import pytest
import torch
from test_experts import parts

from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
from nemo_elastic.mcore.checkpoint.stored_names import Place, place_of
from nemo_elastic.mcore.models.build import transformer_config
from nemo_elastic.problems import ProblemsError

pytestmark = pytest.mark.usefixtures("one_rank")
LAYER = "decoder.layers.1.mlp."
FC1, FC2 = (f"{LAYER}experts.experts.linear_fc{n}.weight" for n in (1, 2))


def their_layer(feature: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Megatron's `MoELayer` with `SequentialMLP`, and what is in it by canonical names."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    arch, function = parts(feature)
    config = transformer_config(
        {**vars(arch), **function}, moe_token_dispatcher_type="allgather", variable_seq_lengths=False,
        moe_router_load_balancing_type="none",
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=arch.num_moe_experts, moe_grouped_gemm=False)
    layer = MoELayer(config, submodules=spec.submodules, layer_number=2)
    generator = torch.Generator().manual_seed(1)
    own: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
                own[name] = value.clone()
    wanted = {f"{LAYER}{name}": value for name, value in own.items() if "local_experts" not in name}
    for linear, name in (("linear_fc1", FC1), ("linear_fc2", FC2)):
        experts = range(arch.num_moe_experts)
        wanted[name] = torch.stack([own[f"experts.local_experts.{n}.{linear}.weight"] for n in experts])
    return layer, wanted


def save(state: dict, folder: Path) -> Path:
    from megatron.core import dist_checkpointing

    folder.mkdir(parents=True)
    dist_checkpointing.save(state, str(folder))
    return folder


def check(folder: Path, wanted: dict[str, torch.Tensor]) -> TorchDistReader:
    reader = TorchDistReader(folder)
    assert set(wanted) <= set(reader.names()) and {FC1, FC2} <= set(wanted)
    for name, value in wanted.items():
        assert tuple(reader.shape(name)) == tuple(value.shape) and reader.dtype(name) == value.dtype
        assert torch.equal(reader.read(name), value), name
    return reader


@pytest.mark.parametrize("feature", ["nemotron", "granite", "qwen"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_sequential_mlp_as_megatron_saves_it(feature: str, apart: bool, tmp_path: Path) -> None:
    layer, wanted = their_layer(feature)
    state = layer.sharded_state_dict(f"module.{LAYER}", (), {"singleton_local_shards": apart})
    reader = check(save(state, tmp_path / "weights"), wanted)
    own = [key for key in reader._stored if ".experts.experts.3." in key]
    assert bool(own) is apart  # the form that the name of this case says


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_grouped_mlp_as_megatron_saves_it(gated: bool, apart: bool, tmp_path: Path) -> None:
    """Transformer Engine is not here: the same functions of Megatron on the tensors `weightJ` that it would hold."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    expert_features.skip_without_slot()
    generator, count = torch.Generator().manual_seed(2), 5
    wanted = {
        FC1: torch.randn(count, 12, 8, generator=generator),
        FC2: torch.randn(count, 8, 6 if gated else 12, generator=generator),
    }
    state: dict[str, Any] = {}
    for name, whole in wanted.items():
        linear = name.removeprefix(f"{LAYER}experts.experts.")
        for number, weight in enumerate(whole):
            key = f"module.{LAYER}experts.experts.{number}.{linear}" if apart else f"module.{name}"
            offsets = () if apart else ((0, number, count),)
            tensor = ShardedTensor.from_rank_offsets(key, weight, *offsets, prepend_axis_num=len(offsets))
            if gated and name == FC1:
                tensor = apply_swiglu_sharded_factory(tensor, offsets, apart)
            state[f"{name}{number}"] = tensor
    check(save(state, tmp_path / "weights"), wanted)


@pytest.mark.parametrize("spelling", ["experts.local_experts.{}.{}", "experts.{1}{0}", "experts.experts.{1}{0}"])
def test_state_dicts_that_nobody_put_together(spelling: str, tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    expert_features.skip_without_slot()
    wanted = {FC1: torch.randn(3, 4, 8), FC2: torch.randn(3, 8, 4)}
    keys = {
        f"module.{LAYER}{spelling.format(n, name.rsplit('experts.', 1)[1])}": part
        for name, whole in wanted.items()
        for n, part in enumerate(whole)
    }
    state = {key: ShardedTensor.from_rank_offsets(key, part) for key, part in keys.items()}
    check(save(state, tmp_path / "weights"), wanted)
    gone = dict(list(state.items())[1:])
    with pytest.raises(ProblemsError, match=r"lacks expert 0 of decoder\.layers\.1\.mlp\.experts\.experts\.linear_fc1"):
        TorchDistReader(save(gone, tmp_path / "gone"))
    odd = {**state, (last := list(state)[-1]): ShardedTensor.from_rank_offsets(last, torch.zeros(8, 5))}
    with pytest.raises(ProblemsError, match=r"expert 2 of .* has another shape"):
        TorchDistReader(save(odd, tmp_path / "odd"))


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (f"module.{LAYER}shared_experts.linear_fc1.weight_w", (f"{LAYER}shared_experts.linear_fc1.weight", None, "w")),
        ("decoder.layers.0.mixer.in_proj.weight.dt", ("decoder.layers.0.mixer.in_proj.weight", None, "dt")),
        ("module.decoder.layers.1.mlp.experts.experts.12.linear_fc1.weight_v", (FC1, 12, "v")),
        (f"{LAYER}linear_fc1.layer_norm_weight", ("decoder.layers.1.pre_mlp_layernorm.weight", None, None)),
        ("decoder.layers.1.mlp.strange_w", ("decoder.layers.1.mlp.strange_w", None, None)),
        ("module.mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1.weight", None),
        ("optimizer.state.exp_avg.module.decoder.layers.1.mlp.router.weight", None),
    ],
)  # fmt: skip
def test_places(key: str, place: tuple | None) -> None:
    assert place_of(key) == (None if place is None else Place(*place))
