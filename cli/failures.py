"""What the command line says of an error: one line and an exit code, whatever was raised."""

import errno
import os
import re
import traceback
from pathlib import Path
from typing import Any

from maekit.cli.options import with_flags
from maekit.system.errors import MaekitError

_TRAINING = ("torch", "timm", "torchvision", "onnxscript", "safetensors", "sklearn", "tensorboard")
# What to do about errors of the system that have other causes than the file they name.
_REMEDIES = {
    errno.EMFILE: "this process may open no more files; raise the limit: ulimit -n 65536",
    errno.ENFILE: "this machine can open no more files; end other programs, or raise fs.file-max",
    errno.EAGAIN: "no more processes or threads are allowed; use fewer `workers`, or raise the limit: ulimit -u",
    errno.ENOMEM: "there is no memory for another process; use fewer `workers`, or raise the limit: ulimit -v",
    errno.EFBIG: "the file became larger than is allowed; raise the limit: ulimit -f unlimited",
    errno.ENOSPC: "the disk is full; make space, and run the same command again",
    errno.EDQUOT: "your quota of this disk is used up; make space, and run the same command again",
    errno.ENAMETOOLONG: "the name is too long for this system; use a shorter one",
}
_OUT_OF_MEMORY = (
    "out of memory; use fewer `workers` or a smaller `batch_size`, or give it more (ulimit -v, the job's limit)"
)
_QUOTED_OPTION = re.compile(r"'(--?[a-z][a-z-]*)'")
_LONG_NAME = re.compile(r"[^\s:;,']{500,}")
# How libraries say so in exceptions of their own.
_NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "Failed to allocate memory"),
    *("bad_alloc", "bad allocation"),
    "failed to map segment",  # of a shared library, by the loader
)


def described(error: BaseException) -> tuple[str, int]:
    """Return the line that says what went wrong, without `maekit:` before it, and the exit code."""
    line, code = _described(error)
    line = _LONG_NAME.sub(lambda name: f"{name[0][:80]}…{name[0][-40:]} ({len(name[0])} characters)", with_flags(line))
    return line.replace("\r", "\\r").replace("\n", "\\n"), code  # a name may contain a line break


def _described(error: BaseException) -> tuple[str, int]:
    said = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MaekitError):
        return str(error).strip(), error.exit_code
    if hasattr(error, "format_message"):  # of a wrong command line; Typer keeps the class to itself
        return _of_usage(error), getattr(error, "exit_code", 2)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _TRAINING:
        return f"this command needs {str(error.name).partition('.')[0]}: pip install 'maekit[train]'", 2
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
        return _OUT_OF_MEMORY, 1
    if isinstance(error, ImportError) and ".so" in said:
        return f"a library cannot be loaded: {said}; reinstall the package that it belongs to", 1
    if isinstance(error, OSError) and error.errno is not None:
        subject = [os.fsdecode(error.filename)] if isinstance(error.filename, str | bytes) else []
        said = error.strerror or os.strerror(error.errno)
        remedy = [_REMEDIES[error.errno]] if error.errno in _REMEDIES else []
        return ": ".join([*subject, said, *remedy]), 2 if error.errno == errno.ENAMETOOLONG else 1
    if isinstance(error, RuntimeError) and "can't start new thread" in said:
        return f"{said}: {_REMEDIES[errno.EAGAIN]}", 1
    if isinstance(error, ValueError) and "embedded null" in said:
        return "a path contains a NUL character; no file has such a name", 2
    return (
        f"unforeseen {type(error).__name__}{_place(error)}: {said or 'no message'}; a bug: please report it with what "
        "the same command prints with MAEKIT_DEBUG=1 before it",
        1,
    )


def _of_usage(error: Any) -> str:
    """Return the line for a command line that Typer refused: `--batch-size: 'x' is not a valid int; see …`."""
    said = " ".join(error.format_message().split()).rstrip(".")
    said = said[:1].lower() + said[1:]
    said = re.sub(r"^invalid value for (.*?): ", r"\1: ", said)
    command = getattr(getattr(error, "ctx", None), "command_path", "maekit")
    return f"{_QUOTED_OPTION.sub(lambda option: option[1], said)}; {command} --help lists what there is"


def _place(error: BaseException) -> str:
    """Return where in maekit the error arose, as ` in maekit/x.py, line 3`; the innermost frame of this package."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "maekit" in Path(frame.filename).parts]
    return f" in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
