"""`maekit neighbours`: what is nearest, of rows and of images, and the page that shows it."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises
from support.models import embed_config
from support.pages import Notes, parse
from support.shards import jpeg, write_shard
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app
from maekit.embedding.stored import EmbeddingFolder
from maekit.system.errors import InputError, MaekitError

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module", params=["parquet", "npy"])
def embedded(trained: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return embeddings of the trained model's shards (9, 1 and 20 rows), in either layout."""
    out = tmp_path_factory.mktemp("embedded") / request.param
    maekit.embed(embed_config(trained, out, format=request.param, dtype="float16"))
    return out


def brute_force(folder: Path, query: np.ndarray, k: int, own: int | None = None) -> list[tuple[str, str, float]]:
    """Return (shard, key, cosine) of the nearest rows, by one product with all of them."""
    shards = list(EmbeddingFolder(folder).shards())
    names = [(shard.record.shard, key) for shard in shards for key in shard.keys]
    rows = np.concatenate([shard.vectors for shard in shards]).astype(np.float64)
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    order = [i for i in np.argsort(-cosines, kind="stable") if i != own][:k]
    return [(*names[i], cosines[i]) for i in order]


def vector_of(folder: Path, shard: str, key: str) -> tuple[int, np.ndarray]:
    start = 0
    for part in EmbeddingFolder(folder).shards():
        if part.record.shard == shard:
            return start + part.keys.index(key), part.vectors[part.keys.index(key)].astype(np.float64)
        start += len(part.keys)
    raise KeyError(shard)


def test_rows_against_brute_force(embedded: Path, trained: Path, tmp_path: Path) -> None:
    """The same rows in the same order, without the query; the page has each one's picture and caption."""
    out = tmp_path / "n.html"
    queries = ("s0k3", "2.tar:s2k11", "1.tar:s1k0")
    result = maekit.neighbours(maekit.NeighboursConfig(embedded, queries, out, k=7, shards=(str(trained / "shards"),)))
    assert (result.rows, result.path) == (30, str(out))
    found = parse(out)
    for query, (shard, key) in zip(
        result.queries, (("0.tar", "s0k3"), ("2.tar", "s2k11"), ("1.tar", "s1k0")), strict=True
    ):
        number, vector = vector_of(embedded, shard, key)
        expected = brute_force(embedded, vector, 7, number)
        assert [(n.shard, n.key) for n in query.neighbours] == [(s, k) for s, k, _ in expected]
        np.testing.assert_allclose([n.cosine for n in query.neighbours], [c for *_, c in expected], atol=1e-5)
        assert query.row is not None
        assert (query.row.shard, query.row.key) == (shard, key)
        for n in query.neighbours:
            assert f"{n.cosine:.4f} {n.key} ({n.shard})" in found.text
            assert n.index == int(n.key.split("k")[1])
    images = found.images()
    assert len(images) == 3 * 8
    # They are the pictures of their captions: 48 by 40 pixels, kept exactly.
    from maekit.images import decode

    assert np.array_equal(np.asarray(images[0]), decode(jpeg(3)))
    first = result.queries[0].neighbours[0]
    assert np.array_equal(np.asarray(images[1]), decode(jpeg(100 * int(first.shard[0]) + first.index)))


def test_an_image_is_a_query(embedded: Path, trained: Path, tmp_path: Path) -> None:
    """Embedded by the file that made the embeddings, it finds itself; another file is refused, and none is missed."""
    picture = tmp_path / "mine.jpg"
    picture.write_bytes(jpeg(205))
    model = trained / "encoder.onnx"
    result = maekit.neighbours(
        maekit.NeighboursConfig(embedded, [str(picture)], tmp_path / "n.html", k=40, model=str(model))
    )
    (query,) = result.queries
    assert query.row is None
    assert len(query.neighbours) == 30
    assert (query.neighbours[0].shard, query.neighbours[0].key) == ("2.tar", "s2k5")
    assert query.neighbours[0].cosine == pytest.approx(1, abs=1e-4)
    vector = maekit.Embedder(model, device="cpu")(picture)[0].astype(np.float64)
    assert [n.key for n in query.neighbours[:5]] == [key for _, key, _ in brute_force(embedded, vector, 5)]
    with raises(InputError, match="name the file that made the embeddings, --model"):
        maekit.neighbours(maekit.NeighboursConfig(embedded, [str(picture)], tmp_path / "n.html"))
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes() + b"\0")
    with raises(InputError, match=r"other\.onnx is not the file that made .*(parquet|npy): the SHA-256"):
        maekit.neighbours(maekit.NeighboursConfig(embedded, [str(picture)], tmp_path / "n.html", model=str(other)))
    picture.write_bytes(b"<html>")
    with raises(InputError, match=r"mine\.jpg has no embedding: not_an_image"):
        maekit.neighbours(maekit.NeighboursConfig(embedded, [str(picture)], tmp_path / "n.html", model=str(model)))


def test_without_shards_the_page_is_a_table(embedded: Path, tmp_path: Path) -> None:
    progress = Notes()
    result = maekit.neighbours(maekit.NeighboursConfig(embedded, ["s0k0"], tmp_path / "n.html", k=3), progress)
    found = parse(tmp_path / "n.html")
    assert not found.images()
    expected = [[f"{n.cosine:.4f}", n.key, n.shard, str(n.index)] for n in result.queries[0].neighbours]
    assert found.cells[1:] == expected
    assert "the shards that were embedded were not named" in found.text
    assert any("--shards" in said for said in progress.said)


