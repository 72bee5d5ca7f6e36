"""Decoding in worker processes: bytes -> uint8 pixels, written directly into a ring of batches.

The ring is anonymous shared memory, so nothing of it can outlive the processes. Shards are passed as open descriptors.
Only small messages cross the pipes: no pixel is ever pickled.

A process may die: killed, out of memory, or a decoder that crashes or never ends. It is replaced, and its images are
retried one by one; an image that kills two processes is rejected as `crashed`.
"""

import contextlib
import errno
import mmap
import multiprocessing
import os
import queue
import resource
import signal
import threading
import time
import zlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import ClassVar, NamedTuple

import numpy as np

from maekit.embedding.inputs import Images, Location, read_image
from maekit.images import Pixels, Preprocess
from maekit.system.errors import ImageError, MaekitError
from maekit.system.machine import available_memory
from maekit.system.parallel import follow_parent, forking

_OPEN_SHARDS = 4  # descriptors kept open per process
_SECONDS_PER_IMAGE = 30  # of CPU time; the largest accepted images take 2 or 3
_MOST_CRASHES = 100  # more cannot be the images' fault
_LOWEST_PRIORITY = 19


class Rejected(NamedTuple):
    """An image without a row.

    Attributes:
        row: its position in the batch.
        reason: a reason code.
        detail: what was found.
    """

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Chunk:
    """A few images for consecutive rows of one batch.

    Attributes:
        slot: position of the batch in the ring.
        row: row of the first image.
        images: what the images are read from.
        locations: location of each image.
    """

    slot: int
    row: int
    images: Images
    locations: list[Location]


@dataclass
class Decoded:
    """Result of decoding a chunk.

    Attributes:
        crcs: CRC-32 of each image's bytes; 0 if they could not be read.
        refused: the images without a row.
        failure: why the shard cannot be read at all; then the other fields are void.
        seconds: CPU time spent.
    """

    crcs: list[int] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)
    failure: str | None = None
    seconds: float = 0.0


class Ring:
    """Batches of pixels in shared memory.

    Args:
        slots: number of batches.
        batch_size: images per batch.
        size: (height, width) of an image, in pixels.

    Attributes:
        batches: uint8 `[slots, batch_size, H, W, 3]`.

    Raises:
        MaekitError: there is not enough memory.
    """

    def __init__(self, slots: int, batch_size: int, size: tuple[int, int]) -> None:
        self.shape = (slots, batch_size, *size, 3)
        count = int(np.prod(self.shape))
        self.descriptor = os.memfd_create("maekit-batches")
        try:
            if count > available_memory():
                raise OSError(errno.ENOMEM, "not so much is free")
            os.posix_fallocate(self.descriptor, 0, count)  # else a shortage shows as SIGBUS on first use of a page
            self._memory = mmap.mmap(self.descriptor, count)
        except OSError as error:
            os.close(self.descriptor)
            raise MaekitError(
                f"no {count / 1e6:.0f} MB of memory for {slots} batches of {batch_size} images ({error.strerror}); "
                "choose a smaller `batch_size`"
            ) from error
        self.batches: Pixels = np.frombuffer(self._memory, np.uint8).reshape(self.shape)

    def close(self) -> None:
        """Close the descriptor; the memory is freed when the last array that views it is."""
        os.close(self.descriptor)


class DecodePool:
    """A pool of decoding processes; a context manager. It forks them on creation, before other code starts threads.

    Args:
        workers: number of processes.
    """

    _work: "_Work"

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all: list[_Process] = []
        self._crashes = 0
        self._is_aborted = False
        self._threads = ThreadPoolExecutor(workers, "decode")
        try:
            for _ in range(workers):
                self._all.append(_Process())
                self._idle.put(self._all[-1])
        except MaekitError:
            self.__exit__()
            raise

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.abort()
        self._threads.shutdown(wait=True)
        for process in self._all:
            process.close()

    def abort(self) -> None:
        """Kill the processes; chunks that are not decoded yet fail."""
        self._is_aborted = True
        for process in self._all:
            process.kill()

    def use(self, ring: Ring, preprocess: Preprocess, *, yielding: bool) -> None:
        """Decode into this ring from now on.

        Args:
            ring: receives the pixels.
            preprocess: turns bytes into pixels.
            yielding: run at the lowest priority, for a model on the same cores: decoding then proceeds while the model
                waits for images, and does not slow it down when it has some.
        """
        self._work = _Work(ring, preprocess, yielding)

    def submit(self, chunk: Chunk) -> "Future[Decoded]":
        """Decode a chunk as soon as a process is free.

        The result raises:
            MaekitError: the processes keep dying.
        """
        return self._threads.submit(self._decode, chunk)

    def _decode(self, chunk: Chunk) -> Decoded:
        process = self._idle.get()
        try:
            return process.decode(chunk, self._work)
        except _Died:
            self._replace(process)
            return self._one_by_one(process, chunk)
        finally:
            self._idle.put(process)

    def _one_by_one(self, process: "_Process", chunk: Chunk) -> Decoded:
        whole = Decoded()
        for row, location in enumerate(chunk.locations, chunk.row):
            one = self._tried_twice(process, Chunk(chunk.slot, row, chunk.images, [location]))
            if one.failure is not None:
                return one
            whole.crcs += one.crcs
            whole.refused += one.refused
            whole.seconds += one.seconds
        return whole

    def _tried_twice(self, process: "_Process", one: Chunk) -> Decoded:
        for _ in range(2):
            try:
                return process.decode(one, self._work)
            except _Died as died:
                how = str(died)
                self._replace(process)
        self._crashes += 1
        if self._crashes > _MOST_CRASHES:
            raise MaekitError(f"decoding processes keep dying ({how}; out of memory?); run the command again")
        return Decoded([0], [Rejected(one.row, "crashed", f"two processes died of it ({how})")])

    def _replace(self, process: "_Process") -> None:
        if self._is_aborted:
            raise MaekitError("stopped while decoding")
        process.start_anew()
        if self._is_aborted:
            process.kill()  # it was started while `abort` killed the others


