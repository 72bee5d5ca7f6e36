"""`maekit pack`."""

from pathlib import Path
from typing import Annotated

import typer

_TABLE = "Table"


def command(
    images: Annotated[Path, typer.Argument(help="A folder of images, searched to any depth.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="SHARDS", help="A folder for the shards.", show_default=False)],
    samples_per_shard: Annotated[int, typer.Option(help="Images in each shard at most.")] = 1000,
    shard_mb: Annotated[float | None, typer.Option(help="Megabytes in each shard at most.", show_default=False)] = None,
    classes: Annotated[
        bool, typer.Option(help="Take the first folder of each path for the class, where all images lie in folders.")
    ] = True,
    table: Annotated[
        Path | None,
        typer.Option(
            help="A CSV, TSV or parquet file that says which images, in what order, and with what label.",
            show_default=False,
            rich_help_panel=_TABLE,
        ),
    ] = None,
    path_column: Annotated[
        str | None,
        typer.Option(
            help="Its column of paths. [dim]\\[default: one named path, file, filename or image][/dim]",
            show_default=False,
            rich_help_panel=_TABLE,
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Its column of labels, whole numbers or text. [dim]\\[default: one named label, cls, class or target]"
            "[/dim]",
            show_default=False,
            rich_help_panel=_TABLE,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes. [dim]\\[default: one per core][/dim]", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Pack a folder of images into tar shards.

    Image bytes go in unchanged, in sorted order, the same bytes every time. The key is the path without its extension,
    dots in the name turned into underscores; a .json, .txt or .cls file of the same name rides along. Links are
    followed, hidden names are not. Labels go in as .cls members, class names into classes.txt. Beside each shard lies
    its index, with CRC-32s. The same command again goes on after a kill.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.shards.pack import PackOptions, pack
    from maekit.system.files import describe_bytes

    options = PackOptions(
        samples_per_shard=samples_per_shard,
        shard_mb=shard_mb,
        classes=classes,
        table=table,
        path_column=path_column,
        label_column=label_column,
        workers=workers,
    )
    report = pack(images, out, options, progress=make_progress())
    print(f"{report.samples} images in {len(report.shards)} shards, {describe_bytes(report.bytes)}: {out}")
    if report.classes:
        shown = ", ".join(f"{name} {report.class_counts[name]}" for name in report.classes[:12])
        more = f", {len(report.classes) - 12} more" if len(report.classes) > 12 else ""
        print(f"classes: {shown}{more} (in {out}/classes.txt)")
    for count, what in ((report.unlabelled, "images have no label"), (report.empty, "image files hold no bytes")):
        if count:
            print(f"{count} {what}")
    for what, counts in (("riding along", report.sidecars), ("passed over", report.passed_over)):
        if counts:
            print(f"{what}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    print(f"next: maekit check {out} --images")
    if as_json:
        print_json({**dataclasses.asdict(report), "shards": len(report.shards)})
