"""`maekit report`."""

from pathlib import Path
from typing import Annotated

import typer

from maekit.config.pages import ReportOptions

_DEFAULT = ReportOptions()


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="What `maekit pretrain` wrote, finished or not.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page. [dim]\\[default: RUN/report.html][/dim]", show_default=False)
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose images are shown; may be repeated. [dim]\\[default: those of the training][/dim]",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="How many are embedded for the neighbours and the map, evenly spread.")
    ] = _DEFAULT.samples,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _DEFAULT.device,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Write a run as one HTML page that needs no other file.

    Settings, curves, reconstructions over time, nearest neighbours, a map of the embeddings, and the tables of
    `maekit evaluate`. What cannot be shown any more (shards that are gone) is said in its place.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.pages.report import report
    from maekit.system.files import describe_bytes

    result = report(run, out, ReportOptions(tuple(shards or ()), samples, device), make_progress())
    print(f"{result.path}: {describe_bytes(result.bytes)}, {result.samples} samples, {result.evaluations} evaluations")
    if as_json:
        print_json(dataclasses.asdict(result))