class _Work(NamedTuple):
    """What a process needs before it can decode."""

    ring: Ring
    preprocess: Preprocess
    yielding: bool


class _Died(Exception):
    """A decoding process died; the message says how."""


class _Process:
    """One decoding process and the parent's end of its pipe; used by one thread at a time."""

    # No other child may be forked between creating a pipe and closing the child's end here: that child would inherit
    # the end and keep it open, so the death of its owner would go unnoticed.
    _forking = threading.Lock()
    _ends: ClassVar[set[Connection]] = set()

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._known: _Work | None = None  # what the process has received
        self._open: OrderedDict[int, None] = OrderedDict()  # shards that the process has open
        context = multiprocessing.get_context("fork")
        try:
            with self._forking, forking():
                self._connection, end = context.Pipe()
                self._ends.add(self._connection)
                self._process = context.Process(
                    target=_serve, args=(end, os.getpid()), name="maekit-decode", daemon=True
                )
                try:
                    self._process.start()
                finally:
                    end.close()
        except OSError as error:
            raise MaekitError(
                f"no decoding process can be started ({error.strerror}); choose fewer `workers`, or raise the limits "
                "of open files and processes (ulimit -n, ulimit -u)"
            ) from error

    def start_anew(self) -> None:
        self.kill()
        self.close()
        self._start()

    def kill(self) -> None:
        """Kill the process; a thread that waits for its answer gets an error."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        self._ends.discard(self._connection)
        self._connection.close()

    def decode(self, chunk: Chunk, work: _Work) -> Decoded:
        images, number, descriptor = chunk.images, chunk.images.number, chunk.images.descriptor
        if descriptor is None and not isinstance(chunk.locations[0], str):
            return Decoded(failure=f"{images.name}: was closed")  # the shard was given up in the meantime
        try:
            if self._known is not work:
                self._known = work
                self._hand_over(work.ring.descriptor, "use", work.ring.shape, work.preprocess, work.yielding)
            if descriptor is not None and number not in self._open:
                gone = self._open.popitem(last=False)[0] if len(self._open) == _OPEN_SHARDS else None
                self._open[number] = None
                self._hand_over(descriptor, "open", number, gone)
            self._connection.send(("decode", chunk.slot, chunk.row, number, images.name, chunk.locations))
            decoded: Decoded = self._connection.recv()
            return decoded
        except (EOFError, OSError) as error:
            self.kill()  # it may still be alive
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise _Died(how) from error

    def _hand_over(self, descriptor: int, *message: object) -> None:
        """Send a message that refers to a descriptor, and the descriptor."""
        self._connection.send(message)
        assert self._process.pid is not None
        send_handle(self._connection, descriptor, self._process.pid)


def _serve(connection: Connection, parent: int) -> None:
    """Main function of a decoding process."""
    follow_parent(parent)
    for end in _Process._ends:  # the parent's ends of the pipes to this process and to earlier ones
        end.close()
    worker = _Worker()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            what, *arguments = connection.recv()
            if what == "decode":
                connection.send(worker.decode(*arguments))
            else:
                getattr(worker, what)(recv_handle(connection), *arguments)


class _Worker:
    """State of a decoding process; its methods are the messages that it receives."""

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}

    def use(self, descriptor: int, shape: tuple[int, ...], preprocess: Preprocess, yielding: bool) -> None:
        if yielding:
            os.nice(_LOWEST_PRIORITY)
        memory = mmap.mmap(descriptor, int(np.prod(shape)))
        os.close(descriptor)
        self._batches = np.frombuffer(memory, np.uint8).reshape(shape)
        self._preprocess = preprocess

    def open(self, descriptor: int, number: int, gone: int | None) -> None:
        self._descriptors[number] = descriptor
        if gone is not None:
            os.close(self._descriptors.pop(gone))

    def decode(self, slot: int, row: int, number: int, name: str, locations: list[Location]) -> Decoded:
        started = time.thread_time()  # process_time lags by milliseconds
        descriptor = self._descriptors.get(number)  # a folder has none
        decoded = Decoded()
        for at, location in enumerate(locations, row):
            crc = 0
            try:
                data = read_image(descriptor, name, location)
                crc = zlib.crc32(data)
                _limit_cpu_time()
                self._batches[slot, at] = self._preprocess(data)
            except ImageError as error:
                decoded.refused.append(Rejected(at, error.reason, str(error)))
            except MaekitError as error:
                return Decoded(failure=str(error))
            decoded.crcs.append(crc)
        decoded.seconds = time.thread_time() - started
        return decoded


def _limit_cpu_time() -> None:
    """Let the kernel kill this process after N more seconds of CPU time, so that no image can block a run."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(time.process_time()) + 1 + _SECONDS_PER_IMAGE
    if hard == resource.RLIM_INFINITY or limit <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
