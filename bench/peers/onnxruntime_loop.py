"""The usual loop with ONNX Runtime over a folder of images: Pillow, a session with its defaults, one .npy file.

With `--decoders N` as a careful user writes it: N threads decode ahead while the session runs.
Prints its rate, counted from the moment when the session is ready.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="what `maekit export` wrote")
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--decoders", type=int, default=0, help="threads that decode ahead; 0: none, one after the other"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    session = ort.InferenceSession(options.model, providers=["CPUExecutionProvider"])
    spec = json.loads(session.get_modelmeta().custom_metadata_map["maekit"])["preprocess"]
    paths = sorted(options.images.iterdir())
    before = time.perf_counter()
    rows, batch = [], []
    for image in prepared(paths, spec["resize"][0], spec["size"][0], options.decoders, 4 * options.batch_size):
        batch.append(image)
        if len(batch) == options.batch_size:
            rows.append(session.run(None, {"images": np.stack(batch)})[0])
            batch.clear()
    if batch:
        rows.append(session.run(None, {"images": np.stack(batch)})[0])
    seconds = time.perf_counter() - before
    np.save(options.out, np.concatenate(rows))
    print(json.dumps({"images_per_second": len(paths) / seconds}))


def prepared(paths: list[Path], resize: int, size: int, decoders: int, ahead: int) -> Iterator[np.ndarray]:
    """Yield the images in order: uint8 `[size, size, 3]`."""
    if not decoders:
        yield from (prepare(path, resize, size) for path in paths)
        return
    with ThreadPoolExecutor(decoders) as pool:
        waiting = deque()
        for path in paths:
            waiting.append(pool.submit(prepare, path, resize, size))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(path: Path, resize: int, size: int) -> np.ndarray:
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = resize / min(image.size)
    if image.width <= image.height:
        image = image.resize((resize, int(image.height * scale)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(image.width * scale), resize), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


if __name__ == "__main__":
    main()
