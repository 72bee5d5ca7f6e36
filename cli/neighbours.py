"""`maekit neighbours`."""

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, say
from maekit.config.pages import NeighboursConfig


@configured(NeighboursConfig)
def command(config: NeighboursConfig) -> Summary:
    """Find the images nearest to some others, exactly, and write them as one HTML page.

    A query that is a row is not among its own neighbours. The embeddings of one shard are in memory at a time.
    """
    from maekit.pages.neighbours import neighbours

    result = neighbours(config, make_progress())
    say(f"{result.path}: {len(result.queries)} queries among {result.rows} embeddings")
    yield result
