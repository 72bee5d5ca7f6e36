"""At which steps a run logs, saves, validates and draws."""

from dataclasses import dataclass

from maekit.config import RunConfig


@dataclass(frozen=True)
class Intervals:
    """Which steps log, save, validate or draw; 0 means never.

    Attributes:
        log: steps between rows of metrics.
        checkpoint: steps between checkpoints.
        keep: checkpoints at multiples of this step are never deleted.
        pictures: steps between pictures.
        validate: steps between validations.
        last: the last step, at which everything is due.
    """

    log: int
    checkpoint: int
    keep: int
    pictures: int
    validate: int
    last: int

    def logs(self, done: int) -> bool:
        """Whether a row of metrics ends here."""
        return done % self.log == 0

    def saves(self, done: int) -> bool:
        """Whether a checkpoint of this step is due, whatever the time."""
        return done == self.last or done % self.checkpoint == 0 or self.keeps(done)

    def keeps(self, done: int) -> bool:
        """Whether the checkpoint of this step is never deleted."""
        return bool(self.keep) and done % self.keep == 0

    def validates(self, done: int) -> bool:
        """Whether the model is validated on held-out images here."""
        return bool(self.validate) and (done == self.last or done % self.validate == 0)

    def draws(self, done: int) -> bool:
        """Whether a picture is drawn here."""
        return bool(self.pictures) and (done == self.last or done % self.pictures == 0)

    @classmethod
    def of(cls, run: RunConfig, steps: int) -> "Intervals":
        """Return the intervals of a run of `steps` steps; what the config leaves open follows from its length."""
        every = run.checkpoint_every or min(1000, -(-steps // 10))
        return cls(
            log=run.log_every or min(50, -(-steps // 100)),
            checkpoint=every,
            keep=run.keep_every or 0,
            pictures=every if run.pictures_every is None else run.pictures_every,
            validate=run.val_every or every,
            last=steps,
        )
