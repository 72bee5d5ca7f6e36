"""The processes that embed: this one alone, or one per device, all taking parts from one queue.

A device's process opens its session, reports where it runs, waits until the output is claimed, then requests one part
after the other. If it dies, its parts go to the others.
"""

import contextlib
import mmap
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from maekit.embedding.decode_pool import DecodePool
from maekit.embedding.device_worker import Assignment, DeviceWork, Outcome
from maekit.embedding.inputs import PlannedPart
from maekit.embedding.pipeline import Timing
from maekit.embedding.session import EncoderSession
from maekit.encoder_file import EncoderDescription
from maekit.providers import CPU
from maekit.shards.cache import RemoteCache
from maekit.system.errors import MaekitError
from maekit.system.parallel import follow_parent, forking

_GPU_CONCURRENCY = 2
_TELL_SECONDS = 0.5
_ASK_SECONDS = 0.001


@dataclass(frozen=True)
class Running:
    """Where the model runs.

    Attributes:
        description: what the model's file states about itself.
        provider: execution provider that runs its nodes.
        reason: why that provider.
        nodes: number of the model's nodes on each provider.
        concurrency: batches in the session at a time. On a CPU, one per core, each in one thread: none waits for
            another, and a row has the same bits for any number of cores. On a GPU, two: one is copied while the other
            is computed.
    """

    description: EncoderDescription
    provider: str
    reason: str
    nodes: dict[str, int]
    concurrency: int


@dataclass(frozen=True)
class DeviceOptions:
    """How one device is used.

    Attributes:
        model: the ONNX file.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        provider_options: options of the CUDA provider.
        cores: CPU cores that it may use.
        workers: decoding processes.
    """

    model: Path
    device: str
    provider_options: Mapping[str, str]
    cores: int
    workers: int


class OneDevice:
    """The model in this process; a context manager.

    Args:
        options: how the device is used.
        remote: cache that fetches remote shards.

    Attributes:
        running: where the model runs; known once entered.
        count: number of devices.
        concurrency: batches in sessions at a time, over all devices.
        workers: decoding processes, over all devices.
    """

    running: Running
    count = 1
    concurrency: int

    def __init__(self, options: DeviceOptions, remote: RemoteCache) -> None:
        self._options, self._remote, self.workers = options, remote, options.workers
        self._work: DeviceWork | None = None

    def __enter__(self) -> "OneDevice":
        options = self._options
        # Fork first: a child forked later would inherit the state of ONNX Runtime's threads without the threads.
        self._pool = DecodePool(options.workers)
        try:
            session = EncoderSession(
                options.model, device=options.device, threads=1, provider_options=options.provider_options
            )
        except BaseException:
            self.__exit__()
            raise
        self.concurrency = options.cores if session.provider == CPU else _GPU_CONCURRENCY
        self.running = Running(session.description, session.provider, session.reason, session.nodes, self.concurrency)
        self._session = session
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.__exit__()

    @property
    def timing(self) -> Timing:
        """Time spent in each stage."""
        return self._work.timing if self._work else Timing()

    def run(self, job: Assignment) -> Iterator[None]:
        """Embed all parts of the job in this process, yielding regularly.

        Raises:
            MaekitError: the model failed, or the output cannot be written.
        """
        self._work = DeviceWork(self._session, self._pool, remote=self._remote, concurrency=self.concurrency, job=job)
        yield from self._work.run()


@dataclass
class _Child:
    """The process of a device and the parts it holds.

    Attributes:
        device: its device.
        process: the process.
        connection: pipe to it.
        in_hand: the parts that it has received and not reported, by name.
        timing: its last report.
        has_ended: whether it has finished or died.
    """

    device: str
    process: Any
    connection: Connection
    in_hand: dict[str, PlannedPart] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)
    has_ended: bool = False

    def receive(self) -> Any:
        """Return its next message.

        Raises:
            MaekitError: the device failed.
            EOFError: the process died; ConnectionResetError if it did not read all messages before.
        """
        message = self.connection.recv()
        if isinstance(message, MaekitError):
            raise message
        return message

    def send(self, message: object) -> None:
        """Send a message; if the process has died, that is seen when its next message is awaited."""
        with contextlib.suppress(OSError):
            self.connection.send(message)


