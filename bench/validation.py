"""The share of a run's time that the embeddings of held-out images take: at most 2 % by design.

    python bench/validation.py SHARDS --val SHARDS [--config recipes/cifar10.toml] [--steps 200] [--set KEY=VALUE ...]
                               [--json FILE]

Trains as `maekit pretrain` does. The share is of the time in the loop, the held-out loss included. A short run embeds
32 images at least, and may exceed the share: take a thousand steps of a small model, not ten.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import maekit
from maekit.config import PretrainConfig
from maekit.config.settings import load_settings, parse_setting, set_value
from maekit.pretraining.task import Pretraining
from maekit.pretraining.validation import Validation
from maekit.runs import RunDirectory

SPENT = {"whole validation": 0.0, "embeddings": 0.0, "rank and kNN": 0.0}


def timed(owner: type, method: str, name: str) -> None:
    """Add up the seconds of a method."""
    whole = getattr(owner, method)

    def measured(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return whole(*args, **options)
        finally:
            SPENT[name] += time.perf_counter() - began

    setattr(owner, method, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    timed(Validation, "__call__", "whole validation")
    timed(Pretraining, "_embed", "embeddings")
    timed(Validation, "_judge", "rank and kNN")
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig()
        if asked.config:
            config = load_settings(config, asked.config)
        config.shards, config.out, config.data.val = tuple(asked.shards), folder, tuple(asked.val)
        config.epochs, config.steps = None, asked.steps
        for text in asked.set:
            set_value(config, *parse_setting(text))
        result = maekit.pretrain(config)
        rows = [row for row in RunDirectory(Path(folder)).metrics() if "val_rank" in row]
    seconds = result.samples / result.images_per_second
    took = SPENT["embeddings"] + SPENT["rank and kNN"]
    found = {
        "config": asked.config and asked.config.name,
        "set": asked.set,
        "steps": result.steps,
        "images": result.samples,
        "embedded": [row["val_embeddings"] for row in rows],
        "seconds": round(seconds, 1),
        **{name: round(value, 2) for name, value in SPENT.items()},
        "share": round(took / seconds, 4),
    }
    print(json.dumps(found, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
