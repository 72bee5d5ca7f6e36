"""`maekit evaluate finetune`: supervised training of an encoder with a head, by the engine of pretraining.

Stopped and gone on with as a pretraining is: same samples, crops, policies, mixtures and dropped paths; bit for bit on
a CPU with as many threads.
"""

import copy
import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch.nn import functional

from maekit import files, runs
from maekit.config import DEFAULT_FINETUNE_EPOCHS, load_settings
from maekit.errors import ImageError, InputError, MaekitError
from maekit.evaluation.classifier import Classifier, ClassifierObjective, LabelledUpload, make_optimizer
from maekit.evaluation.finetune_config import FinetuneConfig
from maekit.evaluation.labelled import LabelledSet, by_name, classes_of, encode, open_labelled
from maekit.evaluation.policy import RandAugment
from maekit.images import Pixels, Preprocess
from maekit.mae.autoencoder import initialize_encoder
from maekit.mae.loading import TrainedEncoder, load_encoder, norm_eps, set_norm_eps
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.mae.pooling import poolings_of
from maekit.mae.sources import Note, create_timm
from maekit.mae.weights import encoder_bytes, load_strictly, read_safetensors
from maekit.parallel import map_in_threads
from maekit.progress import Progress, Silent
from maekit.random import Purpose, random_bits
from maekit.runs import FinetuneDirectory, RunDirectory
from maekit.shards.order import Order
from maekit.shards.read import ShardSet
from maekit.signals import stop_on_signal
from maekit.training import distributed, metrics
from maekit.training.crops import Augmentation, CropLoader, Watch
from maekit.training.data import Division
from maekit.training.distributed import World
from maekit.training.engine import Engine, Finished, Stop, device_errors
from maekit.training.kernels import choose_kernels
from maekit.training.optim import Schedule, make_schedule
from maekit.training.prepare import (
    choose_device,
    choose_precision,
    index_shards,
    newest_checkpoint,
    refuse_different_data,
    refuse_indivisible,
)
from maekit.training.ram import DecodedSet

