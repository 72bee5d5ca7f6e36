"""The data path of training: positions in the order -> chunks of uint8 crops -> the batch of a step -> the device.

    1  ExactSource     positions of each chunk of each step, a pure function of the step; each worker takes every W-th
    2  CropLoader      read by position, decode, crop (crops.py); the position of a bad image determines its substitute
    3  StepBatches     the chunks of one step, divided into micro-batches
    4  upload          uint8 to the device, overlapping with computation; the step normalises and mirrors (step.py)

1 and 2 are a `webdataset.DataPipeline` and run in the DataLoader's workers. The workers return their chunks in turn, so
the sequence of chunks is the same for any number of workers and can start anywhere. The division of a step into chunks
decides only which worker decodes what: a sample's crop, flip and mask depend only on its position.
"""

import contextlib
import itertools
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maekit.shards.order import SampleOrder, SampleSlice
from maekit.shards.read import ShardSet
from maekit.system.errors import MaekitError
from maekit.system.parallel import follow_parent
from maekit.training.crops import Chunk, CropLoader, WorkerProgress, name_of

_CHUNK_BYTES = 8 << 20
_CHUNK_IMAGES = 512
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class BatchLayout:
    """How the batch of a step is divided.

    Attributes:
        batch_size: images per step, over all ranks.
        micro_batch: images per forward pass; divides a rank's share.
        rank: rank of this process.
        world: number of processes that divide each batch.
        image_bytes: bytes of one image; determines how many images a worker returns at a time.
    """

    batch_size: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    image_bytes: int = 1 << 17

    @property
    def share(self) -> int:
        """Images per step on this rank."""
        return self.batch_size // self.world

    def chunks(self) -> list[tuple[int, int]]:
        """Return (first, last) of each chunk within this rank's share; no chunk crosses a micro-batch boundary."""
        largest = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // self.image_bytes))
        count = -(-self.micro_batch // largest)
        cuts = [self.micro_batch * number // count for number in range(count + 1)]
        return [
            (start + first, start + last)
            for start in range(0, self.share, self.micro_batch)
            for first, last in itertools.pairwise(cuts)
        ]


class ExactSource(IterableDataset[SampleSlice]):
    """Stage 1: the sample positions of each step's chunks, in order.

    Args:
        order: order of the samples.
        layout: layout of each step's batch.
        first: steps already done.
        last: total number of steps.
    """

    def __init__(self, order: SampleOrder, layout: BatchLayout, *, first: int, last: int) -> None:
        self._order, self._layout, self._first, self._last = order, layout, first, last

    def __iter__(self) -> Iterator[SampleSlice]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        chunks = self._layout.chunks()
        for chunk in range(number, (self._last - self._first) * len(chunks), workers):
            step, within_step = divmod(chunk, len(chunks))
            start = (self._first + step) * self._layout.batch_size + self._layout.rank * self._layout.share
            first, last = chunks[within_step]
            yield self._order.slice(start + first, start + last)


def make_loader(
    source: ExactSource, crops: CropLoader, layout: BatchLayout, *, workers: int, prefetch: int, pin: bool
) -> DataLoader[Chunk | MaekitError]:
    """Return the DataLoader that runs stages 1 and 2.

    Args:
        source: stage 1.
        crops: stage 2.
        layout: layout of each step's batch.
        workers: number of worker processes; 0 loads in this process.
        prefetch: minimum number of whole steps to prefetch.
        pin: return pinned memory.
    """
    _allow_many_files()
    parent = os.getpid()
    ahead = max(2, -(-prefetch * len(layout.chunks()) // max(1, workers)))
    return DataLoader(
        webdataset.DataPipeline(source, crops),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin,
        worker_init_fn=lambda worker: follow_parent(parent),
        # Forked workers share the shard indexes and the decoded images.
        multiprocessing_context="fork" if workers else None,
        timeout=_POLL_SECONDS if workers else 0,
    )


def _allow_many_files() -> None:
    """Raise the limit of open files to its maximum: each chunk in flight takes three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stop_workers(batches: Iterator[object]) -> None:
    """Stop the workers of a DataLoader's iterator now, not when the iterator is garbage-collected.

    Until then, a killed worker makes torch raise in the middle of whatever the main process does next. A hanging worker
    ignores the signal that torch sends and would block the shutdown; it is therefore killed after a short delay.
    """
    shutdown = getattr(batches, "_shutdown_workers", None)  # absent where there are no workers
    if shutdown is None:
        return
    workers = getattr(batches, "_workers", [])

    def kill() -> None:
        for worker in workers:
            if worker.is_alive():
                worker.kill()

    with _no_news_of_children():
        reaper = threading.Timer(_GRACE_SECONDS, kill)
        reaper.start()
        with contextlib.suppress(RuntimeError):
            shutdown()
        reaper.cancel()
        kill()


@contextlib.contextmanager
def _no_news_of_children() -> Iterator[None]:
    """Disable torch's SIGCHLD handler, which raises anywhere in the main thread when a worker was killed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    while True:
        try:
            before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
            break
        except RuntimeError:  # raised by the old handler for a signal that was already pending
            continue
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


class StepBatches:
    """Stage 3: the micro-batches, step by step.

    Args:
        chunks: chunks from the DataLoader, or the error that stopped a worker.
        layout: layout of each step's batch.
        shards: names the sample at which a worker is stuck.
        watch: the sample each worker is reading.
        patience: seconds to wait without any progress before giving up.
    """

    def __init__(
        self,
        chunks: Iterator[Chunk | MaekitError],
        layout: BatchLayout,
        *,
        shards: ShardSet,
        watch: WorkerProgress,
        patience: float,
    ) -> None:
        self._chunks, self._shards, self._watch, self._patience = chunks, shards, watch, patience
        self._per_micro_batch = len(layout.chunks()) // (layout.share // layout.micro_batch)
        self._per_step = len(layout.chunks())
        self._ready: list[Chunk] = []

    def next(self, give_up: Callable[[], bool] = lambda: False) -> list[list[Chunk]] | None:
        """Return the chunks of the next step, grouped by micro-batch; None if `give_up` returned True.

        Raises:
            MaekitError: a worker failed, died or is stuck; names the sample.
        """
        while len(self._ready) < self._per_step:
            chunk = self._wait(give_up)
            if chunk is None:
                return None
            if isinstance(chunk, MaekitError):
                raise chunk
            self._ready.append(chunk)
        ready, self._ready = self._ready, []
        return [ready[start : start + self._per_micro_batch] for start in range(0, len(ready), self._per_micro_batch)]

    def _wait(self, give_up: Callable[[], bool]) -> Chunk | MaekitError | None:
        done, since = self._watch.rows.copy(), time.monotonic()
        while not give_up():
            try:
                return next(self._chunks)
            except StopIteration:
                raise MaekitError("the data ended before the run did; please report this as a bug") from None
            except (OSError, EOFError) as error:
                if not hasattr(self._chunks, "_shutdown_workers"):
                    raise MaekitError(f"reading the data failed: {error}") from error
                # Workers read the files and return their errors as values, so this is a broken connection to a worker.
                raise MaekitError(
                    f"reading the data failed: a worker process is gone ({error}){self._at()}; run the command again"
                ) from error
            except RuntimeError as error:
                # The DataLoader raises one exception type for every failure.
                if "timed out" not in str(error):
                    raise self.failure(error) from error
            now = self._watch.rows.copy()
            if (now != done).any():
                done, since = now, time.monotonic()
            elif time.monotonic() - since > self._patience:
                raise MaekitError(
                    f"reading the data failed: nothing came for {self._patience:g} s{self._at()}; a hanging disk, or "
                    "an image that hangs its decoder (see data.patience)"
                )
        return None

    def failure(self, error: RuntimeError) -> MaekitError:
        """Translate an error of the DataLoader."""
        lines = str(error).strip().splitlines()
        if lines[0].startswith("Caught "):  # by a worker, with its traceback; the last line names the error
            return MaekitError(f"reading the data failed: {lines[-1]}")
        said = lines[0].rstrip(". ")
        dead = {int(number) for number in re.findall(r"\d+", said)}
        return MaekitError(f"reading the data failed: {said}{self._at(dead)}; run the command again")

    def _at(self, processes: Container[int] | None = None) -> str:
        """Name the samples that workers are reading: all workers, or those with the given process ids."""
        names = [
            name_of(self._shards, shard, ordinal)
            for process, shard, ordinal, _ in self._watch.rows.tolist()
            if ordinal >= 0 and (processes is None or process in processes)
        ]
        return f" (being read: {', '.join(names[:8])})" if names else ""


# Stage 4: from the chunks of a micro-batch to the arguments of the objective.
Upload = Callable[[list[Chunk]], tuple[torch.Tensor, ...]]


class Uploader:
    """Stage 4: from chunks on the host to the arguments of `MaskedObjective.forward`, on the device.

    On CUDA the copies run in a separate stream and overlap with queued computation, because the host runs ahead.

    Args:
        device: device of the model.
        tokenizer: (images, flips) on the host -> tokens, where tokens are the target.
    """

    def __init__(
        self,
        device: torch.device,
        tokenizer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._device, self._tokenizer = device, tokenizer
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, chunks: list[Chunk]) -> tuple[torch.Tensor, ...]:
        """Return images, flips, noise and, where they are the target, tokens of chunks as one micro-batch."""
        if self._stream is None:
            return self._gather(chunks)
        with torch.cuda.stream(self._stream):
            uploaded = self._gather(chunks)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in uploaded:
            # Allocated in one stream and used in another: the memory must not be reused before the other has finished.
            tensor.record_stream(computing)
        return uploaded

    def _gather(self, chunks: list[Chunk]) -> tuple[torch.Tensor, ...]:
        rows: list[tuple[torch.Tensor, ...]] = [(chunk.images, chunk.flips, chunk.noise) for chunk in chunks]
        if self._tokenizer is not None:
            rows = [(*row, self._tokenizer(*row[:2])) for row in rows]
        columns = (
            [tensor.to(self._device, non_blocking=True) for tensor in column] for column in zip(*rows, strict=True)
        )
        return tuple(column[0] if len(column) == 1 else torch.cat(column) for column in columns)
