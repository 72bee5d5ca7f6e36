"""RUN/tensorboard: rows of metrics as curves, and pictures of reconstructions. Imports TensorBoard only when used."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.system import files

_NO_CURVES = ("step", "samples")


class TensorBoardLog:
    """Writes TensorBoard's event files; a resumed run purges the steps that it writes again.

    Args:
        folder: folder of the event files.
        first: steps already done.

    Raises:
        MaekitError: the files cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder
        # TensorBoard's thread passes a full-disk error to the caller, then raises it again uncaught; hide the second.
        self._excepthook = threading.excepthook
        threading.excepthook = self._heed
        with files.writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None, flush_secs=30)

    def _heed(self, failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            self._excepthook(failed)

    def row(self, row: dict[str, Any]) -> None:
        """Add a row of metrics."""
        with files.writing(self._folder):
            for name, value in row.items():
                if name not in _NO_CURVES and isinstance(value, int | float):  # skips the digest of a test set
                    self._writer.add_scalar(name, value, row["step"])

    def picture(self, pixels: NDArray[np.uint8], step: int) -> None:
        """Add a picture, uint8 `[H, W, 3]`."""
        with files.writing(self._folder):
            self._writer.add_image("reconstructions", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        try:
            with files.writing(self._folder):
                self._writer.close()
        finally:
            threading.excepthook = self._excepthook