class ManyDevices:
    """One process per device.

    Args:
        options: how each device is used.
        remote: cache that fetches remote shards.

    Attributes:
        running: where the model runs; known once entered. `count`, `concurrency` and `workers` as in `OneDevice`.
    """

    running: Running
    concurrency: int

    def __init__(self, options: Sequence[DeviceOptions], remote: RemoteCache) -> None:
        self._options, self._remote = options, remote
        self.count, self.workers = len(options), sum(device.workers for device in options)
        self._children: list[_Child] = []
        self._stop = mmap.mmap(-1, 1)  # shared with the children

    def __enter__(self) -> "ManyDevices":
        context = multiprocessing.get_context("fork")
        try:
            for options in self._options:
                connection, end = context.Pipe()
                others = [child.connection for child in self._children]
                arguments = (end, [connection, *others], options, self._remote, self._stop, os.getpid())
                process = context.Process(target=_serve, args=arguments, name=f"maekit-{options.device}")
                with forking():
                    process.start()
                end.close()
                self._children.append(_Child(options.device, process, connection))
            ready = [self._first_message(child) for child in self._children]
            self.running = ready[0]
            self.concurrency = sum(running.concurrency for running in ready)
            for child, running in zip(self._children, ready, strict=True):
                if running.provider != self.running.provider:
                    raise MaekitError(f"{child.device} runs on {running.provider}, not on {self.running.provider}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self._children:
            child.process.kill()
            child.process.join()
            child.connection.close()

    @property
    def timing(self) -> Timing:
        """Time spent in each stage, summed over the devices."""
        return sum((child.timing for child in self._children), Timing())

    def run(self, job: Assignment) -> Iterator[None]:
        """Hand out the parts of the job as the devices request them, yielding regularly.

        Raises:
            MaekitError: a device failed, or all of them were killed.
        """
        try:
            yield from self._run(job)
        except BaseException:
            self.__exit__()  # kill them before the caller removes their unfinished files
            raise

    def _run(self, job: Assignment) -> Iterator[None]:
        todo = deque(job.parts)
        asking: list[_Child] = []
        for child in self._children:
            child.send((job.output, job.batch_size))
        while live := [child for child in self._children if not child.has_ended]:
            if job.stopped():
                self._stop[0] = 1
                todo.clear()
            # While others hold parts, a device waits: if one of them dies, its parts come back.
            while asking and (todo or job.stopped() or not any(child.in_hand for child in live)):
                child = asking.pop()
                part = todo.popleft() if todo else None
                if part is not None:
                    child.in_hand[part.name] = part
                child.send(part)
            for ready in wait([child.connection for child in live], timeout=_TELL_SECONDS):
                child = next(child for child in live if child.connection is ready)
                try:
                    message = child.receive()
                except (EOFError, ConnectionResetError):
                    self._bury(child, todo, job.note)
                    if child in asking:
                        asking.remove(child)
                    continue
                if isinstance(message, Outcome):
                    child.in_hand.pop(message.name, None)
                    job.report(message)
                elif isinstance(message, Timing):
                    child.timing = message
                elif isinstance(message, str):
                    job.note(f"{child.device}: {message}")
                elif message is True:
                    asking.append(child)
                else:
                    child.has_ended = True
            yield
        if todo:
            raise MaekitError("the processes of all devices were killed (out of memory?); run the command again")

    def _bury(self, child: _Child, todo: deque[PlannedPart | None], note: Callable[[str], None]) -> None:
        """Put the parts of a process that died back at the front of the queue."""
        child.process.join()
        child.has_ended = True
        todo.extendleft(reversed(child.in_hand.values()))
        note(f"the process of {child.device} died; its {len(child.in_hand)} shards go to the others")
        child.in_hand.clear()

    def _first_message(self, child: _Child) -> Running:
        try:
            running: Running = child.receive()
            return running
        except (EOFError, ConnectionResetError) as error:
            child.process.join()
            raise MaekitError(
                f"the process of {child.device} ended while it loaded the model (exit code {child.process.exitcode}; "
                "negative: killed by that signal, perhaps for lack of memory)"
            ) from error


Devices = OneDevice | ManyDevices


def _serve(
    connection: Connection,
    others: list[Connection],
    options: DeviceOptions,
    remote: RemoteCache,
    stop: mmap.mmap,
    parent: int,
) -> None:
    """Main function of the process of one device."""
    follow_parent(parent)
    for other in others:
        other.close()
    sending = threading.Lock()

    def tell(message: object) -> None:
        with sending:
            connection.send(message)

    def ask() -> Iterator[PlannedPart | None]:
        while not stop[0]:
            tell(True)
            while not connection.poll(_ASK_SECONDS):
                yield None  # work on the parts in hand continues meanwhile
            part = connection.recv()
            if part is None:
                return
            yield part

    try:
        with OneDevice(options, remote) as device:
            tell(device.running)
            output, batch_size = connection.recv()
            job = Assignment(ask(), output, batch_size, report=tell, note=tell, stopped=lambda: stop[0])
            ended = threading.Event()
            threading.Thread(target=_tell_regularly, args=(device, tell, stop, remote, ended), daemon=True).start()
            for _ in device.run(job):
                pass
            ended.set()
            tell(device.timing)
        tell(False)
    except MaekitError as error:
        tell(error)
    except (EOFError, BrokenPipeError):  # the parent is gone
        os._exit(1)
    except OSError as error:
        tell(MaekitError(f"{options.device}: {error}"))


def _tell_regularly(
    device: OneDevice, tell: Callable[[object], None], stop: mmap.mmap, remote: RemoteCache, ended: threading.Event
) -> None:
    with contextlib.suppress(OSError):
        while not ended.wait(_TELL_SECONDS):
            tell(device.timing)
            if stop[0]:
                remote.stop()  # aborts downloads
