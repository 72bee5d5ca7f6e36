"""Settings by key: types, TOML, bounds, and what a config class makes of its declarations."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from support.errors import raises

from maekit.config import PretrainConfig, load_config
from maekit.config.fields import Config, argument, check, count_or_auto, setting, settings_of, unlisted
from maekit.config.settings import dump_toml, fields_of, parse_setting, set_value
from maekit.system.errors import InputError


def test_config_round_trip(tmp_path: Path) -> None:
    config = PretrainConfig(shards=("a b", 'quo"te', "ünï"), out="run", steps=7)
    set_value(config, "optimizer.lr", 1)
    set_value(config, "model.init_from", "timm:x")
    set_value(config, "data.crop_scale", [0.5, 1])
    (tmp_path / "c.toml").write_text(dump_toml(config))
    assert list(fields_of(load_config(tmp_path / "c.toml"))) == list(fields_of(config))


def test_settings_are_typed() -> None:
    config = PretrainConfig()
    for key, value in (
        ("batch_size", 2.5),
        ("batch_size", True),
        ("model.target", 1),
        ("data.crop_scale", [0.1]),
        ("data.mean", 3),
        ("model.name", 3),
    ):
        with raises(InputError, match=key):
            set_value(config, key, value)
    assert parse_setting("a=1e-3") == ("a", 1e-3)
    assert parse_setting("a = vit") == ("a", "vit")
    assert parse_setting("a=none") == ("a", None)
    with raises(InputError, match="key=value"):
        parse_setting("a")


class Inner(Config):
    """Inside."""

    share: float = setting(0.5, "A share.", above=0, below=1)
    side: int | tuple[int, int] = unlisted(8, "One or two numbers.", above=0)


class Outer(Config):
    """Outside."""

    paths: tuple[str, ...] = argument(help="Some paths.")
    kind: Literal["a", "b"] | None = setting(None, "Of which kind.", free=True)
    inner: Inner = setting(factory=Inner)


def test_a_config_is_a_dataclass_that_lists_its_settings() -> None:
    config = Outer([Path("x"), "y"])
    assert config == Outer(("x", "y"))
    assert dataclasses.asdict(config) == {"paths": ("x", "y"), "kind": None, "inner": {"share": 0.5, "side": 8}}
    assert "    paths: Some paths.\n    kind: Of which kind.\n" in Outer.__doc__
    assert [field.key for field in settings_of(Outer)] == ["paths", "kind", "inner.share", "inner.side"]
    assert [field.default for field in settings_of(Outer)] == [dataclasses.MISSING, None, 0.5, 8]
    assert [(field.about.positional, field.about.only_set) for field in settings_of(Outer)] == [
        *((True, False), (False, False), (False, False), (False, True))
    ]
    assert list(fields_of(config))[1:] == [("kind", None, True), ("inner.share", 0.5, False), ("inner.side", 8, False)]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kind", "c", "`kind` = c: must be one of a, b"),
        ("inner.share", 0.0, "`inner.share` = 0: must lie between 0 and 1"),
        ("inner.share", float("nan"), "must be finite"),
        ("inner.side", (4, 0), "`inner.side` = 4, 0: must be greater than 0"),
    ],
)
def test_check_names_the_key(key: str, value: object, said: str) -> None:
    config = Outer(("x",))
    owner = config.inner if key.startswith("inner.") else config
    setattr(owner, key.rpartition(".")[2], value)
    with pytest.raises(InputError) as caught:
        check(config)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kind", "c", "`kind` = c: must be one of a, b"),
        ("inner.share", "x", "`inner.share` = 'x': must be a number"),
        ("inner.side", "x", "must be a whole number or a list of 2 values, each a whole number"),
        ("paths", 3, "must be a list of values, each text"),
        ("inner.shore", 1, "unknown setting 'inner.shore'; did you mean inner.share?"),
    ],
)
def test_values_of_the_wrong_type(key: str, value: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        set_value(Outer(("x",)), key, value)
    assert said in str(caught.value)


def test_a_value_that_can_be_none() -> None:
    config = Outer(("x",), kind="a")
    set_value(config, "kind", None)
    set_value(config, "inner.side", [3, 4])
    assert (config.kind, config.inner.side) == (None, (3, 4))


def test_counts() -> None:
    assert [count_or_auto(text) for text in ("auto", "7")] == [None, 7]
    for text in ("0", "-1", "1.5", "some"):
        with pytest.raises(ValueError, match="a whole number greater than 0, or auto"):
            count_or_auto(text)
