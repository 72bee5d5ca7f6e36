"""What a run measures on held-out images: the loss, the effective rank of embeddings, kNN among them."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises
from support.pages import parse
from support.planted import plant
from support.processes import finish, start, tiny_config
from support.shards import MakeShards, jpeg, write_shard
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app
from maekit.evaluation.features import TorchEncoder
from maekit.pretrained.load import load_encoder
from maekit.pretraining.validation import EmbeddingSchedule
from maekit.runs import RunDirectory
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import MaekitError
from maekit.system.progress import Silent
from maekit.vectors.knn import leave_one_out_accuracy
from maekit.vectors.rank import effective_rank
from maekit.vectors.whitening import whiten_sample

pytestmark = pytest.mark.whole


class Told(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def validations(run: Path) -> list[dict]:
    return [row for row in RunDirectory(run).metrics() if "val_loss" in row]


def open_all(folder: Path) -> ShardSet:
    return open_shards(find_shards((str(folder),)))


def test_rank_and_neighbours_are_those_of_the_saved_encoder(tmp_path: Path) -> None:
    """Recomputed from the finished run, of the same images; and validating changes nothing in the training."""
    shards, held_out = plant(tmp_path / "shards", 0, 40, 8), plant(tmp_path / "val", 1000, 30, 27)
    changes = {"data__val": [str(held_out)], "run__val_every": 20, "steps": 120, "batch_size": 32}
    result = maekit.pretrain(tiny_config(shards, tmp_path / "run", **changes))
    *_, first, other, last = validations(tmp_path / "run")
    # A hundredth of 3,840 images: once, at the end.
    assert (last["step"], last["val_images"], last["val_embeddings"]) == (120, 57, 38)
    assert set(first) == set(other) == {"step", "val_loss", "val_images"}
    found = open_all(held_out)
    numbers = [57 * number // 38 for number in range(38)]
    trained = load_encoder(str(tmp_path / "run"))
    rows = TorchEncoder(trained, ("avg",), "cpu")(np.stack(list(found.images(numbers, trained.preprocess))))["avg"]
    labels = np.array([int(text) for text in found.labels(numbers)])
    assert last["val_rank"] == pytest.approx(effective_rank(rows), rel=1e-3)
    assert last["val_knn"] == pytest.approx(leave_one_out_accuracy(rows, labels))
    assert last["val_knn_whitened"] == pytest.approx(leave_one_out_accuracy(whiten_sample(rows)[0], labels))
    assert last["val_knn_whitened"] > 0.5  # colours are plain to see
    for name in ("val_loss", "val_rank", "val_knn", "val_knn_whitened"):
        assert getattr(result, name) == last[name]
    without = maekit.pretrain(tiny_config(shards, tmp_path / "without", **changes | {"data__val": []}))
    assert (without.loss, without.val_rank, without.val_knn) == (result.loss, None, None)


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    """Images and labels of all ranks come together in the order of the set, also where one rank has fewer."""
    shards, held_out = plant(tmp_path / "shards", 0, 16), plant(tmp_path / "val", 1000, 20, 13)
    changes = {"data__val": [str(held_out)], "steps": 4, "batch_size": 8}
    config = tiny_config(shards, tmp_path / "two", **changes)
    assert finish(start(config, tmp_path / "log", world=2)) == [0, 0]
    maekit.pretrain(tiny_config(shards, tmp_path / "one", **changes))
    ours, theirs = (validations(tmp_path / name)[-1] for name in ("two", "one"))
    assert ours["val_rank"] == pytest.approx(theirs["val_rank"], rel=1e-3)
    assert ours["val_knn"] == pytest.approx(theirs["val_knn"], abs=0.04)
    assert ours["val_embeddings"] == theirs["val_embeddings"] == 32


def test_images_without_labels_alone_of_their_class_or_unreadable(tmp_path: Path) -> None:
    """kNN is of the images that can be right: labelled, with another of their class, in at least two classes."""
    shards = plant(tmp_path / "shards", 0, 16)

    def validate(name: str, samples: dict) -> dict:
        write_shard(tmp_path / name / "0.tar", samples)
        changes = {"data__val": [str(tmp_path / name)], "steps": 1}
        maekit.pretrain(tiny_config(shards, tmp_path / f"{name}-run", **changes))
        return validations(tmp_path / f"{name}-run")[-1]

    images = [jpeg(number, (40, 40)) for number in range(12)]
    mixed = {f"{n:02}": {"jpg": image, "cls": str(n % 2).encode()} for n, image in enumerate(images[:6])}
    mixed |= {"10": {"jpg": images[6]}, "11": {"jpg": images[7], "cls": b"alone"}, "12": {"jpg": b"no image"}}
    found = validate("mixed", mixed)
    assert (found["val_images"], found["val_embeddings"]) == (8, 8)
    assert found["val_knn"] in {number / 6 for number in range(7)}
    assert "val_knn" not in validate("none", {f"{n:02}": {"jpg": image} for n, image in enumerate(images)})
    every = {f"{n:02}": {"jpg": image, "cls": str(n).encode()} for n, image in enumerate(images)}
    assert "val_knn" not in validate("every", every)
    one = {f"{n:02}": {"jpg": image, "cls": b"1"} for n, image in enumerate(images)}
    assert "val_knn" not in validate("one", one)
    with raises(MaekitError, match="none of the held-out images can be read"):
        validate("broken", {"a": {"jpg": b"no image"}})


def test_a_collapse_is_told_once_and_shown(
    tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one image many times over, whatever the encoder: in a note, in the report, as curves of `inspect`."""
    monkeypatch.setattr("maekit.pretraining.validation._SHARE", 10)  # at every validation
    shards = make_shards(12)
    write_shard(tmp_path / "val/0.tar", {f"{n:02}": {"jpg": jpeg(0, (40, 40)), "cls": b"1"} for n in range(12)})
    told = Told()
    config = tiny_config(shards, tmp_path / "run", data__val=[str(tmp_path / "val")], run__val_every=2)
    maekit.pretrain(config, told)
    said = "collapsed: 12 held-out images have about the same embedding, effective rank 1.00"
    assert [note for note in told.notes if "collaps" in note] == [
        f"{said}; a lower `lr`, a longer warm-up or `clip_grad=1` usually help"
    ]
    maekit.report(maekit.ReportConfig(str(tmp_path / "run"), samples=4, device="cpu"))
    text = parse(tmp_path / "run/report.html").text
    assert f"C{said[1:]}." in text
    assert "Last effective rank, held out 1.0" in text
    assert "Effective rank of embeddings" in text
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")]).stdout
    assert "val_rank" in shown


