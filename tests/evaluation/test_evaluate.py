"""Judging embeddings: each score against an independent implementation, and what is deployed against the run."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from support.errors import raises
from support.planted import picture, plant
from support.processes import tiny_config
from support.shards import write_shard
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app
from maekit.config.export import ExportConfig
from maekit.evaluation.labelled import classes_of
from maekit.evaluation.retrieval import retrieval_scores
from maekit.exporters.export import export
from maekit.system.errors import InputError, MaekitError
from maekit.system.files import sha256_file
from maekit.system.progress import Silent
from maekit.vectors.knn import knn_accuracies
from maekit.vectors.nearest import nearest

CPU = {"device": "cpu"}


@pytest.fixture(autouse=True)
def _few_pixels(monkeypatch) -> None:
    """Whitening 3,072 directions takes seconds."""
    monkeypatch.setattr("maekit.evaluation.features.PIXELS", 8)


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Return 300 rows of 5 classes that overlap, and 90 more."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(5, 12))
    made = {}
    for name, count in (("train", 300), ("test", 90)):
        made[f"{name}_labels"] = random.integers(0, 5, count)
        noise = random.normal(0, 1.5, (count, 12))
        made[name] = (centres[made[f"{name}_labels"]] + noise).astype(np.float32)
    return made


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `train` and `test`, a `run` on them, its `encoder.onnx`, and `embeddings` of both."""
    folder = tmp_path_factory.mktemp("judged")
    plant(folder / "shards/train", 0, 30, 34)
    plant(folder / "shards/test", 1000, 24)
    maekit.pretrain(tiny_config(folder / "shards/train", folder / "run"))
    export(ExportConfig(folder / "run", folder / "encoder.onnx", normalize=False))
    maekit.embed(
        maekit.EmbedConfig(
            str(folder / "encoder.onnx"), (str(folder / "shards"),), str(folder / "embeddings"), device="cpu"
        )
    )
    return folder


def sets(folder: Path) -> dict[str, list[str]]:
    return {"train": [str(folder / "shards/train")], "test": [str(folder / "shards/test")]}


@pytest.mark.parametrize("blocks", [[300], [7, 0, 200, 93]])
@pytest.mark.parametrize("k", [1, 20, 400])
def test_neighbours_are_those_of_faiss(rows: dict, blocks: list[int], k: int, monkeypatch) -> None:
    import faiss

    from maekit.vectors import nearest as neighbours

    monkeypatch.setattr(neighbours, "_QUERIES", 40)
    monkeypatch.setattr(neighbours, "_ROWS", 64)
    unit = {name: rows[name] / np.linalg.norm(rows[name], axis=1, keepdims=True) for name in ("train", "test")}
    index = faiss.IndexFlatIP(12)
    index.add(unit["train"])
    cosines, numbers = index.search(unit["test"], min(k, 300))
    parts = np.split(rows["train"], np.cumsum(blocks)[:-1])
    mine, found = nearest(rows["test"], parts, k)
    np.testing.assert_allclose(mine, cosines, atol=1e-6)
    assert (found == numbers).mean() > 0.99  # equal to the last bit or two, neighbours may change places
    assert [set(row) for row in found] == [set(row) for row in numbers]


def test_of_equal_neighbours_the_first_are_taken() -> None:
    rows = np.repeat(np.eye(2, dtype=np.float32), [700, 300], axis=0)
    _, numbers = nearest(rows[:2], [rows[:10], rows[10:]], 3)
    assert numbers.tolist() == [[0, 1, 2]] * 2
    labels = np.arange(1000) % 7
    alone, among = (knn_accuracies(rows, labels, rows[:50], labels[:50], ks=ks)[0] for ks in ([5], [5, 20, 800]))
    assert alone == among


def test_votes_are_those_of_scikit_learn(rows: dict) -> None:
    ks = [1, 5, 20, 300, 999]
    shares = knn_accuracies(rows["train"], rows["train_labels"], rows["test"], rows["test_labels"], ks=ks)
    for k, share in zip(ks, shares, strict=True):
        oracle = KNeighborsClassifier(
            min(k, 300), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute"
        ).fit(rows["train"], rows["train_labels"])
        assert share == pytest.approx(oracle.score(rows["test"], rows["test_labels"]))
    assert len(set(shares)) > 2


