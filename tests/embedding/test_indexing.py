"""What `maekit embed` writes is read as it is by the tools that index vectors, as docs/indexing.md shows."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import faiss
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from embedding_reader import EmbeddingReader
from support.processes import tiny_config
from support.shards import jpeg, write_shard
from usearch.index import Index

import maekit
from maekit.config.embed import EmbedConfig
from maekit.config.export import ExportConfig
from maekit.embedding.embed import embed
from maekit.exporters.export import export

pytestmark = pytest.mark.whole

DIM = 32
SHARDS = {"a/000": 120, "a/001": 0, "b/001": 50, "b/c/000": 80, "z": 1}  # a/001 has samples, and none with an image
TYPES = {"float32": pa.float32(), "float16": pa.float16()}
# Cosines that differ by less are as near: half precision leaves unit vectors this much off their length.
TOLERANCE = {"float32": 1e-6, "float16": 1e-3}
DOCS = Path(__file__).parents[2] / "docs" / "indexing.md"


def riding(number: int) -> str:
    return json.dumps({"número": number}, ensure_ascii=False)


@dataclass
class Embedded:
    """Outputs of both layouts, and their rows as the parquet files hold them, read one by one in order."""

    parquet: Path
    npy: Path
    dtype: str
    rows: pa.Table
    vectors: np.ndarray
    keys: list[str]

    def similarities(self, query: np.ndarray) -> np.ndarray:
        vectors, query = self.vectors.astype(np.float64), np.asarray(query, np.float64).ravel()
        return vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))

    def recall(self, query: np.ndarray, found: Sequence[str], among: str | None = None) -> float:
        """Return the share of what was found that is as near as the true nearest, by brute force."""
        similarities = self.similarities(query)
        if among is not None:
            similarities[np.array(self.rows["cls"].to_pylist()) != among] = -1
        assert len(set(found)) == len(found) == 10
        limit = np.sort(similarities)[-10] - TOLERANCE[self.dtype]
        return float(np.mean([similarities[self.keys.index(key)] >= limit for key in found]))

    def assert_finds(self, search: Callable[[np.ndarray], Sequence[str]], *, recall: float = 1.0) -> None:
        """Known keys find themselves first, then the neighbours that brute force finds."""
        rows = range(0, len(self.keys), 10)
        recalls = []
        for row in rows:
            found = search(self.vectors[row])
            assert found[0] == self.keys[row]
            recalls.append(self.recall(self.vectors[row], found))
        assert np.mean(recalls) >= recall


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export of a tiny model, with the shards that it was trained on beside it."""
    folder = tmp_path_factory.mktemp("indexing")
    number = 0
    for name, count in SHARDS.items():
        samples: dict[str, dict[str, bytes]] = {} if count else {"nothing": {"txt": b"no image"}}
        for _ in range(count):
            samples[f"k{number:03d}"] = {"jpg": jpeg(number), "cls": str(number % 3).encode()}
            if number % 2:
                samples[f"k{number:03d}"]["json"] = riding(number).encode()
            number += 1
        write_shard(folder / "shards" / f"{name}.tar", samples)
    maekit.pretrain(tiny_config(folder / "shards", folder / "run"))
    export(ExportConfig(folder / "run", folder / "encoder.onnx"))
    return folder / "encoder.onnx"


@pytest.fixture(scope="module", params=["float32", "float16"])
def embedded(request: pytest.FixtureRequest, encoder: Path) -> Embedded:
    dtype = request.param
    outs = {layout: encoder.parent / f"{layout}-{dtype}" for layout in ("parquet", "npy")}
    settings = {"device": "cpu", "dtype": dtype, "keep": ("json", "cls")}
    for layout, out in outs.items():
        embed(EmbedConfig(str(encoder), (str(encoder.parent / "shards"),), str(out), format=layout, **settings))
    files = [outs["parquet"] / f"{name}.parquet" for name, count in SHARDS.items() if count]
    rows = pa.concat_tables(pq.ParquetFile(file).read() for file in files)
    vectors = np.array(rows["embedding"].to_pylist(), dtype)
    return Embedded(outs["parquet"], outs["npy"], dtype, rows, vectors, rows["key"].to_pylist())


