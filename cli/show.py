"""Output of the command line: progress on standard error, results on standard output."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from maekit.cli.options import with_flags
from maekit.system.progress import Silent, duration
from maekit.system.redaction import redact, redacted
from maekit.system.text import printable

_PLAIN_SECONDS = 15.0


def plain(text: str) -> str:
    """Return a text as it may be shown: one line, no control characters, no secret of a URL."""
    return redact(printable(text))


def say(text: str = "", *, error: bool = False) -> None:
    """Print one line, on standard output or standard error, whatever names and words of others are in it."""
    print(plain(text), file=sys.stderr if error else sys.stdout, flush=error)


def print_json(summary: Any) -> None:
    """Print one object, a dictionary or a dataclass, as the last line of standard output."""
    print(json.dumps(redacted(summary if isinstance(summary, dict) else asdict(summary))), flush=True)


def is_main_process() -> bool:
    """Whether this process prints for the run; launchers of several processes set RANK."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "") in ("", "0", "1")


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

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    def note(self, text: str) -> None:
        """Print one line."""
        say(self._prefix + with_flags(text), error=True)


class Plain(Notes):
    """Prints a progress line at intervals, for logs."""

    def __init__(self) -> None:
        super().__init__()
        self.start("", 0)

    def start(self, what: str, total: int, done: int = 0, unit: str = "") -> None:
        """Begin a task."""
        from maekit.system.files import describe_bytes  # loads hashlib, which `--help` needs not

        self._what, self._total, self._first, self._figures = with_flags(what), total, done, ""
        self._count: Callable[[int], str] = describe_bytes if unit == "bytes" else str
        self._started = self._shown = time.monotonic()

    def advance(self, done: int) -> None:
        """Print a line if enough time has passed since the last one."""
        now = time.monotonic()
        if now - self._shown >= _PLAIN_SECONDS:
            self._shown = now
            left = (now - self._started) / max(1, done - self._first) * (self._total - done)
            of = f"{self._count(done)}/{self._count(self._total)}"
            self.note(f"{self._what} {of}  {duration(left)} left  {self._figures}".rstrip())

    def figures(self, row: dict[str, Any]) -> None:
        """Remember the newest figures for the next line."""
        self._figures = describe(row)

    def stop(self) -> None:
        """Print the last figures."""
        if self._figures:
            self.note(f"{self._what}: {self._figures}")


class Bar(Silent):
    """A live bar with the count done, the time left and the newest figures."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._console = Console(stderr=True)
        self._bar = Progress(console=self._console)

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        from rich.text import Text  # never read as markup or emoji, unlike a str

        self._console.print(Text(plain(with_flags(text))))

    def start(self, what: str, total: int, done: int = 0, unit: str = "") -> None:
        """Show a bar."""
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.fields[row]}", markup=False),
            console=self._console,
        )
        self._bar.add_task(plain(with_flags(what)), total=total, completed=done, row="")
        self._bar.start()

    def _update(self, **fields: Any) -> None:
        for task in self._bar.task_ids:
            self._bar.update(task, **fields)

    def advance(self, done: int) -> None:
        """Move the bar."""
        self._update(completed=done)

    def figures(self, row: dict[str, Any]) -> None:
        """Show the newest figures beside the bar."""
        self._update(row=plain(describe(row)))

    def stop(self) -> None:
        """Stop the bar and leave it on the screen."""
        self._bar.stop()


_FIGURES = {"epoch": "epoch {:.2f}", "loss": "loss {:.4f}", "lr": "lr {:.2e}", "images_per_second": "{:.1f} img/s"}


def describe_unused(unused: dict[str, int]) -> str:
    """Return what is added to a line of counts: images and files that are the image of no sample, by kind."""
    return f", unused: {', '.join(f'{count} {kind}' for kind, count in unused.items())}" if unused else ""


def describe(row: dict[str, Any]) -> str:
    """Return the most useful figures of a row in one short line."""
    parts = [form.format(row[key]) for key, form in _FIGURES.items() if row.get(key) is not None]
    if "data_wait" in row:
        bottleneck = ", the loader is the bottleneck" if row["data_wait"] > 0.2 else ""
        parts.append(f"data-wait {row['data_wait']:.0%}{bottleneck}")
    if known := [f"{stage} {rate:.0f}" for stage, rate in row.get("rates", {}).items() if rate]:
        parts.append(f"({', '.join(known)} alone)")
    if row.get("binds"):
        parts.append(f"bottleneck: {row['binds']}")
    if bad := row.get("bad") or row.get("errors"):
        parts.append(f"{bad} bad samples")
    return "  ".join(parts)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """Print aligned columns on standard output, each as wide as its widest cell; `right` lists right-aligned ones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(Text(plain(heading)), justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(str(cell))) for cell in row))
    # In a file or pipe, lines are not folded at 80 columns, for the sake of scripts and logs.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
