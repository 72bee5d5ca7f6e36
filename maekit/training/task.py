"""What the engine trains: a `Task` defines the objective, the images, and the files that the run produces."""

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from maekit.images import Pixels
from maekit.training.crops import CropLoader
from maekit.training.data import Upload
from maekit.training.step import Objective


class Task(abc.ABC):
    """The parts of a training that differ between kinds of training.

    Attributes:
        name: name of the work, for progress updates.
        objective: the training objective; its `model` is saved in checkpoints, buffers (such as a queue) included.
        optimizer: optimiser over the objective's parameters.
        forward: returns a fresh context for the forward pass.
        crops: from positions in the order to chunks of images, in the workers.
        upload: from chunks on the host to the arguments of the objective.
    """

    name: str
    objective: Objective
    optimizer: torch.optim.Optimizer
    forward: Callable[[], AbstractContextManager[Any]]
    crops: CropLoader
    upload: Upload

    @abc.abstractmethod
    def finish(self, steps: int) -> None:
        """Write the final files of the run; called on the main process."""

    @abc.abstractmethod
    def mismatch_message(self, key: str, before: Any, now: Any) -> str:
        """Return the message for a setting that differs from the one the run was started with, with a remedy."""

    def fits(self, count: int) -> bool:
        """Whether a micro-batch of `count` images is allowed, whatever the memory."""
        return True

    def begin(self) -> None:
        """Write what a run records at its start besides its config, by default nothing; called on the main process."""
        return None

    def begin_step(self, done: int) -> None:
        """Prepare the step that follows `done` steps, by default a no-op; called on every rank."""
        return None

    def open_validation(self, micro_batch: int) -> Callable[[int], dict[str, Any]] | None:
        """Return a function that validates on held-out images after N steps, called on all ranks; None for none.

        Args:
            micro_batch: images that fit into memory in training.
        """
        return None

    def draw(self) -> Pixels | None:
        """Return a picture of the model's output, or None; called on the main process."""
        return None


def changed_setting(run: object, key: str, before: Any, now: Any, remedy: str) -> str:
    """Return the usual message for a changed setting; `remedy` follows "go on with the old value"."""
    before, now = ("not set" if value is None else value for value in (before, now))
    return f"{run} was started with {key} = {before}, and now it is {now}; go on with the old value {remedy}"
