"""What can be asked of the commands that show. Imports nothing heavy: their `--help` shows these defaults."""

from dataclasses import dataclass

from maekit.config import MASKINGS
from maekit.system.errors import InputError

ENDINGS = (".png", ".html")
_MOST_ROWS = 1000
_MOST_SAMPLES = 5000
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


@dataclass(frozen=True)
class ReportOptions:
    """What the report of a run looks at.

    Attributes:
        shards: input specs of the samples shown; empty is what the run was trained on.
        samples: how many are embedded for neighbours and map, at most.
        device: `auto`, `cpu` or `cuda`.
    """

    shards: tuple[str, ...] = ()
    samples: int = 600
    device: str = "auto"

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: names the first impossible value.
        """
        if not 2 <= self.samples <= _MOST_SAMPLES:
            raise InputError(f"--samples {self.samples}: must be at least 2, and at most {_MOST_SAMPLES}")
        if self.device not in DEVICES:
            raise InputError(f"--device {self.device}: must be one of {', '.join(DEVICES)}")


@dataclass(frozen=True)
class NeighbourOptions:
    """How neighbours are looked for and shown.

    Attributes:
        k: neighbours of each query.
        shards: input specs of what was embedded, for the pictures; none where empty.
        model: the ONNX file that made the embeddings, for queries that are image files.
    """

    k: int = 10
    shards: tuple[str, ...] = ()
    model: str | None = None

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: names the first impossible value.
        """
        if not 1 <= self.k <= _MOST_ROWS:
            raise InputError(f"--k {self.k}: must be at least 1, and at most {_MOST_ROWS}")
