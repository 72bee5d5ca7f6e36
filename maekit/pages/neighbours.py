"""`maekit neighbours`: the nearest neighbours of some queries by their embeddings, as one HTML page."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maekit.config.pages import NeighboursConfig
from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.embedder import Embedder
from maekit.embedding.inputs import Images, Part, TarPart, find_inputs, read_image
from maekit.embedding.stored import EmbeddedShard, EmbeddingFolder, is_made_from
from maekit.images import Pixels, open_rgb
from maekit.pages import html
from maekit.pages.html import Html
from maekit.pages.thumbnails import nearest_others, thumbnail
from maekit.shards.cache import RemoteCache
from maekit.system import files
from maekit.system.errors import ImageError, InputError, MaekitError
from maekit.system.progress import Progress, Silent

_SIDE = 192  # pixels of a picture, the longer side
_MOST_QUERIES = 100
_SHOWN = 3  # keys in a message


@dataclass(frozen=True)
class Row:
    """One embedding.

    Attributes:
        shard: name of the shard.
        key: key within the shard.
        index: position of the sample in the shard.
    """

    shard: str
    key: str
    index: int

    @property
    def name(self) -> str:
        """SHARD:KEY."""
        return f"{self.shard}:{self.key}"


@dataclass(frozen=True)
class Neighbour(Row):
    """A row near a query.

    Attributes:
        cosine: cosine similarity of row and query.
    """

    cosine: float


@dataclass(frozen=True)
class Query:
    """A query and its neighbours.

    Attributes:
        query: the query as given.
        row: the row that it names; None for an image.
        neighbours: nearest first, without the query's own row.
    """

    query: str
    row: Row | None
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class NeighboursResult:
    """Result of the search; `--json` prints it.

    Attributes:
        path: the page.
        rows: number of embeddings searched.
        queries: the queries, in the order given.
    """

    path: str
    rows: int
    queries: tuple[Query, ...]


def neighbours(config: NeighboursConfig, progress: Progress | None = None) -> NeighboursResult:
    """Find the nearest rows of each query by exact cosine search, and write them as a page.

    Holds the embeddings of one shard in memory at a time.

    Args:
        config: the embeddings, the queries, and what the page shows.
        progress: receives progress updates.

    Raises:
        InputError: no embeddings, no such row or image, a model or shards that do not belong to the embeddings.
        MaekitError: an embedding cannot be read, or the page cannot be written.
    """
    progress, queries = progress or Silent(), config.queries
    config.validate()
    if not 1 <= len(queries) <= _MOST_QUERIES:
        raise InputError(f"{len(queries)} queries: give at least 1, and at most {_MOST_QUERIES} (`queries` KEY|IMAGE)")
    out = html.output_path(config.out, ".html")
    folder = EmbeddingFolder(Path(config.embeddings))
    parts = find_inputs(config.shards) if config.shards else []
    wanted = _find_queries(folder, queries, config.model)
    files.require_writable(out.parent)
    results = _search(folder, wanted, config.k, progress)
    pictures = _pictures(folder, parts, results, progress) if parts else {}
    if parts and not pictures:
        raise InputError(f"`shards` {', '.join(config.shards)}: {folder.path} was made of none of these")
    about = f"{folder.path}: {folder.rows:,} embeddings, exact search by cosine"
    if parts:
        body = [_drawn(query, given.image, pictures) for query, given in zip(results, wanted, strict=True)]
    else:
        body = [html.note("Without pictures: the shards that were embedded were not named."), *map(_listed, results)]
        progress.note("no `shards` were given: the page shows names and no pictures")
    files.write_atomically(out, html.document("Nearest neighbours", about, body))
    return NeighboursResult(str(out), folder.rows, results)


@dataclass(frozen=True)
class _Wanted:
    """A query and its embedding, `[d]`, with either its row and that row's number over all shards, or its image."""

    text: str
    vector: NDArray[np.float32]
    row: Row | None = None
    number: int | None = None
    image: Pixels | None = None


def _find_queries(folder: EmbeddingFolder, queries: Sequence[str], model: str | None) -> list[_Wanted]:
    """Return the queries with their embeddings; a query that names no row is read as an image file.

    Raises:
        InputError: a query is neither a row nor a file, or names several rows.
    """
    found: dict[str, list[_Wanted]] = {query: [] for query in queries}
    first: list[str] = []
    start = 0
    for shard in folder.shards():
        name = shard.record.shard
        first += [f"{name}:{key}" for key in shard.keys[: _SHOWN - len(first)]]
        positions = {key: i for i, key in enumerate(shard.keys)}
        for query, rows in found.items():
            for key in {query, query.removeprefix(f"{name}:")} & positions.keys():
                i = positions[key]
                rows.append(_Wanted(query, shard.vectors[i].copy(), _row(shard, i), start + i))
        start += shard.record.rows
    embedder: Embedder | None = None
    for query, rows in found.items():
        if len(rows) > 1:
            names = [row.row.name for row in rows if row.row]
            raise InputError(f"`queries` {query}: {len(rows)} rows have this key; name one, as in `queries` {names[0]}")
        if not rows:
            if not os.path.isfile(query):
                raise InputError(
                    f"`queries` {query}: no such row, and no such file; the first rows are {', '.join(first)}"
                )
            embedder = embedder or _load_embedder(folder, model)
            rows.append(_embedded(query, embedder))
    return [found[query][0] for query in queries]


