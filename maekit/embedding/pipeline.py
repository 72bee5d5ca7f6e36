"""The pipeline of embedding: read -> decode -> batch -> run. Rows come out in tar order, shard after shard.

1  chunks of samples are read and decoded by a pool of threads (Pillow decodes without the interpreter's lock), a
bounded number ahead, across the borders of shards
2  decoded images of one shard fill batches of one size; the last one of a shard is padded to a power of two
3  the session runs a batch while the pool decodes the next ones
"""

import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from maekit.embedding.session import Embeddings, EncoderSession
from maekit.errors import ImageError, MaekitError
from maekit.images import Pixels, Preprocess
from maekit.shards.index import ShardIndex
from maekit.shards.read import MemberReader
from maekit.shards.remote import RemoteCache

_CHUNK = 8


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """A key that gets no embedding: its place in the shard, a reason code, and what was found."""

    ordinal: int
    key: str
    reason: str
    detail: str


@dataclass
class ShardResult:
    """Everything about one shard.

    Attributes:
        number: place in the row of shards that was handed in.
        ordinals: places in the shard of the samples that have a row, in tar order.
        embeddings: float32 `[rows, dim]`.
        errors: the samples that have none, in tar order.
        content: CRC-32 over the CRC-32s of all images, in tar order; as `content_of` gives it.
        failure: why the shard could not be read to its end; then there are no rows and no errors.
    """

    number: int
    ordinals: list[int]
    embeddings: Embeddings
    errors: list[ErrorRow]
    content: int = 0
    failure: str | None = None


@dataclass
class Timing:
    """Where the time went.

    Attributes:
        waiting: seconds that the session waited for decoded images.
        running: seconds in the session.
        images: images embedded.
        samples: samples seen, those without an image included.
        bytes: of shards, as far as they have been worked through.
    """

    waiting: float = 0.0
    running: float = 0.0
    images: int = 0
    samples: int = 0
    bytes: float = 0.0

    @property
    def binds(self) -> str:
        """The slower of the two sides."""
        return "decoding" if self.waiting > 0.1 * (self.waiting + self.running) else "the model"


@dataclass
class _Decoded:
    shard: int
    index: ShardIndex
    ordinal: int
    pixels: Pixels | None
    error: ErrorRow | None
    crc: int = 0
    failure: str | None = None


@dataclass
class _Open:
    """The shard that is being embedded."""

    ordinals: list[int] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    parts: list[Embeddings] = field(default_factory=list)
    waiting: list[Pixels] = field(default_factory=list)
    content: int = 0
    failure: str | None = None


