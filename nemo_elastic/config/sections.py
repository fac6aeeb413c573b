"""What a run is, section by section. Each field's comment is its documentation; values are checked in `rules.py`.

Frozen and keyword-only: YAML and Python build the same object, and nothing at run time is kept in it. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..kinds import axis

AUTO = "auto"  # a value that the machine decides when a run starts
PHASES = ("warmup", "soft", "hard", "frozen")  # of the router, in this order
RACE_PHASES = ("race", "frozen")  # of a race of candidates
OF_LEARNED = (
    "hidden_size", "init_std", "tau_start", "tau_end", "scale_start", "scale_end", "budget_lambda", "dual_ascent_rate",
    "max_price", "dead_zone", "shortfall", "warmup_fraction", "soft_fraction", "freeze_fraction", "settle_fraction",
    "settle_weight", "lr",
)  # fmt: skip
SHAPES = ("race", "learned", "search", "greedy", "even")  # where shapes come from


@dataclass(frozen=True, kw_only=True)
class ParentConfig:
    """Where the trained parent is."""

    path: str | None = None  # a NeMo checkpoint or Hugging Face folder, builtin:tiny_parent or builtin:tiny_experts
    output_weights: str | None = None  # if a tied parent stores an lm_head of its own: embedding or lm_head counts


@dataclass(frozen=True, kw_only=True)
class DimConfig:
    """One elastic dim."""

    choices: tuple[int | float, ...] = ()  # sizes (integers) or ratios of the parent's size (floats up to 1.0)
    per_layer: bool = False  # every layer of the dim's kind has a size of its own


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """What may vary, and the children that are wanted."""

    dims: Mapping[str, DimConfig] = field(default_factory=dict)  # dim name (TransformerConfig field) -> choices
    multiple_of: Mapping[str, int] = field(default_factory=dict)  # dim -> what ratios are rounded to, for fast kernels
    depth_unit: str | None = None  # layer or block (a mixer and its MLP); empty: as the parent's files say, else layer
    ffn_groups: int = 8  # groups that FFN neurons are dealt to; every TP size must divide it
    expert_groups: int | None = None  # groups of experts; every EP size must divide it; empty: as many as ffn_groups
    budgets: Mapping[str, Any] = field(
        default_factory=dict
    )  # name -> fraction, parameters, or {kind:, value:}; null: none
    subnets: Mapping[str, Any] = field(default_factory=dict)  # name -> forced sizes: that budget is not learned

    @property
    def groups(self) -> axis.Groups:
        """Of neurons and of experts."""
        return axis.Groups(self.ffn_groups, self.expert_groups or self.ffn_groups)


@dataclass(frozen=True, kw_only=True)
class BlendSource:
    """One source of a blend."""

    path: str  # prefix of a Megatron .bin/.idx pair, file or folder of text or conversations, or builtin:corpus
    weight: float = 1.0  # share of the samples, in any unit


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations become tokens."""

    template: str | None = None  # file of a Jinja chat template; empty: the parent's own, unless start or end are set
    date: str = "2025-01-01"  # the day that a template's strftime_now tells, so that tokens never change
    start: str | None = None  # without a template, in front of every turn; empty: a marker with the role's name
    end: str | None = None  # without a template, behind every turn; empty: the end-of-text token
    layout: str = "padded"  # one conversation a sample; or packed: end to end, state runs on across conversations


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and evaluation text."""

    paths: tuple[str, ...] = ()  # .txt, .jsonl, .parquet files or folders; empty: the corpus of the tiny parent
    blend: tuple[BlendSource, ...] = ()  # weighted sources, instead of paths
    chat: ChatConfig = field(default_factory=ChatConfig)
    tokenizer: str | None = None  # a tokenizer.json, or a folder with one (and a chat template); empty: the parent's
    end_of_text: str | None = None  # the token that ends a text; empty: what the parent's or tokenizer's files say
    cache_dir: str | None = None  # tokenized files; empty: the user's cache folder
    num_workers: int = 0


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Importance of widths and layers (docs/ranking.md)."""

    samples: int = 64
    seq_length: int = 256
    micro_batch_size: int = 8
    ffn_site: str = "linear_fc2_input"  # or linear_fc1_output (the paper's formula)
    mamba_site: str = "out_proj_contribution"  # or out_proj_input, in_proj_x (the paper's)
    aggregation: str = "mean_l2"  # mean over the sequence, L2 over samples; or l2_l2, mean_mean
    depth: str = "greedy"  # or one_shot, cosine, random
    depth_metric: str = "centred_mse"  # squared error of logits less their mean; or mse (the paper's): as they are
    depth_samples: int = 32
    min_layers: int | None = None  # stop ranking here; empty: the smallest elastic.dims.num_layers choice
    protected_layers: tuple[int, ...] = ()  # never dropped
    min_attention_layers: int = 0
    activation_memory_gb: float = 1.0  # budget for activations kept for reuse by the depth ranking
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Where the shape of each budget comes from: a race, a router, a search (docs/router.md)."""

    hidden_size: int = 256
    init_std: float = 0.1
    tau_start: float = 1.0  # temperature of the choices, from the start to the end of the soft phase
    tau_end: float = 0.05
    scale_start: float = 1.0  # factor of the router's logits, likewise
    scale_end: float = 10.0
    budget_lambda: float = 2.0  # quadratic penalty of the expected cost's distance from its target
    dual_ascent_rate: float = 5.0  # growth of a budget's price (multiplier) over the soft phase, per unit of cost error
    max_price: float = 50.0
    dead_zone: float = 0.0  # relative cost error below which the budget loss is zero
    tolerance: float = 0.01  # relative cost error that counts as met; what overshoots by more is repaired
    shortfall: float | None = None  # how far below its budget a learned choice may stay, relative; empty: tolerance
    warmup_fraction: float = 0.2  # part of the run on shapes of the search (even ones without scores), before it learns
    soft_fraction: float = 0.3  # part of the run with soft masks, after the warm-up; then hard
    freeze_fraction: float = 0.4  # last part of the run, with the choices pinned: what is trained is what is extracted
    settle_fraction: float = 0.7  # last part of the soft phase, in which the router is led to a choice that fits
    settle_weight: float = 3.0  # weight of the loss that leads it, at the end of the soft phase; 0: none
    lr: float = 1e-2
    recipe: str = "default"  # of a learned one; or paper: lambda 1, no warm-up or settling, soft to the end
    frozen: bool = False  # nothing is learned, drawn or raced: one shape per budget from the first step to the last
    shapes: str = AUTO  # race, learned, search, greedy or even; auto: race, learned by recipe: paper, even when frozen
    candidates: int = 6  # shapes per budget that a search proposes to a race, at most
    candidate_spread: float = 1.6  # multiple of the least estimated damage up to which a shape is a candidate
    race_spread: float = 1.2  # multiple of the least loss above the parent's, untrained, up to which one starts
    race_fraction: float = 0.3  # first part of the run, in which candidates share a budget's turns
    race_rounds: int = 3  # after each of them held-out loss halves the candidates; the last leaves one

    @property
    def method(self) -> str:
        """Where shapes come from, of `SHAPES`."""
        if self.shapes != AUTO:
            return self.shapes
        return "even" if self.frozen else "learned" if self.recipe == "paper" else "race"

    @property
    def searches(self) -> bool:
        """Whether a search by the ranking's scores pins shapes before training, once there is a ranking."""
        return self.method in ("search", "greedy")

    @property
    def races(self) -> bool:
        """Whether candidates of a search by the ranking's scores race for their budget."""
        return self.method == "race"

    @property
    def learns(self) -> bool:
        """Whether a router learns the shapes."""
        return self.method == "learned"

    @property
    def unread(self) -> list[str]:
        """What is set and has no effect with this method, as sentences."""
        plain, found = RouterConfig(), []
        if not self.learns:
            names = [name for name in OF_LEARNED if getattr(self, name) != getattr(plain, name)]
            if names:
                keys = ", ".join(f"router.{name}" for name in names)
                found.append(f"{keys}: of a learned router; router.shapes is {self.method}, so nothing reads it")
        if self.shapes == "even" and not self.frozen:
            found.append("router.shapes=even is even shrinking from the first step; for a learned router say learned")
        return found

    @property
    def phases(self) -> tuple[str, ...]:
        """Of a run, in order."""
        return RACE_PHASES if self.races else PHASES


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the children learn from (docs/training.md)."""

    loss: str = "forward_kl"  # or reverse_kl, topk_kl
    top_k: int = 128  # tokens of the teacher that topk_kl compares one by one; all others are one class
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0  # mean squared error of the final hidden states, over the channels the child keeps
    teacher: str = "parent"  # or self: the full member as it stands teaches the others; no second model is held
    budgets_per_batch: int = 1  # budgets that learn from one teacher forward of a micro-batch
    teacher_cache: str | None = None  # folder for the teacher's final hidden states: filled first, then it never runs
    fuse_output_layer: bool = True  # output layer and loss in token chunks: logits never exist as a whole
    chunk_tokens: int | str = AUTO  # tokens whose logits are alive at once; auto: 2048 on a GPU, 256 on a CPU

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss compares with a teacher; without one none is built or run."""
        return bool(self.kd_weight or self.hidden_weight)

    @property
    def self_taught(self) -> bool:
        """Whether the full member teaches the others."""
        return self.needs_teacher and self.teacher == "self"

    @property
    def builds_parent(self) -> bool:
        """Whether a frozen parent is built, to teach or to fill a cache."""
        return self.needs_teacher and (not self.self_taught or bool(self.teacher_cache))

    @property
    def of_full(self) -> "DistillConfig":
        """The loss of the full member: with `teacher: self` and no cached parent, the text's in its teacher's place."""
        if not self.self_taught or self.teacher_cache:
            return self
        return replace(self, kd_weight=0.0, ce_weight=self.kd_weight + self.ce_weight, hidden_weight=0.0)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Adam with warm-up and cosine decay."""

    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_steps: int = 60
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.98)
    clip_grad: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum. Its length is given in `steps` or in `tokens`."""

    steps: int = 0
    tokens: int | None = None  # instead of steps: rounded up to whole steps
    seq_length: int = 256
    global_batch_size: int = 8
    micro_batch_size: int | None = None  # empty: train.micro_batch_size; longer sequences may want a smaller one
    budget_probabilities: Mapping[str, float] | None = None  # empty: uniform over budgets
    lr: float | None = None  # a new warm-up and cosine from this rate; empty: the schedule before goes on
    router: str | None = None  # phase: race or frozen, or of a learned router; empty: by the router's fractions

    def __post_init__(self) -> None:
        if self.tokens and not self.steps:
            object.__setattr__(self, "steps", self.steps_of_tokens())

    def steps_of_tokens(self) -> int:
        """Whole steps that `tokens` need; 0 where the sizes make no sense."""
        per_step = self.seq_length * self.global_batch_size
        return -(-self.tokens // per_step) if self.tokens and per_step > 0 else 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The elastic run. Parallel sizes are Megatron's."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    context_parallel_size: int = 1  # ranks that share out every sequence
    expert_model_parallel_size: int = 1  # ranks that share out a layer's experts; made of data-parallel ones
    virtual_pipeline_model_parallel_size: int | None = None
    micro_batch_size: int = 4
    precision: str = AUTO  # bf16-mixed on a GPU, 32 on a CPU; decided when a run starts, and kept
    seed: int = 1234
    start_from: str | None = None  # nested family of this parent and ranking that students start as; empty: the parent
    mode: str = "sliced"  # how a hard subnet runs: sliced (a step costs its share) or masked
    recompute_granularity: str | None = None  # full or selective
    use_distributed_optimizer: bool | None = None  # shards Adam's state over data parallel; empty: with bf16-mixed
    recipe: str = "default"  # or last_percent: up to all budgets a micro-batch, 0.3 of the rates; written_out: done
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    moe_router_bias_update_rate: float = 0.0  # how far a step moves the bias of experts by their tokens; 0: not at all
    stages: tuple[StageConfig, ...] = ()
    log_every_steps: int = 10
    val_every_steps: int = 100
    val_samples: int = 32
    save_every_steps: int = 100
    keep_checkpoints: int | None = None  # the newest n training checkpoints stay; empty: all of them
    keep_every_steps: int | None = None  # beside those, every one after a multiple of so many steps stays
    async_save: bool = False  # the run goes on while a checkpoint is written; takes host memory for a copy of it
    max_time: str | None = None  # HH:MM:SS or D-HH:MM:SS after the start, or seconds: then the run saves and stops
    loggers: tuple[str, ...] = ()  # tensorboard, wandb; logs/metrics.csv is always written
    wandb_project: str | None = None  # empty: nemo-elastic
    wait_minutes: float = 1440.0  # how long processes wait for one that sorts, nests or extracts, before they give up
    preemption: bool = True  # SIGTERM saves a checkpoint and stops after the step

    @property
    def sharing(self) -> int:
        """Replicas whose ranks share out experts, and so run one subnet: context-parallel ranks come first."""
        return max(1, self.expert_model_parallel_size // self.context_parallel_size)

    @property
    def distributed_optimizer(self) -> bool:
        """Whether Megatron's distributed optimizer runs, also with one process.

        Its plain one cannot save a bf16 model: Mamba's A_log and D and the router stay fp32 in the groups of the bf16
        parameters, and it maps only these (`Float16OptimizerWithFloat16Params.sharded_state_dict`).
        """
        given = self.use_distributed_optimizer
        return self.precision == "bf16-mixed" if given is None else given


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Children read out of a nested checkpoint."""

    dtype: str | None = None  # bfloat16 or float32: cast the weights; empty: as they are stored
    hf_schema: str = "uniform"  # or list, per_layer_config: how a Hugging Face folder says sizes that differ per layer


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """One GPU and its links, as `plan --gpus` counts with them: assumptions, until a GPU of yours has measured them."""

    memory_gb: float = 80.0  # of one GPU, 1e9 bytes; an H100 has 80
    reserve_gb: float = 5.0  # of that for CUDA, NCCL and what the allocator cannot use
    matmul_tflops: float = 660.0  # that large products reach: two thirds of an H100's 989 in dense bf16
    memory_tbs: float = 3.0  # TB/s that copies reach: 90 % of an H100's 3.35
    memory_passes: float = 3.0  # how often a byte kept for the backward is read or written on the way forward
    node_gpus: int = 8  # GPUs that NVLink joins
    node_gbs: float = 360.0  # GB/s a GPU sends over it while it receives: 80 % of an H100's 450
    network_gbs: float = 40.0  # GB/s a GPU sends between nodes: 80 % of one 400 Gbit/s port a GPU


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What `plan` and `report` assume and say."""

    title: str | None = None
    batch_size: int = 1
    sequence_length: int = 8192
    profile: Any = "bf16"  # bytes per element: bf16, fp32, fp8_kv, fp8, int8, fp4, a mapping, or a .yaml file
    mfu: float = 0.35  # share of peak_tflops that training is assumed to reach, for `plan`'s GPU-hours
    peak_tflops: float = 989.0  # of one GPU in the training precision: an H100 SXM in dense bf16
    gpu: GpuConfig = field(default_factory=GpuConfig)  # what `plan --gpus` takes a GPU and its links to be
    latency_table: str | None = None  # what `nemo-elastic profile` wrote; latency_ms budgets need it


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `model` holds NeMo `SSMConfig` field names verbatim (and `vocab_size`)."""

    name: str = "run"
    parent: ParentConfig = field(default_factory=ParentConfig)
    model: Mapping[str, Any] = field(default_factory=dict)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
