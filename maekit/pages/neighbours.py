"""`maekit neighbours`: the images whose embeddings are nearest to those of some queries, as one HTML page."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maekit.config.pages import NeighboursConfig
from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.embedder import Embedder
from maekit.embedding.inputs import Images, Part, find_inputs, read_place
from maekit.embedding.stored import EmbeddedShard, EmbeddingFolder, is_made_from
from maekit.images import Pixels, open_rgb
from maekit.pages import html
from maekit.pages.html import Html
from maekit.pages.thumbnails import thumbnail, without
from maekit.shards.cache import RemoteCache
from maekit.system import files
from maekit.system.errors import ImageError, InputError, MaekitError
from maekit.system.progress import Progress, Silent
from maekit.vectors.nearest import nearest

_SIDE = 192  # pixels of a picture, the longer side
_MOST_QUERIES = 100
_SHOWN = 3  # keys in a message
_CACHE_BYTES = 50 * 10**9


@dataclass(frozen=True)
class Row:
    """One embedding.

    Attributes:
        shard: its name.
        key: within the shard.
        index: place in the shard.
    """

    shard: str
    key: str
    index: int


@dataclass(frozen=True)
class Neighbour(Row):
    """A row near a query.

    Attributes:
        cosine: of the angle between the two.
    """

    cosine: float


@dataclass(frozen=True)
class Query:
    """What was looked for, and what was found.

    Attributes:
        query: as it was given.
        row: the row that it names; None where it is an image.
        neighbours: nearest first, without that row.
    """

    query: str
    row: Row | None
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class NeighboursResult:
    """What was found; `--json` prints it.

    Attributes:
        path: the page.
        rows: embeddings that were compared with.
        queries: in the order given.
    """

    path: str
    rows: int
    queries: tuple[Query, ...]


def neighbours(config: NeighboursConfig, progress: Progress | None = None) -> NeighboursResult:
    """Find the nearest rows of each query by cosine, exactly, and write them as a page.

    One shard's embeddings are in memory at a time.

    Args:
        config: the embeddings, the queries, and what is shown.
        progress: is told of what goes on.

    Raises:
        InputError: no embeddings, no such row or image, another model than theirs, shards that are others.
        MaekitError: an embedding cannot be read, or the page cannot be written.
    """
    progress, out, queries = progress or Silent(), Path(config.out), config.queries
    config.validate()
    if not 1 <= len(queries) <= _MOST_QUERIES:
        raise InputError(f"{len(queries)} queries: give at least 1, and at most {_MOST_QUERIES} (`queries` KEY|IMAGE)")
    if out.suffix.lower() != ".html":
        raise InputError(f"`out` {out}: must end in .html")
    if out.is_dir():
        raise InputError(f"`out` {out}: is a directory")
    folder = EmbeddingFolder(Path(config.embeddings))
    parts = find_inputs(config.shards) if config.shards else []
    wanted = _vectors(folder, queries, config.model)
    files.require_writable(out.parent)
    progress.start("search", folder.rows)
    vectors = np.stack([query.vector for query in wanted])
    cosines, numbers = nearest(vectors, _advancing(folder, progress), config.k + 1)
    progress.stop()
    found = [
        without(query.number, near, cosine, config.k)
        for query, near, cosine in zip(wanted, numbers, cosines, strict=True)
    ]
    named = _rows(folder, {number for near in found for number, _ in near})
    results = tuple(
        Query(
            query.text,
            query.row,
            tuple(Neighbour(row.shard, row.key, row.index, cosine) for row, cosine in _rows_of(near, named)),
        )
        for query, near in zip(wanted, found, strict=True)
    )
    pictures = _pictures(folder, parts, results, progress) if parts else {}
    if parts and not pictures:
        raise InputError(f"`shards` {', '.join(config.shards)}: {folder.path} was made of none of these")
    about = f"{folder.path}: {folder.rows:,} embeddings, exact search by cosine"
    body = [_shown(query, given.image, pictures, bool(parts)) for query, given in zip(results, wanted, strict=True)]
    if not parts:
        body.insert(0, html.note("Without pictures: the shards that were embedded were not named."))
        progress.note("no `shards` were given: the page shows names and no pictures")
    files.write_atomically(out, html.document("Nearest neighbours", about, body))
    return NeighboursResult(str(out), folder.rows, results)


@dataclass(frozen=True)
class _Wanted:
    """A query with its embedding, `[d]`; the row that it is, and that row's number over all shards; or its image."""

    text: str
    vector: NDArray[np.float32]
    row: Row | None = None
    number: int | None = None
    image: Pixels | None = None


def _vectors(folder: EmbeddingFolder, queries: Sequence[str], model: str | None) -> list[_Wanted]:
    """Return the queries with their embeddings: rows first, image files where there is no such row.

    Raises:
        InputError: a query is neither, or names several rows.
    """
    found: dict[str, list[_Wanted]] = {query: [] for query in queries}
    first: list[str] = []
    start = 0
    for shard in folder.shards():
        name = shard.record.shard
        if len(first) < _SHOWN:
            first += [f"{name}:{key}" for key in shard.keys[: _SHOWN - len(first)]]
        places = {key: i for i, key in enumerate(shard.keys)}
        for query, rows in found.items():
            for key in {query, query.removeprefix(f"{name}:")}:
                if (i := places.get(key)) is not None:
                    rows.append(_Wanted(query, shard.vectors[i].copy(), _row(shard, i), start + i))
        start += shard.record.rows
    embed = _ImageEmbedder(folder, model)
    wanted = []
    for query in queries:
        rows = found[query]
        if len(rows) > 1:
            names = [f"{w.row.shard}:{w.row.key}" for w in rows[:_SHOWN] if w.row]
            raise InputError(f"`queries` {query}: {len(rows)} rows have this key; name one, as in `queries` {names[0]}")
        if not rows and not os.path.isfile(query):
            raise InputError(f"`queries` {query}: no such row, and no such file; the first rows are {', '.join(first)}")
        wanted.append(rows[0] if rows else embed(query))
    return wanted