def as_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return the vectors of a column; files are joined, and nothing more is copied, or it raises."""
    joined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return joined.flatten().to_numpy(zero_copy_only=True).reshape(-1, joined.type.list_size)


def test_the_parquet_layout(embedded: Embedded, encoder: Path) -> None:
    """One file per shard with rows, in tar order; columns, types and values are those that are documented."""
    names = [name for name, count in SHARDS.items() if count]
    files = sorted(embedded.parquet.rglob("*.parquet"))
    assert [file.relative_to(embedded.parquet).as_posix() for file in files] == [f"{name}.parquet" for name in names]
    for name, file in zip(names, files, strict=True):
        table = pq.ParquetFile(file).read()
        fields = [(field.name, field.type, field.nullable) for field in table.schema]
        assert fields == [
            ("key", pa.string(), False),
            ("shard", pa.string(), False),
            ("index", pa.int32(), False),
            ("embedding", pa.list_(pa.field("element", TYPES[embedded.dtype]), DIM), False),
            ("json", pa.string(), True),
            ("cls", pa.string(), True),
        ]
        assert table["shard"].to_pylist() == [f"{name}.tar"] * SHARDS[name]
        assert table["index"].to_pylist() == list(range(SHARDS[name]))
        assert table["embedding"].combine_chunks().flatten().null_count == 0
    count = sum(SHARDS.values())
    assert embedded.keys == [f"k{number:03d}" for number in range(count)]
    assert embedded.rows["cls"].to_pylist() == [str(number % 3) for number in range(count)]
    assert embedded.rows["json"].to_pylist() == [riding(number) if number % 2 else None for number in range(count)]
    expected = maekit.Embedder(encoder, device="cpu")([jpeg(number) for number in range(count)])
    np.testing.assert_allclose(embedded.vectors, expected.astype(embedded.dtype), atol=TOLERANCE[embedded.dtype])


def test_the_npy_layout(embedded: Embedded) -> None:
    """Pairs of files of equal numbers, a shard without rows leaves its number out; the rows are those of parquet."""
    arrays, tables = sorted((embedded.npy / "img_emb").iterdir()), sorted((embedded.npy / "metadata").iterdir())
    numbers = [number for number, count in enumerate(SHARDS.values()) if count]
    assert [file.name for file in arrays] == [f"img_emb_{number:05d}.npy" for number in numbers]
    assert [file.name for file in tables] == [f"metadata_{number:05d}.parquet" for number in numbers]
    for file, metadata, name in zip(arrays, tables, [name for name in SHARDS if SHARDS[name]], strict=True):
        vectors, table = np.load(file, mmap_mode="r"), pq.ParquetFile(embedded.parquet / f"{name}.parquet").read()
        assert vectors.dtype.str == {"float32": "<f4", "float16": "<f2"}[embedded.dtype]
        assert vectors.flags.c_contiguous
        np.testing.assert_array_equal(vectors, as_matrix(table["embedding"]))
        assert pq.ParquetFile(metadata).read() == table.drop_columns("embedding")


def test_no_reader_sees_the_bookkeeping(embedded: Embedded, tmp_path: Path) -> None:
    """Nothing below `_maekit` is taken for rows, nor what a killed run leaves there."""
    for layout, names in (("parquet", {"a", "b", "z.parquet"}), ("npy", {"img_emb", "metadata"})):
        out = shutil.copytree(getattr(embedded, layout), tmp_path / layout)
        assert {path.name for path in out.iterdir()} == {"_maekit", *names}
        assert not [file for file in (out / "_maekit").rglob("*") if file.suffix in (".parquet", ".npy")]
        (out / "_maekit" / ".tmp").mkdir(exist_ok=True)
        for name in ("000.parquet", "img_emb_00000.npy", "metadata_00000.parquet"):
            (out / "_maekit" / ".tmp" / f".{name}.4711.tmp").write_bytes(b"unfinished")
    count = len(embedded.keys)
    assert ds.dataset(tmp_path / "parquet").count_rows() == count
    assert pq.read_table(tmp_path / "parquet", columns=["key"]).num_rows == count
    assert len(duckdb.execute(f"SELECT key FROM '{tmp_path}/parquet/**/*.parquet'").fetchall()) == count
    assert EmbeddingReader(str(tmp_path / "parquet"), file_format="parquet").count == count
    assert EmbeddingReader(str(tmp_path / "npy"), file_format="npy").count == count


def test_pyarrow_dataset(embedded: Embedded) -> None:
    """The folder is one dataset, of which the rows of one shard, or of one class, can be asked for."""
    dataset = ds.dataset(embedded.parquet)
    assert dataset.to_table() == embedded.rows
    assert dataset.to_table(filter=ds.field("shard") == "b/001.tar")["key"].to_pylist() == embedded.keys[120:170]
    of_class = dataset.to_table(filter=ds.field("cls") == "2", columns=["key"])["key"].to_pylist()
    assert of_class == embedded.keys[2::3]
    without = dataset.to_table(filter=pc.is_null(ds.field("json")), columns=["key"])["key"].to_pylist()
    assert without == embedded.keys[::2]


def test_names_that_pyarrow_passes_over(embedded: Embedded, tmp_path: Path) -> None:
    """A shard whose name begins with an underscore is seen with the documented argument only."""
    out = shutil.copytree(embedded.parquet, tmp_path / "out")
    shutil.move(out / "z.parquet", out / "_z.parquet")
    shutil.move(out / "a", out / "_a")
    assert ds.dataset(out).count_rows() == len(embedded.keys) - 121
    assert ds.dataset(out, ignore_prefixes=["_maekit"]).count_rows() == len(embedded.keys)


@pytest.mark.parametrize("file_format", ["npy", "parquet_npy", "parquet"])
@pytest.mark.parametrize("batch_size", [7, 10**6])
def test_embedding_reader(embedded: Embedded, file_format: str, batch_size: int) -> None:
    """Sub-folders, gaps in the numbers, half precision: all rows come, each with its own metadata."""
    columns = ["key", "shard", "index", "json", "cls"]
    arguments: dict[str, Any] = {
        "npy": {"embeddings_folder": str(embedded.npy / "img_emb")},
        "parquet_npy": {
            "embeddings_folder": str(embedded.npy / "img_emb"),
            "metadata_folder": str(embedded.npy / "metadata"),
            "meta_columns": columns,
        },
        "parquet": {"embeddings_folder": str(embedded.parquet), "meta_columns": columns},
    }[file_format]
    reader = EmbeddingReader(file_format=file_format, **arguments)
    assert (reader.count, reader.dimension) == embedded.vectors.shape
    batches = list(reader(batch_size=batch_size, show_progress=False))
    vectors = np.concatenate([vectors for vectors, _ in batches])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, embedded.vectors.astype(np.float32))
    for column in columns if file_format != "npy" else ():
        got = [value for _, rows in batches for value in rows[column].tolist()]
        assert got == embedded.rows[column].to_pylist()


def test_faiss_exact(embedded: Embedded) -> None:
    """Vectors come from the buffers that pyarrow read, or from memory maps, and both layouts give one index."""
    index, names = faiss.IndexFlatIP(DIM), []
    for batch in ds.dataset(embedded.parquet).to_batches(columns=["key", "embedding"]):
        vectors = as_matrix(batch["embedding"])
        assert vectors.ctypes.data == batch["embedding"].flatten().buffers()[1].address
        index.add(vectors)
        names += batch["key"].to_pylist()
    embedded.assert_finds(lambda query: [names[row] for row in index.search(query[None], 10)[1][0]])
    mapped = faiss.IndexFlatIP(DIM)
    for file in sorted((embedded.npy / "img_emb").glob("*.npy")):
        mapped.add(np.load(file, mmap_mode="r"))
    np.testing.assert_array_equal(mapped.reconstruct_n(), index.reconstruct_n())


@pytest.mark.parametrize("kind", ["HNSW32", "IVF4,Flat"])
def test_faiss_approximate(embedded: Embedded, kind: str) -> None:
    vectors = as_matrix(ds.dataset(embedded.parquet).to_table()["embedding"])
    index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.ParameterSpace().set_index_parameter(index, *(("nprobe", 3) if "IVF" in kind else ("efSearch", 64)))
    embedded.assert_finds(lambda query: [embedded.keys[row] for row in index.search(query[None], 10)[1][0]], recall=0.9)


def test_usearch(embedded: Embedded) -> None:
    """Both precisions are stored as they are. (One thread: the graph of several now and then loses a row.)"""
    vectors = as_matrix(ds.dataset(embedded.parquet).to_table()["embedding"])
    index = Index(ndim=DIM, metric="cos", dtype={"float32": "f32", "float16": "f16"}[embedded.dtype])
    index.add(np.arange(len(vectors)), vectors, threads=1)
    np.testing.assert_array_equal(index.get(np.arange(len(vectors)), dtype=embedded.dtype), embedded.vectors)
    for exact, recall in ((True, 1.0), (False, 0.9)):
        embedded.assert_finds(
            lambda query, exact=exact: [embedded.keys[row] for row in index.search(query, 10, exact=exact).keys],
            recall=recall,
        )


def test_lancedb(embedded: Embedded, tmp_path: Path) -> None:
    """The folder becomes a table of the same columns, searched with the key coming back; it grows with the folder."""
    table = lancedb.connect(tmp_path).create_table("images", ds.dataset(embedded.parquet / "a"))
    for _ in range(2):
        merge = table.merge_insert(["shard", "index"]).when_matched_update_all().when_not_matched_insert_all()
        merge.execute(ds.dataset(embedded.parquet))
        assert sorted(table.to_arrow()["key"].to_pylist()) == embedded.keys
    there = table.schema.field("embedding").type
    assert (there.value_type, there.list_size) == (TYPES[embedded.dtype], DIM)
    assert sorted(table.to_arrow()["json"].to_pylist(), key=str) == sorted(embedded.rows["json"].to_pylist(), key=str)

    def search(query: np.ndarray, where: str = "true") -> list[str]:
        found = table.search(query).distance_type("cosine").where(where, prefilter=True).limit(10)
        return found.to_arrow()["key"].to_pylist()

    embedded.assert_finds(search)
    query = embedded.vectors[4]
    assert embedded.recall(query, search(query, "cls = '1'"), among="1") == 1


def test_duckdb(embedded: Embedded) -> None:
    """A glob is a table; its vectors cast to arrays of fixed length, which half precision does as well."""
    rows = f"SELECT *, embedding::FLOAT[{DIM}] AS vector FROM read_parquet('{embedded.parquet}/**/*.parquet')"
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE images AS {rows}")

        def search(query: np.ndarray, where: str = "true") -> list[str]:
            order = f"array_cosine_similarity(vector, ?::FLOAT[{DIM}]) DESC"
            statement = f"SELECT key FROM images WHERE {where} ORDER BY {order} LIMIT 10"
            return [key for (key,) in connection.execute(statement, [query.tolist()]).fetchall()]

        embedded.assert_finds(search)
        query = embedded.vectors[4]
        assert embedded.recall(query, search(query, "cls = '1'"), among="1") == 1
        joined = f"images JOIN '{embedded.npy}/metadata/*.parquet' USING (shard, index, key, cls)"
        assert connection.execute(f"SELECT count(*) FROM {joined}").fetchone() == (len(embedded.keys),)


def snippets() -> dict[str, str]:
    """Return the Python of docs/indexing.md by heading."""
    found = {}
    for section in re.split(r"^## ", DOCS.read_text(encoding="utf-8") if DOCS.exists() else "", flags=re.M)[1:]:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S), 1):
            found[f"{section.partition(chr(10))[0]} {number}"] = code
    return found


@pytest.mark.source
def test_each_reader_has_a_snippet() -> None:
    names = {name.rpartition(" ")[0] for name in snippets()}
    assert names >= {"pyarrow", "embedding-reader", "faiss", "usearch", "LanceDB", "DuckDB"}


@pytest.mark.source
@pytest.mark.parametrize("name", snippets())
def test_snippets(embedded: Embedded, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each snippet runs as it is printed, and leaves what it says."""
    shutil.copytree(embedded.parquet, tmp_path / "embeddings")
    shutil.copytree(embedded.npy, tmp_path / "embeddings-npy")
    # Rows that no record speaks of.
    committed = name.startswith("Only what is committed")
    if committed:
        shutil.copy(tmp_path / "embeddings" / "z.parquet", tmp_path / "embeddings" / "zz.parquet")
    monkeypatch.chdir(tmp_path)
    left: dict[str, Any] = {}
    exec(compile(snippets()[name], f"docs/indexing.md: {name}", "exec"), left)
    if committed:
        assert left["table"]["key"].to_pylist() == embedded.keys
    elif name.startswith("Keys without an embedding"):
        assert left["reasons"] == {"no_image": 1}
    else:
        query, keys = left["query"], left["keys"]
        np.testing.assert_allclose(
            np.ravel(query), embedded.vectors[embedded.keys.index(keys[0])], atol=TOLERANCE[embedded.dtype]
        )
        assert embedded.recall(query, keys, among="1" if "cls = '1'" in snippets()[name] else None) >= 0.9
