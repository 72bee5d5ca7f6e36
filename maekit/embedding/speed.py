"""Throughput of a run and of each stage alone, and the bottleneck."""

from dataclasses import dataclass

from maekit.embedding.devices import Devices
from maekit.embedding.pipeline import Timing
from maekit.providers import CPU
from maekit.system.machine import cores


@dataclass(frozen=True)
class Speed:
    """Throughput of a run, and its bottleneck.

    Attributes:
        images_per_second: throughput of the whole run.
        rates: images per second of each stage if it ran alone: `decode`, `model`, `write`.
        limit_share: utilisation: throughput as a fraction of the limit set by decoding and the model.
        binds: the bottleneck, in words; empty while unknown.
    """

    images_per_second: float
    rates: dict[str, float]
    limit_share: float
    binds: str

    @classmethod
    def of(cls, timing: Timing, seconds: float, devices: Devices) -> "Speed":
        """Return the speed of work that took `seconds`."""
        workers, provider = devices.workers, devices.running.provider
        decode = timing.samples * min(workers, cores()) / timing.decoding if timing.decoding else 0.0
        model = timing.images * devices.concurrency / timing.running if timing.running else 0.0
        write = timing.rows * devices.count / timing.writing if timing.writing else 0.0
        whole = timing.images / seconds if seconds else 0.0
        rates = {"decode": decode, "model": model, "write": write}
        known = {stage: rate for stage, rate in rates.items() if rate}
        if not (decode and model):
            return cls(whole, rates, 0.0, "")
        limit = 1 / (1 / decode + 1 / model) if provider == CPU else min(decode, model)
        names = {"decode": "decoding", "model": "the model", "write": "writing"}
        return cls(whole, rates, whole / limit, names[min(known, key=known.__getitem__)])
