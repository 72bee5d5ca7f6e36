"""The output directory: its model and options, the shards that are done, and their results.

OUT/…                                files of embeddings (formats.py)
OUT/_maekit/.output.json             which model and options the directory belongs to
OUT/_maekit/a/000.tar.json           commit record of a shard, written last
OUT/_maekit/errors/a/000.tar.jsonl   every key that has no row, with the reason
OUT/_maekit/.numbers/00000.json      npy layout: shards first seen in the same run, in the order of their numbers
OUT/_maekit/.locks/                  locks of running processes (no shard lies in a hidden folder)
OUT/_maekit/.tmp/                    unfinished files
"""

import contextlib
import dataclasses
import json
import operator
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from maekit.embedding.commit_record import (
    BOOKKEEPING,
    CommitRecord,
    OutputOptions,
    is_below,
    read_json,
    read_record,
    record_path,
    recorded_shards,
)
from maekit.embedding.formats import Layout, ShardFiles
from maekit.embedding.inputs import Images, Part
from maekit.encoder_file import EncoderDescription
from maekit.shards.folder import TAR
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.locks import LockedError, owned, still_owns

_INTENT = "about_to_write"
_OUTPUT = ".output.json"


class OutputDirectory:
    """A directory of embeddings.

    Args:
        path: the directory, new or from an earlier run.
        model: the encoder.
        options: the options that determine its bytes.
        owner: name of this run among those that write here concurrently.
    """

    def __init__(self, path: Path, model: EncoderDescription, options: OutputOptions, owner: str = "all") -> None:
        self.path, self.options, self._owner = path, options, owner
        self.bookkeeping = path / BOOKKEEPING
        footer = {
            "model_sha256": model.sha256,
            "pool": model.pool,
            "normalize": model.normalize,
            "preprocess": model.preprocess.to_json(),
        }
        self.layout = Layout(options.format, options.dtype, model.dim, options.keep, footer)
        self._numbers: dict[str, int] = {}
        self._is_new = False

    def refuse_foreign(self) -> None:
        """Check that the directory is new, empty, or an output of embedding.

        Raises:
            InputError: it is anything else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; `out` names a directory")
        for name in (".", ".tmp", ".locks", ".locks/runs", ".locks/shards", ".numbers", "errors"):
            if (self.bookkeeping / name).is_symlink():
                raise InputError(f"{self.bookkeeping / name} is a link; embed notes nothing outside its output")
        if self.path.is_dir() and not self.bookkeeping.is_dir():
            try:
                names = sorted(p.name for p in self.path.iterdir())
            except OSError as error:
                raise InputError(f"cannot read {self.path}: {error.strerror}") from error
            if names:
                raise InputError(f"{self.path} holds {names[0]} and is no output of `maekit embed`; choose a new `out`")

    @contextlib.contextmanager
    def sole_run(self) -> Iterator[None]:
        """Lock this run's name in the directory for this process alone.

        Raises:
            InputError: another run holds it.
        """
        is_new = not self.bookkeeping.exists()
        try:
            with owned(self._run_lock(self._owner)):
                try:
                    yield
                finally:
                    self._sweep()
        except LockedError as held:
            raise InputError(
                f"{self.path} is in use by {held.owner}; wait for it to end or choose another `out`"
            ) from held
        finally:
            if is_new and not (self.bookkeeping / _OUTPUT).exists():
                _remove_empty(self.bookkeeping)  # the run was refused before it wrote anything: leave no trace

    def claim(self, names: Sequence[str], *, overwrite: bool) -> None:
        """Claim the directory for this model and options, or check that it is theirs; number the input's shards.

        Args:
            names: names of all shards of the input.
            overwrite: delete the existing output first.

        Raises:
            InputError: it belongs to another model or other options, or another run is using what `overwrite` deletes.
            MaekitError: it cannot be written.
        """
        mark = self.bookkeeping / _OUTPUT
        self._is_new = overwrite or not mark.is_file()
        if overwrite and mark.is_file():
            self._clear()
        self._sweep()
        wanted = self.options.to_json()
        if not mark.is_file():
            files.create_whole(mark, json.dumps(wanted, indent=1).encode(), scratch=self.scratch)
        there = read_json(mark) or {}
        for key in {**there, **wanted}:  # one that is left out where it is not set may stand on one side only
            if there.get(key) != wanted.get(key):
                raise InputError(
                    f"{self.path} was made with {key} = {there.get(key)}, and {wanted.get(key)} is asked for now; "
                    "choose another `out`, or `overwrite` to delete what is there"
                )
        if self.options.format == "npy":
            self._number(names)
        self._remove_uncommitted()

    def discard_if_new(self) -> None:
        """Undo this run's claim if the claim was new, so that a mistaken run does not fix the options."""
        if self._is_new:
            self._clear()

    def sole_owner_of(self, name: str, *, sweeping: bool = False) -> AbstractContextManager[None]:
        """Return a lock on one shard for this process alone, across all runs; `LockedError` if another one holds it.

        Args:
            name: name of the shard.
            sweeping: hold it only to clean up after its last owner.
        """
        return owned(self._shard_lock(name), sweeping=sweeping)

    def committed(self, name: str, first: int | None = None) -> CommitRecord | None:
        """Return a shard's commit record if model and options are unchanged and its files exist; else None.

        Args:
            name: name of the shard.
            first: `Scope.first` of the shard in this run.
        """
        record = read_record(self.path, name)
        return record if record is not None and record.first == first and self._is_current(record) else None

    def _is_current(self, record: CommitRecord) -> bool:
        # The recorded size may be smaller than requested: a batch that did not fit into memory is halved.
        if {**record.options, "batch_size": self.options.batch_size} != self.options.to_json():
            return False
        paths = [(self.path / output["path"], output["bytes"]) for output in record.outputs]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def renew(self, record: CommitRecord, version: str | None, unused: dict[str, int]) -> CommitRecord:
        """Record a shard's new version when its content is unchanged, so that the next run need not read it.

        `unused` are the images, or files, beside it that are now used by no sample.

        Raises:
            MaekitError: the record cannot be written.
        """
        record = dataclasses.replace(record, input_version=version, unused=unused)
        self._note(record.shard, record.to_json())
        return record

    def begin(self, name: str) -> ShardFiles:
        """Start writing the files of a shard."""
        return ShardFiles(self.layout, self.path, paths=self._paths_of(name), shard=name, scratch=self.scratch)

    def _paths_of(self, name: str) -> list[str]:
        """Return the paths of a shard's files, relative to the directory."""
        return self.layout.paths(name.removesuffix(TAR), self._numbers.get(name))

    def commit(self, images: Images, shard_files: ShardFiles, record: CommitRecord) -> CommitRecord:
        """Publish rows, then errors, then the record; if killed in between, the next run embeds the shard again.

        Args:
            images: the shard.
            shard_files: its rows and errors.
            record: its record, without rows, errors and outputs.

        Raises:
            MaekitError: the disk is full or the path is not writable; names the path.
        """
        shard_files.complete()
        if not still_owns(self._shard_lock(images.name)):
            raise MaekitError(f"another run took over {images.name} while this one stood still; run the command again")
        # Replaces an earlier record, which does not describe the new rows. If the run is killed after this, the next
        # one finds here which files are uncommitted.
        self._note(images.name, {"shard": images.name, _INTENT: shard_files.paths})
        shard_files.publish()
        if not shard_files.rows:
            _unlink(self.path / path for path in shard_files.paths)
        errors_file = self._errors_file(images.name)
        if shard_files.errors:
            errors = sorted(shard_files.errors, key=operator.itemgetter("index"))
            text = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
            files.write_atomically(errors_file, text.encode(), scratch=self.scratch)
        else:
            _unlink([errors_file])
        outputs = [
            {"path": path, "sha256": files.sha256_file(self.path / path), "bytes": (self.path / path).stat().st_size}
            for path in (shard_files.paths if shard_files.rows else [])
        ]
        record = dataclasses.replace(record, rows=shard_files.rows, errors=len(shard_files.errors), outputs=outputs)
        if record.rows + record.errors != record.keys:
            raise MaekitError(
                f"{images.name}: {record.rows} rows, {record.errors} errors, {record.keys} keys: an error in maekit"
            )
        self._note(images.name, record.to_json())
        return record

    def write_damage(self, name: str, reason: str) -> None:
        """Record that a shard without any embeddings is damaged; the next run tries it again.

        Raises:
            MaekitError: the record cannot be written.
        """
        # Left by a run that was killed before it wrote the record.
        _unlink(self.path / path for path in self._paths_of(name))
        self._note(name, {"shard": name, "damaged": reason})

    def orphans(self, names: Collection[str]) -> list[CommitRecord]:
        """Return the records of committed shards that are not in the input."""
        records = [read_record(self.path, name) for name in recorded_shards(self.path) if name not in names]
        return [record for record in records if record is not None and self._is_current(record)]

    def unaccounted(self) -> list[str]:
        """Return the files that look like output and belong to no committed shard, relative to the directory."""
        known = {path for name in recorded_shards(self.path) for path in self._outputs(name)}
        found = {path for suffix in ("parquet", "npy") for path in self.path.rglob(f"*.{suffix}")}
        return sorted(path.relative_to(self.path).as_posix() for path in found - known)

    def errors_of(self, name: str) -> list[tuple[int, str, str]]:
        """Return ordinal, key and reason of the samples of a shard that have no row.

        Raises:
            MaekitError: the list cannot be read.
        """
        path = self._errors_file(name)
        try:
            # Not splitlines(): keys may contain other characters that it treats as line ends.
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            return [(int(row["index"]), str(row["key"]), str(row.get("reason"))) for row in rows]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MaekitError(f"{path}: cannot be read: {error!r}") from error

    def has_errors(self, record: CommitRecord, reasons: Collection[str]) -> bool:
        """Whether an error of a committed shard has one of these reasons; a list that cannot be read counts as one."""
        try:
            return record.errors > 0 and any(reason in reasons for _, _, reason in self.errors_of(record.shard))
        except MaekitError:
            return True

    def _remove_uncommitted(self) -> None:
        """Remove the files of shards whose run was killed before it wrote the commit record.

        Readers would take them for output. If only one of a shard's two files exists, readers of the npy layout would
        also pair the other files wrongly.
        """
        for name in recorded_shards(self.path):
            if self._intended(name):
                with contextlib.suppress(LockedError), self.sole_owner_of(name, sweeping=True):
                    if intended := self._intended(name):  # read again: it may have been committed in the meantime
                        _unlink([*intended, record_path(self.path, name)])

    def _intended(self, name: str) -> list[Path]:
        """Return the files that a killed run was about to publish for a shard."""
        paths = self._noted(name).get(_INTENT)
        return [self.path / path for path in paths if is_below(path)] if isinstance(paths, list) else []

    def forget(self, name: str) -> None:
        """Remove a shard that is no longer in the input: its files, its errors and its record.

        Raises:
            MaekitError: they cannot be removed.
        """
        with contextlib.suppress(LockedError), self.sole_owner_of(name):
            _unlink([*self._outputs(name), self._errors_file(name), record_path(self.path, name)])

    def _outputs(self, name: str) -> list[Path]:
        """Return the files of a committed shard."""
        record = read_record(self.path, name)
        return [self.path / output["path"] for output in record.outputs] if record is not None else []

    def _noted(self, name: str) -> dict[str, Any]:
        """Return what the record of a shard says, whether or not it is a valid commit record."""
        return read_json(record_path(self.path, name)) or {}

    def _note(self, name: str, record: dict[str, Any]) -> None:
        path = record_path(self.path, name)
        files.write_atomically(path, json.dumps(record, indent=1).encode(), scratch=self.scratch)

    def _number(self, names: Sequence[str]) -> None:
        """Number the shards that have no number yet: in input order, after those seen before.

        Each generation of new shards is one file that is created atomically, so runs on several machines agree without
        a lock.
        """
        while True:
            self._numbers, generations = {}, 0
            while (path := self._generation(generations)).exists():
                there = (read_json(path) or {}).get("shards")
                if not isinstance(there, list) or not all(isinstance(name, str) for name in there):
                    raise InputError(f"{path} is damaged, and with it the numbers of shards; choose another `out`")
                for name in there:
                    self._numbers.setdefault(name, len(self._numbers))
                generations += 1
            new = [name for name in names if name not in self._numbers]
            if not new:
                return
            text = json.dumps({"shards": new}, indent=0).encode()
            files.create_whole(self._generation(generations), text, scratch=self.scratch)

    def _generation(self, number: int) -> Path:
        return self.bookkeeping / ".numbers" / f"{number:05d}.json"

    def _clear(self) -> None:
        """Delete everything that embedding wrote here, and nothing else.

        Raises:
            InputError: another run is using the directory.
        """
        for lock in (self.bookkeeping / ".locks" / "runs").glob("*"):
            if lock.name == self._owner or lock.name.startswith("."):
                continue
            try:
                with owned(lock):
                    pass
            except LockedError as held:
                raise InputError(f"`overwrite`: {self.path} is in use by {held.owner}; wait for it to end") from held
        for name in recorded_shards(self.path):
            _unlink([*self._outputs(name), *self._intended(name)])
        for child in self.bookkeeping.iterdir():
            if child.is_dir() and child.name != ".locks":
                shutil.rmtree(child)
            elif child.is_file():
                child.unlink()

    def _sweep(self) -> None:
        """Remove files and locks left by killed processes of this run, and by other runs that no longer exist."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for left in (self.bookkeeping / ".tmp").glob("*"):
            if left.name != self._owner:
                with contextlib.suppress(MaekitError), owned(self._run_lock(left.name), sweeping=True):
                    shutil.rmtree(left, ignore_errors=True)
        for lock in (self.bookkeeping / ".locks").rglob("*"):
            if lock.is_file() and not lock.is_symlink() and lock != self._run_lock(self._owner):
                with contextlib.suppress(MaekitError), owned(lock, sweeping=True):
                    pass  # its owner is dead; taking and releasing the lock removes it

    @property
    def scratch(self) -> Path:
        """Directory of this run's unfinished files."""
        return self.bookkeeping / ".tmp" / self._owner

    def _run_lock(self, owner: str) -> Path:
        return self.bookkeeping / ".locks" / "runs" / owner

    def _shard_lock(self, name: str) -> Path:
        return self.bookkeeping / ".locks" / "shards" / name

    def _errors_file(self, name: str) -> Path:
        return self.bookkeeping / "errors" / f"{name}.jsonl"


