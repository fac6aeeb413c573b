"""What computes the toy kind of `toy_linear.py`: `nemo_elastic.mcore.kernels.kind_modules` says which names it has."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from toy_linear import LINEAR, RANK

from nemo_elastic.mcore.elastic.call import MaskCache, inner_multiplier, times
from nemo_elastic.mcore.elastic.layers import ElasticLayer
from nemo_elastic.mcore.elastic.linear import column_parallel, row_parallel
from nemo_elastic.mcore.elastic.norm import ElasticRMSNorm
from nemo_elastic.mcore.kernels.kind_modules import norm_keys
from nemo_elastic.mcore.kernels.norm import RMSNorm


class Linear(MegatronModule):
    """Two linears and nothing between them."""

    def __init__(self, config, **kwargs):
        super().__init__(config)
        rank, more = getattr(config, RANK), {"config": config, "init_method": config.init_method, "bias": False}
        more["skip_bias_add"] = False
        self.down = ColumnParallelLinear(config.hidden_size, rank, gather_output=False, **more)
        self.up = RowParallelLinear(rank, config.hidden_size, input_is_parallel=True, **more)

    def forward(self, x, **kwargs):
        return self.up(self.down(x)[0])[0], None


class ElasticLinear(Linear):
    def bind(self, rows, axes, tp_group):
        self.rows, self.axes, self.elastic_tp_group, self.masks = rows, axes, tp_group, MaskCache()

    def elastic(self, x, call, attention_mask=None):
        parallel = {"sequence_parallel": self.config.sequence_parallel, "tp_group": self.elastic_tp_group}
        if call.sliced:
            y = column_parallel(self.down, x, self.rows["mlp.down.weight"], call.sizes, **parallel)
        else:
            y = self.down(x)[0]
        y = times(y, inner_multiplier(call, self.axes["rank"], (RANK,), self.masks, y))
        if call.sliced:
            return row_parallel(self.up, y, self.rows["mlp.up.weight"], call.sizes, **parallel)
        return self.up(y)[0]


class ElasticLinearLayer(ElasticLayer, MLPLayer):
    part_names = ("pre_mlp_layernorm", "mlp", "mlp_bda")


LAYER, SUBLAYER = ElasticLinearLayer, ElasticLinear


def _spec(layer, norm, linear):
    parts = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(module=linear),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=norm_keys(LINEAR),
    )
    return ModuleSpec(module=layer, submodules=parts)


def plain_layer():
    return _spec(MLPLayer, RMSNorm, Linear)


def elastic_layer(*, transformer_engine=False):
    return _spec(LAYER, ElasticRMSNorm, SUBLAYER)


def observe(collector, number, layer):
    collector.watch_norm(number, layer.pre_mlp_layernorm, layer.mlp.down)
    collector.on_input(layer.mlp.up, lambda a: collector.see("rank", number, a))


def unit_scores(sites, architecture, settings):
    return {RANK: sites["rank"]}
