"""The settings of `maekit sweep`; the sweep's file lists the varied settings."""

from dataclasses import dataclass

from maekit.config.fields import check, config_class, setting
from maekit.config.pretrain import Device


@config_class
@dataclass
class SweepConfig:
    """Which sweep, and where its runs go."""

    plan: str = setting(help="A config of `maekit pretrain` with a table [sweep].", metavar="CONFIG.toml")
    out: str = setting(help="The directory: a run for each cell.")
    device: Device | None = setting(None, "auto, cpu or cuda.", shown="as the file says")

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: names the first impossible value.
        """
        check(self)
