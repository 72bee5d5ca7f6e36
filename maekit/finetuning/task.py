"""Training of a classifier: labels, augmentation, mixing and testing; see `maekit.training.task.Task`."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch.nn import functional

from maekit import runs
from maekit.config.finetune import FinetuneConfig
from maekit.evaluation.labelled import LabelledSet
from maekit.finetuning.classifier import Classifier, ClassifierObjective, LabelledUpload, make_optimizer
from maekit.finetuning.rand_augment import RandAugment
from maekit.mae.autoencoder import initialize_encoder
from maekit.mae.kernels import choose_kernels
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.mae.pooling import check_pooling
from maekit.pretrained.files import encoder_bytes, load_strictly, read_safetensors
from maekit.pretrained.load import TrainedEncoder, norm_eps, set_norm_eps
from maekit.pretrained.sources import create_timm
from maekit.runs import FinetuneDirectory
from maekit.system import files
from maekit.system.draws import Purpose, random_bits
from maekit.system.errors import ImageError, InputError, MaekitError
from maekit.system.parallel import batched
from maekit.training import metrics
from maekit.training.crops import Augmentation, CropLoader
from maekit.training.distributed import DistributedContext
from maekit.training.engine import Finished
from maekit.training.launch import Launch
from maekit.training.task import Task, changed_setting

_TEST_BATCH = 64


@dataclass(frozen=True)
class Labelled:
    """Labels of the training set, and the labelled test set.

    Attributes:
        labels: labels of the training samples, int64 `[samples]`, -1 where there is none.
        classes: names of the labels.
        test: the test set.
        test_labels: int64 `[n]`, -1 for classes absent from the training set.
    """

    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    test: LabelledSet
    test_labels: NDArray[np.int64]


class Supervised(Task):
    """Supervised training of a classifier.

    Args:
        launch: the run.
        run: its directory.
        trained: the encoder to start from.
        data: labels of the training set, and the test set.

    Raises:
        InputError: the batch, pooling, number of blocks or policy is impossible.
    """

    config: FinetuneConfig

    def __init__(
        self, launch: Launch[FinetuneConfig], run: FinetuneDirectory, trained: TrainedEncoder, data: Labelled
    ) -> None:
        config, model, device, prepare = launch.config, launch.config.model, launch.device, trained.preprocess
        self.config, self.data, self.trained, self.shards = config, data, trained, launch.shards
        self._run, self._world, self._prepare = run, launch.world, prepare
        self._mixes = bool(config.mix.mixup or config.mix.cutmix)
        self.name = "probe" if model.batch_norm and model.blocks == 0 else "finetune"
        name = config.mix.rand_augment
        policy = None if name == "none" else RandAugment(name, prepare.size, prepare.mean)
        # Nothing is masked; the smallest mask keeps the cost of the unused noise negligible.
        nothing, augmentation = MaskShape("random", (1, 2), 0.5), Augmentation.of(config, prepare, policy)
        self.crops = CropLoader(launch.shards, launch.order, augmentation, nothing, labels=data.labels)
        count = config.run.micro_batch or config.batch_size // launch.world.size
        if not self.fits(count):
            why = "mixup and cutmix mix pairs of images" if self._mixes else "a BatchNorm needs two images at least"
            raise InputError(f"{why}: a batch of {config.batch_size} gives each process {count} at a time")
        check_pooling(trained.encoder, model.pool)
        self.model = Classifier(self._encoder(), len(data.classes), model, seed=config.seed).to(device)
        self.objective = ClassifierObjective(self.model)
        self.forward = choose_kernels(self.model, device, launch.precision)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        channels = trained.encoder.patch_embed.proj.weight.shape[1]
        self._normalizer = Normalizer(prepare.mean, prepare.std, device, channels=channels)
        self.upload = LabelledUpload(self._normalizer, device, len(data.classes), config.mix)

    def _encoder(self) -> Any:
        """Return the encoder to start from, with stochastic depth."""
        arguments = {**self.trained.arguments, "drop_path_rate": self.config.model.drop_path}
        encoder = create_timm(self.trained.name, arguments)
        encoder.load_state_dict(self.trained.encoder.state_dict())
        set_norm_eps(encoder, norm_eps(self.trained.encoder))
        if self.config.model.from_scratch:
            initialize_encoder(encoder, seed=self.config.seed)
        return encoder

    def fits(self, count: int) -> bool:
        """Whether a micro-batch of `count` images is allowed: mixing needs pairs, a BatchNorm at least two images."""
        return count % 2 == 0 if self._mixes else count > 1 or not self.config.model.batch_norm

    def begin_step(self, done: int) -> None:
        """Seed the global generators, which stochastic depth, erasing and mixing draw from."""
        words = random_bits(3, Purpose.STEP, seed=self.config.seed, epoch=done, position=self._world.rank).tolist()
        torch.manual_seed(words[0])
        np.random.seed(words[1] & 0xFFFFFFFF)
        random.seed(words[2])

    def open_validation(self, micro_batch: int) -> Callable[[int], dict[str, Any]]:
        """Return a function that measures the model on the test set, called on all ranks."""
        return lambda done: self._measure(self._world)

    def tested(self, finished: Finished) -> dict[str, Any]:
        """Return the row of metrics with the test of the final weights.

        They are tested now unless they were on this test set: after a kill, or with another test set, there is no row.
        """
        done, digest = finished.steps, self._test_digest()
        for row in reversed(finished.rows):
            if row["step"] == done and row.get("test") == digest:
                return row
        load_strictly(self.model, read_safetensors(self._run.checkpoint(done).path / runs.MODEL), str(self._run.path))
        row = {"step": done, **self._measure(DistributedContext())}
        metrics.append(self._run.metrics_file, row)
        return row

    def _measure(self, world: DistributedContext) -> dict[str, Any]:
        """Return accuracy and mean cross-entropy on the test set; the ranks of `world` divide the images."""
        world.broadcast(self.model.buffers())
        totals = np.zeros(4)
        device = next(self.model.parameters()).device
        self.objective.eval()
        try:
            for images, labels in self._test_batches(slice(world.rank, None, world.size)):
                with torch.no_grad(), self.forward():
                    logits = self.model(self._normalizer(images.permute(0, 3, 1, 2).to(device))).cpu()
                right = float((logits.argmax(dim=1) == labels).sum())
                loss = float(functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum"))
                totals += right, loss, len(labels), float((labels >= 0).sum())
        finally:
            self.objective.train()
        right, loss, seen, known = world.sum(totals.tolist())
        if not known:
            raise MaekitError("`test`: none of the test images can be read, or none is of a known class")
        found = {"accuracy": right / seen, "test_loss": loss / known, "test_images": int(seen)}
        return {**found, "test": self._test_digest()}

    def _test_batches(self, mine: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images, uint8 `[B, H, W, 3]`, and labels, int64 `[B]`, of the readable ones of some test images."""
        test, labels = self.data.test, self.data.test_labels[mine].tolist()
        images = test.shards.images(test.numbers[mine].tolist(), self._prepare, threads=self._world.cores)
        pairs = zip(images, labels, strict=True)
        for batch in batched((pair for pair in pairs if not isinstance(pair[0], ImageError)), _TEST_BATCH):
            readable, known = zip(*batch, strict=True)
            yield torch.from_numpy(np.stack(readable)), torch.tensor(known)

    def _test_digest(self) -> str:
        """Return a digest of the test set: its samples and their labels."""
        test, labels = self.data.test, self.data.test_labels
        return hashlib.sha256(test.shards.digest.encode() + test.numbers.tobytes() + labels.tobytes()).hexdigest()[:16]

    def mismatch_message(self, key: str, before: Any, now: Any) -> str:
        """Return the message for a setting, or weights, that differ from those the run was started with."""
        if key == "model.sha256":
            return (
                f"{self.config.model.source} holds other weights than {self._run.path} was started from; go on with "
                "those, or start another `out`"
            )
        remedy = f"({self._run.config_file} has all of them), or choose another `out`"
        return changed_setting(self._run.path, key, before, now, remedy)

    def begin(self) -> None:
        """Record the encoder's architecture, so that the run can resume without the source of the encoder."""
        start = {
            "source": self.config.model.source,
            "name": self.trained.name,
            "arguments": self.trained.arguments,
            "preprocess": self._prepare.to_json(),
            "provenance": self.trained.provenance,
            "norm_eps": norm_eps(self.trained.encoder),
        }
        files.write_atomically(self._run.start_file, json.dumps(start, indent=1).encode())

    def finish(self, steps: int) -> None:
        """Write the encoder and the head."""
        description = {
            "model": self.trained.name,
            "timm_arguments": self.trained.arguments,
            "preprocess": self._prepare.to_json(),
            "step": steps,
            "data_digest": self.shards.digest,
        }
        head = {f"head.{name}": tensor.cpu().contiguous() for name, tensor in self.model.head.state_dict().items()}
        head |= {f"norm.{name}": tensor.cpu() for name, tensor in self.model.norm.state_dict().items()}
        about = {"maekit": json.dumps({"classes": self.data.classes, "pool": self.config.model.pool})}
        files.write_atomically(self._run.head_file, safetensors.torch.save(head, metadata=about))
        files.write_atomically(self._run.encoder_file, encoder_bytes(self.model.encoder, description))
