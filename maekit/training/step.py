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

# Bytes of activations on a CPU: above that, larger micro-batches are no faster.
_CPU_ACTIVATIONS = 2 << 30
_LARGEST_MICRO_BATCH = 1024
# Fraction of a device's memory to use; the rest is for fragmentation, the compiler and NCCL.
_SHARE_OF_DEVICE = 0.8
# Allowance for temporary tensors, which the count of saved tensors does not include; found by experience.
_TEMPORARIES = 1.3


class Objective(nn.Module, abc.ABC):
    """The training objective: one module from the uploaded tensors to the loss, compiled and averaged as a whole."""

    model: nn.Module

    @abc.abstractmethod
    def example(self, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Return arguments of `forward` for `count` images of (height, width) pixels."""


class MaskedObjective(Objective):
    """The loss of a masked autoencoder, computed from uint8 images.

    Args:
        model: the autoencoder.
        normalizer: normalises the model's input.
        masks: k, masks per image.
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
            noise: float32 `[B, k·N]`, selects k masks for each image.
            tokens: tokens of the mirrored images, int64 `[B, N]`, where tokens are the target.
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
    """The bare training step.

    A non-finite gradient changes nothing: a flag on the device makes AdamW's fused kernel leave weights and moments
    unchanged. The host learns of it some steps later, when it fetches losses and norms.

    Args:
        objective: in training mode, on its device.
        optimizer: fused AdamW over the objective's parameters.
        schedule: the learning-rate schedule.
        forward: returns a fresh context for the forward pass, as from `choose_kernels`.
        upload: chunks -> micro-batch on the device.
        world: the processes whose gradients are averaged.
        clip: maximum gradient norm; longer gradients are scaled down to it.
        compile: whether to compile the objective.
        begin: called before each step with the number of steps done.
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
        self.schedule = schedule
        self._optimizer, self._forward, self._upload = optimizer, forward, upload
        self._clip, self._begin = clip, begin
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self._wrapped: nn.Module = objective
        if world.size > 1:
            on_cuda = self._parameters[0].is_cuda
            # This also broadcasts the weights of rank 0.
            self._wrapped = DistributedDataParallel(
                objective,
                device_ids=[self._parameters[0].device] if on_cuda else None,
                gradient_as_bucket_view=True,
            )
        # Compiled outside DistributedDataParallel, not inside: the compiler then splits the graph where gradients are
        # reduced. All micro-batches have one shape, so nothing is compiled twice.
        self._loss: Callable[..., torch.Tensor] = (
            torch.compile(self._wrapped, dynamic=False) if compile else self._wrapped
        )

    def __call__(self, micro_batches: Sequence[list[Chunk]], done: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the step that follows `done` steps.

        Args:
            micro_batches: the chunks of each micro-batch.
            done: steps done so far; determines the learning rate.

        Returns:
            this rank's loss and the norm of the averaged gradient before clipping, two scalars on the device.
        """
        self._begin(done)
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.at(done) * group.get("lr_scale", 1.0)
        # ---- one training step; nothing in here waits for the device --------------------------------------------
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, chunks in enumerate(micro_batches, 1):
            micro_batch = self._upload(chunks)
            # Gradients are reduced once, with the last micro-batch.
            with nullcontext() if number == len(micro_batches) else self._summed():
                with self._forward():
                    loss = self._loss(*micro_batch) / len(micro_batches)
                loss.backward()
            losses.append(loss.detach())
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        # torch.amp.GradScaler reports an overflow to the fused kernel in the same way.
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
    *,
    moments: int = 0,
    fits: Callable[[int], bool] = lambda count: True,
) -> int:
    """Return the micro-batch: the largest divisor of a rank's share that fits into memory.

    The bytes that the forward pass saves for the backward pass are counted for two images and for four. The difference
    is the cost of two images; the rest (under autocast, copies of all weights) is a fixed cost.

    Args:
        objective: on its device.
        share: images per step on this rank.
        image_shape: (height, width) in pixels.
        forward: returns a fresh context for the forward pass.
        moments: bytes that the optimiser's state already takes on the device.
        fits: whether a micro-batch of N images is allowed, whatever the memory.
    """
    device = next(objective.parameters()).device
    mode = objective.training
    objective.eval()  # or a BatchNorm would add these images to its running statistics
    two, four = (_saved_bytes(objective, count, image_shape, forward) for count in (2, 4))
    objective.train(mode)
    per_image, once = (four - two) / 2 * _TEMPORARIES, max(0, 2 * two - four)
    if device.type == "cuda":
        # A resumed run already has AdamW's moments on the device. They are counted as free memory, so that it chooses
        # the same micro-batch as before.
        free = torch.cuda.mem_get_info(device)[0] + moments
        # Still to be allocated: gradients and both moments.
        later = 3 * sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
        room = free * _SHARE_OF_DEVICE - later - once
    else:
        room = _CPU_ACTIVATIONS
    largest = max(1, min(_LARGEST_MICRO_BATCH, int(room / per_image)))
    fitting = [count for count in _divisors(share) if fits(count)]
    return max((count for count in fitting if count <= largest), default=fitting[0])


def _divisors(share: int) -> list[int]:
    return [count for count in range(1, share + 1) if share % count == 0]


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
        InputError: names the nearest divisor.
    """
    if share % micro_batch:
        nearest = min(_divisors(share), key=lambda count: abs(count - micro_batch))
        raise InputError(
            f"`micro_batch` {micro_batch} does not divide the {share} images of a step that each process takes; "
            f"{nearest} does"
        )
