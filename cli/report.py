"""`maekit report`."""

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, say
from maekit.config.pages import ReportConfig


@configured(ReportConfig)
def command(config: ReportConfig) -> Summary:
    """Write a run as one HTML page that needs no other file.

    Settings, curves, reconstructions over time, nearest neighbours, a map of the embeddings, and the tables of
    `maekit evaluate`. What cannot be shown any more (shards that are gone) is said in its place.
    """
    from maekit.pages.report import report
    from maekit.system.files import describe_bytes

    result = report(config, make_progress())
    say(f"{result.path}: {describe_bytes(result.bytes)}, {result.samples} samples, {result.evaluations} evaluations")
    yield result
