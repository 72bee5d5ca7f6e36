"""One training step: from the uint8 images of a batch to new weights. Nothing in here waits for the device."""

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.normalize import Normalizer
from maekit.system.errors import InputError
from maekit.training.crops import Chunk
from maekit.training.data import Upload
from maekit.training.distributed import DistributedContext
from maekit.training.optim import Schedule

# What the forward pass keeps for the backward pass, on a CPU: above that more images at a time are no faster.
_CPU_ACTIVATIONS = 2 << 30
_LARGEST_MICRO_BATCH = 1024
# Of a device's memory: the rest is for fragments, and for what the compiler and NCCL take.
_SHARE_OF_DEVICE = 0.8
# What is alive only for a while, of which the count of saved tensors knows nothing, by experience.
_TEMPORARIES = 1.3


class Objective(nn.Module, abc.ABC):
    """What is minimised: one module from what is uploaded to the loss, to be compiled and averaged as a whole."""

    model: nn.Module

    @abc.abstractmethod
    def example(self, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Return arguments of `forward` for `count` images of (height, width) pixels."""


class MaskedObjective(Objective):
    """The loss of a masked autoencoder, from uint8 images on.

    Args:
        model: the autoencoder.
        normalizer: of its input.
        masks: how many of each image.
    """

    model: MaskedAutoencoder

    def __init__(self, model: MaskedAutoencoder, normalizer: Normalizer, masks: int = 1) -> None:
        super().__init__()
        self.model, self.normalizer, self._masks = model, normalizer, masks

    def forward(
        self, images: torch.Tensor, flips: torch.Tensor, noise: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss, a scalar.

        Args:
            images: uint8 `[B, 3, H, W]`.
            flips: bool `[B]`, True = mirror.
            noise: float32 `[B, k·N]`, chooses k masks of each image.
            tokens: of the mirrored images, int64 `[B, N]`, where those are the target.
        """
        mirrored = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        return self.model(self.normalizer(mirrored), noise.view(-1, self.model.patches), tokens).loss

    def example(self, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Return arguments of `forward` for `count` images of (height, width) pixels."""
        device = next(self.parameters()).device
        images = torch.zeros(count, 3, *size, dtype=torch.uint8, device=device)
        flips = torch.zeros(count, dtype=torch.bool, device=device)
        noise = torch.rand(count, self._masks * self.model.patches, device=device)
        return images, flips, noise, torch.zeros(count, self.model.patches, dtype=torch.int64, device=device)


class Step:
    """The step, bare.

    A gradient that is not finite changes nothing: AdamW's fused kernel is told on the device and leaves weights and
    moments as they are. Whether that happened is seen when losses and norms are fetched, some steps later.

    Args:
        objective: in training mode, on its device.
        optimizer: fused AdamW over its parameters.
        schedule: its learning rate.
        forward: a fresh context for the forward pass, as `choose_kernels` gives it.
        upload: chunks -> micro-batch on the device.
        world: the processes whose gradients are averaged.
        clip: largest norm of the gradient; longer ones are scaled down to it.
        compile: compile the objective.
        begin: called with the steps done before each step.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        forward: Callable[[], AbstractContextManager[Any]],
        upload: Upload,
        world: DistributedContext,
        clip: float | None = None,
        compile: bool = False,
        begin: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._begin = begin
        self._optimizer, self._schedule, self._forward, self._upload = optimizer, schedule, forward, upload
        self._clip = clip
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self._wrapped: nn.Module = objective
        if world.size > 1:
            on_cuda = self._parameters[0].is_cuda
            # The main process's weights go to all others here.
            self._wrapped = DistributedDataParallel(
                objective,
                device_ids=[world.local_rank] if on_cuda else None,
                gradient_as_bucket_view=True,
            )
        # Around DistributedDataParallel and not within: the compiler then cuts the graph where gradients are sent.
        # All micro-batches have one shape, so nothing is compiled twice.
        self._loss: Callable[..., torch.Tensor] = (
            torch.compile(self._wrapped, dynamic=False) if compile else self._wrapped
        )

    def __call__(self, micro_batches: Sequence[list[Chunk]], done: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the step that follows `done` steps.

        Args:
            micro_batches: the chunks of each.
            done: steps done so far, which decides the learning rate.

        Returns:
            this rank's loss and the norm of the averaged gradient before clipping, two scalars on the device.
        """
        self._begin(done)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.at(done) * group.get("lr_scale", 1.0)
        # ---- one training step; nothing in here waits for the device --------------------------------------------
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, chunks in enumerate(micro_batches, 1):
            micro_batch = self._upload(chunks)
            # Gradients are sent once, with the last micro-batch.
            with nullcontext() if number == len(micro_batches) else self._summed():
                with self._forward():
                    loss = self._loss(*micro_batch) / len(micro_batches)
                loss.backward()
            losses.append(loss.detach())
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        # As torch.amp.GradScaler tells the fused kernel of an overflow.
        self._optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        # ----------------------------------------------------------------------------------------------------------
        return torch.stack(losses).sum(), norm

    def _summed(self) -> AbstractContextManager[Any]:
        return self._wrapped.no_sync() if isinstance(self._wrapped, DistributedDataParallel) else nullcontext()


def choose_micro_batch(
    objective: Objective,
    share: int,
    image_shape: tuple[int, int],
    forward: Callable[[], AbstractContextManager[Any]],
    moments: int = 0,
    fits: Callable[[int], bool] = lambda count: True,
) -> int:
    """Return how many images go through the model at a time: the largest part of a rank's share that memory allows.

    What the forward pass keeps for the backward pass is counted over two images and over four: the difference is what
    images cost, the rest (under autocast, copies of all weights) comes once.

    Args:
        objective: on its device.
        share: images of a step that this rank takes.
        image_shape: (height, width) in pixels.
        forward: a fresh context for the forward pass.
        moments: bytes that the optimiser's state takes on the device already.
        fits: whether so many images may go through the model at a time, whatever the memory.
    """
    device = next(objective.parameters()).device
    mode = objective.training
    objective.eval()  # a BatchNorm would take these images into its running statistics
    two, four = (_saved_bytes(objective, count, image_shape, forward) for count in (2, 4))
    objective.train(mode)
    per_image, once = (four - two) / 2 * _TEMPORARIES, max(0, 2 * two - four)
    if device.type == "cuda":
        # What is resumed has AdamW's moments on the device already: counted as if it were not, so that a run that is
        # resumed divides its steps as it did.
        free = torch.cuda.mem_get_info(device)[0] + moments
        # Gradients and both moments.
        later = 3 * sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
        room = free * _SHARE_OF_DEVICE - later - once
    else:
        room = _CPU_ACTIVATIONS
    largest = max(1, min(_LARGEST_MICRO_BATCH, int(room / per_image)))
    parts = [part for part in range(1, share + 1) if share % part == 0 and fits(part)]
    return max((part for part in parts if part <= largest), default=parts[0])


def _saved_bytes(
    objective: Objective,
    images_at_once: int,
    image_shape: tuple[int, int],
    forward: Callable[[], AbstractContextManager[Any]],
) -> int:
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    example = objective.example(images_at_once, image_shape)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), forward():
        objective(*example)
    return sum(storages.values())


def check_micro_batch(micro_batch: int, share: int) -> None:
    """Refuse a micro-batch that does not divide a rank's share of the batch.

    Raises:
        InputError: names the nearest that does.
    """
    if share % micro_batch:
        fitting = [part for part in range(1, share + 1) if share % part == 0]
        nearest = min(fitting, key=lambda part: abs(part - micro_batch))
        raise InputError(
            f"`micro_batch` {micro_batch} does not divide the {share} images of a step that each process takes; "
            f"{nearest} does"
        )
