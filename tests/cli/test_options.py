"""Options made of configs, and messages with settings shown as options."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import maekit
from maekit.cli.options import configured, with_flags
from maekit.config import PretrainConfig
from maekit.config.embed import EmbedConfig
from maekit.config.fields import settings_of


def parsed(config: Any, line: list[str], **options: Any) -> Any:
    """Return the config that a command line makes."""
    seen: list[Any] = []
    app = typer.Typer()

    def command(config: Any) -> Iterator[Any]:
        seen.append(config)
        yield {}

    app.command()(configured(config, **options)(command))
    result = CliRunner().invoke(app, line)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


def test_what_is_not_given_is_the_default() -> None:
    assert parsed(PretrainConfig, [], toml="config.toml") == PretrainConfig()


def test_file_then_options_then_set(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("steps = 9\nseed = 1\nbatch_size = 2\n[optimizer]\nlr = 0.5\n")
    arguments = ["a", "b", "--config", str(file), "--epochs", "3", "--seed", "2", "--set", "batch_size=4"]
    config = parsed(PretrainConfig, arguments, toml="config.toml")
    assert (config.shards, config.epochs, config.steps) == (("a", "b"), 3, None)
    assert (config.seed, config.batch_size, config.optimizer.lr) == (2, 4, 0.5)


def test_kinds_of_values() -> None:
    arguments = ["m.onnx", "s", "--out", "o", "--keep", ".json,CLS", "--devices", "0,cpu", "--batch-size", "auto"]
    arguments += ["--provider-option", "a=1", "--provider-option", "b=2", "--verify", "--limit", "5"]
    config = parsed(EmbedConfig, arguments)
    assert config == EmbedConfig(
        *("m.onnx", ("s",), "o"),
        keep=("json", "cls"),
        devices=("cuda:0", "cpu"),
        provider_options={"a": "1", "b": "2"},
        verify=True,
        limit=5,
    )
    shapes = [
        ["--image-size", "192x256"],
        ["--image-size", "64"],
        ["--no-class-token"],
        ["--class-token"],
        ["--no-compile"],
    ]
    made = [parsed(PretrainConfig, some) for some in shapes]
    assert [c.model.image_size for c in made[:2]] == [(192, 256), 64]
    assert [c.model.class_token for c in made[2:4]] == [False, True]
    assert made[4].run.compile is False


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("more than `data.max_bad` 0.01", "more than --max-bad 0.01"),
        ("`model.mask_ratio` = 3: must lie between 0 and 1", "--mask-ratio 3: must lie between 0 and 1"),
        ("`clip_grad=1` or `precision=fp32` help", "--clip-grad 1 or --precision fp32 help"),
        ("`compile=false` goes without", "--no-compile goes without"),
        ("`force=true` keeps it", "--force keeps it"),
        ("`data.patience` = -1: must be greater than 0", "data.patience = -1: must be greater than 0"),
        ("run `maekit check` and `nvidia-smi`", "run `maekit check` and `nvidia-smi`"),
        ("`whiten_dims` = 5", "--whiten-dim 5"),
        ("plain", "plain"),
    ],
)
def test_messages_show_options(message: str, shown: str) -> None:
    assert with_flags(message) == shown


def test_a_key_has_one_option_everywhere() -> None:
    """A message does not say of which command a key is. (Positional arguments and options that are others' apart.)"""
    flags: dict[str, set[str]] = defaultdict(set)
    for name in maekit.__all__:
        if name.endswith("Config"):
            for key, _, about, _ in settings_of(getattr(maekit, name)):
                leaf = key.rpartition(".")[2]
                if not about.only_set:
                    flags[leaf].add((about.flag or f"--{leaf.replace('_', '-')}").split("/")[0])
    assert {leaf for leaf, names in flags.items() if len(names) > 1} <= {"shards", "name"}
