"""How a config declares its settings: each once, with default, help, bounds and `--help` panel.

    class ModelConfig(Config):
        mask_ratio: float = setting(0.75, "Share of patches removed.", panel="Masking", above=0, below=1)

`maekit.cli.options` turns them into a command's options, and `check` validates a config against them. Choices are a
`Literal` in the annotation.
"""

import dataclasses
import functools
import math
import operator
import os
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, NamedTuple

from maekit.system.errors import InputError

# The bounds of a number: the words of the message, and the comparison that must hold.
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "above": ("greater than", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("less than", operator.lt),
    "at_most": ("at most", operator.le),
}
_LARGEST = 10**12  # of a number whose field sets no upper bound: more would only overflow somewhere, hours later
# Bounds that commands share: far above what a machine has, and low enough to be refused before memory is asked for.
MOST_PROCESSES = 1024
MOST_IMAGES = 1 << 20  # of a batch


@dataclass(frozen=True)
class Setting:
    """Metadata of a field besides its type and default.

    Attributes:
        help: description for `--help` and the docstring.
        panel: heading of its option in `--help`.
        flag: name of its option; None means the field's name with dashes.
        metavar: placeholder of its value in `--help`.
        shown: the default as shown in `--help`, if that is not the value itself.
        parse: text of the command line -> value, if the type is not enough; raises ValueError with a message.
        positional: it is an argument of its command, not an option.
        only_set: it has no option of its own; only `--set` and TOML files reach it.
        free: it may change when a run is resumed.
        above: the value must be greater than this; likewise `below`, `at_least`, `at_most`, which is 10¹² by default.
    """

    help: str
    panel: str | None = None
    flag: str | None = None
    metavar: str | None = None
    shown: str | None = None
    parse: Callable[[Any], Any] | None = None
    positional: bool = False
    only_set: bool = False
    free: bool = False
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def problem(self, value: Any) -> str | None:
        """Return the violated bound of a number, or None; each number of a tuple is checked."""
        given = {name: getattr(self, name) for name in _BOUNDS if getattr(self, name) is not None}
        bounds = [(*_BOUNDS[name], bound) for name, bound in given.items()]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if isinstance(number, float) and not math.isfinite(number):  # isfinite(10**400) overflows
                return "must be finite"
            if not all(holds(number, bound) for _, holds, bound in bounds):
                if self.above is not None and self.below is not None:
                    return f"must lie between {shown(self.above)} and {shown(self.below)}"
                return "must be " + ", and ".join(f"{words} {shown(bound)}" for words, _, bound in bounds)
            if not {"below", "at_most"} & set(given) and number > _LARGEST:
                return f"must be at most {_LARGEST}"
        return None


def setting(default: Any = MISSING, help: str = "", *, factory: Any = MISSING, **about: Any) -> Any:
    """Return a dataclass field that carries a `Setting`; without default and factory the value is required."""
    return field(default=default, default_factory=factory, metadata={"setting": Setting(help, **about)})


# A setting that is an argument of its command, and one without an option, which only `--set` and TOML files reach.
argument = functools.partial(setting, positional=True)
unlisted = functools.partial(setting, only_set=True)


@typing.dataclass_transform()
class Config:
    """Base of all configs. A subclass becomes a dataclass whose docstring lists its settings."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        dataclass(cls)
        helps = {f.name: f.metadata["setting"].help for f in dataclasses.fields(cls)}
        listed = "".join(f"\n    {name}: {help}" for name, help in helps.items() if help)
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\nAttributes:{listed}\n"

    def __post_init__(self) -> None:
        """Accept `Path` for text and lists for tuples."""
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif isinstance(value, list | tuple):
                setattr(self, name, tuple(os.fspath(v) if isinstance(v, os.PathLike) else v for v in value))

    def validate(self) -> None:
        """Check every value that needs neither data nor a model.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        check(self)


class Field(NamedTuple):
    """A setting of a config class.

    Attributes:
        key: its dotted key.
        kind: its type.
        about: how it was declared.
        default: its default; MISSING if it is required.
    """

    key: str
    kind: Any
    about: Setting
    default: Any


def settings_of(cls: type) -> tuple[Field, ...]:
    """Return all settings of a config class, those of the configs in it included."""
    hints = typing.get_type_hints(cls)
    found: list[Field] = []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            found += [inner._replace(key=f"{f.name}.{inner.key}") for inner in settings_of(typing.cast(type, kind))]
        else:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            found.append(Field(f.name, kind, f.metadata["setting"], default))
    return tuple(found)


def check(config: Any, prefix: str = "") -> None:
    """Check every value of a config against the choices and bounds of its field.

    Args:
        config: the config, or a part of one.
        prefix: prefix of its keys in messages.

    Raises:
        InputError: names the first impossible value.
    """
    for key, kind, about, _ in settings_of(type(config)):
        value = operator.attrgetter(key)(config)
        if value is None:
            continue
        choices = choices_of(kind)
        for one in value if isinstance(value, tuple | list) else (value,):
            if choices and one not in choices:
                raise InputError(f"`{prefix}{key}` = {one}: must be one of {shown(choices)}")
            if isinstance(one, str) and "\0" in one:
                raise InputError(f"`{prefix}{key}` = {one!r}: no name or text may hold a NUL character")
        if problem := about.problem(value):
            raise InputError(f"`{prefix}{key}` = {shown(value)}: {problem}")


def is_union(kind: Any) -> bool:
    """Whether a type is a union; `Literal[...] | None` gives the older `typing.Union`."""
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def without_none(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union besides None; any other type alone."""
    return tuple(k for k in typing.get_args(kind) if k is not types.NoneType) if is_union(kind) else (kind,)


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


def count_or_auto(text: str) -> int | None:
    """Parse a whole number greater than 0, or `auto`, which is None.

    Raises:
        ValueError: it is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{text!r}: must be a whole number greater than 0, or auto")
    return int(text)