def test_shards_are_known_by_their_content(embedded: Path, trained: Path, tmp_path: Path) -> None:
    """Under another name they are found; another shard of the same name is none; without any it is an error."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for old, new in (("0", "first"), ("1", "second")):
        shutil.copy(trained / f"shards/{old}.tar", moved / f"{new}.tar")
    write_shard(moved / "2.tar", {"s2k0": {"jpg": jpeg(1)}})
    progress = Notes()
    options = dict(k=29, shards=(str(moved),))
    maekit.neighbours(maekit.NeighboursConfig(embedded, ["s0k0"], tmp_path / "n.html", **options), progress)
    found = parse(tmp_path / "n.html")
    assert len(found.images()) == 10
    assert found.text.count("no picture") == 20
    assert len([said for said in progress.said if said.startswith("2.tar: not among --shards")]) == 1
    options = dict(shards=(str(moved / "2.tar"),))
    with raises(InputError, match="was made of none of these"):
        maekit.neighbours(maekit.NeighboursConfig(embedded, ["s0k0"], tmp_path / "x.html", **options))
    assert not (tmp_path / "x.html").exists()


def test_a_folder_of_images(trained: Path, tmp_path: Path) -> None:
    """Keys are paths; the folder gives the pictures. A key that is also a file is the row."""
    images = tmp_path / "images"
    (images / "<b>").mkdir(parents=True)
    for i in range(4):
        (images / "<b>" / f"{i}.jpg").write_bytes(jpeg(i))
    maekit.embed(embed_config(trained, tmp_path / "emb", shards=(str(images),)))
    options = dict(shards=(str(images),))
    result = maekit.neighbours(maekit.NeighboursConfig(tmp_path / "emb", ["<b>/2.jpg"], tmp_path / "n.html", **options))
    assert {n.key for n in result.queries[0].neighbours} == {"<b>/0.jpg", "<b>/1.jpg", "<b>/3.jpg"}
    found = parse(tmp_path / "n.html")
    assert len(found.images()) == 4
    assert "images-00000:<b>/2.jpg" in found.text


def test_a_key_of_two_shards_must_be_told_apart(trained: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"s/{name}.tar", {"same": {"jpg": jpeg(ord(name))}, f"of-{name}": {"jpg": jpeg(1)}})
    maekit.embed(embed_config(trained, tmp_path / "emb", shards=(str(tmp_path / "s"),)))
    with raises(InputError, match=r"--query same: 2 rows have this key; name one, as in --query a\.tar:same"):
        maekit.neighbours(maekit.NeighboursConfig(tmp_path / "emb", ["same"], tmp_path / "n.html"))
    result = maekit.neighbours(maekit.NeighboursConfig(tmp_path / "emb", ["b.tar:same"], tmp_path / "n.html", k=2))
    assert "b.tar" not in {n.shard for n in result.queries[0].neighbours if n.key == "same"}


@pytest.mark.parametrize(
    ("queries", "options", "said"),
    [
        (["nobody"], {}, r"--query nobody: no such row, and no such file; the first rows are 0\.tar:s0k0, 0\.tar:s0k1"),
        (["0.tar:s2k0"], {}, "no such row"),
        (["x" * 5000], {}, "no such row"),
        ([], {}, "0 queries: give at least 1"),
        (["s0k0"], {"k": 0}, "--k 0: must be at least 1"),
        (["s0k0"], {"shards": ("nowhere",)}, "nowhere"),
    ],
)
def test_what_cannot_be_found(embedded: Path, tmp_path: Path, queries, options, said: str) -> None:
    with raises(InputError, match=said):
        maekit.neighbours(maekit.NeighboursConfig(embedded, queries, tmp_path / "n.html", **options))
    assert not (tmp_path / "n.html").exists()


def test_damaged_embeddings(embedded: Path, tmp_path: Path) -> None:
    """A file that is cut is named; a folder that is no output is refused."""
    copy = tmp_path / "copy"
    shutil.copytree(embedded, copy)
    output = EmbeddingFolder(copy).records[0].outputs[0]["path"]
    (copy / output).write_bytes((copy / output).read_bytes()[:-9])
    with raises(MaekitError, match="missing, or changed since it was embedded"):
        maekit.neighbours(maekit.NeighboursConfig(copy, ["s0k0"], tmp_path / "n.html"))
    with raises(InputError, match="holds no embeddings"):
        maekit.neighbours(maekit.NeighboursConfig(tmp_path, ["s0k0"], tmp_path / "n.html"))


def test_the_command(embedded: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "n.html"
    arguments = ["neighbours", str(embedded), "--query", "s0k3", "--query", "s2k1", "--k", "2", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--shards", str(trained / "shards"), "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert set(summary) == {"path", "rows", "queries"}
    assert [set(query) for query in summary["queries"]] == [{"query", "row", "neighbours"}] * 2
    assert set(summary["queries"][0]["neighbours"][0]) == {"shard", "key", "index", "cosine"}
    assert len(parse(out).images()) == 6
    refused = CliRunner().invoke(app, [*arguments[:-1], "n.txt"])
    assert isinstance(refused.exception, InputError)
    assert "must end in .html" in str(refused.exception)


def test_it_needs_no_torch(python: list[str], tmp_path: Path) -> None:
    code = "import sys, maekit.pages.neighbours; print({'torch', 'timm', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([*python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
