"""`metrics.jsonl`: one JSON row per logging step, truncated to the checkpoint when a run resumes."""

import json
from pathlib import Path
from typing import Any

from maekit import runs
from maekit.system import files


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row.

    Raises:
        MaekitError: the file cannot be written.
    """
    with files.writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Drop the rows after `step`; the resumed run writes them again."""
    if path.exists():
        rows = [row for row in runs.read_metrics(path) if row["step"] <= step]
        files.write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