@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_logistic_regression_is_that_of_scikit_learn(rows: dict, c: float) -> None:
    import torch

    from maekit.evaluation.linear import LogisticRegression

    mean, std = rows["train"].mean(axis=0), rows["train"].std(axis=0)
    oracle = Reference(C=c, tol=1e-8, max_iter=5000).fit((rows["train"] - mean) / std, rows["train_labels"])
    mine = LogisticRegression(rows["train"], rows["train_labels"], 5, torch.device("cpu"))
    mine.fit(c)
    # Adding one number to all biases changes nothing.
    bias = mine._bias.detach().numpy()
    np.testing.assert_allclose(mine._weight.detach().numpy(), oracle.coef_, atol=2e-3)
    np.testing.assert_allclose(bias - bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=2e-3)
    assert mine.accuracy(rows["test"], rows["test_labels"]) == pytest.approx(
        oracle.score((rows["test"] - mean) / std, rows["test_labels"]), abs=0.012
    )


def test_a_feature_that_does_not_vary_is_left_out(rows: dict) -> None:
    from maekit.evaluation.linear import linear_accuracy

    train, test = (np.c_[rows[name], np.full(len(rows[name]), 7, np.float32)] for name in ("train", "test"))
    test[:, -1] = 1e6
    score = linear_accuracy(train, rows["train_labels"], test, rows["test_labels"])
    plain = linear_accuracy(rows["train"], rows["train_labels"], rows["test"], rows["test_labels"])
    assert score.accuracy == plain.accuracy > 0.4
    assert score.c in score.held_out
    assert max(score.held_out.values()) == score.held_out[score.c]


@pytest.mark.parametrize("alone", [False, True])
def test_retrieval_is_that_of_scikit_learn(rows: dict, alone: bool, monkeypatch) -> None:
    from maekit.evaluation import retrieval

    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", 100_000)  # several blocks
    train, labels = rows["train"], rows["train_labels"]
    queries, wanted = (train, labels) if alone else (rows["test"], rows["test_labels"])
    mine = retrieval_scores(train, labels, *((None, None) if alone else (queries, wanted)), recalls=[1, 5])
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    average, precision, recall = [], [], []
    for number, (query, label) in enumerate(zip(queries, wanted, strict=True)):
        others = np.arange(len(train)) != number if alone else np.ones(len(train), bool)
        cosines, hits = (unit @ (query / np.linalg.norm(query)))[others], (labels == label)[others]
        average.append(average_precision_score(hits, cosines))
        ranked = hits[np.argsort(-cosines)]
        precision.append(ranked[: hits.sum()].mean())
        recall.append([ranked[:1].any(), ranked[:5].any()])
    assert mine["map"] == pytest.approx(np.mean(average), abs=1e-6)
    assert mine["r_precision"] == pytest.approx(np.mean(precision), abs=1e-6)
    assert [mine["recall@1"], mine["recall@5"]] == pytest.approx(np.mean(recall, axis=0))
    assert mine["queries"] == len(queries)


def test_a_query_without_anything_to_find_does_not_count() -> None:
    rows, labels = np.eye(3, dtype=np.float32), np.array([0, 0, 1])
    scores = retrieval_scores(rows, labels, None, None, recalls=[1])
    assert scores["queries"] == 2
    with raises(InputError, match="no query"):
        retrieval_scores(rows, np.arange(3), None, None, recalls=[1])


def test_classes_are_in_order() -> None:
    assert classes_of(["10", "9", "-1"]) == ("-1", "9", "10")
    assert classes_of(["b", "a", "10"]) == ("10", "a", "b")
    assert classes_of(["--1", "٣", "9" * 5000]) == ("--1", "9" * 5000, "٣")  # no numbers that can be counted with


