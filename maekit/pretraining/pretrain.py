"""`maekit pretrain`: from a config to a run directory, resuming where a previous start stopped.

Order: check the config -> join the other processes -> resolve the model -> index the shards -> build the model -> own
the directory -> find what to resume, or start from weights -> run the engine, which compares with the existing run,
writes the config, loops, and has the encoder written.
"""

import copy
from collections import ChainMap
from dataclasses import dataclass, field
from pathlib import Path

import torch

from maekit import runs
from maekit.config import DEFAULT_EPOCHS, PretrainConfig
from maekit.encoder_file import read_model
from maekit.images import Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder
from maekit.mae.normalize import Normalizer
from maekit.mae.targets import PcaTarget
from maekit.pretrained.load import fill_in, initialize_from, resolve_model
from maekit.pretraining.pca import fit_pca
from maekit.pretraining.task import Pretraining
from maekit.runs import RunDirectory
from maekit.shards.read import ShardSet
from maekit.system.errors import InputError
from maekit.system.progress import Progress, Silent
from maekit.training.engine import Engine
from maekit.training.launch import launched, refuse_foreign_directory


@dataclass(frozen=True)
class PretrainResult:
    """The result of a finished run; `--json` prints it.

    Attributes:
        out: the run directory.
        steps: optimiser steps done.
        samples: images trained on, repeats counted.
        loss: mean loss over the last logged steps; None if there is no row of metrics.
        val_loss: the last loss on held-out images; None without `--val`.
        val_rank: the last effective rank of their embeddings; see `maekit.vectors.rank`.
        val_knn: the last share of them that kNN classifies correctly; None if they have no labels.
        val_knn_whitened: the same, of the whitened embeddings.
        images_per_second: rate of all ranks together since this start of the run.
        data_wait: fraction of this process's time spent waiting for data.
        bad: samples replaced, over the whole run.
        skipped: steps skipped because of a non-finite gradient, over the whole run.
        resumed_from: the step that this process resumed from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
        unused: number of images in the shards that are the image of no sample, by extension.
    """

    out: str
    steps: int
    samples: int
    loss: float | None
    val_loss: float | None
    val_rank: float | None
    val_knn: float | None
    val_knn_whitened: float | None
    images_per_second: float
    data_wait: float
    bad: int
    skipped: int
    resumed_from: int
    already_finished: bool = False
    unused: dict[str, int] = field(default_factory=dict)


def pretrain(config: PretrainConfig, progress: Progress | None = None) -> PretrainResult:
    """Pre-train a masked autoencoder; a second call with the same config resumes, or reports that it is finished.

    With several processes (`torchrun`), each calls this with the same config and all return the same result.

    Raises:
        InputError: bad usage, damaged or missing data, or a directory of another run; found before any step.
        Stopped: any of the processes received SIGTERM or SIGINT, or the time limit is reached; everything is saved.
        OtherRankError: another process of the run failed or was stopped, and raises the error itself.
        MaekitError: failed during training.
    """
    progress = progress or Silent()
    config = copy.deepcopy(config)
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_EPOCHS
    config.validate()
    run = RunDirectory(Path(config.out))
    with launched(config, run, progress, lambda: resolve(config, run)) as launch:
        resolved, world, shards = launch.config, launch.world, launch.shards
        model = world.together(lambda: build_autoencoder(resolved.model, seed=resolved.seed))
        newest = launch.own()
        # Only rank 0 knows whether a checkpoint exists, so it decides; every rank then enters the same collectives.
        world.on_main(lambda: None if newest else start_from(resolved, model, shards, progress))
        finished = Engine(launch, Pretraining(launch, model.to(launch.device))).go(newest)
        held_out = ChainMap(*reversed(finished.rows))  # the last of each figure
        result = PretrainResult(
            out=str(Path(resolved.out)),
            val_loss=held_out.get("val_loss"),
            val_rank=held_out.get("val_rank"),
            val_knn=held_out.get("val_knn"),
            val_knn_whitened=held_out.get("val_knn_whitened"),
            skipped=finished.state.skipped,
            unused=shards.unused,
            **finished.summary(resolved.batch_size),
        )
        shared: PretrainResult = world.share(result)
        return shared


def resolve(config: PretrainConfig, run: RunDirectory) -> None:
    """Fill in settings that the config leaves to `init_from`, and refuse a directory that holds something else."""
    if runs.is_run(run.path) and (begun := run.config().model).init_from == config.model.init_from:
        # Reuse what an earlier start resolved; the weights it started from may be gone by now.
        fill_in(config.model, vars(begun))
    else:
        resolve_model(config.model)
    height, width = config.model.size
    if height == width:
        config.model.image_size = height
    config.model.tokenizer_sha256 = tokenizer_digest(Path(config.model.tokenizer)) if config.model.tokenizer else None
    refuse_foreign_directory(run, "run")


def tokenizer_digest(path: Path) -> str:
    """Return a SHA-256 of an ONNX file and its external weight files.

    Raises:
        InputError: the file cannot be read, or it names external files that are not allowed.
    """
    try:
        return read_model(path).digest
    except InputError as error:
        raise InputError(f"`tokenizer`: {error}") from error


def start_from(config: PretrainConfig, model: MaskedAutoencoder, shards: ShardSet, progress: Progress) -> None:
    """Initialise what a new model does not learn: the weights to start from, and the basis of a PCA target."""
    if config.model.init_from:
        progress.note(initialize_from(model, config.model.init_from, config.model, progress.note))
    if isinstance(model.target, PcaTarget) and not model.target.is_fitted:
        data = config.data
        fit_pca(
            model.target,
            shards,
            prepare=Preprocess.for_size(config.model.size, data.mean, data.std),
            normalizer=Normalizer(data.mean, data.std, torch.device("cpu"), channels=config.model.channels),
            patch_size=model.patch_size,
            progress=progress,
        )
