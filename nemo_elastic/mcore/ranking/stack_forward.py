"""Run parts of a plain hybrid stack forward, without gradients, over pipeline stages.

Ranking needs what Megatron's schedules do not give: a forward that starts at any layer, leaves layers out, and ends
before the output layer. `StackForward` has the pieces; the modules and their collectives are Megatron's own. Layers are
named by their global number (`layer.layer_number - 1`), never by their place in a stage's list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from ..kernels.padded_vocabulary import padding_of
from ..kernels.positions import angles

SENDS_IN_FLIGHT = 8


@dataclass(frozen=True)
class Groups:
    """Process groups that ranking reduces over.

    Expert-parallel ranks need each other in every forward: here they see the same samples.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup  # that have other samples
    ep: dist.ProcessGroup

    @classmethod
    def from_megatron(cls) -> Groups:
        """The groups of `parallel_state`, which must be initialised.

        Raises:
            ValueError: under context parallelism, whose sequence order the scores do not know.
        """
        if parallel_state.get_context_parallel_world_size() > 1:
            raise ValueError("train.context_parallel_size must be 1 to rank; use tensor or pipeline parallelism")
        return cls(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            dp=parallel_state.get_expert_data_parallel_group(),
            ep=parallel_state.get_expert_model_parallel_group(),
        )


class StackForward:
    """The pieces of a forward through `model` (a hybrid model, wrapped or not) on this rank's stage.

    Attributes:
        layers: global layer number -> module, of this stage only.
        stage_of: global layer number -> pipeline stage, of the whole model.
    """

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        while not hasattr(model, "decoder"):
            model = model.module
        self.model, self.groups, self.config = model, groups, model.config
        self.layers: dict[int, nn.Module] = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        self.stage, self.stages = groups.pp.rank(), groups.pp.size()
        self.is_first, self.is_last = self.stage == 0, self.stage == self.stages - 1
        everywhere: list[list[int]] = [[]] * self.stages
        dist.all_gather_object(everywhere, sorted(self.layers), group=groups.pp)
        self.stage_of = {layer: stage for stage, layers in enumerate(everywhere) for layer in layers}
        self._sends: list[tuple[dist.Work, Tensor]] = []

    @property
    def sequence_is_split(self) -> bool:
        """Whether the residual stream is `[s/tp, b, h]`."""
        return bool(self.config.sequence_parallel) and self.groups.tp.size() > 1

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[b, s]` -> `[s, b, h]` (`[s/tp, b, h]`); first stage only."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model.embedding(input_ids=tokens, position_ids=positions)

    @torch.no_grad()
    def layer(self, number: int, hidden: Tensor) -> Tensor:
        """One layer of this stage, residual included."""
        module = self.layers[number]
        if isinstance(module, TransformerLayer):
            return module(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles(self.model, hidden))[0]
        return module(hidden_states=hidden, attention_mask=None)

    @torch.no_grad()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """Input of the output layer; last stage only."""
        return self.model.decoder.final_norm(hidden)

    @torch.no_grad()
    def all_layers(self, tokens: Tensor) -> Tensor | None:
        """The whole stack on token ids `[b, s]`; the final norm's output on the last stage, None elsewhere."""
        hidden = self.embed(tokens) if self.is_first else self.receive(tokens)
        for number in sorted(self.layers):
            hidden = self.layer(number, hidden)
        if not self.is_last:
            self.send(hidden)
            return None
        return self.final_norm(hidden)

    def output_weight(self) -> Tensor:
        """This rank's rows `[v/tp, h]` of the output layer, but for padding; last stage only."""
        tied = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if tied else self.model.output_layer.weight
        return weight[: len(weight) - padding_of(self.model)]

    def send(self, hidden: Tensor) -> None:
        """Hand `hidden` to the next stage; returns before it has arrived."""
        hidden = hidden.contiguous()
        target = dist.get_global_rank(self.groups.pp, self.stage + 1)
        self._sends.append((dist.isend(hidden, target, group=self.groups.pp), hidden))
        while len(self._sends) > SENDS_IN_FLIGHT:
            self._sends.pop(0)[0].wait()

    def receive(self, tokens: Tensor) -> Tensor:
        """What the stage before sent for a micro-batch of token ids `[b, s]`."""
        batch, length = tokens.shape
        length //= self.groups.tp.size() if self.sequence_is_split else 1
        wide = self.config.fp32_residual_connection
        hidden = torch.empty(
            length,
            batch,
            self.config.hidden_size,
            dtype=torch.float32 if wide else self.config.params_dtype,
            device=tokens.device,
        )
        dist.recv(hidden, dist.get_global_rank(self.groups.pp, self.stage - 1), group=self.groups.pp)
        return hidden

    def wait(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sends:
            self._sends.pop(0)[0].wait()