def test_what_is_deployed_is_what_is_judged(judged: Path) -> None:
    found = {
        source: maekit.evaluate(
            maekit.EvaluateConfig("knn", str(judged / source), **sets(judged), baselines=False, whiten=False, **CPU)
        )
        for source in ("run", "run/checkpoints/step-000000008", "encoder.onnx", "embeddings")
    }
    run = found["run"]
    assert [row["name"] for row in run.rows] == ["avg", "cls"]
    for name in ("run/checkpoints/step-000000008", "encoder.onnx", "embeddings"):
        scores = {key: value for key, value in found[name].rows[0].items() if key != "name"}
        assert scores == {key: value for key, value in run.rows[0].items() if key != "name"}
    assert run.train == {
        "shards": 2,
        "damaged": 0,
        "samples": 64,
        "images": 64,
        "classes": 4,
        "unlabelled": 0,
        "unreadable": 0,
        "unused": {},
    }
    assert run.path is not None
    kept = json.loads(Path(run.path).read_text())
    assert re.fullmatch(r"knn-[0-9a-f]{6}-step-000000008\.json", Path(run.path).name)
    assert kept["options"]["k"] == 20
    assert kept["rows"] == run.rows
    assert found["encoder.onnx"].path is None


def test_baselines_and_whitening_stand_beside_it(judged: Path) -> None:
    options = dict(whiten_dims=(3,), pool=("avg",), **CPU)
    result = maekit.evaluate(maekit.EvaluateConfig("knn", str(judged / "run"), **sets(judged), **options))
    names = [(row["name"], row["dim"]) for row in result.rows]
    assert names == [
        ("raw pixels", 192),
        ("raw pixels, whitened", 3),
        ("untrained avg", 32),
        ("untrained avg, whitened", 3),
        ("avg", 32),
        ("avg, whitened", 3),
    ]
    pixels = result.rows[0]
    assert pixels["accuracy"] == pixels["k=20"] == 1.0  # the classes are colours
    again = maekit.evaluate(maekit.EvaluateConfig("knn", str(judged / "run"), **sets(judged), **options))
    assert again.rows == result.rows


def test_poolings_of_several_lengths_are_whitened_as_far_as_they_go(judged: Path) -> None:
    """One that has fewer directions than asked for is no reason to lose the others."""

    class Told(Silent):
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    options = dict(whiten_dims=(40,), pool=("avg", "avg+std"), baselines=False, **CPU)
    result = maekit.evaluate(maekit.EvaluateConfig("knn", str(judged / "run"), **sets(judged), **options), Told())
    dims = {row["name"]: row["dim"] for row in result.rows}
    assert dims == {"avg": 32, "avg, whitened": 31, "avg+std": 64, "avg+std, whitened": 40}
    assert [note for note in Told.notes if "directions; all" in note] == [
        "avg, whitened: the embeddings vary in 31 directions; all of them are taken"
    ]


def test_layers_are_judged_in_one_pass(judged: Path, tmp_path: Path) -> None:
    """Each as the file that `export` makes of it; a whole pooling may name its own layers."""
    options = dict(baselines=False, whiten_dims=(5,), **CPU)
    source = str(judged / "run")
    result = maekit.evaluate(
        maekit.EvaluateConfig("knn", source, **sets(judged), layers=("all",), pool=("avg", "avg@1+cls@2"), **options)
    )
    plain = [row["name"] for row in result.rows if "whitened" not in row["name"]]
    assert plain == ["avg@1", "avg@1+cls@2", "avg@1:pre", "avg@1:pre+cls@2:pre", "avg@2", "avg@2:pre"]
    assert len(result.rows) == 2 * len(plain)
    export(ExportConfig(source, tmp_path / "e.onnx", layer=1, pre_norm=True, normalize=False))
    config = maekit.EvaluateConfig("knn", str(tmp_path / "e.onnx"), **sets(judged), **options)
    (deployed, whitened) = maekit.evaluate(config).rows
    ours = {row["name"]: row for row in result.rows}
    assert deployed["accuracy"] == ours["avg@1:pre"]["accuracy"]
    assert whitened["accuracy"] == ours["avg@1:pre, whitened"]["accuracy"]
    assert deployed["name"] == "avg@1:pre as exported"