def test_the_report_shows_neighbours(tmp_path: Path, make_shards: MakeShards) -> None:
    shards = make_shards(12)
    config = tiny_config(shards, tmp_path / "run", steps=1, data__val=[str(plant(tmp_path / "val", 0, 12))])
    maekit.pretrain(config)
    rows = RunDirectory(tmp_path / "run").metrics()
    more = {**rows[-1], "step": 3, "val_knn": 0.25, "val_knn_whitened": 0.375}
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, more]))
    maekit.report(maekit.ReportConfig(str(tmp_path / "run"), samples=4, device="cpu"))
    text = parse(tmp_path / "run/report.html").text
    assert "Last kNN, held out 25.0%" in text
    assert "Last kNN, held out, whitened 37.5%" in text
    assert "Collaps" not in text


@pytest.mark.parametrize(
    ("changes", "images", "times"),
    [
        # A hundredth of 2.56 million images at ten validations of 2,000 at most; fewer if there are more validations.
        ({}, 2000, 10),
        ({"run__val_every": 500}, 1280, 20),
        ({"run__val_every": 50}, 500, 50),  # enough of them, less often
        ({"run__val_every": 20_000}, 2000, 1),
        ({"model__mask_ratio": 0.5, "run__val_every": 200}, 1024, 50),
        ({"model__masks_per_image": 2, "run__val_every": 500}, 2000, 20),
        ({"steps": 1000, "batch_size": 64}, 500, 1),
        ({"steps": 1100, "batch_size": 256}, 500, 5),
        ({"steps": 600, "batch_size": 64}, 384, 1),
        ({"steps": 10, "batch_size": 8}, 32, 1),
        ({"epochs": 10, "steps": None, "batch_size": 100}, 1000, 10),
    ],
)
def test_images_by_the_time_between_validations(tmp_path: Path, changes: dict, images: int, times: int) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", run__checkpoint_every=None)
    changes = {"steps": 10_000, "batch_size": 256, "model__mask_ratio": 0.75, **changes}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(config, section) if section else config, name, value)
    schedule = EmbeddingSchedule.of(config, 100_000, 2000)
    assert schedule.images == images
    due = [done for done in range(1, schedule.last + 1) if done % schedule.validate == 0 or done == schedule.last]
    embedded = [done for done in due if schedule.is_due(done)]
    assert len(embedded) == times
    assert embedded[-1] == schedule.last
    kept = (1 - config.model.mask_ratio) * config.model.masks_per_image
    assert times * images <= max(32, 0.04 * kept * schedule.last * config.batch_size)
