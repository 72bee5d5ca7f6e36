"""The pipeline of embedding: read -> decode -> run -> write. Rows come out in order, shard after shard.

1  processes read and decode chunks of images straight into the batches of a ring (decoding.py)
2  the oldest batch that is full goes to the session, and its place in the ring is free again when its rows are there
3  rows go to the writer, in a thread of its own (writing.py)

The ring is what bounds all of it: nothing is read ahead of a free batch. A batch holds images of one shard only, the
last one of a shard is padded to a power of two, so what a row is computed with depends on its shard alone.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from maekit.embedding.decode_pool import Chunk, Decoded, DecodePool, Place, Rejected, Ring
from maekit.embedding.inputs import Images
from maekit.embedding.session import Embeddings, EncoderSession
from maekit.images import Pixels
from maekit.providers import CPU

_SMALLEST_CHUNK, _LARGEST_CHUNK = 4, 32
_GLANCE_SECONDS = 0.2  # how long is waited before looking round


@dataclass(frozen=True)
class Opened:
    """A shard that is ready to be embedded.

    Attributes:
        images: what is in it.
        ordinals: which of them are meant.
    """

    images: Images
    ordinals: Sequence[int]


@dataclass
class Part:
    """What came of some consecutive samples of a shard.

    Attributes:
        shard: the shard.
        positions: places in its `ordinals` of the samples that have a row, in order.
        embeddings: float32 `[rows, dim]`.
        refused: position, reason code and detail of those that have none.
        crcs: of the bytes of all images in it, with their positions.
        failure: why the shard cannot be read to its end; then nothing of it counts.
        is_last: whether it ends the shard.
    """

    shard: Opened
    positions: list[int]
    embeddings: Embeddings
    refused: list[Rejected]
    crcs: list[tuple[int, int]]
    failure: str | None
    is_last: bool


@dataclass
class Timing:
    """Where the time went, in seconds.

    Attributes:
        decoding: of CPU time in all decoding processes together.
        running: in the session.
        writing: in the writer.
        samples: that came through, those without an image included.
        images: embedded.
        rows: written.
        bytes: of the input, as far as it has been worked through.
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
    """Some samples of one shard on their way.

    Attributes:
        shard: the shard.
        positions: of the samples whose images go to the rows of the batch, in order.
        imageless: positions of samples without an image, among or behind them.
        is_last: whether it ends the shard.
        slot: its place in the ring.
        chunks: being decoded.
    """

    shard: Opened
    positions: list[int]
    imageless: list[int]
    is_last: bool
    slot: int = -1
    chunks: list["Future[Decoded]"] = field(default_factory=list)


