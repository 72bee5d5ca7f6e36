"""The errors that maekit raises, each with the exit code that the command line gives it.

The library raises and never prints; the command line prints one line and exits. No message holds the secrets of a URL.
"""

from maekit.system.redaction import redact


class MaekitError(Exception):
    """Something failed during the work. The message is one line and names the fix if there is one."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class InputError(MaekitError):
    """Bad usage or bad input, found before any work started."""

    exit_code = 2


class DamagedShard(MaekitError):
    """A tar shard that cannot be trusted.

    Attributes:
        path: the shard.
        offset: byte offset of the header or data where the damage was seen.
        reason: what is wrong, as text.
    """

    def __init__(self, path: str, offset: int, reason: str) -> None:
        super().__init__(f"{path}: damaged at byte {offset}: {reason}")
        self.path, self.offset, self.reason = redact(path), offset, redact(reason)

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return DamagedShard, (self.path, self.offset, self.reason)


class ImageError(MaekitError):
    """An image that gives no embedding, most often because its bytes cannot be decoded.

    Attributes:
        reason: a short code, one of `REASONS`; it is written to output files.
        detail: what was found. The message is the detail, after which image it is, if that is known.
        index: position of the image among those that were given to `Embedder`; else None.
        path: its path; None if it has none, or it is known from the context.
    """

    REASONS = (
        *("no_image", "empty", "not_an_image", "undecodable", "too_large", "unsupported_mode", "checksum"),
        *("unreadable", "crashed", "no_label", "unsupported_format", "bad_member", "not_finite"),
    )

    def __init__(self, reason: str, detail: str, index: int | None = None, path: str | None = None) -> None:
        image = "" if index is None else f"image {index}: " if path is None else f"image {index} ({path}): "
        super().__init__(f"{image}{detail}")
        self.reason, self.detail, self.index = reason, redact(detail), index
        self.path = path if path is None else redact(path)

    def __reduce__(self) -> tuple[type, tuple[str, str, int | None, str | None]]:
        return type(self), (self.reason, self.detail, self.index, self.path)


class UnusableImage(ImageError, InputError):
    """A path given to `Embedder` that cannot be read, or a value that is no image: an `InputError` as well."""


class Stopped(MaekitError):
    """A signal stopped the work and everything is saved; the same command resumes it."""

    exit_code = 75


class MachineWarning(UserWarning):
    """Something that this machine or file system lacks, and what follows; the command line shows the text."""


class OtherRankError(MaekitError):
    """Another process of the same run failed or was stopped, and reports that itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
