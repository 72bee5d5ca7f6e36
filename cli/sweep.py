"""`maekit sweep`."""

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, print_table, say
from maekit.config.sweep import SweepConfig


@configured(SweepConfig)
def command(config: SweepConfig) -> Summary:
    r"""Pre-train a small grid of settings, judge each run alike, and draw the curves.

    \[sweep] names the labelled shards to judge with (train, test), how (judge = \["knn", "linear"]), and whether one
    setting is varied at a time or all combinations are tried (every = "one" or "all"); \[sweep.vary] lists values:
    "model.mask_ratio" = \[0.5, 0.75, 0.9]. OUT/sweep.html shows what is there so far.

    The same command resumes a stopped sweep; cells that are added to the file are trained, the others are not
    done again.
    """
    from maekit.sweeping import measures_of, sweep

    result = sweep(config, make_progress())
    measures = measures_of(result.rows)
    table = [
        [row["name"], *(f"{100 * row[name]:.1f}" for name in measures), f"{row['loss']:.4f}" if row["loss"] else ""]
        for row in result.rows
    ]
    print_table(["", *measures, "loss"], table, right=range(1, len(measures) + 2))
    say(f"{len(result.rows)} cells, {result.trained} trained now: {result.page}")
    yield result
