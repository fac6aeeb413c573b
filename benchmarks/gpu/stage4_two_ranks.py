"""Stage 4: two processes share the one device over gloo; tensor parallelism of 2 is tensor parallelism of 1.

NCCL refuses two ranks on a device; gloo takes CUDA tensors for the collectives of a forward and backward. No sequence
parallelism, no pipeline: those need collectives that gloo has on a CPU only.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from registry import Found, Machine, check, difference, paths_of_the_tree

CHILD = {"hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 8, "mamba_num_heads": 8}
LAYERS = (0, 1, 3, 4, 6, 7)
LIMIT = 1e-5


def results(device: torch.device, tp: int) -> dict[str, torch.Tensor]:
    """Whole logits of plain, masked and sliced forwards, whole gradients of the sliced one, and a drop of random
    numbers that must differ between ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, get_cuda_rng_tracker
    from pool_elastic import elastic_model, layout_of, project, tokens
    from small_parent import architecture, space_of

    from nemo_elastic.mcore.elastic.plan import hard_plan
    from nemo_elastic.mcore.models.build import named_global_parameters, whole_tensors

    arch = architecture()
    layout, ids = layout_of(arch, tp), tokens(arch).to(device)
    model = elastic_model(arch, tensor_model_parallel_size=tp).to(device)
    subnet, found = space_of(arch).subnet(**CHILD, layers=LAYERS), {}
    for mode in ("masked", "sliced"):
        model.zero_grad(set_to_none=True)
        logits = model(ids, None, None, elastic=hard_plan(layout, subnet, mode))
        found[mode] = gather_from_tensor_model_parallel_region(logits)
        project(found[mode]).backward()
    parts = [(n, torch.zeros_like(p) if p.grad is None else p.grad) for n, p in named_global_parameters(model, layout)]
    found |= {f"d {name}": value for name, value in whole_tensors(parts, layout)}
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4, device=device)
    shards = [torch.empty_like(own) for _ in range(tp)]
    dist.all_gather(shards, own, group=parallel_state.get_tensor_model_parallel_group())
    found["random"] = torch.stack(shards)
    return {name: value.detach().cpu() for name, value in found.items()}


def rank(number: int, size: int, device_type: str, out: str) -> None:
    """One process of `size`; the first writes the results."""
    paths_of_the_tree()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_elastic.mcore.runtime import cpu

    torch.set_num_threads(1)
    cpu.install()
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", init_method=f"file://{out}.meeting", rank=number, world_size=size)
    parallel_state.initialize_model_parallel(size)
    model_parallel_cuda_manual_seed(1234)
    found = results(device, size)
    if number == 0:
        torch.save(found, out)
    dist.destroy_process_group()


@check(stage=4, seconds=60, predicted={"logits": (None, 1e-5), "gradients": (None, 1e-4)})
def two_ranks(machine: Machine) -> Found:
    """TP 2 against TP 1: logits and gradients, masked and sliced, two processes over gloo"""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for size in (1, 2):
            out = str(Path(folder) / f"{size}.pt")
            mp.spawn(rank, (size, machine.device.type, out), nprocs=size)
            found.append(torch.load(out, weights_only=True))
    one, two = found
    logits = max(difference(two[mode], one[mode]) for mode in ("masked", "sliced"))
    gradients = max(difference(two[n], v) for n, v in one.items() if n.startswith("d ") and v.any())
    assert logits < LIMIT and gradients < 10 * LIMIT, (logits, gradients)
    assert not torch.equal(*two["random"]), "both ranks draw the same random numbers"
    return Found({"logits": logits, "gradients": gradients})