def batch_size_of(directory: Path) -> int | None:
    """Return the batch size that an output directory was made with; None if unknown."""
    size = (read_json(directory / BOOKKEEPING / _OUTPUT) or {}).get("batch_size")
    return size if isinstance(size, int) and size > 0 else None


def provider_of(directory: Path) -> str | None:
    """Return the provider, or OpenVINO, that an output directory was made with; None if unknown."""
    provider = (read_json(directory / BOOKKEEPING / _OUTPUT) or {}).get("provider")
    return provider if isinstance(provider, str) else None


def check_output_names(layout: Layout, parts: Sequence[Part]) -> None:
    """Refuse parts that would write to the same file, such as `x` and `x.tar`, or into hidden or bookkeeping folders.

    Raises:
        InputError: names such parts.
    """
    owners: dict[str, Part] = {}
    for part in parts:
        pieces = part.name.split("/")
        if pieces[0] == BOOKKEEPING:
            raise InputError(f"{part.where}: a folder named {BOOKKEEPING} is no input; it holds what embed notes")
        if any(piece.startswith(".") for piece in pieces):
            raise InputError(
                f"{part.where} would be named {part.name}: a hidden name, or one that leads out of the output"
            )
        if layout.format == "npy":
            continue  # each part has its own number
        for path in layout.paths(part.name.removesuffix(TAR), None):
            owner = owners.setdefault(path, part)
            if owner is not part:
                raise InputError(f"{owner.where} and {part.where} would both write {path}; rename one of them")


def _unlink(paths: Iterable[Path]) -> None:
    """Delete files if they exist."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise files.write_failure(path, error) from error


def _remove_empty(folder: Path) -> None:
    """Remove a folder that contains only folders; its parent stays, even if empty."""
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)
