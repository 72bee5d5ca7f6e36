"""What can be asked of `maekit export`. Imports nothing heavy: `maekit export --help` shows these defaults."""

from dataclasses import dataclass

from maekit.config.poolings import UNPOOLED, check_pool
from maekit.system.errors import InputError

PRECISIONS = ("fp32", "fp16", "int8")
OPSETS = (18, 19, 20, 21, 22, 23)
OPSET_WITH_ATTENTION = 23  # the first that has the operator
FORMATS = ("onnx", "timm")


@dataclass(frozen=True)
class ExportOptions:
    """What the exported file computes, and what it is held against.

    Attributes:
        pool: `avg`, `cls`, `std`, `avg2x2`, several joined by `+`, or `tokens`; see `maekit.exporters.graph`.
        normalize: divide each embedding by its L2 norm.
        whiten: shards with images to fit a whitening on; none where empty.
        whiten_dim: length of a whitened embedding; None is all directions of any variance.
        whiten_images: so many images are taken to fit it, evenly spread.
        precision: `fp32`, `fp16` (for CUDA) or `int8` (for CPUs).
        opset: of ONNX; below 23 attention is written as MatMul and Softmax, for older runtimes.
        format: `onnx`, or `timm` for a directory that timm loads (encoder alone, fp32).
        model: timm's name of the architecture, for a file of weights that does not tell.
        parity: shards with the images to compare on, and to calibrate int8 on; by default those of the training.
        force: keep a file that does not pass.
    """

    pool: str = "avg"
    normalize: bool = True
    whiten: tuple[str, ...] = ()
    whiten_dim: int | None = None
    whiten_images: int = 5000
    precision: str = "fp32"
    opset: int = 23
    format: str = "onnx"
    model: str | None = None
    parity: tuple[str, ...] = ()
    force: bool = False

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value.
        """
        check_pool("--pool", self.pool, also=(UNPOOLED,))
        for option, value, allowed in (
            ("--precision", self.precision, PRECISIONS),
            ("--opset", self.opset, OPSETS),
            ("--format", self.format, FORMATS),
        ):
            if value not in allowed:
                raise InputError(f"{option} {value}: must be one of {', '.join(map(str, allowed))}")
        if self.whiten_dim is not None and not self.whiten:
            raise InputError(f"--whiten-dim {self.whiten_dim}: needs --whiten SHARDS, to fit the whitening on")
        if self.whiten_dim is not None and self.whiten_dim < 1:
            raise InputError(f"--whiten-dim {self.whiten_dim}: must be at least 1")
        if self.whiten_images != ExportOptions.whiten_images and not self.whiten:
            raise InputError(f"--whiten-images {self.whiten_images}: needs --whiten SHARDS, to take them from")
        if self.whiten_images < 2:
            raise InputError(f"--whiten-images {self.whiten_images}: must be at least 2")
        if self.whiten and self.pool == UNPOOLED:
            raise InputError("--whiten is for embeddings; --pool tokens gives tokens")
        if self.format == "timm":
            changed = ("pool", "normalize", "whiten", "precision", "opset", "force")
            for name in changed:
                if getattr(self, name) != getattr(ExportOptions, name):
                    raise InputError(f"--{name} is not for --format timm, which writes the encoder alone in fp32")
