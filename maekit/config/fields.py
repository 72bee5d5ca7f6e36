"""How a config declares its settings: each once, with default, help, bounds and the panel it stands in.

    mask_ratio: float = setting(0.75, "Share of patches removed.", panel=MASKING, above=0, below=1)

`maekit.cli.options` makes the options of a command of these, `check` checks a config against them, and `config_class`
writes them into the docstring of the class. Choices are a `Literal` in the annotation.
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
    """What a field says of itself besides its type and default.

    Attributes:
        help: what it is, for `--help` and the docstring.
        panel: heading that its option stands under.
        flag: name of its option; None is the field's own name, with dashes.
        metavar: what stands for its value in `--help`.
        shown: how `--help` shows the default, where that is not the value itself.
        parse: text of the command line -> value, where that is more than the type.
        only_set: it has no option of its own; `--set` and TOML files reach it.
        free: it may change when a run is resumed.
        above: it must be greater than this; likewise `below`, `at_least`, `at_most`.
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
        """Return what is wrong with a number, or None; each of several must be right."""
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
    """Return a dataclass field that carries a `Setting`; without default and factory it must be given."""
    return field(default=default, default_factory=factory, metadata={"setting": Setting(help, **about)})


def settings_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Setting, Any]]:
    """Yield (dotted key, type, setting, default) of every value of a config class; MISSING where it must be given."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from settings_of(typing.cast(type, kind), f"{prefix}{f.name}.")
        else:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            yield f"{prefix}{f.name}", kind, f.metadata["setting"], default


def check(config: Any, prefix: str = "") -> None:
    """Hold every value of a config against its field: choices, and bounds of numbers.

    Args:
        config: the config, or a part of one.
        prefix: of its keys in messages.

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
    """Whether a type is one of several; `Literal[...] | None` is a union of the older kind."""
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def choices_of(kind: Any) -> tuple[Any, ...]:
    """Return the values that a type allows; empty where it is no `Literal`."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if is_union(kind) or typing.get_origin(kind) is tuple:
        return next((found for part in typing.get_args(kind) if (found := choices_of(part))), ())
    return ()


def shown(value: Any) -> str:
    """Return a value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def config_class(cls: Class) -> Class:
    """Complete a config dataclass: its docstring lists its fields, it takes `Path` for text and lists for tuples."""
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