class EmbeddingPipeline:
    """Embeds shards one after the other, decoding ahead.

    Args:
        session: the encoder.
        batch_size: images per run of the session.
        workers: decoding threads.
        remote: where remote shards come from.
    """

    def __init__(
        self, session: EncoderSession, *, batch_size: int, workers: int, remote: RemoteCache | None = None
    ) -> None:
        self._session, self._batch_size, self._workers, self._remote = session, batch_size, workers, remote
        self.timing = Timing()

    def run(self, indexes: Iterable[ShardIndex]) -> Iterator[ShardResult | None]:
        """Yield the result of each shard in order, and None after each batch, so that the caller can stop there.

        Args:
            indexes: the shards, none without a sample; asked for as decoding comes to them.

        Raises:
            MaekitError: the session failed.
        """
        decoder = _Decoder(self._session.description.preprocess, self._remote)
        current = _Open()
        with ThreadPoolExecutor(self._workers, "decode") as pool:
            try:
                for decoded in self._decode_ahead(pool, decoder, indexes):
                    self.timing.samples += 1
                    self.timing.bytes += decoded.index.size / decoded.index.samples
                    current.content = _extend(current.content, decoded.crc)
                    if decoded.failure is not None:
                        current.failure = decoded.failure
                    elif decoded.error is not None:
                        current.errors.append(decoded.error)
                    elif decoded.pixels is not None:
                        current.ordinals.append(decoded.ordinal)
                        current.waiting.append(decoded.pixels)
                    last = decoded.ordinal == decoded.index.samples - 1
                    if current.waiting and (last or len(current.waiting) == self._batch_size):
                        current.parts.append(self._embed(current.waiting))
                        current.waiting = []
                        yield None
                    if last and current.failure is not None:
                        nothing = np.empty((0, 0), np.float32)
                        yield ShardResult(decoded.shard, [], nothing, [], failure=current.failure)
                        current = _Open()
                    elif last:
                        dim = self._session.description.dim
                        rows = np.concatenate(current.parts) if current.parts else np.empty((0, dim), np.float32)
                        yield ShardResult(decoded.shard, current.ordinals, rows, current.errors, current.content)
                        current = _Open()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                decoder.close()

    def _decode_ahead(
        self, pool: ThreadPoolExecutor, decoder: "_Decoder", indexes: Iterable[ShardIndex]
    ) -> Iterator[_Decoded]:
        """Yield decoded samples in order, keeping at most two batches and one chunk per worker in flight."""
        ahead = 2 * -(-self._batch_size // _CHUNK) + self._workers
        flying: deque[Future[list[_Decoded]]] = deque()
        chunks = (
            (shard, index, range(start, min(start + _CHUNK, index.samples)))
            for shard, index in enumerate(indexes)
            for start in range(0, index.samples, _CHUNK)
        )
        for shard, index, ordinals in chunks:
            flying.append(pool.submit(decoder, shard, index, ordinals))
            if len(flying) > ahead:
                yield from self._wait(flying.popleft())
        while flying:
            yield from self._wait(flying.popleft())

    def _wait(self, future: Future[list[_Decoded]]) -> list[_Decoded]:
        before = time.perf_counter()
        decoded = future.result()
        self.timing.waiting += time.perf_counter() - before
        return decoded

    def _embed(self, images: list[Pixels]) -> Embeddings:
        before = time.perf_counter()
        rows = embed_padded(self._session, images, self._batch_size)
        self.timing.running += time.perf_counter() - before
        self.timing.images += len(images)
        return rows


def embed_padded(session: EncoderSession, images: Sequence[Pixels], batch_size: int) -> Embeddings:
    """Run one batch, padded to `batch_size` or the next power of two below it: -> float32 `[len(images), dim]`.

    Few sizes mean few memory plans on a GPU; powers of two mean that a small shard does not pay for a full batch.
    """
    size = min(batch_size, 1 << (len(images) - 1).bit_length())
    batch = np.zeros((size, *images[0].shape), np.uint8)
    np.stack(images, out=batch[: len(images)])
    return session(batch)[: len(images)]


class _Decoder:
    """Reads and decodes chunks; called from many threads, each with files of its own."""

    def __init__(self, preprocess: Preprocess, remote: RemoteCache | None) -> None:
        self._preprocess, self._remote = preprocess, remote
        self._failures: dict[int, str] = {}
        self._own = threading.local()
        self._readers: list[MemberReader] = []

    def __call__(self, shard: int, index: ShardIndex, ordinals: range) -> list[_Decoded]:
        if not hasattr(self._own, "reader"):
            self._own.reader = MemberReader(max_open=4, remote=self._remote)
            self._readers.append(self._own.reader)
        return [self._decode(self._own.reader, shard, index, ordinal) for ordinal in ordinals]

    def _decode(self, reader: MemberReader, shard: int, index: ShardIndex, ordinal: int) -> _Decoded:
        if (failure := self._failures.get(shard)) is not None:
            return _Decoded(shard, index, ordinal, None, None, failure=failure)  # its other samples would fail as well
        crc = 0
        try:
            data = reader.read_image(index, ordinal)
            crc = zlib.crc32(data)
            return _Decoded(shard, index, ordinal, self._preprocess(data), None, crc)
        except ImageError as error:
            row = ErrorRow(ordinal, index.key(ordinal), error.reason, str(error))
            return _Decoded(shard, index, ordinal, None, row, crc)
        except MaekitError as error:
            self._failures[shard] = str(error)
            return _Decoded(shard, index, ordinal, None, None, failure=str(error))

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def content_of(index: ShardIndex, reader: MemberReader) -> int:
    """Return the CRC-32 over the CRC-32s of all images of a shard: whether it still holds what was embedded.

    Raises:
        MaekitError: the shard cannot be read.
    """
    content = 0
    for ordinal in range(index.samples):
        try:
            content = _extend(content, zlib.crc32(reader.read_image(index, ordinal)))
        except ImageError:
            content = _extend(content, 0)
    return content


def _extend(content: int, crc: int) -> int:
    return zlib.crc32(crc.to_bytes(4, "little"), content)
