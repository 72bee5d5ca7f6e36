"""The `maekit` command: what every subcommand shares. Loads nothing heavy; the subcommands do that in their bodies."""

import sys
import warnings
from typing import Annotated

import typer

import maekit
from maekit.cli import check, demo, embed, export, inspect, pack, pretrain
from maekit.errors import MaekitError

app = typer.Typer(
    name="maekit",
    help="Pre-train a masked autoencoder on tar shards, export its encoder to ONNX, extract embeddings.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("pack", rich_help_panel="Data")(pack.command)
app.command("check", rich_help_panel="Data")(check.command)
app.command("pretrain", rich_help_panel="Workflow")(pretrain.command)
app.command("export", rich_help_panel="Workflow")(export.command)
app.command("embed", rich_help_panel="Workflow")(embed.command)
app.command("inspect", rich_help_panel="Look")(inspect.command)
app.command("demo", rich_help_panel="Look")(demo.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"maekit {maekit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; print a MaekitError in one line and exit with its code."""
    # Refused images are reported as errors rows, not as warnings of a library.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        app(standalone_mode=True)
    except MaekitError as error:
        print(f"maekit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = {"torch", "timm", "torchvision", "onnxscript", "safetensors"}
        if error.name is None or error.name.split(".")[0] not in extra:
            raise
        print(f"maekit: this command needs {error.name}: pip install 'maekit[train]'", file=sys.stderr)
        sys.exit(2)
