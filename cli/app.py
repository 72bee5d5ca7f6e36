"""The `maekit` command: what every subcommand shares. Loads nothing heavy; the subcommands do that in their bodies."""

import logging
import os
import sys
import warnings
from importlib import import_module
from inspect import cleandoc
from traceback import format_exception
from typing import Annotated, Any

import typer

from maekit.cli.failures import described
from maekit.cli.options import with_flags
from maekit.cli.program import program
from maekit.cli.show import plain, say
from maekit.system.errors import InputError, MachineWarning, OtherRankError
from maekit.version import __version__

# The panels of `maekit --help` and their commands. Each is the function `command` of its module; `evaluate` is an app.
_PANELS = {
    "Data": ("pack", "check"),
    "Workflow": ("pretrain", "export", "embed", "evaluate", "sweep"),
    "Look": ("reconstruct", "neighbours", "report", "inspect", "doctor", "demo"),
}


app = typer.Typer(
    name="maekit",
    help="Pre-train a masked autoencoder on tar shards, export its encoder to ONNX, extract embeddings.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, panel: str) -> None:
    """Add a command. Its help is its docstring with each paragraph as one line, for the terminal to fold."""
    module = import_module(f"maekit.cli.{name}")
    if name == "evaluate":
        app.add_typer(module.app, name=name, rich_help_panel=panel)
        return
    paragraphs = cleandoc(module.command.__doc__).split("\n\n")
    text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    app.command(name, help=text, rich_help_panel=panel)(module.command)


for _panel, _names in _PANELS.items():
    for _name in _names:
        _add(_name, _panel)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"maekit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


_python_way = warnings.formatwarning


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Show what the machine lacks as one line, and other warnings as ever."""
    is_ours = category is MachineWarning
    said = with_flags(str(message)) if is_ours else _python_way(message, category, filename, lineno, line)
    return _lines(said) + "\n"


def _report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print the traceback of a defect: other people's words are in it as well."""
    print(_lines("".join(format_exception(kind, error, trace))), file=sys.stderr, flush=True)


def _lines(text: str) -> str:
    return "\n".join(map(plain, text.splitlines()))


class _Log(logging.Formatter):
    """What libraries log, as a last resort, on standard error."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return _lines(super().format(record))


def main() -> None:
    """Run the command; print whatever error it raises in one line, and exit with its code.

    With MAEKIT_DEBUG=1 the traceback comes before the line.
    """
    with program():
        _main()


def _main() -> None:
    # Refused images are reported as errors rows, not as warnings of a library.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    sys.excepthook = _report
    warnings.formatwarning = _warning
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Log())
    try:
        _require_working_directory()
        sys.exit(app(standalone_mode=False) or 0)  # else Typer would print its own errors, in boxes
    except Exception as error:
        if os.environ.get("MAEKIT_DEBUG"):
            _report(type(error), error, error.__traceback__)
        else:  # what half-made objects of libraries raise when they are collected
            sys.unraisablehook = lambda unraisable: None
        line, code = described(error)
        if not isinstance(error, OtherRankError):
            say(f"maekit: {line}", error=True)
        sys.exit(code)


def _require_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"the working directory is gone ({error.strerror}); cd to one that exists") from error
