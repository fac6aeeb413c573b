"""The one configuration of a run: sections as frozen dataclasses, read from YAML with dotted overrides."""

from .load import Resolved, load_config, load_values
from .sections import (
    BlendSource,
    ChatConfig,
    DataConfig,
    DimConfig,
    DistillConfig,
    ElasticConfig,
    ExportConfig,
    OptimizerSettings,
    ParentConfig,
    RankConfig,
    ReportConfig,
    RouterConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "BlendSource",
    "ChatConfig",
    "DataConfig",
    "DimConfig",
    "DistillConfig",
    "ElasticConfig",
    "ExportConfig",
    "OptimizerSettings",
    "ParentConfig",
    "RankConfig",
    "ReportConfig",
    "Resolved",
    "RouterConfig",
    "RunConfig",
    "StageConfig",
    "TrainConfig",
    "load_config",
    "load_values",
]
