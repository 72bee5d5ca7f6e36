"""`maekit pack`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    images: Annotated[Path, typer.Argument(help="A folder of images, searched to any depth.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="SHARDS", help="A folder for the shards.", show_default=False)],
    samples_per_shard: Annotated[int, typer.Option(help="Images in each shard.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Pack a folder of images into tar shards.

    Image bytes go in unchanged, in sorted order, the same bytes every time. The key is the path without its extension,
    dots in the name turned into underscores. Where all images lie in class folders, the class goes in as a .cls member
    and the names into classes.txt.
    """
    from maekit.cli.show import make_progress, print_json, size
    from maekit.shards.pack import pack

    progress = make_progress()
    started = False

    def on_sample(done: int, total: int) -> None:
        nonlocal started
        if not started:
            progress.start("pack", total)
            started = True
        progress.advance(done)

    try:
        report = pack(images, out, samples_per_shard=samples_per_shard, on_sample=on_sample)
    finally:
        progress.stop()
    classes = f", {len(report.classes)} classes" if report.classes else ""
    print(f"{report.samples} images in {len(report.shards)} shards, {size(float(report.bytes))}{classes}: {out}")
    if report.passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.passed_over.items()))
        print(f"passed over, no images: {kinds}")
    if as_json:
        print_json(
            {
                "samples": report.samples,
                "shards": len(report.shards),
                "bytes": report.bytes,
                "classes": report.classes,
                "passed_over": report.passed_over,
            }
        )
