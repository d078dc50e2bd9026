"""The run file: its keys, their checks, where its paths lead, and how the command line changes them.

A leaf: neither torch nor transformers may enter, so that ``--help`` and a mistyped key are answered at once.
"""

from dpo_ds.config.parse import Run, dump_yaml, parse_run, settle
from dpo_ds.config.paths import resolve_path
from dpo_ds.config.rules import check
from dpo_ds.config.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    DataSource,
    EnginesConfig,
    ExportConfig,
    LossConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
    StreamingConfig,
    TrackingConfig,
    TrainConfig,
    flat,
    shown,
)
from dpo_ds.config.sources import source_names

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "EnginesConfig",
    "ExportConfig",
    "LossConfig",
    "ModelConfig",
    "ReferenceConfig",
    "Run",
    "RunConfig",
    "StreamingConfig",
    "TrackingConfig",
    "TrainConfig",
    "check",
    "dump_yaml",
    "flat",
    "parse_run",
    "resolve_path",
    "settle",
    "shown",
    "source_names",
]