class _ImageEmbedder:
    """Embeds image files by the model that made the embeddings; loads it for the first of them."""

    def __init__(self, folder: EmbeddingFolder, model: str | None) -> None:
        self._folder, self._model = folder, model

    @cached_property
    def _embedder(self) -> Embedder:
        if self._model is None:
            raise InputError("a query is an image: name the file that made the embeddings, `model` ENCODER.ONNX")
        try:
            digest = files.sha256_file(Path(self._model))
        except OSError as error:
            raise InputError(f"`model` {self._model}: cannot be read: {error.strerror or error}") from error
        if digest != self._folder.model:
            raise InputError(
                f"`model` {self._model} is not the file that made {self._folder.path}: the SHA-256 of the one begins "
                f"with {digest[:12]}, of the other with {self._folder.model[:12]}"
            )
        return Embedder(self._model, device="cpu")  # for a few images a GPU is not worth its start

    def __call__(self, path: str) -> _Wanted:
        try:
            data = Path(path).read_bytes()
            vector = self._embedder(data)[0]
            image = thumbnail(np.asarray(open_rgb(data, at_least=(_SIDE, _SIDE))), _SIDE)
        except OSError as error:
            raise InputError(f"`queries` {path}: cannot be read: {error.strerror or error}") from error
        except ImageError as error:
            raise InputError(f"`queries` {path} is no readable image: {error.reason}, {error}") from error
        return _Wanted(path, vector, image=image)


def _advancing(folder: EmbeddingFolder, progress: Progress) -> Iterator[NDArray[np.float32]]:
    done = 0
    for shard in folder.shards():
        yield shard.vectors
        done += len(shard.vectors)
        progress.advance(done)


def _row(shard: EmbeddedShard, i: int) -> Row:
    return Row(shard.record.shard, shard.keys[i], int(shard.ordinals[i]))


def _rows(folder: EmbeddingFolder, numbers: set[int]) -> dict[int, Row]:
    """Return the rows of these numbers; only the shards that hold them are read."""
    found: dict[int, Row] = {}
    start = 0
    for record in folder.records:
        inside = [number for number in numbers if start <= number < start + record.rows]
        if inside:
            shard = folder.read(record)
            found |= {number: _row(shard, number - start) for number in inside}
        start += record.rows
    return found


def _rows_of(near: list[tuple[int, float]], named: Mapping[int, Row]) -> Iterator[tuple[Row, float]]:
    return ((named[number], cosine) for number, cosine in near)


def _pictures(
    folder: EmbeddingFolder, parts: Sequence[Part], queries: Sequence[Query], progress: Progress
) -> dict[tuple[str, int], Pixels]:
    """Return a picture of each row shown, by shard and place in it, where the shard is among `parts`."""
    rows: dict[str, set[int]] = {}
    for query in queries:
        for row in (*query.neighbours, *([query.row] if query.row else [])):
            rows.setdefault(row.shard, set()).add(row.index)
    found: dict[tuple[str, int], Pixels] = {}
    remote = RemoteCache(_CACHE_BYTES)
    records = {record.shard: record for record in folder.records}
    for shard, ordinals in rows.items():
        images = _open(records[shard], parts, remote)
        if images is None:
            progress.note(f"{shard}: not among `shards`, or no longer what was embedded; shown without pictures")
            continue
        with contextlib.closing(images):
            for ordinal in sorted(ordinals):
                place = images.place(ordinal) if 0 <= ordinal < images.samples else None
                if place is None:
                    continue
                try:
                    image = open_rgb(read_place(images, place), at_least=(_SIDE, _SIDE))
                except ImageError as error:
                    progress.note(f"{shard}:{images.key(ordinal)}: shown without picture: {error}")
                    continue
                found[shard, ordinal] = thumbnail(np.asarray(image), _SIDE)
    return found


def _open(record: CommitRecord, parts: Sequence[Part], remote: RemoteCache) -> Images | None:
    """Return what a shard's embeddings were made of: the part of its name, or any with the digest of its index."""
    same = [part for part in parts if part.name == record.shard]
    others = [part for part in parts if part.name != record.shard and not part.is_remote]  # none is fetched on trial
    for part in (*same, *others):
        try:
            images = part.open(remote)
        except MaekitError:  # damaged, or gone
            continue
        if is_made_from(record, part, images):
            return images
        images.close()
    return None


def _shown(query: Query, image: Pixels | None, pictures: Mapping[tuple[str, int], Pixels], with_pictures: bool) -> Html:
    title = f"{query.row.shard}:{query.row.key}" if query.row else query.query
    if not with_pictures:
        rows = [(f"{n.cosine:.4f}", n.key, n.shard, str(n.index)) for n in query.neighbours]
        return html.section(title, html.table(("cosine", "key", "shard", "place"), rows, numbers=(0, 3)))
    if query.row:
        image = pictures.get((query.row.shard, query.row.index))
    near = [
        (_image(pictures.get((n.shard, n.index)), f"{n.shard}:{n.key}"), f"{n.cosine:.4f} {n.key} ({n.shard})")
        for n in query.neighbours
    ]
    return html.section(title, html.neighbours(_image(image, f"query: {title}"), "the query", near, named=True))


def _image(pixels: Pixels | None, alt: str) -> Html:
    return html.blank("no picture") if pixels is None else html.picture(pixels, alt)
