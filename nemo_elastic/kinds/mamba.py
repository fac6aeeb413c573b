"""Mamba-2: `in_proj` to `[z+x+B+C+dt]`, a convolution over x, B and C, the scan, the gated norm, `out_proj`.

Heads are cut inside their SSM group, channels alike in every head; B, C, the state and the kernel are never cut.
"""

from __future__ import annotations

from typing import Any

from .axis import Axis, Groups, MakeFactor, Segment
from .kind import Dim, Gguf, HuggingFace, Kind, Ran, Size, Sizes, size_of
from .scan_chunk import scan_chunk_length

SITES = {
    "out_proj_input": "the gated norm's output, which enters out_proj",
    "in_proj_x": "the x slice of in_proj's output (the paper's formula)",
    "out_proj_contribution": "the norm of what a head, or a channel, adds to the residual through out_proj",
}


def _axes(arch: Any, groups: Groups, factor: MakeFactor) -> dict[str, Axis]:
    heads = factor("mamba_num_heads", arch.mamba_num_groups, arch.mamba_num_heads // arch.mamba_num_groups, tp=True)
    channel = factor("mamba_head_dim", 1, arch.mamba_head_dim)
    state = factor(None, arch.mamba_num_groups, arch.mamba_state_dim, tp=True)
    z, x = Segment("z", (heads, channel)), Segment("x", (heads, channel))
    b, c, dt = Segment("B", (state,)), Segment("C", (state,)), Segment("dt", (heads,))
    return {
        "z+x+B+C+dt": (z, x, b, c, dt),
        "x+B+C": (x, b, c),
        "x": (x,),
        "mamba_heads": (dt,),
        "kernel": (Segment("kernel", (factor(None, 1, arch.mamba_conv_kernel),)),),
    }


def _inner(arch: Any, sizes: Sizes) -> Any:
    """d_inner: heads x head channels."""
    return size_of(arch, sizes, "mamba_num_heads") * size_of(arch, sizes, "mamba_head_dim")


def _flops(arch: Any, sizes: Sizes, length: int, chunk_size: int) -> Any:
    """Two projections, and the scan in chunks of Q steps (the last one filled up): per step and chunk C B^T per group
    (Q G N), the decayed scores times x (Q D), the chunk's state (D N) and what the carried state adds (D N).
    """
    h, m = size_of(arch, sizes, "hidden_size"), size_of(arch, sizes, "mamba_num_heads")
    groups, n, inner, chunk = arch.mamba_num_groups, arch.mamba_state_dim, _inner(arch, sizes), min(chunk_size, length)
    projections = 2 * length * h * (2 * inner + 2 * groups * n + m) + 2 * length * h * inner
    steps = -(-length // chunk) * chunk
    return projections + 2 * steps * chunk * (groups * n + inner) + 2 * 2 * steps * inner * n


def _caches(arch: Any, sizes: Sizes, length: int) -> dict[str, Any]:
    """The state, and one kernel of columns of the convolution; the length does not matter."""
    inner = _inner(arch, sizes)
    channels = inner + 2 * arch.mamba_num_groups * arch.mamba_state_dim
    return {"ssm_state": inner * arch.mamba_state_dim, "conv_state": channels * arch.mamba_conv_kernel}


def _saved(arch: Any, sizes: Sizes, ran: Ran) -> dict[str, float]:
    """mamba-ssm keeps the packed product and the scan's result and computes the rest again; under soft masks, which
    act between convolution and scan, each keeps its own. The scan in torch works in fp32 and keeps more. The gated norm
    is ours either way: in fp32, its input and the normed one.
    """
    e, wide, ranks = ran.element, 4, ran.ranks
    inner, heads = _inner(arch, sizes) / ranks, size_of(arch, sizes, "mamba_num_heads") / ranks
    groups = arch.mamba_num_groups / ranks
    state = groups * arch.mamba_state_dim
    conv, packed = inner + 2 * state, 2 * inner + 2 * state + heads
    kept = {"gated norm": wide * (2 * inner + (2 if ran.soft else 1) * groups), "into out_proj": e * inner}
    if ran.kernels == "cuda" and ran.soft:
        kept["convolution"] = e * 2 * conv
        kept["scan"] = e * (3 * inner + 2 * state + heads) + wide * heads  # x, z, its result, B, C, dt; log decays
    elif ran.kernels == "cuda":
        kept["convolution and scan"] = e * (packed + inner)
    else:
        head_dim = size_of(arch, sizes, "mamba_head_dim")
        chunk = scan_chunk_length(ran.length, head_dim, arch.mamba_state_dim)
        states = (-(-ran.length // chunk) + 1) * inner * arch.mamba_state_dim / ran.length
        own = wide * (
            conv + 3 * heads + states + 3 * inner
        )  # before silu; dt twice, log decays; states; y twice, silu z
        if ran.soft:
            kept["convolution"], kept["scan"] = wide * conv + e * conv, own + wide * (2 * inner + 2 * state)
        elif e == wide:  # x, B, C, z and dt are views of the packed product and of the convolution's result
            kept["convolution and scan"] = own + wide * (packed + conv)
        else:
            kept["convolution and scan"] = own + wide * (2 * conv + inner)
    return kept | ({"in front of gates": e * inner} if ran.gates and not ran.soft else {})


def _exchanged(arch: Any, sizes: Sizes, context: int) -> float:
    """The packed product from sequence to heads and the scan's result back, but for the part that stays."""
    inner, heads = _inner(arch, sizes), size_of(arch, sizes, "mamba_num_heads")
    packed = 2 * inner + 2 * arch.mamba_num_groups * arch.mamba_state_dim + heads
    return (packed + inner) * (context - 1) / context


def _shares_context(arch: Any, sizes: Sizes, ranks: int, context: int) -> bool:
    """Whole groups for each rank, or equal parts of the heads of one."""
    heads, groups = size_of(arch, sizes, "mamba_num_heads") // ranks, arch.mamba_num_groups // ranks
    return heads % context == 0 and groups > 0 and (groups % context == 0 or context % groups == 0)


def _conv_width(arch: Any, sizes: Sizes, ranks: int, context: int) -> int:
    """x of a rank's heads, B and C of its groups: at least one, which other ranks may have, too."""
    groups = max(1, arch.mamba_num_groups // ranks // context)
    return _inner(arch, sizes) // ranks // context + 2 * groups * arch.mamba_state_dim


def _gguf_keys(arch: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": arch.mamba_conv_kernel,
        "ssm.inner_size": arch.mamba_num_heads * arch.mamba_head_dim,
        "ssm.state_size": arch.mamba_state_dim,
        "ssm.time_step_rank": arch.mamba_num_heads,
        "ssm.group_count": arch.mamba_num_groups,
    }


def _gguf_shape(name: str, shape: tuple[int, ...], arch: Any) -> tuple[int, ...]:
    if name in ("ssm_a", "ssm_d"):
        return (*shape, 1)
    if name == "ssm_norm.weight":
        return (arch.mamba_num_groups, shape[0] // arch.mamba_num_groups)
    return (shape[0], shape[2]) if name == "ssm_conv1d.weight" else shape


ROWS = {
    "norm.weight": ("hidden",),
    "mixer.in_proj.weight": ("z+x+B+C+dt", "hidden"),
    "mixer.conv1d.weight": ("x+B+C", "one", "kernel"),
    "mixer.conv1d.bias": ("x+B+C",),
    "mixer.dt_bias": ("mamba_heads",),
    "mixer.A_log": ("mamba_heads",),
    "mixer.D": ("mamba_heads",),
    "mixer.norm.weight": ("x",),
    "mixer.out_proj.weight": ("hidden", "x"),
}

MAMBA = Kind(
    letter="M",
    name="mamba",
    words="Mamba",
    heading="mamba",
    colours=("#0f8b8d", "#35c2bd"),
    sizes=(
        Size(name="mamba_num_heads", huggingface=("mamba_num_heads",)),
        Size(name="mamba_head_dim", huggingface=("mamba_head_dim",)),
        Size(name="mamba_num_groups", huggingface=("n_groups", "mamba_n_groups")),
        Size(name="mamba_state_dim", huggingface=("ssm_state_size",)),
        Size(name="mamba_conv_kernel", required=False, default=4, fixed=True),
    ),
    multiples_of=(("mamba_num_heads", "mamba_num_groups"),),
    dims=(
        Dim(
            name="mamba_num_heads",
            place=20,
            groups=lambda arch, groups: arch.mamba_num_groups,
            multiple=lambda large, ranks: 8 * (ranks if large else 1),  # heads of a rank: see `alignment`
            ratios=(1.0, 0.75, 0.5),
            words="Mamba heads",
            short="mamba\nheads",
            schemas=("per_layer_config",),  # padded with zeros, heads would change the gated norm of the others
            gguf_key="ssm.time_step_rank",
        ),
        Dim(  # the same channels in every head: the heads are the groups of the product axis
            name="mamba_head_dim",
            place=21,
            per_layer=False,
            multiple=lambda large, ranks: 8,
            words="Mamba head dim",
            short="head\ndim",
        ),
    ),
    split_by=("mamba_num_groups",),
    rows=ROWS,
    axes=_axes,
    norm=("norm.weight", "mixer.in_proj.layer_norm_weight"),
    stored_in_parts=("mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias"),
    extra_states=("mixer.in_proj", "mixer.out_proj"),
    flops=_flops,
    caches=_caches,
    saved=_saved,
    exchanged=_exchanged,
    shares_context=_shares_context,
    context_dim="mamba_num_heads",
    aligned={"z+x+B+C+dt": "in_proj rows z+x+B+C+dt", "x": "out_proj columns"},
    conv_axis="x+B+C",
    conv_width=_conv_width,
    fp8={"z+x+B+C+dt": "in_proj rows 2D + 2GN + m = {width} (mamba_num_heads {mamba_num_heads})"},
    ranking={"mamba_site": SITES},
    huggingface=HuggingFace(blocks=("linear_attention", "mamba"), names={name: (name,) for name in ROWS}),
    gguf=Gguf(
        names={
            "norm.weight": "attn_norm.weight",
            "mixer.in_proj.weight": "ssm_in.weight",
            "mixer.conv1d.weight": "ssm_conv1d.weight",
            "mixer.conv1d.bias": "ssm_conv1d.bias",
            "mixer.dt_bias": "ssm_dt.bias",
            "mixer.A_log": "ssm_a",
            "mixer.D": "ssm_d",
            "mixer.norm.weight": "ssm_norm.weight",
            "mixer.out_proj.weight": "ssm_out.weight",
        },
        matrices=frozenset(["ssm_in.weight", "ssm_out.weight"]),
        keys=_gguf_keys,
        shape=_gguf_shape,
        values={"ssm_a": lambda log: -log.float().exp()},
    ),
    serving="nemo_elastic.serving.mamba",
    module="nemo_elastic.mcore.elastic.mixer",
    slot="M",
)
