"""The options of every command, a dataclass for each; `settings` reads and writes them by name.

Nothing in here imports more than the standard library: `maekit --help` shows the defaults and must not wait for NumPy.
"""

from maekit.config.pretrain import (
    DEFAULT_EPOCHS,
    DEFAULT_FINETUNE_EPOCHS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MASKINGS,
    WINDOW_SHARDS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    TrainingConfig,
    check_not_negative,
    check_positive,
    check_training,
    load_config,
    parse_duration,
    total_steps,
)

__all__ = [
    "DEFAULT_EPOCHS",
    "DEFAULT_FINETUNE_EPOCHS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MASKINGS",
    "WINDOW_SHARDS",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "RunConfig",
    "TrainingConfig",
    "check_not_negative",
    "check_positive",
    "check_training",
    "load_config",
    "parse_duration",
    "total_steps",
]
