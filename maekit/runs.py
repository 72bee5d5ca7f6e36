"""The run directory: its file names, its checkpoints, and which checkpoints are valid. Needs no torch.

RUN/config.toml                     the resolved config, written before anything else
RUN/metrics.jsonl                   one row per logging step
RUN/checkpoints/step-000001000/     model.safetensors optimizer.safetensors state.json, and manifest.json, written last
RUN/pictures/step-000001000.png     reconstructions
RUN/encoder.safetensors             the final encoder under timm's parameter names
RUN/evaluations/knn-3f2a9c-step-000001000.json   what `maekit evaluate` found
"""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maekit.config import PretrainConfig, load_config
from maekit.config.finetune import FinetuneConfig
from maekit.config.settings import load_settings
from maekit.system import files
from maekit.system.errors import InputError, MaekitError

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
CONFIG, FINETUNE_CONFIG = "config.toml", "finetune.toml"
_STEP = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint directory.

    Attributes:
        path: the directory.
        step: optimiser steps done.
    """

    path: Path
    step: int

    def problem(self) -> str | None:
        """Return what is wrong with this checkpoint, or None if every file matches its recorded digest.

        Raises:
            MaekitError: a file exists but cannot be read.
        """
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
            for name in (MODEL, OPTIMIZER, STATE):
                if files.sha256_file(self.path / name) != manifest[name]:
                    return f"{name} does not match its digest"
        except FileNotFoundError as error:
            return f"{Path(str(error.filename)).name} is missing"
        except OSError as error:
            # A file that cannot be read now may be sound, so the checkpoint must not count as damaged (and be deleted).
            raise MaekitError(f"cannot read {error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST} is damaged"
        return None

    def state(self) -> dict[str, Any]:
        """Return what `state.json` holds: step, data digest, maekit's version."""
        state: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        return state

    def digest(self) -> str:
        """Return the SHA-256 of the model file, from the manifest; it identifies the weights."""
        return str(json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))["sha256"][MODEL])


class RunDirectory:
    """The paths of one run.

    Attributes:
        path: the run directory.
        config_file: the resolved config.
        metrics_file: one JSON row per logging step.
        checkpoints: the folder of checkpoints.
        encoder_file: the final encoder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / CONFIG
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.encoder_file = path / "encoder.safetensors"

    @property
    def is_finished(self) -> bool:
        """Whether the final files have been written."""
        return self.encoder_file.exists()

    def evaluation(self, task: str, step: int) -> Path:
        """Return the path of the results of `maekit evaluate` for a task and step."""
        return self.path / "evaluations" / f"{task}-step-{step:09d}.json"

    def picture(self, step: int) -> Path:
        """Return the path of the reconstructions of a step."""
        return self.path / "pictures" / f"step-{step:09d}.png"

    def checkpoint(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step, whether or not it exists."""
        return Checkpoint(self.checkpoints / f"step-{step:09d}", step)

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints, valid or not, newest first."""
        steps = [int(m[1]) for p in self.checkpoints.glob("*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
        return [self.checkpoint(step) for step in sorted(steps, reverse=True)]

    def newest_valid(self, on_damage: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """Return the newest checkpoint whose files match their digests; report each damaged one to `on_damage`."""
        for checkpoint in self.list_checkpoints():
            if (problem := checkpoint.problem()) is None:
                return checkpoint
            on_damage(f"{checkpoint.path} is damaged ({problem}); looking for the one before it")
        return None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`."""
        return read_metrics(self.metrics_file)

    def config(self) -> PretrainConfig:
        """Return the run's resolved config.

        Raises:
            InputError: the file is missing or damaged.
        """
        return load_config(self.config_file)


class FinetuneDirectory(RunDirectory):
    """A directory of supervised training: like a run directory, but with fine-tuning settings.

    Attributes:
        start_file: description of the encoder before the training: source, name, arguments, preprocessing; no weights.
        head_file: the final classifier.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.config_file = path / FINETUNE_CONFIG
        self.start_file = path / "start.json"
        self.head_file = path / "head.safetensors"

    def config(self) -> FinetuneConfig:  # type: ignore[override]
        """Return the settings that the training was started with.

        Raises:
            InputError: the file is missing or damaged.
        """
        return load_settings(FinetuneConfig(), self.config_file)

    @property
    def is_finished(self) -> bool:
        """Whether the final files have been written."""
        return super().is_finished and self.head_file.exists()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file up to the first damaged line."""
    rows = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory."""
    return (path / CONFIG).is_file()


def is_finetuned(path: Path) -> bool:
    """Whether `path` is a directory of supervised training."""
    return (path / FINETUNE_CONFIG).is_file()


def find_checkpoint(
    path: Path, on_damage: Callable[[str], None] = lambda text: None
) -> tuple[RunDirectory, Checkpoint]:
    """Return the run and the checkpoint that a path names: a run (its newest valid one), or one checkpoint directory.

    Raises:
        InputError: the path is neither, or the run has no valid checkpoint, or the checkpoint is damaged.
    """
    if is_run(path):
        run = RunDirectory(path)
        if newest := run.newest_valid(on_damage):
            return run, newest
        raise InputError(f"{path} is a run without a valid checkpoint; run `maekit pretrain` on it first")
    if (match := _STEP.fullmatch(path.name)) and path.is_dir() and is_run(path.parent.parent):
        checkpoint = Checkpoint(path, int(match[1]))
        if problem := checkpoint.problem():
            raise InputError(f"{path} is damaged: {problem}")
        return RunDirectory(path.parent.parent), checkpoint
    what = "is neither a run nor a checkpoint of one" if path.exists() else "does not exist"
    raise InputError(f"{path} {what}; a run is the `out` of `maekit pretrain`")
