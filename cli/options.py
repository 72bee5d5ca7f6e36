"""Builds commands from configs: each field of a config becomes an option of its command, declared only at the field.

A field's type, default and `Setting` (help, panel, flag) make a Typer parameter. The given values make a config, which
is passed to the command. Messages of the library name settings by their keys in backticks (`data.max_bad`);
`with_flags` replaces these with the options that set them (--max-bad).
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from maekit.config.fields import Setting, choices_of, is_union, settings_of, shown
from maekit.config.settings import load_toml, parse_setting, set_value

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
_KEY = re.compile(r"`([a-z_][a-z0-9_.]*)(?:=([^`\s]+))?`( = )?")


def configured(
    config: Callable[..., Any],
    *,
    arguments: Sequence[str] = (),
    without: Sequence[str] = (),
    required: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    toml: str | None = None,
    panel: str | None = None,
    help: Mapping[str, str] | None = None,
    instead: Mapping[str, Callable[[], Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a Typer command from a function whose first parameter is a config; its other parameters are extra options.

    An option that is not given stays unset, so the values of presets and TOML files apply. Later sources override
    earlier ones: the config's defaults, `--config FILE`, options, `--set key=value`.

    Args:
        config: the config class, or a preset that returns a config.
        arguments: keys of positional arguments, in order.
        without: keys that this command does not offer.
        required: keys that must be given although the config has a default, which means "none yet".
        defaults: values that replace the config's defaults.
        toml: name of the file that holds all settings; adds `--set`, and for config.toml also `--config`.
        panel: heading of `--config` and `--set` in the help.
        help: help texts that replace those of the config, by key.
        instead: presets by the key of a flag; if the flag is given, its preset replaces `config`.
    """
    preset = dict(defaults or {})
    cls = config if isinstance(config, type) else typing.get_type_hints(config)["return"]
    fields = {
        key: (kind, about, default)
        for key, kind, about, default in _with_instance(cls, config, preset)
        if key not in without and (not about.only_set or key in arguments)
    }

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        flags = _flags_of(fields)

        def texts(key: str, about: Setting) -> str:
            return with_flags((help or {}).get(key, about.help), flags)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        parameters = [_parameter(key, *fields[key], positional=True, required=True, texts=texts) for key in arguments]
        parameters += [
            _parameter(key, *fields[key], positional=False, required=key in required, texts=texts)
            for key in fields
            if key not in arguments
        ]
        if toml == "config.toml":
            parameters.append(_toml_parameter(panel))
        if toml:
            parameters.append(_set_parameter(toml, panel))

        def command(**given: Any) -> None:
            values = {key: given.pop(_name(key)) for key in fields}
            file, texts = given.pop("config", None), given.pop("settings", None)
            chosen = next((other for key, other in (instead or {}).items() if values[key]), config)
            function(_made(chosen, preset, fields, values, file, texts or ()), **given)

        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*parameters, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        )
        command.__annotations__ = {p.name: p.annotation for p in (*parameters, *own)}
        return command

    return decorate


