"""The settings of `maekit sweep`; the sweep's file lists the varied settings."""

from maekit.config.fields import Config, argument, setting
from maekit.config.pretrain import Device


class SweepConfig(Config):
    """Which sweep, and where its runs go."""

    plan: str = argument(help="A config of `maekit pretrain` with a table [sweep].", metavar="CONFIG.toml")
    out: str = setting(help="The directory: a run for each cell.")
    device: Device | None = setting(None, "auto, cpu or cuda.", shown="as the file says")
