"""The numbers that decide every tensor's size in a plain hybrid model; a parent and a uniform child are both one.

Field names are those of Megatron's `TransformerConfig` and NeMo's `SSMConfig`. No torch here.
"""

from dataclasses import dataclass, fields

from .problems import Problem, raise_if_any

MAMBA, ATTENTION, MLP = "M", "*", "-"
KIND_NAMES = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}
UNSUPPORTED_KINDS = {
    "E": "mixture of experts",
    "G": "gated delta net",
    "D": "deepseek sparse attention",
    "+": "multi-latent attention, MLA",
    "/": "multi-token-prediction boundary",
    "|": "pipeline stage boundary",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a plain hybrid Mamba-attention model. `vocab_size` is the rows that whole tensors have.

    Raises:
        ProblemsError: with every illegal value, keyed `model.<field>`.
    """

    hybrid_override_pattern: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_num_groups: int
    mamba_state_dim: int
    vocab_size: int
    share_embeddings_and_output_weights: bool = False
    mamba_conv_kernel: int = 4

    def __post_init__(self) -> None:
        raise_if_any(self._problems())

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner_size(self) -> int:
        """d_inner: heads x head channels."""
        return self.mamba_num_heads * self.mamba_head_dim

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Global indices of the layers of one kind, ascending."""
        return tuple(i for i, letter in enumerate(self.hybrid_override_pattern) if letter == kind)

    def _problems(self) -> list[Problem]:
        found = [
            Problem(f"model.{f.name}", f"{getattr(self, f.name)} must be a positive integer")
            for f in fields(self)
            if f.type is int and (not isinstance(getattr(self, f.name), int) or getattr(self, f.name) < 1)
        ]
        found += pattern_problems(self.hybrid_override_pattern)
        if found:
            return found
        for whole, groups in (("num_attention_heads", "num_query_groups"), ("mamba_num_heads", "mamba_num_groups")):
            n, g = getattr(self, whole), getattr(self, groups)
            if n % g:
                found.append(Problem(f"model.{whole}", f"{n} must be a multiple of {groups}={g}"))
        return found


def pattern_problems(pattern: str) -> list[Problem]:
    """Every letter of a `hybrid_override_pattern` that cannot be elastic here, by its layer number."""
    key = "model.hybrid_override_pattern"
    if not isinstance(pattern, str) or not pattern:
        return [Problem(key, f"{pattern!r} must be a non-empty string of M, * and -")]
    found = []
    for layer, letter in enumerate(pattern):
        if letter in KIND_NAMES:
            continue
        if letter in UNSUPPORTED_KINDS:
            what = f"{UNSUPPORTED_KINDS[letter]} ({letter!r}) is not supported yet"
        else:
            what = f"{letter!r} is no layer kind"
        found.append(Problem(key, f"layer {layer} of {len(pattern)}: {what}; supported: M (Mamba), *, -"))
    return found
