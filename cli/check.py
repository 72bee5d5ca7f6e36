"""`maekit check`."""

from typing import Annotated

import typer


def command(
    shards: Annotated[
        list[str], typer.Argument(help="Directories, .tar files, globs or brace patterns.", show_default=False)
    ],
    write_index: Annotated[
        bool, typer.Option("--write-index", help="Write NAME.tar.index beside each sound shard.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Scan shards strictly: samples, bytes, damage, duplicate keys.

    Every tar header is checked and every byte accounted for. Exits 1 when any shard is damaged, with one line for each
    that says where and why.
    """
    import sys

    from maekit.cli.show import make_progress, print_json, size
    from maekit.shards.check import ShardReport, check_shards
    from maekit.shards.spec import find_shards

    found = find_shards(shards)
    progress = make_progress()
    done = 0

    def on_shard(report: ShardReport) -> None:
        nonlocal done
        done += 1
        progress.advance(done)

    progress.start("check", len(found))
    try:
        report = check_shards(found, write_indexes=write_index, on_shard=on_shard)
    finally:
        progress.stop()
    summary = report.summary()
    for shard in report.damaged:
        assert shard.damage is not None
        print(f"damaged  {shard.name}  at byte {shard.damage.offset}: {shard.damage.reason}", file=sys.stderr)
    print(
        f"{report.samples} samples in {len(report.shards)} shards, {size(float(sum(s.bytes for s in report.shards)))}; "
        f"{len(report.damaged)} damaged"
    )
    for key, what in (
        ("duplicates", "keys stand in more than one shard (a sample is named by its shard too, so nothing is lost)"),
        ("without_image", "samples hold no image"),
        ("ignored", "members belong to no sample (no extension, hidden, or metadata)"),
    ):
        if summary[key]:
            print(f"{summary[key]} {what}")
    if as_json:
        print_json(summary)
    if report.damaged:
        raise typer.Exit(1)
