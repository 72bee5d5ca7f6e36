"""Output of the command line: progress on standard error, results on standard output."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from maekit.cli.options import with_flags
from maekit.system.files import describe_bytes
from maekit.system.progress import Silent, duration

_PLAIN_SECONDS = 15.0


def print_json(summary: dict[str, Any]) -> None:
    """Print one object as the last line of standard output."""
    print(json.dumps(summary), flush=True)


def is_main_process() -> bool:
    """Whether this process prints for the run; launchers of several processes set RANK."""
    return os.environ.get("RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE") or 1) < 2


def make_progress() -> "Bar | Plain | Notes":
    """Return a live bar on a terminal and plain lines elsewhere; other ranks than 0 print only notes."""
    if not is_main_process():
        return Notes(f"rank {os.environ['RANK']}: ")
    return Bar() if sys.stderr.isatty() else Plain()


class Notes(Silent):
    """Prints notes and no progress.

    Args:
        prefix: text before each line.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def note(self, text: str) -> None:
        """Print one line."""
        print(self._prefix + with_flags(text), file=sys.stderr, flush=True)


class Plain:
    """Prints a progress line at intervals, for logs."""

    def __init__(self) -> None:
        self._what, self._total, self._shown, self._row = "", 0, 0.0, ""
        self._first, self._started = 0, 0.0
        self._count: Callable[[int], str] = str

    def note(self, text: str) -> None:
        """Print one line."""
        print(with_flags(text), file=sys.stderr, flush=True)

    def start(self, what: str, total: int, done: int = 0, unit: str = "") -> None:
        """Begin a task."""
        self._what, self._total, self._row, self._first = with_flags(what), total, "", done
        self._count = describe_bytes if unit == "bytes" else str
        self._started = self._shown = time.monotonic()

    def advance(self, done: int) -> None:
        """Print a line if enough time has passed since the last one."""
        now = time.monotonic()
        if now - self._shown >= _PLAIN_SECONDS:
            self._shown = now
            left = (now - self._started) / max(1, done - self._first) * (self._total - done)
            of = f"{self._count(done)}/{self._count(self._total)}"
            self.note(f"{self._what} {of}  {duration(left)} left  {self._row}".rstrip())

    def figures(self, row: dict[str, Any]) -> None:
        """Remember the newest figures for the next line."""
        self._row = describe(row)

    def stop(self) -> None:
        """Print the last figures."""
        if self._row:
            self.note(f"{self._what}: {self._row}")


class Bar:
    """A live bar with the count done, the time left and the newest figures."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(with_flags(text), highlight=False, markup=False)

    def start(self, what: str, total: int, done: int = 0, unit: str = "") -> None:
        """Show a bar."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[row]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(with_flags(what), total=total, completed=done, row="")
        self._bar.start()

    def advance(self, done: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def figures(self, row: dict[str, Any]) -> None:
        """Show the newest figures beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, row=describe(row))

    def stop(self) -> None:
        """Stop the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(row: dict[str, Any]) -> str:
    """Return the most useful figures of a row in one short line."""
    parts = []
    if "epoch" in row:
        parts.append(f"epoch {row['epoch']:.2f}")
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.4f}")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.2e}")
    if "images_per_second" in row:
        parts.append(f"{row['images_per_second']:.1f} img/s")
    if "data_wait" in row:
        parts.append(
            f"data-wait {row['data_wait']:.0%}" + (", the loader is the bottleneck" if row["data_wait"] > 0.2 else "")
        )
    if row.get("rates"):
        known = [f"{stage} {rate:.0f}" for stage, rate in row["rates"].items() if rate]
        parts += [f"({', '.join(known)} alone)"] if known else []
    if row.get("binds"):
        parts.append(f"bottleneck: {row['binds']}")
    if row.get("bad") or row.get("errors"):
        parts.append(f"{row.get('bad') or row.get('errors')} bad samples")
    return "  ".join(parts)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print aligned columns on standard output, each as wide as its widest cell; `right` lists right-aligned ones."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # In a file or pipe, lines are not folded at 80 columns, for the sake of scripts and logs.
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)
