"""`maekit reconstruct`: masked | reconstruction | original for chosen samples, as a PNG or an HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from maekit.config.pages import ENDINGS, ReconstructConfig
from maekit.images import Pixels, Preprocess
from maekit.mae import reconstruction
from maekit.mae.device import choose_device
from maekit.mae.mask_shapes import MaskShape, kept_patches
from maekit.mae.normalize import Normalizer
from maekit.mae.reconstruction import images_of, refuse_unpicturable
from maekit.pages import html
from maekit.pretrained.load import TrainedAutoencoder, load_autoencoder
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.sheet import encode_png, sheet
from maekit.system import files
from maekit.system.draws import Purpose, random_bits, uniforms
from maekit.system.errors import ImageError, InputError
from maekit.system.parallel import batched
from maekit.system.progress import Progress, Silent

TITLES = ("masked", "reconstruction", "original")
_BATCH = 16
# Candidates drawn per wanted sample: some random numbers repeat, and some images cannot be read.
_SPARE = 4


@dataclass(frozen=True)
class Drawn:
    """One sample of the picture.

    Attributes:
        shard: name of the shard.
        key: key within the shard.
        loss: training loss over all its removed patches.
    """

    shard: str
    key: str
    loss: float


@dataclass(frozen=True)
class ReconstructResult:
    """Summary of the picture; `--json` prints it.

    Attributes:
        path: the picture.
        loss: mean over the samples.
        mask_ratio: share of patches removed.
        masking: kind of masks.
        samples: the samples, in the order of the picture.
    """

    path: str
    loss: float
    mask_ratio: float
    masking: str
    samples: tuple[Drawn, ...]


def reconstruct(config: ReconstructConfig, progress: Progress | None = None) -> ReconstructResult:
    """Draw some samples as a masked autoencoder sees them, and its reconstructions.

    Args:
        config: the model (see `maekit.pretrained.sources`), the samples and the masks.
        progress: receives progress updates.

    Raises:
        InputError: no such model, sample or device, or a model that does not predict pixels.
        MaekitError: the picture cannot be written.
    """
    progress = progress or Silent()
    config.validate()
    out = html.output_path(config.out, *ENDINGS)
    device = torch.device(choose_device(config.device))
    trained = load_autoencoder(config.source, target=config.target, on_note=progress.note)
    model = trained.model
    refuse_unpicturable(model)
    if config.mask_ratio is not None:
        model.mask_ratio = config.mask_ratio
    shape = MaskShape(config.masking or trained.masking, model.grid, model.mask_ratio)
    if not 0 < kept_patches(shape.patches, shape.mask_ratio) < shape.patches:
        raise InputError(f"`mask_ratio` {shape.mask_ratio} keeps none or all of the {shape.patches} patches")
    shards = open_shards(
        find_shards(config.shards), skip_damaged=True, on_damage=lambda damage: progress.note(f"left out: {damage}")
    )
    files.require_writable(out.parent)
    chosen = _read(shards, config, trained.preprocess, progress)
    model.to(device)
    columns, losses = _draw(trained, shape, chosen, config=config, progress=progress)
    samples = tuple(Drawn(*shards.name(number), loss) for (number, _), loss in zip(chosen, losses, strict=True))
    loss = float(np.mean(losses))
    if out.suffix.lower() == ".png":
        data = encode_png(sheet(columns, TITLES))
    else:
        captions = [f"{sample.key} ({sample.shard}), loss {sample.loss:.4f}" for sample in samples]
        rows = list(zip(captions, zip(*columns, strict=True), strict=True))
        about = f"{config.source}: {shape.mask_ratio:.0%} of the patches removed ({shape.kind}), mean loss {loss:.4f}"
        data = html.document("Reconstructions", about, [html.image_rows(TITLES, rows)])
    files.write_atomically(out, data)
    return ReconstructResult(str(out), loss, shape.mask_ratio, shape.kind, samples)


def _draw(
    trained: TrainedAutoencoder,
    shape: MaskShape,
    chosen: Sequence[tuple[int, Pixels]],
    *,
    config: ReconstructConfig,
    progress: Progress,
) -> tuple[list[list[Pixels]], list[float]]:
    """Return the images masked, reconstructed and original, and their losses.

    Args:
        trained: the model, on the device it should run on, and its preprocessing.
        shape: shape of the masks; the mask of an image depends only on the seed and the sample's number.
        chosen: number and image of each sample.
        config: seed, and whether kept patches are shown as they are.
        progress: receives progress updates.
    """
    model, preprocess = trained.model, trained.preprocess
    device = next(model.parameters()).device
    channels = model.encoder.patch_embed.proj.weight.shape[1]
    normalizer = Normalizer(preprocess.mean, preprocess.std, device, channels=channels)
    columns: list[list[Pixels]] = [[] for _ in TITLES]
    losses: list[float] = []
    progress.start("reconstruct", len(chosen))
    for batch in batched(chosen, _BATCH):
        draws = [uniforms(shape.draws, Purpose.PICTURE, seed=config.seed, position=number) for number, _ in batch]
        noise = torch.from_numpy(shape.noise(np.stack(draws))).to(device)
        originals = torch.from_numpy(np.stack([image for _, image in batch])).permute(0, 3, 1, 2)
        images = normalizer(originals.to(device))
        shown = reconstruction.reconstruct(model, images, noise)
        predicted = shown.overlaid if config.overlay_visible else shown.predicted
        for column, pictures in zip(columns, (shown.masked, predicted, images), strict=True):
            column += images_of(normalizer.to_pixels(pictures))
        losses += shown.losses.tolist()
        progress.advance(len(losses))
    progress.stop()
    return columns, losses


def _read(
    shards: ShardSet, config: ReconstructConfig, preprocess: Preprocess, progress: Progress
) -> list[tuple[int, Pixels]]:
    """Return number and image of the chosen samples, or of up to `count` readable random ones."""
    named = [_find(shards, key) for key in config.keys]
    wanted = named or _random_numbers(shards, config)
    chosen: list[tuple[int, Pixels]] = []
    for number, image in zip(wanted, shards.images(wanted, preprocess), strict=False):
        if isinstance(image, ImageError):
            said = f"{' '.join(shards.name(number))} holds no readable image: {image.reason}, {image}"
            if named:
                raise InputError(said) from image
            progress.note(f"left out: {said}")
            continue
        chosen.append((number, image))
        if not named and len(chosen) == config.count:
            break
    if not chosen:
        raise InputError("none of the samples drawn holds a readable image")
    return chosen


def _random_numbers(shards: ShardSet, config: ReconstructConfig) -> list[int]:
    """Return random sample numbers, more than wanted; for remote shards, all from the first non-empty one."""
    samples = int(shards.counts[shards.counts > 0][0]) if shards.remote else shards.samples
    candidates = _SPARE * config.count
    bits = random_bits(min(samples, candidates), Purpose.PICTURE, seed=config.seed, salt=1)
    if samples <= candidates:
        return [int(number) for number in np.argsort(bits, kind="stable")]
    return list(dict.fromkeys((bits % np.uint64(samples)).tolist()))


def _find(shards: ShardSet, wanted: str) -> int:
    """Return the number of a sample by KEY or SHARD:KEY.

    Raises:
        InputError: no sample or more than one has this key.
    """
    found = []
    for shard, file in enumerate(shards.shards):
        index = shards.index(shard)
        keys = (wanted, wanted.removeprefix(f"{file.name}:"))
        found += [shards.number(shard, ordinal) for ordinal in range(index.samples) if index.key(ordinal) in keys]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"`keys` {wanted}: there is no such sample; the first is {':'.join(shards.name(0))}")
    first = ":".join(shards.name(found[0]))
    raise InputError(f"`keys` {wanted}: {len(found)} samples have this key; name one, as in `keys` {first}")