class EmbeddingPipeline:
    """Embeds shards one after the other, decoding ahead.

    Args:
        session: the encoder.
        pool: decodes.
        batch_size: images per run of the session.
        concurrency: batches in the session at once.

    Raises:
        MaekitError: there is no memory for the ring.
    """

    def __init__(self, session: EncoderSession, pool: DecodePool, *, batch_size: int, concurrency: int = 1) -> None:
        self._session, self._pool, self._batch_size, self._concurrency = session, pool, batch_size, concurrency
        self._chunk = min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, batch_size // 8))
        # Besides those in the session: one being filled, and enough for each process to have the next chunk waiting.
        ahead = 1 + max(2, -(-2 * pool.workers * self._chunk // batch_size))
        self._ring = Ring(concurrency + ahead, batch_size, session.description.preprocess.size)
        self._free = deque(range(concurrency + ahead))
        self._failed: set[int] = set()
        self._decoding: deque[_Batch] = deque()
        self._running: deque[tuple[_Batch, list[Decoded], Future[Embeddings]]] = deque()
        self.timing = Timing()
        pool.use(self._ring, session.description.preprocess, yielding=session.provider == CPU)

    def run(self, shards: Iterable[Opened | None]) -> Generator[Part | None, None, None]:
        """Yield what comes of each shard in order, and None now and then, so that the caller can stop there.

        Args:
            shards: asked for as decoding comes to them; None where the next one is not there yet.

        Raises:
            OutOfMemory: a batch is too large for the device.
            MaekitError: the session failed, or decoding processes keep dying.
        """
        with ThreadPoolExecutor(self._concurrency, "session") as runner:
            try:
                for shard in shards:
                    if shard is None:
                        yield self._advance(runner) if self._decoding or self._running else None
                        continue
                    for batch in self._batches(shard):
                        while not self._free:
                            yield self._advance(runner)
                        self._fill(batch)
                while self._decoding or self._running:
                    yield self._advance(runner)
            finally:
                chunks = [chunk for batch in self._decoding for chunk in batch.chunks]
                wait([chunk for chunk in chunks if not chunk.cancel()])  # they read from shards that are closed next
                self._ring.close()

    def give_up(self, images: Images) -> None:
        """Let nothing more come of a shard."""
        self._failed.add(images.number)

    def _batches(self, shard: Opened) -> Iterator[_Batch]:
        """Yield the batches of a shard; the last one of a shard without images is empty."""
        positions: list[int] = []
        imageless: list[int] = []
        for position, ordinal in enumerate(shard.ordinals):
            if shard.images.place(ordinal) is None:
                imageless.append(position)
                continue
            if len(positions) == self._batch_size:
                yield _Batch(shard, positions, imageless, is_last=False)
                positions, imageless = [], []
                if shard.images.number in self._failed:
                    return
            positions.append(position)
        yield _Batch(shard, positions, imageless, is_last=True)

    def _fill(self, batch: _Batch) -> None:
        """Have a batch decoded into a free place of the ring."""
        batch.slot = self._free.popleft()
        images = batch.shard.images
        places: list[Place] = []
        for position in batch.positions:
            place = images.place(batch.shard.ordinals[position])
            assert place is not None
            places.append(place)
        for start in range(0, len(places), self._chunk):
            chunk = Chunk(batch.slot, start, images, places[start : start + self._chunk])
            batch.chunks.append(self._pool.submit(chunk))
        self._decoding.append(batch)

    def _advance(self, runner: ThreadPoolExecutor) -> Part | None:
        """Bring the oldest batches one step further."""
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
        self.timing.decoding += sum(chunk.seconds for chunk in decoded)
        self._running.append((batch, decoded, runner.submit(self._embed, batch, decoded)))
        return None

    def _embed(self, batch: _Batch, decoded: list[Decoded]) -> Embeddings:
        """Run one batch: -> float32 `[rows, dim]`, without those that were refused."""
        refused = [refusal.row for chunk in decoded for refusal in chunk.refused]
        count = len(batch.positions)
        is_failed = any(chunk.failure is not None for chunk in decoded)
        if is_failed or count == len(refused) or batch.shard.images.number in self._failed:
            return np.empty((0, self._session.description.dim), np.float32)
        started = time.perf_counter()
        pixels = self._ring.batches[batch.slot]
        pixels[refused] = 0  # what an earlier batch left there must not matter
        rows = embed_padded(self._session, pixels, count)
        self.timing.running += time.perf_counter() - started
        return np.delete(rows, refused, axis=0) if refused else rows

    def _finish(self, batch: _Batch, decoded: list[Decoded], embeddings: Embeddings) -> Part | None:
        self._free.append(batch.slot)
        images = batch.shard.images
        if images.number in self._failed:
            return None  # told already
        failure = next((chunk.failure for chunk in decoded if chunk.failure is not None), None)
        if failure is not None:
            self._failed.add(images.number)
            return Part(batch.shard, [], embeddings, [], [], failure, is_last=True)
        crcs = [crc for chunk in decoded for crc in chunk.crcs]
        refusals = {r.row: r for chunk in decoded for r in chunk.refused}
        refused = [refusals[row]._replace(row=batch.positions[row]) for row in refusals]
        refused += [Rejected(position, "no_image", "no member with an image extension") for position in batch.imageless]
        kept = [position for row, position in enumerate(batch.positions) if row not in refusals]
        samples = len(batch.positions) + len(batch.imageless)
        self.timing.samples += samples
        self.timing.images += len(kept)
        self.timing.bytes += images.size * samples / max(1, len(batch.shard.ordinals))
        crcs_by_position = list(zip(batch.positions, crcs, strict=True))
        return Part(batch.shard, kept, embeddings, refused, crcs_by_position, None, batch.is_last)


def embed_padded(session: EncoderSession, pixels: Pixels, count: int) -> Embeddings:
    """Run the first `count` images of a batch, padded to the next power of two: -> float32 `[count, dim]`.

    Few sizes mean few memory plans on a GPU; powers of two mean that a small shard does not pay for a full batch.

    Args:
        session: the encoder.
        pixels: uint8 `[batch_size, H, W, 3]`; rows behind `count` are set to zero.
        count: images.
    """
    size = min(len(pixels), 1 << (count - 1).bit_length())
    pixels[count:size] = 0
    return session(pixels[:size])[:count]