def _with_instance(cls: type, make: Callable[..., Any], preset: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the rows of `settings_of`, with the values of a preset as defaults."""
    rows = list(settings_of(cls))
    needed = [key for key, _, _, default in rows if default is MISSING]
    whole = None if needed else make()
    for key, kind, about, default in rows:
        value = default
        if whole is not None:
            value = whole
            for part in key.split("."):
                value = getattr(value, part)
        yield key, kind, about, preset.get(key, value)


def _made(
    make: Callable[..., Any],
    preset: Mapping[str, Any],
    fields: Mapping[str, tuple[Any, Setting, Any]],
    values: Mapping[str, Any],
    file: Path | None,
    texts: Sequence[str],
) -> Any:
    """Build the config from the given values."""
    chosen = {key: _read(fields[key], value) for key, value in values.items() if value not in (None, [])}
    needed = {key: chosen.pop(key) for key in list(chosen) if "." not in key and fields[key][2] is MISSING}
    config = make(**preset, **needed)
    for key, value in (load_toml(file) if file else {}).items():
        set_value(config, key, value)
    _make_room(config, chosen)
    for key, value in chosen.items():
        set_value(config, key, value)
    for text in texts:
        set_value(config, *parse_setting(text))
    return config


def _make_room(config: Any, chosen: Mapping[str, Any]) -> None:
    """Reset settings of the file that conflict with a given option."""
    # Steps on the command line replace epochs in the file, and the reverse.
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if given in chosen and other not in chosen:
            setattr(config, other, None)
    # A target on the command line resets the settings of the file's target.
    if "model.target" in chosen and chosen["model.target"] != config.model.target:
        for name in ("pca_components", "tokenizer", "vocabulary"):
            setattr(config.model, name, getattr(type(config.model), name))


def _read(field: tuple[Any, Setting, Any], value: Any) -> Any:
    """Convert a command-line value to the field's type."""
    kind, about, _ = field
    if about.parse is not None:
        return about.parse(value)
    return tuple(value) if _is_list(kind) else value


def _name(key: str) -> str:
    return key.replace(".", "__")


def _parameter(
    key: str,
    kind: Any,
    about: Setting,
    default: Any,
    *,
    positional: bool,
    required: bool,
    texts: Callable[[str, Setting], str],
) -> inspect.Parameter:
    """Return the Typer parameter of a field."""
    text = texts(key, about)
    must = default is MISSING or required
    annotation = _annotation(kind, about)
    common: dict[str, Any] = {"show_default": False, "metavar": about.metavar}
    made: Any
    if positional:
        made = typer.Argument(help=text, **common)
    else:
        shown_default = _shown_default(about, default)
        note = f" [dim]\\[default: {shown_default}][/dim]" if shown_default and not must else ""
        made = typer.Option(*_flags(key, kind, about, default), help=text + note, rich_help_panel=about.panel, **common)
    optional = positional and default is not MISSING
    return inspect.Parameter(
        _name(key),
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[annotation if must and not optional else annotation | None, made],
        default=inspect.Parameter.empty if must and not optional else None,
    )


def _toml_parameter(panel: str | None) -> inspect.Parameter:
    text = "Settings from a TOML file, as a run writes it to config.toml."
    option = typer.Option("--config", help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[Path | None, option], default=None
    )


def _set_parameter(toml: str, panel: str | None) -> inspect.Parameter:
    text = f"Any setting of {toml}, as in --set run.threads=4; may be repeated."
    option = typer.Option("--set", metavar="KEY=VALUE", help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        "settings", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[list[str] | None, option], default=None
    )


def _plain(kind: Any) -> Any:
    """Return a type without its None."""
    if is_union(kind):
        kinds = [part for part in typing.get_args(kind) if part is not types.NoneType]
        return kinds[0] if len(kinds) == 1 else str
    return kind


def _is_list(kind: Any) -> bool:
    return typing.get_origin(_plain(kind)) is tuple


def _annotation(kind: Any, about: Setting) -> Any:
    """Return the type that Typer parses; the config checks choices and bounds, with one-line errors."""
    if about.parse is not None:
        return list[str] if typing.get_origin(kind) is not tuple and "Mapping" in str(kind) else str
    plain = _plain(kind)
    if choices := choices_of(plain):
        return list[str] if _is_list(kind) else type(choices[0])
    if _is_list(kind):
        return list[typing.get_args(plain)[0]]  # type: ignore[misc]
    return plain


def _flags(key: str, kind: Any, about: Setting, default: Any) -> list[str]:
    """Return the names of an option in Typer's form."""
    flag = about.flag or f"--{key.rpartition('.')[2].replace('_', '-')}"
    if "/" in flag:
        return flag.split("/")
    if _plain(kind) is bool and default is not False:
        return [f"{flag}/--no-{flag[2:]}"]
    return [flag]


def _shown_default(about: Setting, default: Any) -> str | None:
    if about.shown is not None:
        return about.shown
    if default is None or default is MISSING or default is False or default in ((), {}):
        return None
    return shown(default)


def _flags_of(fields: Mapping[str, tuple[Any, Setting, Any]]) -> dict[str, str]:
    """Return the option of each field, by its full key and by the key's last part."""
    names = {key: _flags(key, kind, about, default)[0].split("/")[0] for key, (kind, about, default) in fields.items()}
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
    from maekit.config.check import CheckConfig, DoctorConfig, InspectConfig
    from maekit.config.embed import EmbedConfig
    from maekit.config.evaluate import EvaluateConfig
    from maekit.config.export import ExportConfig
    from maekit.config.finetune import FinetuneConfig
    from maekit.config.pack import PackConfig
    from maekit.config.pages import NeighboursConfig, ReconstructConfig, ReportConfig
    from maekit.config.pretrain import PretrainConfig
    from maekit.config.sweep import SweepConfig

    configs = (EvaluateConfig, ExportConfig, EmbedConfig, PackConfig, CheckConfig, InspectConfig, DoctorConfig)
    more = (NeighboursConfig, ReconstructConfig, ReportConfig, SweepConfig, PretrainConfig, FinetuneConfig)
    flags = {"config": "--config", "verify": "--verify"}
    for cls in (*configs, *more):
        offered = {key: (kind, about, default) for key, kind, about, default in settings_of(cls) if not about.only_set}
        flags = {**_flags_of(offered), **flags}
    return flags
