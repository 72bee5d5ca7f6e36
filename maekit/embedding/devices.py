"""The processes that embed: this one alone, or one per device, all taking shards from one queue.

A device's process opens its session, reports where it runs, waits until the output is claimed, then requests one shard
after the other. If it dies, its shards go to the others.
"""

import contextlib
import mmap
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from maekit.embedding.decode_pool import DecodePool
from maekit.embedding.device_worker import DeviceWork, Outcome, Task
from maekit.embedding.output_directory import OutputDirectory
from maekit.embedding.pipeline import Timing
from maekit.embedding.session import EncoderSession
from maekit.encoder_file import EncoderDescription
from maekit.providers import CPU
from maekit.shards.cache import RemoteCache
from maekit.system.errors import MaekitError
from maekit.system.parallel import follow_parent, forking

_GPU_LANES = 2
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
    """

    description: EncoderDescription
    provider: str
    reason: str
    nodes: dict[str, int]


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

    def open_session(self) -> EncoderSession:
        """Load the model on the device.

        Raises:
            InputError: as `EncoderSession`.
        """
        return EncoderSession(self.model, device=self.device, threads=1, provider_options=self.provider_options)

    def concurrency(self, provider: str) -> int:
        """Return how many batches are in the session at a time.

        On a CPU, one per core, each in one thread: none waits for another, and a row has the same bits for any number
        of cores. On a GPU, two: one is copied while the other is computed.
        """
        return self.cores if provider == CPU else _GPU_LANES


@dataclass(frozen=True)
class Assignment:
    """The work for all devices.

    Attributes:
        tasks: the shards.
        output: receives rows and records.
        batch_size: images per run of the model.
        report: called once for each shard, from any thread.
        note: called with messages for the user.
        stopped: returns whether to stop; finished shards stay.
    """

    tasks: Sequence[Task]
    output: OutputDirectory
    batch_size: int
    report: Callable[[Outcome], None]
    note: Callable[[str], None]
    stopped: Callable[[], object]


class Devices(Protocol):
    """One or more devices that embed; a context manager.

    Attributes:
        running: where the model runs; known once entered.
        count: number of devices.
        concurrency: batches in sessions at a time, over all devices.
        workers: decoding processes, over all devices.
    """

    running: Running
    count: int
    concurrency: int
    workers: int

    def __enter__(self) -> "Devices":
        """Open the sessions."""

    def __exit__(self, *exception: object) -> None:
        """End the processes."""

    @property
    def timing(self) -> Timing:
        """Time spent in each stage, summed over the devices."""

    def run(self, job: Assignment) -> Iterator[None]:
        """Embed all shards of the job, yielding regularly.

        Raises:
            MaekitError: the model failed, or the output cannot be written.
        """


class OneDevice:
    """The model in this process.

    Args:
        options: how the device is used.
        remote: cache that fetches remote shards.
    """

    running: Running
    count = 1
    concurrency: int

    def __init__(self, options: DeviceOptions, remote: RemoteCache) -> None:
        self._options, self._remote, self.workers = options, remote, options.workers
        self._work: DeviceWork | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "OneDevice":
        with contextlib.ExitStack() as stack:
            # Fork first: a child forked later would inherit the state of ONNX Runtime's threads without the threads.
            self._pool = stack.enter_context(DecodePool(self._options.workers))
            self._session = self._options.open_session()
            self.running = _running(self._session)
            self.concurrency = self._options.concurrency(self._session.provider)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def timing(self) -> Timing:
        """Time spent in each stage."""
        return self._work.timing if self._work else Timing()

    def run(self, job: Assignment) -> Iterator[None]:
        """Embed all tasks in this process."""
        self._work = DeviceWork(
            self._session,
            self._pool,
            job.output,
            self._remote,
            batch_size=job.batch_size,
            concurrency=self.concurrency,
            ahead=4 if any(task.part.is_remote for task in job.tasks) else 2,
            report=job.report,
            note=job.note,
            stopped=job.stopped,
        )
        yield from self._work.run(job.tasks)


def _running(session: EncoderSession) -> Running:
    return Running(session.description, session.provider, session.reason, session.nodes)


@dataclass
class _Child:
    """The process of a device and the tasks it holds.

    Attributes:
        device: its device.
        process: the process.
        connection: pipe to it.
        in_hand: numbers of the tasks that it has received and not reported.
        timing: its last report.
        has_ended: whether it has finished or died.
    """

    device: str
    process: Any
    connection: Connection
    in_hand: set[int]
    timing: Timing
    has_ended: bool = False


class ManyDevices:
    """One process per device.

    Args:
        options: how each device is used.
        remote: cache that fetches remote shards.
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
                self._children.append(_Child(options.device, process, connection, set(), Timing()))
            ready = [self._receive_first(child) for child in self._children]
            self.running = ready[0]
            self.concurrency = sum(options.concurrency(self.running.provider) for options in self._options)
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
        total = Timing()
        for child in self._children:
            total = total + child.timing
        return total

    def run(self, job: Assignment) -> Iterator[None]:
        """Hand out the tasks as the devices request them."""
        try:
            yield from self._run(job)
        except BaseException:
            self.__exit__()  # kill them before the caller removes their unfinished files
            raise

    def _run(self, job: Assignment) -> Iterator[None]:
        todo = deque(range(len(job.tasks)))
        asking: list[_Child] = []
        numbers = {task.part.name: number for number, task in enumerate(job.tasks)}
        for child in self._children:
            with contextlib.suppress(OSError):  # it has died; that is seen below
                child.connection.send((job.output, job.batch_size))
        while live := [child for child in self._children if not child.has_ended]:
            if job.stopped():
                self._stop[0] = 1
                todo.clear()
            in_hand = any(child.in_hand for child in live)
            while asking and (todo or not in_hand or job.stopped()):
                child = asking.pop()
                task = todo.popleft() if todo else None
                if task is not None:
                    child.in_hand.add(task)
                    in_hand = True
                with contextlib.suppress(OSError):  # it has died; that is seen below
                    child.connection.send(None if task is None else job.tasks[task])
            for ready in wait([child.connection for child in live], timeout=_TELL_SECONDS):
                child = next(child for child in live if child.connection is ready)
                try:
                    message = self._receive(child)
                except EOFError:
                    self._bury(child, todo, job.note)
                    if child in asking:
                        asking.remove(child)
                    continue
                if isinstance(message, Outcome):
                    child.in_hand.discard(numbers[message.name])
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

    def _bury(self, child: _Child, todo: deque[int], note: Callable[[str], None]) -> None:
        """Put the shards of a process that died back at the front of the queue."""
        child.process.join()
        child.has_ended = True
        todo.extendleft(sorted(child.in_hand, reverse=True))
        note(f"the process of {child.device} died; its {len(child.in_hand)} shards go to the others")
        child.in_hand.clear()

    def _receive_first(self, child: _Child) -> Running:
        try:
            running: Running = self._receive(child)
            return running
        except EOFError as error:
            child.process.join()
            raise MaekitError(
                f"the process of {child.device} ended while it loaded the model (exit code {child.process.exitcode}; "
                "negative: killed by that signal, perhaps for lack of memory)"
            ) from error

    def _receive(self, child: _Child) -> Any:
        try:
            message = child.connection.recv()
        except ConnectionResetError as error:  # it died with unread messages
            raise EOFError from error
        if isinstance(message, MaekitError):
            raise message
        return message


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

    def ask() -> Iterator[Task | None]:
        while not stop[0]:
            tell(True)
            while not connection.poll(_ASK_SECONDS):
                yield None  # work on the tasks in hand continues meanwhile
            task = connection.recv()
            if task is None:
                return
            yield task

    try:
        with DecodePool(options.workers) as pool:
            session = options.open_session()
            tell(_running(session))
            output, batch_size = connection.recv()
            work = DeviceWork(
                session,
                pool,
                output,
                remote,
                batch_size=batch_size,
                concurrency=options.concurrency(session.provider),
                ahead=2,
                report=tell,
                note=tell,
                stopped=lambda: stop[0],
            )
            ended = threading.Event()
            threading.Thread(target=_tell_regularly, args=(work, tell, stop, remote, ended), daemon=True).start()
            for _ in work.run(ask()):
                pass
            ended.set()
            tell(work.timing)
        tell(False)
    except MaekitError as error:
        tell(error)
    except (EOFError, BrokenPipeError):  # the parent is gone
        os._exit(1)
    except OSError as error:
        tell(MaekitError(f"{options.device}: {error}"))


def _tell_regularly(
    work: DeviceWork, tell: Callable[[object], None], stop: mmap.mmap, remote: RemoteCache, ended: threading.Event
) -> None:
    with contextlib.suppress(OSError):
        while not ended.wait(_TELL_SECONDS):
            tell(work.timing)
            if stop[0]:
                remote.stop()  # aborts downloads
