"""Image tokens from any ONNX tokenizer, as the training target (as in BEiT, Bao et al. 2021, section 2.1).

The graph declares input and output. One input: RGB images, uint8 or float32 in [0, 1], `[batch, H, W, 3]` or
`[batch, 3, H, W]`. One output: integers, one per patch, `[batch, rows, columns]` or `[batch, N]`. If H and W are fixed,
images are resized to them. Any other normalisation must be part of the graph.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from maekit.encoder_file import read_model
from maekit.providers import first_line, open_cpu, open_cuda
from maekit.system.errors import InputError, MaekitError

_BATCH = 64
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


class Tokenizer:
    """Runs an ONNX file that turns images into tokens.

    Args:
        path: the file.
        size: (height, width) of the input images, in pixels.
        grid: (rows, columns) of patches; one token is needed per patch.
        vocabulary: number of different tokens.
        device: device to run on, the one used for training.
        threads: number of CPU threads.
        sha256: the digest that the file must have; None for any.

    Raises:
        InputError: the file cannot be loaded, or its input or output is different.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: tuple[int, int],
        grid: tuple[int, int],
        vocabulary: int,
        device: torch.device,
        threads: int,
        sha256: str | None = None,
    ) -> None:
        if not path.is_file():
            raise InputError(f"`tokenizer` {path}: there is no such file")
        model = read_model(path)
        if sha256 not in (None, model.digest):
            raise InputError(f"`tokenizer` {path}: was replaced while the run was starting; run the command again")
        self._path, self._grid, self._vocabulary = path, grid, vocabulary
        if device.type == "cuda":
            opened = open_cuda(model, f"cuda:{device.index or 0}", threads=threads)
            if opened.problem is not None:
                raise InputError(f"`tokenizer` {path} on CUDA: {opened.problem.what}; {opened.problem.fix}")
        else:
            opened = open_cpu(model, threads=threads)
        self._session = opened.session
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type not in _TYPES or len(inputs[0].shape) != 4:
            found = ", ".join(f"{value.type} {value.shape}" for value in (*inputs, *outputs))
            raise InputError(
                f"`tokenizer` {path}: wants one input, images as uint8 or float32 of four dimensions, and one output; "
                f"this file has {found}"
            )
        self._input, self._type = inputs[0].name, _TYPES[inputs[0].type]
        batch, *shape = inputs[0].shape
        self._batch = batch if isinstance(batch, int) else None
        if 3 not in (shape[0], shape[2]):
            raise InputError(f"`tokenizer` {path}: images of three channels are known, its input is {inputs[0].shape}")
        self._channels_first = shape[0] == 3
        sides = shape[1:] if self._channels_first else shape[:2]
        height, width = (side if isinstance(side, int) else own for side, own in zip(sides, size, strict=True))
        if not (height > 0 and width > 0 and (self._batch is None or self._batch > 0)):
            raise InputError(f"`tokenizer` {path}: its input is {inputs[0].shape}, which holds no image")
        self._size = height, width
        self(torch.zeros(1, 3, *size, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool))

    def __call__(self, images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        """Return the tokens of images.

        Args:
            images: uint8 `[B, 3, H, W]`, on the CPU.
            flips: bool `[B]`, True = mirror first.

        Returns:
            int64 `[B, N]`.

        Raises:
            InputError: the output is not one token per patch, or a token lies outside the vocabulary.
            MaekitError: running the file failed.
        """
        mirrored = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        if mirrored.shape[2:] != self._size:
            mirrored = functional.interpolate(mirrored, self._size, mode="bicubic", antialias=True)
        if not self._channels_first:
            mirrored = mirrored.permute(0, 2, 3, 1)
        pixels = mirrored.contiguous().numpy()
        size = self._batch or _BATCH
        parts = [self._run(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        return torch.from_numpy(np.concatenate(parts))

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        count = len(pixels)
        if self._batch is not None and count < self._batch:
            pixels = np.concatenate([pixels, np.repeat(pixels[:1], self._batch - count, axis=0)])
        images: Any = pixels if self._type is np.uint8 else pixels.astype(np.float32) / 255
        try:
            (tokens,) = self._session.run(None, {self._input: images})
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise MaekitError(f"`tokenizer` {self._path} failed: {first_line(error)}") from error
        rows, columns = self._grid
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1:] not in ((rows, columns), (rows * columns,)):
            raise InputError(
                f"`tokenizer` {self._path} gives {tokens.dtype} {list(tokens.shape)} for images of "
                f"{self._size[0]} x {self._size[1]}; {rows} x {columns} patches want as many whole numbers"
            )
        flat = tokens[:count].reshape(count, -1).astype(np.int64)
        if flat.min() < 0 or flat.max() >= self._vocabulary:
            raise InputError(
                f"`tokenizer` {self._path} gives tokens from {flat.min()} to {flat.max()}, and `vocabulary` is "
                f"{self._vocabulary}"
            )
        return flat
