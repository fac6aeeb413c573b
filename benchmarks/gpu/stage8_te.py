"""Stage 8: with Transformer Engine, where it is installed, as in an NGC container. A GPU machine without it says so; on
a CPU Megatron's local linears stand in."""

from collections.abc import Callable
from functools import wraps

import torch
from registry import Found, Machine, check, difference, one_process
from stage2_identities import CHILD, LAYERS, SIZES, TINY_CHILD, equal
from stage3_pipeline import nemo_elastic, overrides

LIMIT = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # its fp32 products run in TF32
GRADIENTS = 10  # times as much


def have_te() -> bool:
    from nemo_elastic.mcore.kernels.layer_specs import have_transformer_engine

    return have_transformer_engine()


def where_it_is(run: Callable[[Machine], Found]) -> Callable[[Machine], Found]:
    """The check; nothing on a GPU without Transformer Engine, where a stand-in would cost its time and show nothing."""

    @wraps(run)
    def checked(machine: Machine) -> Found:
        if machine.is_cuda and not have_te():
            return Found({"transformer_engine": "not there"}, stand_in=True)
        return run(machine)

    return checked


@check(stage=8, seconds=30, needs_kernels=True, predicted={"float32": (None, 1e-3), "bfloat16": (None, 1e-2)})
@where_it_is
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
@where_it_is
def te_identities(machine: Machine) -> Found:
    """Masked, sliced and extracted with Transformer Engine's linears, norms and attention"""
    return Found(equal(machine, LIMIT), stand_in=not have_te())


@check(
    stage=8,
    seconds=60,
    needs_kernels=True,
    predicted={"float32_logits": (1e-4, 1e-3), "float32_gradients": (1e-4, 5e-3), "bfloat16_logits": (1e-3, 2e-2)},
)
@where_it_is
def te_against_local(machine: Machine) -> Found:
    """The elastic stack of Transformer Engine's parts against that of Megatron's local ones: full, masked, sliced"""
    one_process()
    from pool_elastic import elastic_model, layout_of, run_plan, tokens
    from small_parent import architecture, space_of

    from nemo_elastic.mcore.elastic.plan import hard_plan

    arch = architecture(**({} if machine.tiny else SIZES))
    layout, subnet = layout_of(arch), space_of(arch).subnet(**(TINY_CHILD if machine.tiny else CHILD), layers=LAYERS)
    plans = {"full": None} | {mode: hard_plan(layout, subnet, mode) for mode in ("masked", "sliced")}
    ids, found = tokens(arch, length=64).to(machine.device), {}
    for dtype, limit in LIMIT.items():
        theirs, ours = (elastic_model(arch, dtype, local=local).to(machine.device) for local in (False, True))
        word, apart = str(dtype).removeprefix("torch."), {"logits": 0.0, "gradients": 0.0}
        for mode, plan in plans.items():
            (logits, gradients), (expected, wanted) = (run_plan(model, ids, plan, layout) for model in (theirs, ours))
            worst = {
                "logits": difference(logits, expected),
                "gradients": max(difference(gradients[n], value) for n, value in wanted.items() if value.any()),
            }
            for what, value in worst.items():
                assert value < limit * (GRADIENTS if what == "gradients" else 1), f"{word} {mode} {what} {value:.2e}"
                apart[what] = max(apart[what], value)
        found |= {f"{word}_{what}": value for what, value in apart.items()}
    return Found(found, stand_in=not have_te())


@check(stage=8, seconds=60, needs_kernels=True)
@where_it_is
def te_ranks(machine: Machine) -> Found:
    """`rank` and two NeMo steps in one process with Transformer Engine's stack, bf16"""
    import tempfile

    if machine.tiny and not have_te():  # stage 3 is the same run without Transformer Engine
        return Found({"steps": 0}, stand_in=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--config", "tiny_parent.yaml", "--out", f"{folder}/run"]
        nemo_elastic(machine, *words, *overrides(machine, "bf16-mixed", 2))
    return Found({"steps": 2}, stand_in=not have_te())
