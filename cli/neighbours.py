"""`maekit neighbours`."""

from pathlib import Path
from typing import Annotated

import typer

from maekit.config.pages import NeighbourOptions

_DEFAULT = NeighbourOptions()


def command(
    embeddings: Annotated[
        Path, typer.Argument(metavar="EMBEDDINGS", help="What `maekit embed` wrote: its --out.", show_default=False)
    ],
    query: Annotated[
        list[str],
        typer.Option(
            metavar="KEY|IMAGE",
            help="KEY or SHARD:KEY of a row, or an image file; may be repeated.",
            show_default=False,
        ),
    ],
    k: Annotated[int, typer.Option("--k", "-k", help="Neighbours of each query.")] = _DEFAULT.k,
    shards: Annotated[
        list[str] | None,
        typer.Option(help="What was embedded, for the pictures; may be repeated.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER.ONNX",
            help="The file that made the embeddings, for queries that are images.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("neighbours.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Find the images nearest to some others, exactly, and write them as one HTML page.

    A query that is a row is not among its own neighbours. The embeddings of one shard are in memory at a time.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.pages.neighbours import neighbours

    options = NeighbourOptions(k, tuple(shards or ()), model)
    result = neighbours(embeddings, query, out, options, make_progress())
    print(f"{result.path}: {len(result.queries)} queries among {result.rows} embeddings")
    if as_json:
        print_json(dataclasses.asdict(result))