def _load_embedder(folder: EmbeddingFolder, model: str | None) -> Embedder:
    """Load the model that made the embeddings.

    Raises:
        InputError: it was not given, cannot be read, or is another model.
    """
    if model is None:
        raise InputError("a query is an image: name the file that made the embeddings, `model` ENCODER.ONNX")
    with files.reading(f"`model` {model}", InputError):
        digest = files.sha256_file(Path(model))  # first: a file that is another one may not even load
    if digest == folder.model:
        embedder = Embedder(model, device="cpu")  # a few images do not justify the start-up time of a GPU
        if (digest := embedder.sha256) == folder.model:
            return embedder
    raise InputError(
        f"`model` {model} is not the file that made {folder.path}: the SHA-256 of the one begins "
        f"with {digest[:12]}, of the other with {folder.model[:12]}"
    )


def _embedded(path: str, embedder: Embedder) -> _Wanted:
    """Embed an image file.

    Raises:
        InputError: it cannot be read, or is no image.
    """
    try:
        data = Path(path).read_bytes()
        image = thumbnail(np.asarray(open_rgb(data, at_least=(_SIDE, _SIDE))), _SIDE)
        return _Wanted(path, embedder(data)[0], image=image)
    except OSError as error:
        raise InputError(f"`queries` {path}: cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise InputError(f"`queries` {path} has no embedding: {error.reason}, {error.detail}") from error


def _search(folder: EmbeddingFolder, wanted: Sequence[_Wanted], k: int, progress: Progress) -> tuple[Query, ...]:
    """Return the k nearest rows of each query."""

    def blocks() -> Iterator[NDArray[np.float32]]:
        done = 0
        for shard in folder.shards():
            yield shard.vectors
            done += len(shard.vectors)
            progress.advance(done)

    progress.start("search", folder.rows)
    vectors, own = np.stack([query.vector for query in wanted]), [query.number for query in wanted]
    found = nearest_others(vectors, own, blocks(), k)
    progress.stop()
    rows = _rows(folder, {number for near in found for number, _ in near})
    return tuple(
        Query(query.text, query.row, tuple(Neighbour(**vars(rows[number]), cosine=cosine) for number, cosine in near))
        for query, near in zip(wanted, found, strict=True)
    )


def _rows(folder: EmbeddingFolder, numbers: set[int]) -> dict[int, Row]:
    """Return the rows with these numbers; reads only the shards that hold them."""
    found: dict[int, Row] = {}
    start = 0
    for record in folder.records:
        inside = [number for number in numbers if start <= number < start + record.rows]
        if inside:
            shard = folder.read(record)
            found |= {number: _row(shard, number - start) for number in inside}
        start += record.rows
    return found


def _row(shard: EmbeddedShard, i: int) -> Row:
    return Row(shard.record.shard, shard.keys[i], int(shard.ordinals[i]))


def _pictures(
    folder: EmbeddingFolder, parts: Sequence[Part], queries: Sequence[Query], progress: Progress
) -> dict[tuple[str, int], Pixels]:
    """Return the picture of each shown row by (shard, position), for the shards that are among `parts`."""
    shown = {(row.shard, row.index) for query in queries for row in (query.row, *query.neighbours) if row}
    found: dict[tuple[str, int], Pixels] = {}
    remote = RemoteCache()
    records = {record.shard: record for record in folder.records}
    for shard, samples in itertools.groupby(sorted(shown), key=itemgetter(0)):
        images = _open(records[shard], parts, remote)
        if images is None:
            progress.note(f"{shard}: not among `shards`, or no longer what was embedded; shown without pictures")
            continue
        with contextlib.closing(images):
            for _, ordinal in samples:
                if not 0 <= ordinal < images.samples:
                    continue
                try:
                    data = read_image(images.descriptor, images.name, images.location(ordinal))
                    image = open_rgb(data, at_least=(_SIDE, _SIDE))
                except ImageError as error:
                    progress.note(f"{shard}:{images.key(ordinal)}: shown without picture: {error}")
                    continue
                found[shard, ordinal] = thumbnail(np.asarray(image), _SIDE)
    return found


def _open(record: CommitRecord, parts: Sequence[Part], remote: RemoteCache) -> Images | None:
    """Open the images that a shard's embeddings were made of: the part of its name, or one with the same digest."""
    same = [part for part in parts if part.name == record.shard]
    others = [part for part in parts if part.name != record.shard and not part.is_remote]  # no trial downloads
    chosen = record.options.get("image")
    for part in (*same, *others):
        try:
            images = (replace(part, image=chosen) if isinstance(part, TarPart) else part).open(remote)
        except MaekitError:  # damaged or deleted
            continue
        if is_made_from(record, part, images):
            return images
        images.close()
    return None


def _listed(query: Query) -> Html:
    """Return a query and its neighbours as a table."""
    rows = [(f"{n.cosine:.4f}", n.key, n.shard, str(n.index)) for n in query.neighbours]
    return html.section(_title(query), html.table(("cosine", "key", "shard", "place"), rows, numbers=(0, 3)))


def _drawn(query: Query, image: Pixels | None, pictures: Mapping[tuple[str, int], Pixels]) -> Html:
    """Return a query, whose image is given unless it is a row, and its neighbours as pictures."""
    if query.row:
        image = pictures.get((query.row.shard, query.row.index))
    near = [
        (_image(pictures.get((n.shard, n.index)), n.name), f"{n.cosine:.4f} {n.key} ({n.shard})")
        for n in query.neighbours
    ]
    title = _title(query)
    return html.section(title, html.neighbours(_image(image, f"query: {title}"), "the query", near, named=True))


def _title(query: Query) -> str:
    return query.row.name if query.row else query.query


def _image(pixels: Pixels | None, alt: str) -> Html:
    return html.blank("no picture") if pixels is None else html.picture(pixels, alt)
