"""How a config declares its settings: each once, with default, help, bounds and `--help` panel.

    mask_ratio: float = setting(0.75, "Share of patches removed.", panel=MASKING, above=0, below=1)

`maekit.cli.options` turns them into a command's options, `check` validates a config against them, and `config_class`
adds them to the docstring of the class. Choices are a `Literal` in the annotation.
"""

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from maekit.system.errors import InputError

Class = TypeVar("Class", bound=type[Any])


@dataclass(frozen=True)
class Setting:
    """Metadata of a field besides its type and default.

    Attributes:
        help: description for `--help` and the docstring.
        panel: heading of its option in `--help`.
        flag: name of its option; None means the field's name with dashes.
        metavar: placeholder of its value in `--help`.
        shown: the default as shown in `--help`, if that is not the value itself.
        parse: text of the command line -> value, if the type is not enough.
        only_set: it has no option of its own; only `--set` and TOML files reach it.
        free: it may change when a run is resumed.
        above: the value must be greater than this; likewise `below`, `at_least`, `at_most`.
    """

    help: str
    panel: str | None = None
    flag: str | None = None
    metavar: str | None = None
    shown: str | None = None
    parse: Callable[[Any], Any] | None = None
    only_set: bool = False
    free: bool = False
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def problem(self, value: Any) -> str | None:
        """Return the violated bound of a number, or None; each number of a tuple is checked."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                return "must be finite"
            if not (
                (self.above is None or number > self.above)
                and (self.below is None or number < self.below)
                and (self.at_least is None or number >= self.at_least)
                and (self.at_most is None or number <= self.at_most)
            ):
                return self._bounds()
        return None

    def _bounds(self) -> str:
        if self.above is not None and self.below is not None:
            return f"must lie between {self.above:g} and {self.below:g}"
        bounds = (
            (self.above, "greater than"),
            (self.at_least, "at least"),
            (self.below, "less than"),
            (self.at_most, "at most"),
        )
        return "must be " + ", and ".join(f"{words} {bound:g}" for bound, words in bounds if bound is not None)


def setting(default: Any = MISSING, help: str = "", *, factory: Any = MISSING, **about: Any) -> Any:
    """Return a dataclass field that carries a `Setting`; without default and factory the value is required."""
    return field(default=default, default_factory=factory, metadata={"setting": Setting(help, **about)})


def settings_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Setting, Any]]:
    """Yield (dotted key, type, setting, default) of every value of a config class; MISSING if it is required."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from settings_of(typing.cast(type, kind), f"{prefix}{f.name}.")
        else:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            yield f"{prefix}{f.name}", kind, f.metadata["setting"], default


def check(config: Any, prefix: str = "") -> None:
    """Check every value of a config against the choices and bounds of its field.

    Args:
        config: the config, or a part of one.
        prefix: prefix of its keys in messages.

    Raises:
        InputError: names the first impossible value.
    """
    for key, kind, about, _ in settings_of(type(config)):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is None:
            continue
        choices = choices_of(kind)
        for one in value if isinstance(value, tuple | list) else (value,):
            if choices and one not in choices:
                raise InputError(f"`{prefix}{key}` = {one}: must be one of {', '.join(map(str, choices))}")
        if problem := about.problem(value):
            raise InputError(f"`{prefix}{key}` = {shown(value)}: {problem}")


def is_union(kind: Any) -> bool:
    """Whether a type is a union; `Literal[...] | None` gives the older `typing.Union`."""
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def choices_of(kind: Any) -> tuple[Any, ...]:
    """Return the values that a type allows; empty if it contains no `Literal`."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if is_union(kind) or typing.get_origin(kind) is tuple:
        return next((found for part in typing.get_args(kind) if (found := choices_of(part))), ())
    return ()


def shown(value: Any) -> str:
    """Return a value in human-readable form."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def config_class(cls: Class) -> Class:
    """Complete a config dataclass: list its fields in its docstring; accept `Path` for text and lists for tuples."""
    fields = "".join(
        f"\n    {f.name}: {f.metadata['setting'].help}" for f in dataclasses.fields(cls) if f.metadata["setting"].help
    )
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\nAttributes:{fields}\n"
    made = cls.__init__

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        made(self, *args, **given)
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif isinstance(value, list | tuple):
                setattr(self, name, tuple(os.fspath(v) if isinstance(v, os.PathLike) else v for v in value))

    cls.__init__ = __init__
    return cls
