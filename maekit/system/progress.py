"""The interface for reporting progress of long work. The library calls it; the command line draws it."""

from typing import Any, Protocol


class Progress(Protocol):
    """Receiver of progress updates."""

    def note(self, text: str) -> None:
        """Show one line that stays."""

    def start(self, what: str, total: int, done: int = 0, unit: str = "") -> None:
        """Begin a piece of work of `total` units (such as `bytes`), `done` of which are finished already."""

    def advance(self, done: int) -> None:
        """Report how many units are finished in all."""

    def figures(self, row: dict[str, Any]) -> None:
        """Show the newest measurements."""

    def stop(self) -> None:
        """End the piece of work."""


class Silent:
    """A `Progress` that shows nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def start(self, what: str, total: int, done: int = 0, unit: str = "") -> None:
        """Show nothing."""

    def advance(self, done: int) -> None:
        """Show nothing."""

    def figures(self, row: dict[str, Any]) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


def duration(seconds: float) -> str:
    """Return a time span as readable text: 45 s, 12 min, 3 h 50 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
