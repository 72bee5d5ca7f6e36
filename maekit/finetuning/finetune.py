"""`maekit evaluate finetune`: supervised training of an encoder with a head, with the engine of pre-training.

It stops and resumes like pre-training, with the same samples, crops, policies, mixtures and dropped paths. The result
is bit-identical on a CPU with the same number of threads.
"""

import copy
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maekit import runs
from maekit.config.finetune import DEFAULT_FINETUNE_EPOCHS, FinetuneConfig
from maekit.evaluation.labelled import encode, open_sets
from maekit.finetuning.task import Labelled, Supervised
from maekit.images import Preprocess
from maekit.pretrained.load import TrainedEncoder, load_encoder, set_norm_eps
from maekit.pretrained.sources import Note, create_timm
from maekit.runs import FinetuneDirectory
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.progress import Progress, Silent
from maekit.training.engine import Engine, Finished
from maekit.training.launch import launched, refuse_foreign_directory


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a finished run; `--json` prints it.

    Attributes:
        out: the directory of the run.
        steps: optimiser steps done.
        samples: images trained on, repeats counted.
        loss: mean training loss over the last logged steps.
        accuracy: fraction of the readable test images that the final weights classify correctly.
        test_loss: mean cross-entropy on the test images.
        test_images: number of readable test images.
        trained: number of trained parameters.
        images_per_second: rate of all ranks together since this start of the run.
        data_wait: fraction of this process's time spent waiting for data.
        bad: samples replaced, over the whole run.
        resumed_from: the step that this process resumed from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
        path: file of the results in the run that the encoder comes from; None for any other model.
    """

    out: str
    steps: int
    samples: int
    loss: float | None
    accuracy: float | None
    test_loss: float | None
    test_images: int
    trained: int
    images_per_second: float
    data_wait: float
    bad: int
    resumed_from: int
    already_finished: bool = False
    path: str | None = None


def finetune(config: FinetuneConfig, progress: Progress | None = None) -> FinetuneResult:
    """Train an encoder, or its last blocks, with a linear head on labels; a second call resumes.

    With several processes (`torchrun`), each calls this with the same config and all return the same result.

    Raises:
        InputError: bad usage, no labels, damaged data, or a directory of another run; found before any step.
        Stopped: a signal came, or the time limit is reached; everything is saved.
        OtherRankError: another process of the run failed or was stopped, and raises the error itself.
        MaekitError: failed during training.
    """
    progress = progress or Silent()
    config = copy.deepcopy(config)
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_FINETUNE_EPOCHS
    config.validate()
    run = FinetuneDirectory(Path(config.out))
    with launched(config, run, progress, lambda: refuse_foreign_directory(run, "directory of fine-tuning")) as launch:
        resolved, world = launch.config, launch.world
        note = progress.note if world.is_main else Silent().note
        trained = world.together(lambda: _source(resolved, run, note))
        data = world.together(lambda: _labels(resolved, progress))
        resolved.model.sha256 = str(trained.provenance.get("sha256") or trained.provenance.get("name"))
        resolved.classes, text = len(data.classes), "\0".join(data.classes).encode()
        resolved.labels_sha256 = hashlib.sha256(text + data.labels.tobytes()).hexdigest()
        resolved.data.mean, resolved.data.std = trained.preprocess.mean, trained.preprocess.std  # type: ignore[assignment]
        task = world.together(lambda: Supervised(launch, run, trained, data))
        finished = Engine(launch, task).go(launch.own())
        result: FinetuneResult = world.share(world.on_main(lambda: _result(resolved, finished, task, progress)))
        return result


def _source(config: FinetuneConfig, run: FinetuneDirectory, note: Note) -> TrainedEncoder:
    """Return the encoder to start from, without its weights if there is a checkpoint, which holds them.
    The run that the encoder came from may have trained further or been deleted.
    """
    if run.list_checkpoints() and run.start_file.is_file():
        try:
            start = json.loads(run.start_file.read_text(encoding="utf-8"))
            if start["source"] == config.model.source:
                encoder = create_timm(start["name"], start["arguments"])
                set_norm_eps(encoder, start["norm_eps"])
                preprocess = Preprocess.from_json(start["preprocess"])
                return TrainedEncoder(encoder, start["name"], preprocess, start["arguments"], start["provenance"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{run.start_file} is damaged ({error!r}); delete {run.path} to start anew") from error
    return load_encoder(config.model.source, model=config.model.name, on_note=note)


def _labels(config: FinetuneConfig, progress: Progress) -> Labelled:
    """Return the labels of the training set, and the test set."""
    (labelled, test), classes = open_sets(
        config.shards,
        config.test,
        progress,
        images=(None, config.test_images),
        image=config.data.image,
        cache_gb=config.data.cache_gb,
    )
    if not set(test.texts) & set(classes):
        raise InputError(
            f"`test` {' '.join(config.test)}: `train` has none of its classes, such as {test.texts[0][:60]!r}"
        )
    labels = np.full(labelled.shards.samples, -1, np.int64)
    labels[labelled.numbers] = encode(labelled.texts, classes)
    if labelled.unlabelled > config.data.max_bad * len(labels):
        raise InputError(
            f"{labelled.unlabelled} of {len(labels)} training samples have no label, more than `max_bad` "
            f"{config.data.max_bad:g}; put the labelled ones into shards of their own"
        )
    return Labelled(labels, classes, test, encode(test.texts, classes))


def _result(config: FinetuneConfig, finished: Finished, task: Supervised, progress: Progress) -> FinetuneResult:
    tested = task.tested(finished)
    result = FinetuneResult(
        out=config.out,
        accuracy=tested["accuracy"],
        test_loss=tested["test_loss"],
        test_images=tested["test_images"],
        trained=sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        **finished.summary(config.batch_size),
    )
    return dataclasses.replace(result, path=_keep(config, result, task, progress))


def _keep(config: FinetuneConfig, result: FinetuneResult, task: Supervised, progress: Progress) -> str | None:
    """Save the results in the run that the encoder comes from; return the path of the file, or None."""
    provenance = task.trained.provenance
    if provenance.get("source") != "run" or config.model.from_scratch:
        return None
    step = int(provenance["step"])
    blocks = "all" if config.model.blocks is None else f"{config.model.blocks:g}"
    row = {"name": Path(config.out).name, "blocks": blocks, "steps": result.steps, "accuracy": result.accuracy}
    table = {
        "task": task.name,
        "model": config.model.source,
        "step": step,
        "train": {"shards": len(task.shards.shards), "images": int((task.data.labels >= 0).sum())},
        "test": {"images": result.test_images},
        "rows": [row],
    }
    # Two directories of the same name are two trainings.
    digest = hashlib.sha256(str(Path(config.out).resolve()).encode()).hexdigest()[:6]
    try:
        run, _ = runs.find_checkpoint(Path(config.model.source))
        path = run.evaluation(f"{task.name}-{Path(config.out).name}-{digest}", step)
        path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, json.dumps(table, indent=1).encode())
    except (OSError, MaekitError) as error:
        progress.note(f"not kept in the run: {error}")
        return None
    return str(path)
