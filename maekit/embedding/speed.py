"""Throughput of a run and of each stage alone, and the bottleneck."""

from typing import NamedTuple

from maekit.embedding.devices import Devices
from maekit.providers import runs_on_cpu


class Speed(NamedTuple):
    """Throughput of a run, and its bottleneck; numbers are rounded for people.

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
    def of(cls, devices: Devices, seconds: float) -> "Speed":
        """Return the speed of what the devices have done in `seconds`."""
        timing, running = devices.timing, devices.running
        decode = timing.samples * min(devices.workers, devices.cores) / timing.decoding if timing.decoding else 0.0
        model = timing.images * running.concurrency / timing.running if timing.running else 0.0
        write = timing.rows * devices.count / timing.writing if timing.writing else 0.0
        whole = timing.images / seconds if seconds else 0.0
        rates = {"decode": decode, "model": model, "write": write}
        share, binds = 0.0, ""
        if decode and model:
            share = whole / (1 / (1 / decode + 1 / model) if runs_on_cpu(running.provider) else min(decode, model))
            names = {"decode": "decoding", "model": "the model", "write": "writing"}
            binds = names[min((stage for stage in rates if rates[stage]), key=rates.__getitem__)]
        return cls(round(whole, 2), {stage: round(rate, 2) for stage, rate in rates.items()}, round(share, 4), binds)
