"""The pipeline of embedding: read -> decode -> run -> write. Rows come out in order, shard after shard.

1  processes read and decode chunks of images directly into the batches of a ring (decode_pool.py)
2  the oldest full batch goes to the session; its slot in the ring is free again when its rows are computed
3  rows go to the writer, which has its own thread (writer.py)

The ring bounds memory and read-ahead: nothing is read without a free batch. A batch holds images of one shard only, and
the last batch of a shard is padded to a power of two, so the batch that computes a row depends on its shard alone.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from maekit.embedding.decode_pool import Chunk, Decoded, DecodePool, Rejected, Ring
from maekit.embedding.inputs import Images, Location, OpenPart
from maekit.embedding.session import Embeddings, EncoderSession
from maekit.images import Pixels
from maekit.providers import runs_on_cpu
from maekit.system.errors import ImageError

_SMALLEST_CHUNK, _LARGEST_CHUNK = 4, 32
_GLANCE_SECONDS = 0.2  # how long to wait before yielding to the caller


@dataclass
class Result:
    """Result of consecutive samples of a part.

    Attributes:
        part: the part.
        positions: positions in `part.ordinals` of the samples with a row, in order.
        embeddings: float32 `[rows, dim]`.
        refused: the samples without a row; `row` is the position in `part.ordinals`.
        crcs: (position, CRC-32 of the image's bytes) of each image.
        is_last: whether it ends the part.
        failure: why the part cannot be read to its end; then the whole part is discarded.
    """

    part: OpenPart
    positions: list[int]
    embeddings: Embeddings
    refused: list[Rejected]
    crcs: list[tuple[int, int]]
    is_last: bool
    failure: str | None = None


@dataclass
class Timing:
    """Time spent in each stage, in seconds, and amounts of work done.

    Attributes:
        decoding: CPU time of all decoding processes together.
        running: time in the session.
        writing: time in the writer.
        samples: samples processed, including those without an image.
        images: images embedded.
        rows: rows written.
        bytes: bytes of the input processed.
    """

    decoding: float = 0.0
    running: float = 0.0
    writing: float = 0.0
    samples: int = 0
    images: int = 0
    rows: int = 0
    bytes: float = 0.0

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class _Batch:
    """Samples of one part that are in the pipeline.

    Attributes:
        part: the part.
        positions: positions of the samples whose images fill the rows of the batch, in order.
        locations: where these images lie.
        refused: samples without an image, among or after them.
        is_last: whether it ends the part.
        slot: its position in the ring.
        chunks: results of decoding its chunks.
    """

    part: OpenPart
    positions: list[int] = field(default_factory=list)
    locations: list[Location] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)
    is_last: bool = False
    slot: int = -1
    chunks: list["Future[Decoded]"] = field(default_factory=list)


class EmbeddingPipeline:
    """Embeds shards one after the other, decoding ahead.

    Args:
        session: the encoder.
        pool: decodes the images.
        batch_size: images per run of the session.
        concurrency: batches in the session at a time.
        timing: the pipeline adds its seconds and images here.

    Raises:
        MaekitError: there is not enough memory for the ring.
    """

    def __init__(
        self, session: EncoderSession, pool: DecodePool, *, batch_size: int, concurrency: int, timing: Timing
    ) -> None:
        self._session, self._pool, self._batch_size, self._concurrency = session, pool, batch_size, concurrency
        self._chunk = min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, batch_size // 8))
        # Besides those in the session: one to fill, and enough that each process has its next chunk waiting.
        ahead = 1 + max(2, -(-2 * pool.workers * self._chunk // batch_size))
        self._ring = Ring(concurrency + ahead, batch_size, session.description.preprocess.size)
        self._free = deque(range(concurrency + ahead))
        self._failed: set[int] = set()
        self._decoding: deque[_Batch] = deque()
        self._running: deque[tuple[_Batch, list[Decoded], Future[Embeddings]]] = deque()
        self._timing = timing
        pool.use(self._ring, session.description.preprocess, yielding=runs_on_cpu(session.provider))

    def run(self, parts: Iterable[OpenPart | None]) -> Generator[Result | None, None, None]:
        """Yield the results of each part in order; a regular None gives the caller a chance to stop.

        Args:
            parts: consumed as decoding reaches them; None while the next one is not ready yet.

        Raises:
            OutOfMemory: a batch is too large for the device.
            MaekitError: the session failed, or decoding processes keep dying.
        """
        with ThreadPoolExecutor(self._concurrency, "session") as runner:
            try:
                for part in parts:
                    if part is None:
                        yield self._advance(runner) if self._decoding or self._running else None
                        continue
                    for batch in self._batches(part):
                        while not self._free:
                            yield self._advance(runner)
                        self._fill(batch)
                while self._decoding or self._running:
                    yield self._advance(runner)
            finally:
                chunks = [chunk for batch in self._decoding for chunk in batch.chunks]
                wait([chunk for chunk in chunks if not chunk.cancel()])  # the caller closes their parts next
                self._ring.close()

    def give_up(self, images: Images) -> None:
        """Yield nothing more of a part."""
        self._failed.add(images.number)

    def _batches(self, part: OpenPart) -> Iterator[_Batch]:
        """Yield the batches of a part; the last one is empty if the part has no images."""
        batch = _Batch(part)
        for position, ordinal in enumerate(part.ordinals):
            try:
                location = part.images.location(ordinal)
            except ImageError as error:
                batch.refused.append(Rejected(position, error.reason, str(error)))
                continue
            if len(batch.positions) == self._batch_size:
                yield batch
                batch = _Batch(part)
                if part.images.number in self._failed:
                    return
            batch.positions.append(position)
            batch.locations.append(location)
        batch.is_last = True
        yield batch

    def _fill(self, batch: _Batch) -> None:
        """Start decoding a batch into a free slot of the ring."""
        batch.slot = self._free.popleft()
        for start in range(0, len(batch.locations), self._chunk):
            chunk = Chunk(batch.slot, start, batch.part.images, batch.locations[start : start + self._chunk])
            batch.chunks.append(self._pool.submit(chunk))
        self._decoding.append(batch)

    def _advance(self, runner: ThreadPoolExecutor) -> Result | None:
        """Advance the oldest batch by one stage."""
        if self._running and (len(self._running) == self._concurrency or not self._decoding):
            batch, decoded, future = self._running[0]
            if wait([future], _GLANCE_SECONDS).not_done:
                return None
            self._running.popleft()
            return self._finish(batch, decoded, future.result())
        batch = self._decoding[0]
        if wait(batch.chunks, _GLANCE_SECONDS).not_done:
            return None
        self._decoding.popleft()
        decoded = [chunk.result() for chunk in batch.chunks]
        self._timing.decoding += sum(chunk.seconds for chunk in decoded)
        self._running.append((batch, decoded, runner.submit(self._embed, batch, decoded)))
        return None

    def _embed(self, batch: _Batch, decoded: list[Decoded]) -> Embeddings:
        """Run one batch: -> float32 `[rows, dim]`, without the rejected images."""
        refused = [refusal.row for chunk in decoded for refusal in chunk.refused]
        count = len(batch.positions)
        is_failed = any(chunk.failure is not None for chunk in decoded)
        if is_failed or count == len(refused) or batch.part.images.number in self._failed:
            return np.empty((0, self._session.description.dim), np.float32)
        started = time.perf_counter()
        pixels = self._ring.batches[batch.slot]
        pixels[refused] = 0  # clear what an earlier batch left there
        rows = embed_padded(self._session, pixels, count)
        self._timing.running += time.perf_counter() - started
        return np.delete(rows, refused, axis=0) if refused else rows

    def _finish(self, batch: _Batch, decoded: list[Decoded], embeddings: Embeddings) -> Result | None:
        self._free.append(batch.slot)
        images = batch.part.images
        if images.number in self._failed:
            return None  # reported already
        failure = next((chunk.failure for chunk in decoded if chunk.failure is not None), None)
        if failure is not None:
            self._failed.add(images.number)
            return Result(batch.part, [], embeddings, refused=[], crcs=[], is_last=True, failure=failure)
        crcs = [crc for chunk in decoded for crc in chunk.crcs]
        refusals = {r.row: r for chunk in decoded for r in chunk.refused}
        refused = [refusals[row]._replace(row=batch.positions[row]) for row in refusals]
        refused += batch.refused
        kept = [position for row, position in enumerate(batch.positions) if row not in refusals]
        samples = len(batch.positions) + len(batch.refused)
        self._timing.samples += samples
        self._timing.images += len(kept)
        self._timing.bytes += images.size * samples / max(1, len(batch.part.ordinals))
        crcs_by_position = list(zip(batch.positions, crcs, strict=True))
        return Result(batch.part, kept, embeddings, refused=refused, crcs=crcs_by_position, is_last=batch.is_last)


def embed_padded(session: EncoderSession, pixels: Pixels, count: int) -> Embeddings:
    """Run the first `count` images of a batch, padded to the next power of two: -> float32 `[count, dim]`.

    Few sizes mean few memory plans on a GPU; with powers of two a small shard does not pay for a full batch.

    Args:
        session: the encoder.
        pixels: uint8 `[batch_size, H, W, 3]`; the rows of padding are set to zero.
        count: number of images.
    """
    size = min(len(pixels), 1 << (count - 1).bit_length())
    pixels[count:size] = 0
    return session(pixels[:size])[:count]
