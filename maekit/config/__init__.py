"""The settings of every command, one dataclass each. `fields` declares them, `settings` reads and writes them.

This package imports only the standard library: `maekit --help` shows the defaults and must not wait for NumPy.
"""

from maekit.config.pretrain import DEFAULT_EPOCHS as DEFAULT_EPOCHS
from maekit.config.pretrain import IMAGENET_MEAN as IMAGENET_MEAN
from maekit.config.pretrain import IMAGENET_STD as IMAGENET_STD
from maekit.config.pretrain import WINDOW_SHARDS as WINDOW_SHARDS
from maekit.config.pretrain import DataConfig as DataConfig
from maekit.config.pretrain import ModelConfig as ModelConfig
from maekit.config.pretrain import OptimizerConfig as OptimizerConfig
from maekit.config.pretrain import PretrainConfig as PretrainConfig
from maekit.config.pretrain import RunConfig as RunConfig
from maekit.config.pretrain import TrainingConfig as TrainingConfig
from maekit.config.pretrain import load_config as load_config
from maekit.config.pretrain import parse_duration as parse_duration
from maekit.config.pretrain import total_steps as total_steps
