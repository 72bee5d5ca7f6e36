"""Tables of the evaluations that `maekit evaluate` stored in a run."""

import json
import math
from pathlib import Path
from typing import Any

from maekit.config.fields import shown
from maekit.pages import html
from maekit.pages.html import Html

_TASKS = {
    "knn": "Nearest neighbours (k-NN)",
    "linear": "Linear classifier",
    "probe": "Linear probing",
    "finetune": "Fine-tuning",
    "retrieval": "Retrieval",
}
# Columns whose floats are not shares. In all others, floats lie in [0, 1] and the largest is best.
_PLAIN = ("seconds", "lr", "c", "loss", "temperature", "rank")


def evaluation_parts(folder: Path) -> tuple[list[Html], list[str]]:
    """Return a table for each evaluation in a folder, and a message for each file that is not an evaluation."""
    parts, damaged = [], []
    for path in sorted(folder.glob("[!.]*.json")):  # hidden files belong to a sweep
        try:
            parts.append(_part(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged.append(f"{path.name} is damaged, or no evaluation")
    return parts, damaged


def _part(found: dict[str, Any]) -> Html:
    """Return a section with the table of one evaluation.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not an evaluation.
    """
    rows: list[dict[str, Any]] = found["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError
    keys = list(dict.fromkeys(key for row in rows for key in row))
    best = []
    for column, key in enumerate(keys):
        shares = {number: row[key] for number, row in enumerate(rows) if _is_share(key, row.get(key))}
        top = max(shares.values(), default=0)
        if top > min(shares.values(), default=0):
            best += [(number, column) for number, share in shares.items() if share == top]
    plain = (int, float, type(None))
    numbers = [i for i, key in enumerate(keys) if all(isinstance(row.get(key), plain) for row in rows)]
    task = str(found["task"])
    about = [str(found["model"]) + (f", step {found['step']:,}" if isinstance(found.get("step"), int) else "")]
    about += [f"{side}: {said}" for side in ("train", "test") if (said := _side(found.get(side)))]
    table = html.table(
        [key.replace("_", " ") for key in keys],
        [[_shown(key, row.get(key)) for key in keys] for row in rows],
        numbers=numbers,
        best=best,
    )
    return html.section(_TASKS.get(task, task), html.paragraph("; ".join(about)), table, level=3)


def _side(side: Any) -> str:
    """Describe one of the two image sets in words."""
    if not isinstance(side, dict):
        return ""
    counts = {key: f"{count:,} {key}" for key, count in side.items() if isinstance(count, int)}
    shards = side.get("shards")
    where = f" ({', '.join(map(str, shards))})" if isinstance(shards, list) and shards else ""
    held = " of ".join(counts[key] for key in ("images", "classes") if key in counts)
    lacking = [counts[key] for key in ("unlabelled", "unreadable") if key in counts and side[key]]
    return ", ".join([held + where, *lacking])


def _is_share(key: str, value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1 and key.lower() not in _PLAIN


def _shown(key: str, value: Any) -> str:
    if _is_share(key, value):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else shown(value)
