"""The elastic language model: embedding, stack and output layer, run as the subnet that the forward is given."""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ...plan.deployment import low_precision_problems
from ...problems import raise_if_any
from ...space.layout import ParamLayout
from ..kernels.padded_vocabulary import masked
from ..kernels.plain_model import PlainModel
from ..kernels.positions import angles
from .census import refuse_plain_layers
from .embedding import embed
from .linear import column_parallel
from .plan import Plan


def refuse_overlap(ddp_config: Any) -> None:
    """Check Megatron's `DistributedDataParallelConfig` (or anything with its fields) for an elastic model.

    Overlapped reduction waits for a gradient of every parameter, which those of dropped layers never get; overlapped
    gathering waits in the forward of modules whose weights a sliced step reads without calling them.

    Raises:
        ValueError: naming every field that must be false.
    """
    names = ("overlap_grad_reduce", "overlap_param_gather", "align_param_gather")
    wrong = [name for name in names if getattr(ddp_config, name, False)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} cannot be true for an elastic model: a subnet leaves layers and parts of weights out; "
            "set it to false in the DistributedDataParallelConfig"
        )


def run_stack(model: Any, x: Tensor | None, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
    """The stack of a hybrid model on embedded tokens `[s, b, k]`; None: on what the stage before sent."""
    entering = model.decoder.input_tensor if x is None else x
    return model.decoder(hidden_states=x, attention_mask=attention_mask, rotary_pos_emb=angles(model, entering), **more)


class ElasticMambaModel(PlainModel):
    """Megatron's hybrid model at the parent's size whose forward takes a `Plan`.

    Args:
        layout: the parameter table of a tensor-parallel shard (`ParamLayout(..., tp_size=TP, ep_size=EP)`).
        others: those of Megatron's model, its spec `elastic_stack_spec()`, its `vocab_size` the padded one.

    Raises:
        ProblemsError: Megatron built a layer that is not elastic, or not the table's layers; or FP8 or FP4 is wanted,
            which a plan never enters.
    """

    def __init__(self, config: TransformerConfig, *args: Any, layout: ParamLayout, **kwargs: Any) -> None:
        raise_if_any(low_precision_problems(vars(config)))
        super().__init__(config, *args, layout=layout, **kwargs)
        assert layout.tp_size == self.pg_collection.tp.size(), "the table must be that of one tensor-parallel shard"
        assert layout.ep_size == config.expert_model_parallel_size, "... and of one expert-parallel shard"
        self.layout = layout
        refuse_plain_layers(self.decoder.layers, layout, self.pg_collection.pp)
        self.decoder.bind(layout, self.pg_collection.tp)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *args: Any,
        labels: Tensor | None = None,
        elastic: Plan | None = None,
        hidden_only: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Logits `[b, s, v/tp]`, or the loss per token `[b, s]` with `labels`, of the planned subnet.

        Args:
            elastic: what to run; None: the parent, by Megatron's own forward.
            hidden_only: return the final hidden states `[s, b, k]` in front of the output layer instead.
        """
        if elastic is None and not hidden_only:
            return super().forward(input_ids, position_ids, attention_mask, *args, labels=labels, **kwargs)
        x = None
        if self.pre_process:
            sizes = elastic.outer.sizes if elastic is not None and elastic.mode == "sliced" else {}
            spec = self.layout.table["embedding.word_embeddings.weight"]
            x = embed(self.embedding, input_ids, position_ids, spec, sizes)
        x = run_stack(self, x, attention_mask, elastic=elastic)
        if not self.post_process or hidden_only:
            return x
        logits = self.logits(x, elastic)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def output_weight(self) -> Tensor:
        """`[v/tp, h]` of the output layer, tied or its own."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, x: Tensor, elastic: Plan | None) -> Tensor:
        """`[s, b, k]` -> `[s, b, v/tp]`."""
        tied = self.output_weight() if self.share_embeddings_and_output_weights else None
        if elastic is None or elastic.mode == "masked":
            return masked(self.output_layer(x, weight=tied)[0], self.vocab_padding)
        logits = column_parallel(
            self.output_layer,
            x,
            self.layout.output_spec,
            elastic.outer.sizes,
            sequence_parallel=self.config.sequence_parallel,
            tp_group=self.pg_collection.tp,
            weight=tied,
        )
        return masked(logits, self.vocab_padding)
