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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from maekit.embedding.device_worker import Assignment, OneDevice, Outcome, Running
from maekit.embedding.inputs import PlannedPart
from maekit.embedding.pipeline import Timing
from maekit.system.errors import MaekitError
from maekit.system.parallel import follow_parent, forking

_TELL_SECONDS = 0.5
_ASK_SECONDS = 0.001


@dataclass(eq=False)
class _Child:
    """The process of a device and the parts it holds.

    Attributes:
        device: its device.
        process: the process.
        connection: pipe to it.
        in_hand: the parts that it has received and not reported, by name.
        timing: its last report.
    """

    device: str
    process: Any
    connection: Connection
    in_hand: dict[str, PlannedPart] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

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
    """One process per device; a context manager.

    Args:
        devices: the devices.

    Attributes:
        running: where the model runs; known once entered. Its `concurrency` is the sum over the devices.
        count: number of devices.
        workers: decoding processes, over all devices.
        cores: CPU cores that they may use, over all devices.
    """

    running: Running

    def __init__(self, devices: Sequence[OneDevice]) -> None:
        self._devices = devices
        self.count, self.workers = len(devices), sum(device.workers for device in devices)
        self.cores = sum(device.cores for device in devices)
        self._children: list[_Child] = []
        self._stop = mmap.mmap(-1, 1)  # shared with the children

    def __enter__(self) -> "ManyDevices":
        context = multiprocessing.get_context("fork")
        try:
            for device in self._devices:
                connection, end = context.Pipe()
                others = [child.connection for child in self._children]
                arguments = (end, [connection, *others], device, self._stop, os.getpid())
                process = context.Process(target=_serve, args=arguments, name=f"maekit-{device.name}")
                with forking():
                    process.start()
                end.close()
                self._children.append(_Child(device.name, process, connection))
            ready = [self._first_message(child) for child in self._children]
            self.running = replace(ready[0], concurrency=sum(running.concurrency for running in ready))
            for child, running in zip(self._children, ready, strict=True):
                if running.provider != self.running.provider:
                    raise MaekitError(f"{child.device} runs on {running.provider}, not on {self.running.provider}")
                if running.description.sha256 != self.running.description.sha256:
                    raise MaekitError(f"{running.description.path} was replaced while the devices loaded it; try again")
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
        live = list(self._children)
        asking: list[_Child] = []
        for child in self._children:
            child.send((job.output, job.batch_size))
        while live:
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
                    live.remove(child)
                    if child in asking:
                        asking.remove(child)
                    child.process.join()
                    todo.extendleft(reversed(child.in_hand.values()))
                    job.note(f"the process of {child.device} died; its {len(child.in_hand)} shards go to the others")
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
                    live.remove(child)
            yield
        if todo:
            raise MaekitError("the processes of all devices were killed (out of memory?); run the command again")

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


def _serve(connection: Connection, others: list[Connection], device: OneDevice, stop: mmap.mmap, parent: int) -> None:
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
        with device:
            tell(device.running)
            output, batch_size = connection.recv()
            job = Assignment(ask(), output, batch_size, report=tell, note=tell, stopped=lambda: stop[0])
            ended = threading.Event()
            threading.Thread(target=_tell_regularly, args=(device, tell, stop, ended), daemon=True).start()
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
        tell(MaekitError(f"{device.name}: {error}"))


def _tell_regularly(device: OneDevice, tell: Callable[[object], None], stop: mmap.mmap, ended: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while not ended.wait(_TELL_SECONDS):
            tell(device.timing)
            if stop[0]:
                device.remote.stop()  # aborts downloads
