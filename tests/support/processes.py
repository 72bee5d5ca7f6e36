"""Training and embedding in processes that start in no time: forked from a server that has imported torch once."""

import hashlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from maekit.config import PretrainConfig
from maekit.config.settings import set_value
from maekit.embedding.embed import raise_if_incomplete

TINY = {
    "model.name": "vit_tiny_patch16_224",
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.decoder_width": 32,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
}


def tiny_config(shards: Path, out: Path, **changes) -> PretrainConfig:
    config = PretrainConfig(shards=(str(shards),), out=str(out), steps=8, batch_size=6)
    settings = {
        **TINY,
        "optimizer.lr": 1e-2,
        "data.workers": 1,
        "run.device": "cpu",
        "run.precision": "fp32",
        "run.threads": 1,
        "run.checkpoint_every": 3,
        "run.log_every": 1,
        "run.pictures_every": 0,
        "run.tensorboard": False,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    for key, value in settings.items():
        set_value(config, key, value)
    return config


def segments() -> list[str]:
    """Return the machine's shared memory by name, but for torch's, which embedding does not load: other tests do."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("torch_"))


def warm_up() -> None:
    """Start the server that processes are forked from, if there is none yet."""
    process = _context().Process(target=os.getpid)
    process.start()
    process.join()


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["maekit.pretraining.pretrain", "maekit.embedding.embed", "maekit.finetuning.finetune"]
    )
    return context


def start(
    config: Any,
    log: Path,
    *,
    world: int = 1,
    trace: Path | None = None,
    sabotage: tuple[Callable[..., None], tuple] | None = None,
) -> list[ForkServerProcess]:
    """Start a run in `world` processes; what they say goes to `log`, what each step is trained on to `trace`."""
    context = _context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {}
        if world > 1:
            environment = {
                "RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        processes.append(context.Process(target=_main, args=(config, environment, log, trace, sabotage)))
        processes[-1].start()
    return processes


def finish(processes: list[ForkServerProcess], seconds: float = 60) -> list[int]:
    """Return the exit codes; a process that takes longer is killed and fails the test."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
    hanging = [process.pid for process in processes if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"still running after {seconds} s: {hanging}"
    return [process.exitcode for process in processes]


def _main(config: Any, environment: dict, log: Path, trace: Path | None, sabotage) -> None:
    import maekit
    from maekit.cli.options import with_flags
    from maekit.config.finetune import FinetuneConfig
    from maekit.finetuning.finetune import finetune
    from maekit.system.errors import MaekitError, OtherRankError
    from maekit.system.progress import Silent

    os.environ.update({key: str(value) for key, value in environment.items()})
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)

    class Notes(Silent):
        def note(self, text: str) -> None:
            print(with_flags(text), file=sys.stderr, flush=True)

    if trace is not None:
        (_trace if isinstance(config, PretrainConfig) else _trace_shards)(trace)
    if sabotage is not None:
        sabotage[0](*sabotage[1])
    try:
        if isinstance(config, PretrainConfig):
            maekit.pretrain(config, Notes())
        elif isinstance(config, FinetuneConfig):
            finetune(config, Notes())
        else:
            raise_if_incomplete(maekit.embed(config, Notes()))
    except MaekitError as error:
        if not isinstance(error, OtherRankError):
            print(f"maekit: {type(error).__name__}: {with_flags(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _trace(trace: Path) -> None:
    """Note of each step: its number, the rank, and a digest of images, flips and mask noise."""
    from maekit.training.step import Step

    take = Step.__call__
    descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def traced(self, micro_batches, done):
        result = take(self, micro_batches, done)
        digest = hashlib.sha256()
        for chunks in micro_batches:
            for chunk in chunks:
                for tensor in (chunk.images, chunk.flips, chunk.noise):
                    digest.update(tensor.numpy().tobytes())
        os.write(descriptor, f"{done + 1} {os.environ.get('RANK', 0)} {digest.hexdigest()}\n".encode())
        return result

    Step.__call__ = traced


def _trace_shards(trace: Path) -> None:
    """Note when a shard's rows begin to be written, and when it is committed, with the process that did it."""
    from maekit.embedding.output_directory import OutputDirectory

    descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begin, commit = OutputDirectory.begin, OutputDirectory.commit

    def begun(self, name):
        os.write(descriptor, f"begin {os.getpid()} {name}\n".encode())
        return begin(self, name)

    def committed(self, images, work, record):
        done = commit(self, images, work, record)
        os.write(descriptor, f"commit {os.getpid()} {images.name}\n".encode())
        return done

    OutputDirectory.begin, OutputDirectory.commit = begun, committed


def read_trace(trace: Path) -> dict[tuple[int, int], str]:
    """Return digests by (step, rank); a step that was taken again must have been trained on the same."""
    steps: dict[tuple[int, int], str] = {}
    for line in trace.read_text().splitlines():
        step, rank, digest = line.split()
        assert steps.setdefault((int(step), int(rank)), digest) == digest, f"step {step} of rank {rank} differs"
    return steps


class Wrapped:
    """A file whose writes are about to go wrong; all else is passed on."""

    def __init__(self, file) -> None:
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def kill_in_checkpoint(number: int, after: bool) -> None:
    """Sabotage: SIGKILL at the n-th thing that the checkpoint's thread does to the disk; see `_kill_at`."""
    import shutil

    names = ((os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "mkdir"))
    _kill_at(number, after, names, lambda path: threading.current_thread().name == "checkpoint")


def kill_at_disk(folder: Path, number: int, after: bool) -> None:
    """Sabotage: SIGKILL at the n-th thing that is done to the disk below a folder; see `_kill_at`."""
    import shutil

    names = ((os, "fsync"), (os, "replace"), (os, "link"), (shutil, "rmtree"), (Path, "unlink"))
    _kill_at(number, after, names, lambda path: path.startswith(str(folder)))


def _kill_at(number: int, after: bool, names: tuple, is_counted: Callable[[str], bool]) -> None:
    """SIGKILL this process at the n-th call of some functions, before it or after it, or within the n-th write.

    Args:
        number: n; calls and writes are counted together.
        after: whether a call still does its work.
        names: the functions, each with what it is an attribute of.
        is_counted: whether what is done to a path counts.
    """
    count = 0

    def deadly(function):
        def called(*arguments, **options):
            nonlocal count
            first = arguments[0]
            if not is_counted(os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)):
                return function(*arguments, **options)
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    class HalfWritten(Wrapped):
        """A file of which the deadly write leaves a half."""

        def write(self, data) -> int:
            nonlocal count
            count += 1
            if count == number:
                half = len(data) // 2
                self._file.write(data[:half] if isinstance(data, str) else memoryview(data)[:half])
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self._file.write(data)

    _wrap_written_files(HalfWritten, is_counted)
    for module, name in names:
        setattr(module, name, deadly(getattr(module, name)))


def _wrap_written_files(wrapper: type[Wrapped], is_ours: Callable[[str], bool]) -> None:
    """Make `open` wrap the files that are opened for writing under our paths, but for locks."""
    import builtins

    plain_open = builtins.open

    def open_file(path, mode="r", *arguments, **options):
        file = plain_open(path, mode, *arguments, **options)
        wraps = mode[0] in "wa" and not isinstance(path, int) and "/.locks/" not in str(path) and is_ours(str(path))
        return wrapper(file) if wraps else file

    builtins.open = open_file


def fill_disk(folder: Path, number: int) -> None:
    """Sabotage: the n-th write below a folder, and all that follow, find the disk full."""
    import errno

    count = 0

    class Full(Wrapped):
        def write(self, data) -> int:
            nonlocal count
            count += 1
            if count >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

    _wrap_written_files(Full, lambda path: path.startswith(str(folder)) and not path.endswith(".lock"))
