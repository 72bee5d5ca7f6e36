"""What the engine trains: a `Task` says what is minimised, on which images, and which files come of it."""

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from maekit.config import TrainingConfig
from maekit.images import Pixels
from maekit.training.crops import CropLoader, WorkerProgress
from maekit.training.data import BatchLayout, Upload
from maekit.training.image_cache import DecodedSet
from maekit.training.step import Objective


class Task(abc.ABC):
    """A training, as far as it differs from others.

    Attributes:
        name: of the work, for the progress.
        config: settings of the run.
        objective: what is minimised; its `model` is saved in checkpoints.
        optimizer: over its parameters.
        forward: returns a fresh context for the forward pass.
        upload: from chunks on the host to the arguments of the objective.
        size: (height, width) of the images, in pixels.
    """

    name: str
    config: TrainingConfig
    objective: Objective
    optimizer: torch.optim.Optimizer
    forward: Callable[[], AbstractContextManager[Any]]
    upload: Upload
    size: tuple[int, int]

    @abc.abstractmethod
    def crops(self, watch: WorkerProgress, decoded: DecodedSet | None) -> CropLoader:
        """Return what makes images of positions in the order."""

    @abc.abstractmethod
    def is_finished(self) -> bool:
        """Whether the files that the run is for have been written."""

    @abc.abstractmethod
    def finish(self, steps: int) -> None:
        """Write the files that the run is for; called on the main process."""

    @abc.abstractmethod
    def mismatch_message(self, key: str, before: Any, now: Any) -> str:
        """Return the message for a setting that is not what the run was started with, with a remedy."""

    def fits(self, count: int) -> bool:
        """Whether `count` images may go through the model at a time, whatever the memory."""
        return True

    def begin(self) -> None:
        """Write what a run starts with besides its config: nothing; called on the main process."""
        return None

    def begin_step(self, done: int) -> None:
        """Prepare for the step that follows `done` steps: by nothing; called on every rank."""
        return None

    def open_validation(self, division: BatchLayout) -> Callable[[], dict[str, Any]] | None:
        """Return what measures the model on held-out images, on all ranks together; None where nothing does."""
        return None

    def draw(self) -> Pixels | None:
        """Return a picture of what the model does, None where there is none; called on the main process."""
        return None


def changed_setting(run: object, key: str, before: Any, now: Any, remedy: str) -> str:
    """Return the usual message for a setting that changed; `remedy` follows "go on with the old value"."""
    before, now = ("not set" if value is None else value for value in (before, now))
    return f"{run} was started with {key} = {before}, and now it is {now}; go on with the old value {remedy}"
