"""`maekit inspect`."""

from pathlib import Path
from typing import Any

import typer

from maekit.cli.curve import draw
from maekit.cli.options import Summary, configured
from maekit.cli.show import say
from maekit.config.check import InspectConfig


@configured(InspectConfig)
def command(config: InspectConfig, as_json: bool) -> Summary:
    """Say what a run, a checkpoint, an ONNX file, embeddings or shards are; exits 1 where shards are damaged.

    Of a run, the loss is drawn as well. Of an ONNX file: input, output, preprocessing, where its weights come from, how
    close to PyTorch it was measured, and its nodes.
    """
    from maekit.inspection import inspect

    description = inspect(config)
    if not as_json:
        _print(description)
        if description["kind"] == "run":
            _print_curves(config.thing)
    yield description
    if description.get("damaged"):
        raise typer.Exit(1)


def _print_curves(run: str) -> None:
    from maekit.runs import RunDirectory

    rows = RunDirectory(Path(run)).metrics()
    for name in ("loss", "val_loss", "val_rank", "val_knn", "val_knn_whitened"):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if len(points) > 1:
            say()
            for line in draw(points, label=name):
                say(line)


def _print(description: dict[str, Any], indent: int = 0) -> None:
    """Print nested values, one a line; short tables of numbers on one line."""
    width = max((len(key) for key in description), default=0)
    for key, value in description.items():
        key = _plain(key)
        label = " " * indent + f"{key:<{width}}  "
        if isinstance(value, list) and value and isinstance(value[0], dict):
            say(" " * indent + key)
            for item in value:
                is_checkpoint = isinstance(item, dict) and {"step", "problem"} <= set(item)
                say(" " * (indent + 2) + (_checkpoint(item) if is_checkpoint else _plain(item)))
        elif isinstance(value, dict) and value and not _is_short(value):
            say(" " * indent + key)
            _print(value, indent + 2)
        else:
            say(f"{label}{_plain(value)}".rstrip())


def _checkpoint(item: dict[str, Any]) -> str:
    return f"step {item['step']}, {'whole' if item['problem'] is None else 'damaged: ' + item['problem']}"


def _is_short(value: dict[str, Any]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) for v in value.values())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
