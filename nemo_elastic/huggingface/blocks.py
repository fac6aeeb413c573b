"""What families of whole blocks share: a block of theirs is two layers here, a mixer and its MLP, each with its norm.

    layer 2b  =  input_layernorm + mixer of block b          layer 2b + 1  =  the second norm + MLP of block b

Attention's packed rows are q, k and v there; a gated MLP's are `[gate; up]`, as two tensors or (Granite) as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..kinds import kind_of, kinds
from ..kinds.kind import Packed
from ..problems import Problem
from ..space.architecture import DEEPEST
from ..space.blocks import is_blocks
from .adapter import Field, Model, Only, Stacked
from .said import Said

Names = Mapping[str, tuple[str, ...]]
OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_norm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_QKV = Packed(groups="num_query_groups", channels="kv_channels")
PACKED = {
    "self_attention.linear_qkv.weight": _QKV,
    "self_attention.linear_qkv.bias": _QKV,
    "mlp.linear_fc1.weight": Stacked(),
    "mlp.linear_fc1.bias": Stacked(),
}
ATTENTION = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
QKV_BIAS = {"self_attention.linear_qkv.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv")}
HEAD_NORMS = {f"self_attention.{part}_layernorm.weight": (f"self_attn.{part}_norm.weight",) for part in "qk"}


def _of_hidden(said: Said, model: Model) -> int | None:
    """The channels of a head that a file does not say."""
    hidden, heads = model.get("hidden_size"), model.get("num_attention_heads")
    known = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (hidden, heads))
    return hidden // heads if known else None


ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "squared_relu": "relu2"}
GATED = {"gated_linear_unit": True}
NO_WINDOW = Only(keys=("sliding_window",), allowed=(None,), why="attention sees everything before a token", unsaid=True)
NO_EXPERTS = Only(keys=("num_local_experts",), allowed=(None, 0), why="models of this family have none", unsaid=True)
HINTS = (
    Field(ours="seq_length", keys=("max_position_embeddings",), kind="hint"),
    Field(ours="init_method_std", keys=("initializer_range",), kind="hint"),
    Field(ours="attention_dropout", keys=("attention_dropout",), kind="hint"),
)


FFN = Field(ours="ffn_hidden_size", keys=("intermediate_size",))


def gated_mlp(norm: str, module: str = "mlp") -> Names:
    """Names of a gated MLP in three tensors, behind the norm of this name."""
    return {
        "pre_mlp_layernorm.weight": (f"{norm}.weight",),
        "mlp.linear_fc1.weight": (f"{module}.gate_proj.weight", f"{module}.up_proj.weight"),
        "mlp.linear_fc2.weight": (f"{module}.down_proj.weight",),
    }


def attention_fields(*, groups: int | None, head_dim: int | None = None, ffn: Field = FFN) -> tuple[Field, ...]:
    """Sizes of a family with attention, with what its class takes where a file does not say them.

    Args:
        groups: key heads; None: as many as query heads.
        head_dim: channels of a head; None: hidden_size / query heads.
    """
    return (
        Field(ours="hidden_size", keys=("hidden_size",)),
        ffn,
        Field(ours="num_attention_heads", keys=("num_attention_heads",)),
        Field(
            ours="num_query_groups",
            keys=("num_key_value_heads",),
            null="num_attention_heads",
            missing=groups is None,
            default=groups,
        ),
        Field(ours="kv_channels", keys=("head_dim",), default=head_dim, derived=None if head_dim else _of_hidden),
        Field(ours="vocab_size", keys=("vocab_size",)),
        Field(ours="share_embeddings_and_output_weights", keys=("tie_word_embeddings",), kind="flag", default=False),
    )


def activation(words: Mapping[str, str] = ACTIVATIONS) -> Field:
    """`hidden_act`."""
    return Field(ours="activation_func", keys=("hidden_act",), kind="word", default="silu", words=words)


def epsilon(default: float = 1e-6) -> Field:
    """The epsilon of all norms; `default`: of the class."""
    return Field(ours="layernorm_epsilon", keys=("rms_norm_eps",), kind="number", default=default)


def mixers(names: Names) -> dict[str, str]:
    """Words of `layer_types`, today's first -> letter, of the mixers that a family has names for."""
    found = [k for k in kinds() if k.huggingface and not k.ends_block and k.norm[0] in names]
    return {
        word: kind.letter for place in (0, 1) for kind in found for word in kind.huggingface.blocks[place : place + 1]
    }


