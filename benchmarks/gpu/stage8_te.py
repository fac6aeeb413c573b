"""Stage 8: with Transformer Engine, where it is installed; else Megatron's local linears stand in."""

import torch
from registry import Found, Machine, check, difference
from stage2_identities import equal
from stage3_pipeline import nemo_elastic, overrides

LIMIT = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # its fp32 products run in TF32


def have_te() -> bool:
    from nemo_elastic.mcore.layer_specs import have_transformer_engine

    return have_transformer_engine()


@check(stage=8, seconds=30, needs_kernels=True, predicted={"float32": (None, 1e-3), "bfloat16": (None, 1e-2)})
def te_linear(machine: Machine) -> Found:
    """One linear of Transformer Engine against fp64"""
    size, found = 64 if machine.tiny else 1024, {}
    for dtype in (torch.float32, torch.bfloat16):
        if have_te():
            import transformer_engine.pytorch as te

            linear = te.Linear(size, size, bias=False, params_dtype=dtype)
        else:
            linear = torch.nn.Linear(size, size, bias=False, dtype=dtype)
        linear = linear.to(machine.device)
        x = torch.randn(32, size, generator=torch.Generator().manual_seed(0)).to(machine.device, dtype)
        expected = x.double().cpu() @ linear.weight.detach().double().cpu().t()
        found[str(dtype).removeprefix("torch.")] = difference(linear(x), expected)
    return Found(found, stand_in=not have_te())


@check(
    stage=8,
    seconds=60,
    needs_kernels=True,
    predicted={"float32_masked_sliced": (3e-4, 1e-3), "bfloat16_masked_sliced": (None, 1e-2)},
)
def te_identities(machine: Machine) -> Found:
    """Masked, sliced and extracted with Transformer Engine's linears, norms and attention"""
    return Found(equal(machine, LIMIT), stand_in=not have_te())


@check(stage=8, seconds=60, needs_kernels=True)
def te_ranks(machine: Machine) -> Found:
    """`rank` and two NeMo steps in one process with Transformer Engine's stack, bf16"""
    import tempfile

    if machine.tiny and not have_te():  # stage 3 is the same run without Transformer Engine
        return Found({"steps": 0}, stand_in=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--config", "tiny_parent.yaml", "--out", f"{folder}/run"]
        nemo_elastic(machine, *words, *overrides(machine, "bf16-mixed", 2))
    return Found({"steps": 2}, stand_in=not have_te())
