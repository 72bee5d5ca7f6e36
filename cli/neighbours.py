"""`maekit neighbours`."""

from maekit.cli.options import Json, configured
from maekit.config.pages import NeighboursConfig


@configured(NeighboursConfig, arguments=["embeddings"])
def command(config: NeighboursConfig, as_json: Json = False) -> None:
    """Find the images nearest to some others, exactly, and write them as one HTML page.

    A query that is a row is not among its own neighbours. The embeddings of one shard are in memory at a time.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.pages.neighbours import neighbours

    result = neighbours(config, make_progress())
    print(f"{result.path}: {len(result.queries)} queries among {result.rows} embeddings")
    if as_json:
        print_json(dataclasses.asdict(result))
