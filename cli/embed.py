"""`maekit embed`."""

from maekit.cli.options import Summary, configured
from maekit.cli.show import describe_unused, make_progress, say
from maekit.config.embed import EmbedConfig
from maekit.system.text import count


@configured(EmbedConfig)
def command(config: EmbedConfig) -> Summary:
    """Embed every image of every shard: one row for each key, or a line that says why not.

    A shard counts when its commit record is written; the same command again does what is left, and new shards in the
    input are simply added. Keys without a readable image are listed with the reason in OUT/_maekit/errors.
    """
    from maekit.embedding.embed import embed, raise_if_incomplete

    result = embed(config, make_progress())
    split = "" if result.split == "all" else f", split {result.split}"
    say(
        f"{result.rows} rows, {result.errors} errors{describe_unused(result.unused)}; "
        f"{count('shard', result.shards)} embedded, {result.skipped} already there{split}: {result.out}"
    )
    if result.binds:
        stages = ", ".join(f"{stage} {rate:.1f}" for stage, rate in result.rates.items())
        say(
            f"{result.images_per_second:.1f} img/s on {result.provider}, {result.limit_share:.0%} of the limit "
            f"(alone: {stages} img/s); bottleneck: {result.binds}"
        )
    if result.verified is not None and not result.verified.problems:
        verified = result.verified
        counts = f"{verified.rows} rows and {verified.errors} errors are all keys of {count('shard', verified.shards)}"
        say(f"verified: {counts}" if verified.shards else "nothing to verify")
    yield result
    raise_if_incomplete(result)
