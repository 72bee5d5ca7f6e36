"""AdamW and its learning-rate schedule, as published (He et al. 2021, appendix A.1, table 8)."""

import math
from dataclasses import dataclass

import torch

from maekit.config import OptimizerConfig

BASE_BATCH = 256


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step.

    Attributes:
        peak: the learning rate at the end of the warm-up.
        floor: the final learning rate of the cosine.
        warmup_steps: steps of linear warm-up from 0.
        steps: total number of steps.
    """

    peak: float
    floor: float
    warmup_steps: int
    steps: int

    def at(self, done: int) -> float:
        """Return the learning rate of the step that follows `done` steps: linear, then half a cosine."""
        if done < self.warmup_steps:
            return self.peak * done / self.warmup_steps
        progress = (done - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_schedule(config: OptimizerConfig, *, batch_size: int, samples: int, steps: int) -> Schedule:
    """Convert a base rate per 256 images and a warm-up in epochs into a schedule over steps.

    The warm-up takes at most a tenth of the run; otherwise a short run would end inside it.
    """
    warmup = min(math.ceil(config.warmup_epochs * samples / batch_size), steps // 10)
    return Schedule(config.lr * batch_size / BASE_BATCH, config.min_lr, warmup, steps)


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, with weight decay on those of two or more dimensions."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
