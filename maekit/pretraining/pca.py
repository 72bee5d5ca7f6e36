"""The basis of a PCA target, fitted on the shards before the first step; afterwards it is part of the checkpoints."""

from collections.abc import Iterator

import torch

from maekit.images import Preprocess
from maekit.mae.normalize import Normalizer
from maekit.mae.targets import PcaTarget, patchify
from maekit.shards.read import ShardSet
from maekit.system.errors import ImageError, InputError
from maekit.system.parallel import batched
from maekit.system.progress import Progress

# 200,000 patches of a ViT-B/16.
_IMAGES = 1024
_BATCH = 32


def fit_pca(
    target: PcaTarget,
    shards: ShardSet,
    *,
    prepare: Preprocess,
    normalizer: Normalizer,
    patch_size: int,
    progress: Progress,
) -> None:
    """Fit the basis to patches of at most 1,024 images, evenly spread (of a remote set, over its first shard).

    Raises:
        InputError: none of them can be read, or they have too few patches.
    """
    numbers = shards.spread(_IMAGES)
    progress.start("fit the PCA target", len(numbers))

    def readable() -> Iterator[torch.Tensor]:
        for done, image in enumerate(shards.images(numbers, prepare), 1):
            progress.advance(done)
            if not isinstance(image, ImageError):  # training counts it as bad
                yield torch.from_numpy(image.copy()).permute(2, 0, 1)

    try:
        batches = (torch.stack(images) for images in batched(readable(), _BATCH))
        kept = target.fit(patchify(normalizer(images), patch_size) for images in batches)
    except InputError as error:
        raise InputError(f"{error}, those of {len(numbers)} images") from error
    finally:
        progress.stop()
    progress.note(f"target: {target.outputs} principal components, {kept:.1%} of the variance of patches")
