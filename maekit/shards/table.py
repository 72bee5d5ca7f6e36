"""The table of `maekit pack`: which images are packed, in what order, and with what label."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maekit.config.pack import PackConfig
from maekit.shards.folder import extension_of
from maekit.shards.image_choice import IMAGE_EXTENSIONS
from maekit.system.errors import InputError
from maekit.system.text import first_few

_PATH_COLUMNS = ("path", "filepath", "file_path", "file", "filename", "file_name", "image")
_LABEL_COLUMNS = ("label", "cls", "class", "target")
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.0+)?")
Labels = dict[Path, int | str | None]


def read_table(images: Path, config: PackConfig, found: dict[Path, Path]) -> Labels:
    """Read which images are packed, in the order of the table, each with its label.

    Args:
        images: the folder of images.
        config: names the table and its columns.
        found: the files in the folder, by their path relative to it.

    Raises:
        InputError: no table that can be read, no such column, or rows that name no image.
    """
    table = Path(str(config.table))
    rows = _load(table)
    names = rows.column_names
    path_column = _choose(table, names, "path", asked=config.path_column, usual=_PATH_COLUMNS)
    label_column = _choose(table, names, "label", asked=config.label_column, usual=_LABEL_COLUMNS)
    if path_column is None:
        hint = "; is it separated by semicolons? Commas are expected" if any(";" in name for name in names) else ""
        raise InputError(
            f"{table}: no column of paths (looked for {', '.join(_PATH_COLUMNS)}; there are {', '.join(names)}); "
            f"name it with `path_column`{hint}"
        )
    paths = rows[path_column].to_pylist()
    labels = _labels(rows[label_column].to_pylist()) if label_column else [None] * len(paths)
    wanted: Labels = {}
    problems = []
    for row, (text, label) in enumerate(zip(paths, labels, strict=True), 1):
        path = Path(os.path.relpath(images / str(text), images))
        if text is None or path not in found:
            hint = "; paths are written with /" if "\\" in str(text) else ""
            problems.append(f"row {row}: there is no file {text!r} in the folder of images{hint}")
        elif extension_of(path) not in IMAGE_EXTENSIONS:
            problems.append(f"row {row}: {text!r} has no image extension")
        elif path in wanted:
            problems.append(f"row {row}: {text!r} comes twice")
        elif isinstance(label, bool) or not isinstance(label, (int, str, type(None))):
            problems.append(f"row {row}: the label {label!r} is neither a whole number nor text")
        elif isinstance(label, int) and label < 0:
            problems.append(f"row {row}: the label {label} is negative")
        elif isinstance(label, str) and len(label.splitlines()) > 1:
            problems.append(f"row {row}: the label {label!r} has more than one line")
        else:
            wanted[path] = label
    if problems:
        raise InputError(f"{table}: {first_few(problems)}")
    if not wanted:
        raise InputError(f"{table} names no image")
    return wanted


def _load(table: Path) -> Any:
    """Return the table as pyarrow reads it.

    Raises:
        InputError: it is no table, or cannot be read.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    kind = extension_of(table)
    if kind not in ("csv", "tsv", "parquet"):
        raise InputError(f"{table}: a table is a .csv, .tsv or .parquet file")
    try:
        if kind == "parquet":
            return parquet.read_table(table)
        parse = csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True)
        names = csv.open_csv(table, parse_options=parse).schema.names
        # Read as text without conversion: 01 and 1 are two names, and NA is a name.
        as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        return csv.read_csv(table, parse_options=parse, convert_options=as_text)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"cannot read the table {table}: {str(error).splitlines()[0]}") from error


def _labels(values: list[Any]) -> list[Any]:
    """Return labels as integers if all of them are written as such; an empty label becomes None."""
    values = [None if value == "" else value for value in values]
    given = [value for value in values if value is not None]
    if all(isinstance(value, str) and _WHOLE.fullmatch(value) for value in given) or (
        # Many programs write a column of integers with an empty cell as floats (1.0).
        all(isinstance(value, float) and value.is_integer() for value in given)
    ):
        return [None if value is None else int(float(value)) for value in values]
    return values


def _choose(table: Path, names: Sequence[str], what: str, *, asked: str | None, usual: Sequence[str]) -> str | None:
    """Return the requested column, or else the one with a usual name; None if there is none."""
    if asked is not None:
        if names.count(asked) != 1:
            there = "more than one" if asked in names else "no"
            raise InputError(f"{table}: {there} column {asked!r} (there are {', '.join(names)})")
        return asked
    found = [name for name in names if name.lower() in usual]
    if len(found) > 1:
        both = " and ".join(found)
        raise InputError(f"{table}: {both} may both be the column of {what}s; say which by `{what}_column`")
    return found[0] if found else None