_TEST_BATCH = 64


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished run amounts to; `--json` prints it.

    Attributes:
        out: the directory of the run.
        steps: optimiser steps done.
        samples: images trained on, repeats counted.
        loss: mean training loss over the last logged steps.
        accuracy: share of test images that the last weights get right, of those that can be read.
        test_loss: their mean cross-entropy.
        test_images: that could be read.
        trained: parameters that were.
        images_per_second: over this process's part of the run, on all ranks together.
        data_wait: share of this process's time spent waiting for data.
        bad: samples replaced, over the whole run.
        resumed_from: the step that this process went on from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
        path: where the figures are kept in the run that the encoder is from; None for any other model.
    """

    out: str
    steps: int
    samples: int
    loss: float | None
    accuracy: float | None
    test_loss: float | None
    test_images: int
    trained: int
    images_per_second: float
    data_wait: float
    bad: int
    resumed_from: int
    already_finished: bool = False
    path: str | None = None


def finetune(config: FinetuneConfig, progress: Progress | None = None) -> FinetuneResult:
    """Train an encoder, or its last blocks, with a linear head on labels; called again, go on.

    In several processes (`torchrun`), each calls this with the same config and all return the same.

    Raises:
        InputError: bad usage, no labels, damaged data, or a directory of another run; found before any step.
        Stopped: a signal came, or the time is over; everything is saved.
        ElsewhereError: another process of the run failed or was stopped, and raises the error itself.
        MaekitError: failed while working.
    """
    progress = progress or Silent()
    config = copy.deepcopy(config)
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_FINETUNE_EPOCHS
    config.validate()
    run = FinetuneDirectory(Path(config.out))
    files.require_utf8(run.path)
    stop = Stop(config.run.max_time)
    kind = choose_device(config)
    with (
        stop_on_signal(stop.heed) as stop.received_signal,
        device_errors(),
        distributed.join(kind) as world,
        ExitStack() as stack,
    ):
        device = torch.device(kind, world.local_rank) if kind == "cuda" else torch.device(kind)

        def main(work: Callable[[], Any]) -> Any:
            """Do some work on the main process, and fail on all if it fails."""
            return world.together(lambda: work() if world.is_main else None)

        main(lambda: refuse_indivisible(config, world))
        main(lambda: _refuse_foreign_directory(run))
        note = progress.note if world.is_main else Silent().note
        trained = world.together(lambda: _source(config, run, note))
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        shards = world.in_turn(lambda: index_shards(config, world, progress))
        refuse_different_data(shards, world)
        labels, classes, test = world.together(lambda: _labels(config, progress))
        config.classes, config.model.sha256 = len(classes), _digest(trained)
        config.labels_sha256 = hashlib.sha256("\0".join(classes).encode() + labels.tobytes()).hexdigest()
        config.data.mean, config.data.std = (_three(v) for v in (trained.preprocess.mean, trained.preprocess.std))
        precision = choose_precision(config, device, world, progress)
        task = world.together(
            lambda: _Supervised(config, run, shards, labels, classes, test, trained, device, precision, world)
        )
        main(lambda: stack.enter_context(files.sole_owner(run.path)))
        newest = main(lambda: newest_checkpoint(run, progress))
        finished = Engine(task, run, shards, task.order, device, world, progress, stop).go(newest)
        main(lambda: task.measure_once(finished))
        result: FinetuneResult = world.share(_result(config, finished, task, trained) if world.is_main else None)
        return result


def _source(config: FinetuneConfig, run: FinetuneDirectory, note: Note) -> TrainedEncoder:
    """Return the encoder that is started from; where there is a checkpoint, as far as that one does not hold it.

    A run that the encoder came from may have gone on, or be gone.
    """
    if run.list_checkpoints() and run.start_file.is_file():
        start = json.loads(run.start_file.read_text(encoding="utf-8"))
        if start["source"] == config.model.source:
            encoder = create_timm(start["name"], start["arguments"])
            set_norm_eps(encoder, start["norm_eps"])
            preprocess = Preprocess.from_json(start["preprocess"])
            return TrainedEncoder(encoder, start["name"], preprocess, start["arguments"], start["provenance"])
    return load_encoder(config.model.source, model=config.model.name, on_note=note)


def _refuse_foreign_directory(run: FinetuneDirectory) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} is a file; --out names a directory")
    if run.path.is_dir() and not runs.is_finetuned(run.path):
        others = sorted(p.name for p in run.path.iterdir() if not p.name.startswith("."))
        if others:
            raise InputError(
                f"{run.path} is no directory of fine-tuning (it holds {others[0]}); choose an empty or new --out"
            )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _digest(trained: TrainedEncoder) -> str:
    """Return what names the weights that are started from."""
    return str(trained.provenance.get("sha256") or trained.provenance.get("name"))


def _labels(
    config: FinetuneConfig, progress: Progress
) -> tuple[NDArray[np.int64], tuple[str, ...], tuple[LabelledSet, NDArray[np.int64]]]:
    """Return the class of every training sample, int64 `[samples]`, -1 where it has none, the classes, the test set."""
    images, cache = config.test_images, config.data.cache_gb
    labelled, test = by_name(
        [
            open_labelled(config.shards, "--train", progress, cache_gb=cache),
            open_labelled(config.test, "--test", progress, images=images, cache_gb=cache),
        ]
    )
    classes = classes_of(labelled.texts)
    if len(classes) < 2:
        raise InputError(f"--train {' '.join(config.shards)}: all images are of one class, {classes[0][:60]!r}")
    labels = np.full(labelled.shards.samples, -1, np.int64)
    labels[labelled.numbers] = encode(labelled.texts, classes)
    if labelled.unlabelled > config.data.max_bad * len(labels):
        raise InputError(
            f"{labelled.unlabelled} of {len(labels)} training samples have no label, more than --max-bad "
            f"{config.data.max_bad:g}; put the labelled ones into shards of their own"
        )
    return labels, classes, (test, encode(test.texts, classes))


class _Supervised:
    """A classifier as what is trained; see `maekit.training.engine.Task`."""

    masks, pictures = 1, False

    def __init__(
        self,
        config: FinetuneConfig,
        run: FinetuneDirectory,
        shards: ShardSet,
        labels: NDArray[np.int64],
        classes: tuple[str, ...],
        test: tuple[LabelledSet, NDArray[np.int64]],
        trained: TrainedEncoder,
        device: torch.device,
        precision: str,
        world: World,
    ) -> None:
        self.config, self.classes = config, classes
        self.name = "probe" if config.model.batch_norm and config.model.blocks == 0 else "finetune"
        self._run, self.shards, self.labels, self.test, self._world = run, shards, labels, test, world
        self._trained, self._prepare = trained, trained.preprocess
        self.size = trained.preprocess.size
        self.clip_grad = config.optimizer.clip_grad
        policy = config.mix.rand_augment
        self._policy = None if policy == "none" else RandAugment(policy, self.size, self._prepare.mean)
        share = config.batch_size // world.size
        if not self.fits(config.run.micro_batch or share):
            why = "mixup and cutmix mix pairs of images" if self._mixes else "a BatchNorm needs two images at least"
            raise InputError(
                f"{why}: a batch of {config.batch_size} gives each process {config.run.micro_batch or share} at a time"
            )
        if "cls" in config.model.pool and "cls" not in poolings_of(trained.encoder):
            raise InputError(f"--pool {config.model.pool}: this model has no class token; use --pool avg")
        self.model = Classifier(
            self._encoder(),
            len(classes),
            pool=config.model.pool,
            batch_norm=config.model.batch_norm,
            blocks=config.model.blocks,
            seed=config.seed,
        ).to(device)
        self.objective = ClassifierObjective(self.model)
        self.forward = choose_kernels(self.model, device, precision)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        channels = trained.encoder.patch_embed.proj.weight.shape[1]
        self._normalizer = Normalizer(self._prepare.mean, self._prepare.std, device, channels=channels)
        self.upload = LabelledUpload(self._normalizer, device, len(classes), config.mix)
        self.order = Order(shards.counts, seed=config.seed, digest=shards.digest, window=config.data.window)

    def _encoder(self) -> Any:
        """Return the encoder to start from, with stochastic depth."""
        arguments = {**self._trained.arguments, "drop_path_rate": self.config.model.drop_path}
        encoder = create_timm(self._trained.name, arguments)
        encoder.load_state_dict(self._trained.encoder.state_dict())
        set_norm_eps(encoder, norm_eps(self._trained.encoder))
        if self.config.model.from_scratch:
            initialize_encoder(encoder, seed=self.config.seed)
        return encoder

    @property
    def _mixes(self) -> bool:
        return bool(self.config.mix.mixup or self.config.mix.cutmix)

    def fits(self, count: int) -> bool:
        return count % 2 == 0 if self._mixes else count > 1 or not self.config.model.batch_norm

    def schedule(self, steps: int) -> Schedule:
        size, samples = self.config.batch_size, self.shards.samples
        return make_schedule(self.config.optimizer, batch_size=size, samples=samples, steps=steps)

    def crops(self, watch: Watch, decoded: DecodedSet | None) -> CropLoader:
        data = self.config.data
        augmentation = Augmentation(
            self.size,
            self._prepare.resize,
            self.config.seed,
            data.augmentation,
            data.crop_scale,
            data.flip,
            data.color_jitter,
            self._policy,
        )
        # Nothing is masked; the numbers that would choose a mask are of no use and cost next to nothing.
        nothing = MaskShape("random", (1, 2), 0.5)
        return CropLoader(
            self.shards, self.order, augmentation, nothing, watch=watch, decoded=decoded, labels=self.labels
        )

    def begin_step(self, done: int) -> None:
        """Seed the global generators, which dropping paths, erasing and mixing take their numbers from."""
        words = random_bits(3, Purpose.STEP, seed=self.config.seed, epoch=done, position=self._world.rank).tolist()
        torch.manual_seed(words[0])
        np.random.seed(words[1] & 0xFFFFFFFF)
        random.seed(words[2])

    def open_validation(self, division: Division) -> Callable[[], dict[str, Any]]:
        return lambda: self._measure(self._world)

    def measure_once(self, finished: Finished) -> None:
        """Measure the final weights, where that was not done on this test set: after a kill, or with another set."""
        done, digest = finished.steps, self.test_digest
        if any(row["step"] == done and row.get("test") == digest for row in finished.rows):
            return
        load_strictly(self.model, read_safetensors(self._run.checkpoint(done).path / runs.MODEL), str(self._run.path))
        row = {"step": done, **self._measure(World())}
        metrics.append(self._run.metrics_file, row)
        finished.rows.append(row)

    def _measure(self, world: World) -> dict[str, Any]:
        """Return accuracy and mean cross-entropy on the test set, each rank of `world` doing its part."""
        labelled, labels = self.test
        distributed.share_buffers(self.model, world)
        mine = np.arange(len(labels))[world.rank :: world.size]
        right = loss = seen = known_seen = 0.0
        device = next(self.model.parameters()).device
        self.objective.eval()
        try:
            for images, wanted in self._test_batches(labelled, labels, mine):
                with torch.no_grad(), self.forward():
                    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
                    logits = self.model(self._normalizer(pixels)).cpu()
                known = torch.from_numpy(wanted)
                right += float((logits.argmax(dim=1) == known).sum())
                loss += float(functional.cross_entropy(logits, known, ignore_index=-1, reduction="sum"))
                seen, known_seen = seen + len(known), known_seen + float((known >= 0).sum())
        finally:
            self.objective.train()
        right, loss, seen, known_seen = world.sum([right, loss, seen, known_seen])
        if not known_seen:
            raise MaekitError("--test: none of the test images can be read, or none is of a known class")
        found = {"accuracy": right / seen, "test_loss": loss / known_seen, "test_images": int(seen)}
        return {**found, "test": self.test_digest}

    @property
    def test_digest(self) -> str:
        """What names the test set: its samples and their labels."""
        labelled, labels = self.test
        digest = hashlib.sha256(labelled.shards.digest.encode() + labelled.numbers.tobytes() + labels.tobytes())
        return digest.hexdigest()[:16]

    def _test_batches(self, labelled: LabelledSet, labels: NDArray[np.int64], mine: NDArray[np.int64]) -> Any:
        starts = range(0, len(mine), _TEST_BATCH)

        def read(start: int) -> tuple[list[Pixels], NDArray[np.int64]]:
            reader = labelled.shards.reader()
            images, wanted = [], []
            try:
                for place in mine[start : start + _TEST_BATCH].tolist():
                    shard, ordinal = labelled.shards.locate(int(labelled.numbers[place]))
                    try:
                        data = reader.read_image(labelled.shards.index(shard), ordinal)
                        images.append(self._prepare(data))
                    except ImageError:
                        continue
                    wanted.append(labels[place])
            finally:
                reader.close()
            return images, np.array(wanted, np.int64)

        for images, wanted in map_in_threads(read, starts, threads=self._world.cores):
            if images:
                yield np.stack(images), wanted

    def draw(self) -> Pixels | None:
        return None

    @property
    def otherwise(self) -> str:
        return f"({self._run.config_file} has all of them), or choose another --out"

    def difference(self, key: str, before: Any, now: Any) -> str | None:
        if key != "model.sha256":
            return None
        return (
            f"{self.config.model.source} holds other weights than {self._run.path} was started from; go on with those, "
            "or start another --out"
        )

    def read_config(self, run: RunDirectory) -> FinetuneConfig:
        return load_settings(FinetuneConfig(), run.config_file)

    def is_finished(self) -> bool:
        return self._run.encoder_file.exists() and self._run.head_file.exists()

    def begin(self) -> None:
        start = {
            "source": self.config.model.source,
            "name": self._trained.name,
            "arguments": self._trained.arguments,
            "preprocess": self._prepare.to_json(),
            "provenance": self._trained.provenance,
            "norm_eps": norm_eps(self._trained.encoder),
        }
        files.write_atomically(self._run.start_file, json.dumps(start, indent=1).encode())

    def finish(self, steps: int) -> None:
        description = {
            "model": self._trained.name,
            "timm_arguments": self._trained.arguments,
            "preprocess": self._prepare.to_json(),
            "step": steps,
            "data_digest": self.shards.digest,
        }
        head = {f"head.{name}": tensor.cpu().contiguous() for name, tensor in self.model.head.state_dict().items()}
        head |= {f"norm.{name}": tensor.cpu() for name, tensor in self.model.norm.state_dict().items()}
        about = {"maekit": json.dumps({"classes": self.classes, "pool": self.config.model.pool})}
        files.write_atomically(self._run.head_file, safetensors.torch.save(head, metadata=about))
        files.write_atomically(self._run.encoder_file, encoder_bytes(self.model.encoder, description))


def _result(config: FinetuneConfig, finished: Finished, task: _Supervised, trained: TrainedEncoder) -> FinetuneResult:
    tested = [row for row in finished.rows if row.get("test") == task.test_digest and row["step"] == finished.steps]
    last: dict[str, Any] = tested[-1] if tested else {}
    tally = finished.tally
    result = FinetuneResult(
        out=config.out,
        steps=finished.steps,
        samples=finished.steps * config.batch_size,
        loss=next((row["loss"] for row in reversed(finished.rows) if "loss" in row), None),
        accuracy=last.get("accuracy"),
        test_loss=last.get("test_loss"),
        test_images=last.get("test_images", 0),
        trained=sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        images_per_second=finished.images_per_second(config.batch_size),
        data_wait=round(tally.wait / tally.seconds, 4) if tally.seconds else 0.0,
        bad=tally.bad,
        resumed_from=finished.resumed_from,
        already_finished=finished.already_finished,
    )
    return dataclasses.replace(result, path=_keep(config, result, task, trained))


def _keep(config: FinetuneConfig, result: FinetuneResult, task: _Supervised, trained: TrainedEncoder) -> str | None:
    """Note the figures in the run that the encoder is from."""
    if trained.provenance.get("source") != "run" or config.model.from_scratch:
        return None
    step = int(trained.provenance["step"])
    blocks = "all" if config.model.blocks is None else f"{config.model.blocks:g}"
    row = {"name": Path(config.out).name, "blocks": blocks, "steps": result.steps, "accuracy": result.accuracy}
    said = {
        "task": task.name,
        "model": config.model.source,
        "step": step,
        "train": {"shards": len(task.shards.shards), "images": int((task.labels >= 0).sum())},
        "test": {"images": result.test_images},
        "rows": [row],
    }
    # Two directories of one name are two trainings.
    place = hashlib.sha256(str(Path(config.out).resolve()).encode()).hexdigest()[:6]
    try:
        run, _ = runs.find_checkpoint(Path(config.model.source))
        path = run.evaluation(f"{task.name}-{Path(config.out).name}-{place}", step)
        path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, json.dumps(said, indent=1).encode())
    except (OSError, MaekitError):
        return None
    return str(path)
