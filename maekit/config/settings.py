"""Settings of a config (a tree of dataclasses) by dotted key: list, set, read from TOML and write as TOML.

Imports only the standard library, like `maekit.config`.
"""

import contextlib
import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from maekit.config.fields import Config, settings_of, shown, without_none
from maekit.system.errors import InputError
from maekit.system.redaction import redacted

AnyConfig = TypeVar("AnyConfig", bound=Config)


def fields_of(config: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted key, value, whether it may change on resuming) of every value in a config."""
    for key, _, about, _ in settings_of(type(config)):
        yield key, attrgetter(key)(config), about.free


def set_value(config: Any, key: str, value: Any, prefix: str = "") -> None:
    """Set one value by its dotted key, converted to the field's type; `prefix` precedes the key in messages.

    Raises:
        InputError: no such key (names the nearest), or a value of the wrong type.
    """
    types_by_key = {field.key: field.kind for field in settings_of(type(config))}
    *path, leaf = key.split(".")
    if key not in types_by_key:
        same_leaf = [name for name in types_by_key if name.rpartition(".")[2] == leaf]
        nearest = difflib.get_close_matches(key, types_by_key, n=1, cutoff=0.4) or same_leaf
        hint = f"; did you mean {prefix}{nearest[0]}?" if nearest else f" (there are {', '.join(types_by_key)})"
        raise InputError(f"unknown setting {prefix + key!r}{hint}")
    owner = functools.reduce(getattr, path, config)
    setattr(owner, leaf, _convert(prefix + key, value, types_by_key[key]))


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is read as TOML, or else as plain text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{text!r}: a setting must be key=value, as in model.mask_ratio=0.6")
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # ValueError alone: a whole number of thousands of digits
        read = None if value.strip() in ("none", "None", "null") else value.strip()
    return _renamed(key.strip(), read)


def load_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file by dotted key.

    Raises:
        InputError: the file cannot be read or is not valid TOML.
    """
    try:
        with open(path, "rb") as file:
            return dict(_renamed(*item) for item in _flatten(tomllib.load(file)))
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid TOML: {error}") from error


def load_settings(config: AnyConfig, path: Path) -> AnyConfig:
    """Apply the settings of a TOML file to a config, a dataclass, and return the config.

    Raises:
        InputError: the file cannot be read or is not valid TOML, or holds an unknown key or a value of the wrong type.
    """
    for key, value in load_toml(path).items():
        set_value(config, key, value)
    return config


def _renamed(key: str, value: Any) -> tuple[str, Any]:
    """Translate a setting of an earlier version to its current name and value."""
    if key == "model.norm_pixel":
        return "model.target", "norm_pixel" if value else "pixel"
    return key, value


def dump_toml(config: Any) -> str:
    """Return a whole config, a dataclass, as TOML: no setting that is None, and no secret of a URL."""
    lines: dict[str, list[str]] = {"": []}
    for key, value, _ in fields_of(config):
        table, _, leaf = key.rpartition(".")
        if value is not None:
            lines.setdefault(table, []).append(f"{leaf} = {_toml(redacted(value))}")
    return "\n\n".join("\n".join([f"[{t}]", *rows] if t else rows) for t, rows in lines.items()) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, float):
        return repr(value) if any(c in repr(value) for c in ".en") else f"{value!r}.0"
    # JSON strings, integers and booleans are TOML as well, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _convert(key: str, value: Any, kind: Any) -> Any:
    wrong = InputError(f"`{key}` = {value!r}: must be {_describe(kind)}")
    if value is None and types.NoneType in typing.get_args(kind):
        return None
    kind, *others = without_none(kind)
    if others:
        for possible in (kind, *others):
            with contextlib.suppress(InputError):
                return _convert(key, value, possible)
        raise wrong
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value is None and "none" in items:
            return "none"  # `--set` parses it as None
        if value not in items:
            raise InputError(f"`{key}` = {value}: must be {_describe(kind)}")
        return value
    if value is None and kind is str:
        return "none"  # this setting cannot be unset, so `--set KEY=none` means the text
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (items[-1] is not Ellipsis and len(value) != len(items)):
            raise wrong
        return tuple(_convert(key, v, items[0]) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    if not isinstance(value, origin or kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    return value


def _describe(kind: Any) -> str:
    kind, *others = without_none(kind)
    if others:
        return " or ".join(map(_describe, (kind, *others)))
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if origin is Mapping:
        return "a table of names and texts"
    if origin is typing.Literal:
        return f"one of {shown(items)}"
    if origin is tuple:
        return f"a list of {'' if items[-1] is Ellipsis else f'{len(items)} '}values, each {_describe(items[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
