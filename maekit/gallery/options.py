"""What can be asked of `maekit reconstruct`. Imports nothing heavy: its `--help` shows these defaults."""

from dataclasses import dataclass

from maekit.config import MASKINGS
from maekit.errors import InputError

ENDINGS = (".png", ".html")
_MOST_ROWS = 1000
TARGETS = ("norm_pixel", "pixel")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ReconstructOptions:
    """Which samples are drawn, and under which masks.

    Attributes:
        keys: of the samples, KEY or SHARD:KEY; a random set where empty.
        count: how many are drawn at random.
        seed: of the samples and the masks.
        mask_ratio: share of patches removed, in (0, 1); None is that of the training.
        masking: `random`, `block` or `grid`; None is that of the training.
        target: what the model predicts, `norm_pixel` or `pixel`, for a file of weights that does not tell.
        overlay_visible: show kept patches as they are, and not as they are predicted.
        device: `auto`, `cpu` or `cuda`.
    """

    keys: tuple[str, ...] = ()
    count: int = 8
    seed: int = 0
    mask_ratio: float | None = None
    masking: str | None = None
    target: str | None = None
    overlay_visible: bool = False
    device: str = "auto"

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value.
        """
        if not 1 <= self.count <= _MOST_ROWS:
            raise InputError(f"--count {self.count}: must be at least 1, and at most {_MOST_ROWS}")
        if len(self.keys) > _MOST_ROWS:
            raise InputError(f"{len(self.keys)} keys: at most {_MOST_ROWS} fit into a picture")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed {self.seed}: must lie between 0 and 2^63")
        if self.mask_ratio is not None and not 0 < self.mask_ratio < 1:
            raise InputError(f"--mask-ratio {self.mask_ratio}: must lie between 0 and 1")
        for option, value, allowed in (
            ("--masking", self.masking, (None, *MASKINGS)),
            ("--target", self.target, (None, *TARGETS)),
            ("--device", self.device, DEVICES),
        ):
            if value not in allowed:
                raise InputError(f"{option} {value}: must be one of {', '.join(filter(None, allowed))}")