def older_words(names: Names, pattern: str) -> list[str]:
    """`layer_types` of a pattern in the words that both older and newer readers know."""
    assert set(pattern[::2]) <= set(mixers(names).values()), pattern
    return [kind_of(letter).huggingface.blocks[-1] for letter in pattern[::2]]


def pattern_of(words: Sequence[str], names: Names, feed_forward: str | None = None) -> str:
    """Two letters a block; `feed_forward`: that of a family that has several."""
    letters, ends = mixers(names), feed_forward or feed_forwards(names)[0]
    return "".join(letters[word] + ends for word in words)


def blocks_of(said: Said, key: str = "num_hidden_layers") -> int | None:
    """How many blocks a file says."""
    blocks = said.config.get(key)
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 1 <= blocks <= DEEPEST // 2:
        words = f"{repr(blocks)[:40]} must be a positive integer of at most {DEEPEST // 2}"
        said.wrong(key, "is not given" if blocks is None else words)
        return None
    return blocks


def attention_pattern(names: Names) -> Callable[[Said], str | None]:
    """The pattern of a family whose blocks are all attention; `layer_types` may say so."""

    def pattern(said: Said) -> str | None:
        blocks, (word, *_) = blocks_of(said), mixers(names)
        listed = said.config.get("layer_types")
        if listed is not None and (not isinstance(listed, list) or any(name != word for name in listed)):
            words = f"{_other(listed, word)} must be {word!r} in every layer: attention sees everything before a token"
            said.wrong("layer_types", words)
        elif listed is not None and blocks is not None and len(listed) != blocks:
            words = f"lists {len(listed)} layers, num_hidden_layers says {blocks}; one of them is stale"
            said.wrong("layer_types", words)
        return None if blocks is None else pattern_of([word] * blocks, names)

    return pattern


def block_count(pattern: str) -> dict[str, Any]:
    """Keys that say how deep a model of equal blocks is."""
    return {"num_hidden_layers": len(pattern) // 2}


def whole_blocks(names: Names, needs: Names | None = None) -> Callable[[str, str], list[Problem]]:
    """Whether a family can say a pattern; `needs`: the names of a mixer that it cannot be without."""

    def problems(pattern: str, reader: str) -> list[Problem]:
        key = "model.hybrid_override_pattern"
        known = {*mixers(names).values(), *feed_forwards(names)}
        for letter in dict.fromkeys(pattern):
            if letter not in known:
                return [Problem(key, f"{letter!r} ({kind_of(letter).words}) cannot be said in {reader}")]
        if not is_blocks(pattern):
            words = f"{pattern} cannot be said in {reader}, which knows only whole blocks of a mixer and an MLP; "
            return [Problem(key, f"{words}train with elastic.depth_unit=block")]
        if len(set(pattern[1::2])) > 1:
            both = " and ".join(kind_of(letter).words for letter in dict.fromkeys(pattern[1::2]))
            return [Problem(key, f"{pattern} cannot be said in {reader}, whose blocks are alike: it has {both}")]
        if needs and not set(pattern) & set(mixers(needs).values()):
            return [Problem(key, f"{pattern} cannot be said in {reader}, which has Mamba layers")]
        return []

    return problems


def feed_forwards(names: Names) -> list[str]:
    """Letters of the feed-forward layers that a family has names for; their norm alone says nothing."""
    found = [kind for kind in kinds() if kind.huggingface and kind.ends_block]
    return [kind.letter for kind in found if all(row in names for row in kind.rows if row not in kind.only_with)]


def _other(listed: Any, word: str) -> str:
    return repr(next((name for name in listed if name != word), listed) if isinstance(listed, list) else listed)
