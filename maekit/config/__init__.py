"""The settings of every command, one dataclass each. `fields` declares them, `settings` reads and writes them.

This package imports only the standard library: `maekit --help` shows the defaults and must not wait for NumPy.
"""

from maekit.config.pretrain import (
    DEFAULT_EPOCHS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    WINDOW_SHARDS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    TrainingConfig,
    check_training,
    load_config,
    parse_duration,
    total_steps,
)

__all__ = [
    "DEFAULT_EPOCHS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "WINDOW_SHARDS",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "RunConfig",
    "TrainingConfig",
    "check_training",
    "load_config",
    "parse_duration",
    "total_steps",
]
