"""Builds commands from configs: each field of a config becomes an option of its command, declared only at the field.

A field's type, default and `Setting` (help, panel, flag) make a Typer parameter. The given values make a config, which
is passed to the command. Messages of the library name settings by their keys in backticks (`data.max_bad`);
`with_flags` replaces these with the options that set them (--max-bad).
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from maekit.cli.streams import streams
from maekit.config.fields import Field, Setting, check, choices_of, settings_of, shown, without_none
from maekit.config.settings import load_settings, parse_setting, set_value
from maekit.system.errors import InputError

Summary = Iterator[Any]  # of one object, a dataclass or a dict: what a command yields for --json
_KEY = re.compile(r"`([a-z_][a-z0-9_.]*)(?:=([^`\s]+))?`( = )?")


def configured(
    config: Callable[..., Any],
    *,
    without: Sequence[str] = (),
    required: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    toml: str | None = None,
    panel: str | None = None,
    help: Mapping[str, str] | None = None,
    instead: Mapping[str, Callable[[], Any]] | None = None,
) -> Callable[[Callable[..., Summary]], Callable[..., None]]:
    """Make a Typer command from a generator function that takes a config and yields its summary, for `--json`.

    What the function does after it has yielded, such as to raise, happens after the summary is printed. A function
    with a parameter `as_json` is told whether `--json` was given.

    An option that is not given stays unset, so the values of presets and TOML files apply. Later sources override
    earlier ones: the config's defaults, `--config FILE`, options, `--set key=value`.

    Args:
        config: the config class, or a preset that returns a config.
        without: keys that this command does not offer.
        required: keys that must be given although the config has a default, which means "none yet".
        defaults: values that replace the config's defaults.
        toml: name of the file that holds all settings; adds `--set`, and for config.toml also `--config`.
        panel: heading of `--config` and `--set` in the help.
        help: help texts that replace those of the config, by key.
        instead: presets by the key of a flag; if the flag is given, its preset replaces `config`.
    """
    cls = config if isinstance(config, type) else typing.get_type_hints(config)["return"]
    settings = settings_of(cls)
    # What a config requires is required of the command line, and set after the config is made.
    preset = {key: MISSING for key, _, _, default in settings if default is MISSING} | dict(defaults or {})
    fields = {
        field.key: field
        for field in _with_defaults(settings, config(**preset), required)
        if field.key not in without and not field.about.only_set
    }
    for key, text in (help or {}).items():
        fields[key] = fields[key]._replace(about=replace(fields[key].about, help=text))

    def decorate(function: Callable[..., Summary]) -> Callable[..., None]:
        flags = _flags_of(fields.values())
        told = "as_json" in inspect.signature(function).parameters
        arguments_first = sorted(fields.values(), key=lambda field: not field.about.positional)
        parameters = [_of_field(field, flags) for field in arguments_first]
        if toml:
            parameters += _toml_parameters(toml, panel)
        option = typer.Option("--json", help="Print one JSON object as the last line.")
        parameters.append(_parameter("as_json", bool, option, default=False))

        def command(
            as_json: bool = False, config_file: Path | None = None, changes: Sequence[str] | None = None, **values: Any
        ) -> None:
            from maekit.cli.show import print_json

            given = {
                key: _read(field, values[_name(key)])
                for key, field in fields.items()
                if values[_name(key)] not in (None, [])
            }
            make = next((other for key, other in (instead or {}).items() if key in given), config)
            chosen = _filled(make(**preset), given, config_file, changes or ())
            check(chosen)  # the library does, too, but only after it has loaded PyTorch
            streams.is_result, streams.is_asked_for = as_json or getattr(chosen, "out", "") == "", as_json
            for summary in function(chosen, **({"as_json": as_json} if told else {})):
                if as_json:
                    print_json(summary)

        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _with_defaults(settings: Iterable[Field], config: Any, required: Sequence[str]) -> Iterator[Field]:
    """Yield settings with the values of a config as defaults, MISSING for those that are required."""
    for field in settings:
        yield field._replace(default=MISSING if field.key in required else attrgetter(field.key)(config))


def _filled(config: Any, given: Mapping[str, Any], file: Path | None, changes: Sequence[str]) -> Any:
    """Set what the file, the options and `--set` say, in this order, and return the config."""
    if file:
        load_settings(config, file)
    # Steps on the command line replace epochs in the file, and the reverse.
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in given and other not in given:
            setattr(config, other, None)
    # A target on the command line resets the settings of the file's target.
    if "model.target" in given and given["model.target"] != config.model.target:
        for name in ("pca_components", "tokenizer", "vocabulary"):
            setattr(config.model, name, getattr(type(config.model), name))
    for key, value in (*given.items(), *map(parse_setting, changes)):
        set_value(config, key, value)
    return config


def _read(field: Field, value: Any) -> Any:
    """Convert a command-line value to the field's type."""
    if field.about.parse is None:
        return tuple(value) if isinstance(value, list) else value
    try:
        return field.about.parse(value)
    except ValueError as error:
        raise InputError(f"`{field.key}` {error}") from None