def test_the_untrained_encoder_is_another_one(judged: Path, tmp_path: Path) -> None:
    hard = str(plant(tmp_path / "hard", 0, 24, label=lambda number: str(number // 4 % 2)))
    rows = {}
    for seed in (0, 1):
        options = dict(whiten=False, pool=("avg",), seed=seed, **CPU)
        made = maekit.evaluate(maekit.EvaluateConfig("retrieval", str(judged / "run"), [hard], **options))
        rows[seed] = {row["name"]: row for row in made.rows}
    assert rows[0]["avg"] == rows[1]["avg"]
    assert rows[0]["untrained avg"]["map"] != rows[1]["untrained avg"]["map"]


def test_linear_and_retrieval(judged: Path, tmp_path: Path) -> None:
    options = dict(pool=("avg+cls",), precisions=("fp32", "int8"), **CPU)
    linear = maekit.evaluate(maekit.EvaluateConfig("linear", str(judged / "run"), **sets(judged), **options))
    assert [row["name"] for row in linear.rows] == [
        "raw pixels",
        "untrained avg+cls",
        "avg+cls",
        "avg+cls, int8",
    ]
    assert all(row["accuracy"] == 1.0 for row in linear.rows)
    easy = maekit.evaluate(maekit.EvaluateConfig("retrieval", str(judged / "encoder.onnx"), sets(judged)["train"]))
    assert easy.test is None
    assert easy.rows[0]["map"] > 0.99
    assert easy.rows[0]["recall@1"] == 1.0
    hard = str(plant(tmp_path / "hard", 0, 24, label=lambda number: str(number // 4 % 2)))
    found = maekit.evaluate(maekit.EvaluateConfig("retrieval", str(judged / "run"), [hard], **options))
    int8, fp32 = ({r["name"]: r for r in found.rows}[name] for name in ("avg+cls, int8", "avg+cls"))
    assert int8["map"] == pytest.approx(fp32["map"], abs=0.05)
    assert int8["map"] != fp32["map"]


def test_what_cannot_be_used_is_left_out_and_counted(judged: Path, tmp_path: Path) -> None:
    shards = plant(tmp_path / "train", 0, 20)
    write_shard(
        shards / "bad.tar",
        {
            "a": {"png": picture(0)},
            "b": {"png": picture(1), "cls": b"  "},
            "c": {"png": b"nothing", "cls": b"1"},
            "d": {"png": picture(2), "cls": b"2\n"},
        },
    )
    (shards / "cut.tar").write_bytes((shards / "0.tar").read_bytes()[:3000])
    result = maekit.evaluate(
        maekit.EvaluateConfig(
            "knn", str(judged / "run"), [str(shards)], sets(judged)["test"], pool=("avg",), whiten=False, **CPU
        )
    )
    assert (result.train["samples"], result.train["damaged"]) == (24, 1)
    assert (result.train["images"], result.train["unlabelled"], result.train["unreadable"]) == (22, 2, 1)


def test_labels_may_be_words_and_some_unknown(judged: Path, tmp_path: Path) -> None:
    words = ["red", "green", "blue", "yellow"]
    train = plant(tmp_path / "train", 0, 20, label=lambda n: words[n % 4])
    test = plant(tmp_path / "test", 500, 8, label=lambda n: words[n % 4] if n % 4 else "pink")
    options = dict(baselines=True, pool=("avg",), whiten=False, k=3, **CPU)
    result = maekit.evaluate(maekit.EvaluateConfig("knn", str(judged / "run"), [str(train)], [str(test)], **options))
    assert result.test is not None
    assert result.test["classes"] == 3
    assert result.rows[0]["accuracy"] == 0.75  # pink is never right


def test_classes_are_known_by_name_where_both_sets_have_names(judged: Path, tmp_path: Path) -> None:
    words = ["red", "green", "blue", "yellow"]
    # The test set lacks a class, and so numbers the others differently.
    train, few = plant(tmp_path / "train", 0, 20), [n for n in range(500, 520) if n % 4]
    write_shard(tmp_path / "test/0.tar", {f"{n}": {"png": picture(n), "cls": str(n % 4 - 1).encode()} for n in few})
    (train / "classes.txt").write_text("\n".join(words))
    (tmp_path / "test/classes.txt").write_text("\n".join(words[1:]))
    options = dict(pool=("avg",), whiten=False, k=3, **CPU)
    result = maekit.evaluate(
        maekit.EvaluateConfig("knn", str(judged / "run"), [str(train)], [str(tmp_path / "test")], **options)
    )
    assert result.rows[0]["accuracy"] == 1.0
    (train / "classes.txt").unlink()  # nothing tells any more
    result = maekit.evaluate(
        maekit.EvaluateConfig("knn", str(judged / "run"), [str(train)], [str(tmp_path / "test")], **options)
    )
    assert result.rows[0]["accuracy"] == 0.0


def test_what_is_exported_whitened_is_not_whitened_again(judged: Path, tmp_path: Path) -> None:
    export(ExportConfig(judged / "run", tmp_path / "w.onnx", whiten=(sets(judged)["train"][0],)))
    result = maekit.evaluate(maekit.EvaluateConfig("knn", str(tmp_path / "w.onnx"), **sets(judged), baselines=False))
    assert [row["name"] for row in result.rows] == ["avg, whitened, as exported"]


def test_a_part_of_the_images(judged: Path) -> None:
    options = dict(train_images=16, test_images=8, baselines=False, **CPU)
    result = maekit.evaluate(maekit.EvaluateConfig("knn", str(judged / "encoder.onnx"), **sets(judged), **options))
    assert result.test is not None
    assert (result.train["images"], result.test["images"]) == (16, 8)


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("run", {"k": 0}, "--k 0"),
        ("run", {"pool": ("max",)}, "--pool max: must be one of avg, cls"),
        ("run", {"pool": ("avg+max",)}, "--pool avg[+]max: must be one of avg, cls"),
        ("run", {"pool": ("avg+avg",)}, "each once"),
        ("run", {"pool": ("tokens",)}, "--pool tokens: must be one of"),
        ("run", {"pool": ("",)}, "--pool : must be one of"),
        ("run", {"whiten": False, "whiten_dims": (9,)}, "does not go with --no-whiten"),
        ("run", {"layers": ("0",)}, "--layer 0: must be the number of a block"),
        ("run", {"layers": ("3",)}, "avg@3: this model has 2 blocks"),
        ("run", {"layers": ("all",), "precisions": ("int8",)}, "judged in fp32"),
        ("encoder.onnx", {"layers": ("1",)}, "which has one"),
        ("encoder.onnx", {"pool": ("cls",)}, "pooled already"),
        ("embeddings", {"precisions": ("int8",)}, "judged as it is"),
        ("missing", {}, "does not exist"),
        ("shards", {}, "neither a run nor a checkpoint"),
    ],
)
def test_what_is_refused(judged: Path, source: str, options: dict, said: str) -> None:
    with raises(InputError, match=said):
        maekit.evaluate(maekit.EvaluateConfig("knn", str(judged / source), **sets(judged), **options, **CPU))


def test_sets_that_are_refused(judged: Path, tmp_path: Path) -> None:
    test = sets(judged)["test"]
    other = [str(plant(tmp_path / "other", 5000, 12))]
    alike = [str(plant(tmp_path / "alike", 0, 12, label=lambda n: "1"))]
    bare = [str(write_shard(tmp_path / "bare/0.tar", {"a": {"png": picture(0)}}).parent)]
    options = dict(baselines=False, **CPU)
    for source, train, held_out, said in (
        ("embeddings", other, test, "has no embeddings of"),
        ("run", alike, test, "all images are of one class, '1'"),
        ("run", bare, test, r"none of 1 samples has a \.cls member"),
        ("run", other, [], "needs --test"),
    ):
        with raises(InputError, match=said):
            maekit.evaluate(maekit.EvaluateConfig("knn", str(judged / source), train, held_out, **options))
    with raises(InputError, match="--test-images 5: is for --test"):
        maekit.evaluate(maekit.EvaluateConfig("retrieval", str(judged / "run"), other, [], test_images=5, **CPU))
    foreign = [str(plant(tmp_path / "foreign", 0, 12, label=lambda n: "zz"))]
    with raises(InputError, match="no query has an image of its class"):
        maekit.evaluate(maekit.EvaluateConfig("retrieval", str(judged / "run"), other, foreign, **options))
    few = [str(plant(tmp_path / "few", 0, 8))]
    with raises(InputError, match="at least 10 labelled training images, there are 8"):
        maekit.evaluate(maekit.EvaluateConfig("linear", str(judged / "run"), few, test, **options))
    with raises(InputError, match="must be one of knn, linear, retrieval"):
        maekit.evaluate(maekit.EvaluateConfig("tsne", str(judged / "run"), other, test, **options))


def test_embeddings_belong_to_the_images_they_were_made_of(judged: Path, tmp_path: Path) -> None:
    # Uncompressed images: keys and sizes are all the same, and so are the digests of the indexes.
    def bmp(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture(number))).save(buffer, "BMP")
        return buffer.getvalue()

    for name, first in (("train", 0), ("test", 101), ("other", 202)):
        samples = {f"{i:03d}": {"bmp": bmp(first + i), "cls": str((first + i) % 4).encode()} for i in range(16)}
        write_shard(tmp_path / f"{name}.tar", samples)
    train, test, other = (str(tmp_path / f"{name}.tar") for name in ("train", "test", "other"))
    out = str(tmp_path / "emb")
    maekit.embed(maekit.EmbedConfig(str(judged / "encoder.onnx"), (train, test), out, device="cpu"))
    options = dict(baselines=False, k=3, whiten=False, **CPU)
    assert maekit.evaluate(maekit.EvaluateConfig("knn", out, [train], [test], **options)).rows[0]["accuracy"] == 1.0
    with raises(InputError, match=r"has no embeddings of .*other.tar"):
        maekit.evaluate(maekit.EvaluateConfig("knn", out, [train], [other], **options))
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(path, tmp_path / "moved" / f"my-{Path(path).name}") for path in (train, test)]
    assert (
        maekit.evaluate(maekit.EvaluateConfig("knn", out, moved[:1], moved[1:], **options)).rows[0]["accuracy"] == 1.0
    )


@pytest.mark.parametrize("kind", ["reversed", "cut", "nan", "gone"])
def test_embeddings_that_are_not_what_was_written(judged: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(judged / "embeddings", tmp_path / "emb")
    path = tmp_path / "emb/train/0.parquet"
    table = pq.read_table(path)
    if kind == "reversed":
        pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "gone":
        path.unlink()
    else:
        column = table["embedding"].combine_chunks()
        values = column.flatten().to_numpy().copy()
        values[0] = np.nan
        made = pa.FixedSizeListArray.from_arrays(values, column.type.list_size)
        pq.write_table(table.set_column(3, table.schema.field("embedding"), made), path)
        record = tmp_path / "emb/_maekit/train/0.tar.json"
        there = json.loads(record.read_text())
        there["outputs"][0] |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        record.write_text(json.dumps(there))
    said = "not finite" if kind == "nan" else "missing, or changed since it was embedded"
    with raises(MaekitError, match=said):
        maekit.evaluate(maekit.EvaluateConfig("knn", str(tmp_path / "emb"), **sets(judged), **CPU))


def test_a_shard_without_a_row_counts_as_embedded(judged: Path, tmp_path: Path) -> None:
    shards = plant(tmp_path / "train", 0, 20)
    write_shard(shards / "junk.tar", {"a": {"png": b"x", "cls": b"1"}})
    out = str(tmp_path / "emb")
    specs = (str(shards), sets(judged)["test"][0])
    maekit.embed(maekit.EmbedConfig(str(judged / "encoder.onnx"), specs, out, device="cpu"))
    options = dict(baselines=False, whiten=False, **CPU)
    result = maekit.evaluate(maekit.EvaluateConfig("knn", out, [str(shards)], sets(judged)["test"], **options))
    assert (result.train["images"], result.train["unreadable"]) == (21, 1)
    assert [key for key in result.rows[0] if key.startswith("k=")] == ["k=1", "k=5", "k=10", "k=20"]


def test_the_command(judged: Path) -> None:
    run, train, test = str(judged / "run"), *(specs[0] for specs in sets(judged).values())
    done = CliRunner().invoke(
        app,
        ["evaluate", "knn", run, "--train", train, "--test", test, "--pool", "avg", "--device", "cpu", "--json"],
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["task"] == "knn"
    assert result["step"] == 8
    assert re.search(rf"kept in {run}/evaluations/knn-[0-9a-f]{{6}}-step-000000008\.json", done.stdout)
    assert "raw pixels, whitened" in done.stdout