def _name(key: str) -> str:
    return key.replace(".", "__")


def _parameter(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    """Return a Typer parameter; without a default, that is with Parameter.empty, it is required."""
    option.show_default = False
    accepted = kind | None if default is None else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[accepted, option]
    )


def _toml_parameters(toml: str, panel: str | None) -> Iterator[inspect.Parameter]:
    """Yield `--config`, for config.toml alone, and `--set`."""
    if toml == "config.toml":
        text = "Settings from a TOML file, as a run writes it to config.toml."
        yield _parameter("config_file", Path, typer.Option("--config", help=text, rich_help_panel=panel))
    text = f"Any setting of {toml}, as in --set run.threads=4; may be repeated."
    option = typer.Option("--set", metavar="KEY=VALUE", help=text, rich_help_panel=panel)
    yield _parameter("changes", list[str], option)


def _of_field(field: Field, flags: Mapping[str, str]) -> inspect.Parameter:
    """Return the Typer parameter of a setting; `flags` are the options of its command."""
    about, required = field.about, field.default is MISSING
    text = with_flags(about.help, flags)
    if about.positional:
        option = typer.Argument(help=text, metavar=about.metavar)
    else:
        default = "" if required else _shown_default(about, field.default)
        text += f" [dim]\\[default: {default}][/dim]" if default else ""
        option = typer.Option(*_flags(field), help=text, metavar=about.metavar, rich_help_panel=about.panel)
    return _parameter(_name(field.key), _annotation(field), option, inspect.Parameter.empty if required else None)


def _annotation(field: Field) -> Any:
    """Return the type that Typer parses; the config checks choices and bounds, with one-line errors."""
    kind, *others = without_none(field.kind)
    is_list = typing.get_origin(kind) is tuple
    if field.about.parse is not None or others:
        return list[str] if typing.get_origin(kind) is Mapping else str
    if choices := choices_of(kind):
        return list[str] if is_list else type(choices[0])
    return list[typing.get_args(kind)[0]] if is_list else kind  # type: ignore[misc]


def _flags(field: Field) -> list[str]:
    """Return the names of an option in Typer's form."""
    flag = field.about.flag or f"--{field.key.rpartition('.')[2].replace('_', '-')}"
    if "/" in flag:
        return flag.split("/")
    if without_none(field.kind) == (bool,) and field.default is not False:
        return [f"{flag}/--no-{flag[2:]}"]
    return [flag]


def _shown_default(about: Setting, default: Any) -> str:
    if about.shown is not None:
        return about.shown
    return "" if default is None or default is False or default in ((), {}) else shown(default)


def _flags_of(fields: Iterable[Field]) -> dict[str, str]:
    """Return the option of each field, by its full key and by the key's last part."""
    names = {field.key: _flags(field)[0].split("/")[0] for field in fields}
    return {**{key.rpartition(".")[2]: flag for key, flag in names.items()}, **names}


def with_flags(text: str, flags: Mapping[str, str] | None = None) -> str:
    """Replace the settings in a message of the library with the options that set them.

    `data.max_bad` -> --max-bad; `data.max_bad` = 0.1 -> --max-bad 0.1; `clip_grad=1` -> --clip-grad 1;
    `compile=false` -> --no-compile. Keys without an option stay; dotted ones lose their backticks. `flags` are the
    options of one command, by default those of all commands.
    """
    if "`" not in text:
        return text
    known = _all_flags() if flags is None else flags

    def replaced(match: re.Match[str]) -> str:
        key, value, equals = match.groups()
        if key not in known:
            return match[0].replace("`", "") if "." in key else match[0]
        flag = known[key]
        if value in ("true", "false"):
            return flag if value == "true" else f"--no-{flag[2:]}"
        return f"{flag} {value}" if value else flag + (" " if equals else "")

    return _KEY.sub(replaced, text)


@cache
def _all_flags() -> dict[str, str]:
    """Return the option of each key of all configs, by its full key and by the key's last part."""
    import maekit

    flags: dict[str, str] = {}
    for name in maekit.__all__:
        if name.endswith("Config"):
            offered = [field for field in settings_of(getattr(maekit, name)) if not field.about.only_set]
            flags = {**_flags_of(offered), **flags}
    return flags
