"""`maekit embed`."""

from typing import Annotated

import typer


def command(
    model: Annotated[
        str, typer.Argument(metavar="ENCODER.ONNX", help="What `maekit export` wrote.", show_default=False)
    ],
    shards: Annotated[
        list[str], typer.Argument(help="Directories, .tar files, globs, brace patterns or URLs.", show_default=False)
    ],
    out: Annotated[str, typer.Option(help="The output directory.", show_default=False)],
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda. cuda means on CUDA, or exit 2 with the fix.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the stored embeddings: float32 or float16.")] = "float32",
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images per run of the model. [dim]\\[default: 16 on a CPU, 256 on a GPU][/dim]", show_default=False
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Decoding threads. [dim]\\[default: one per core][/dim]", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what is in --out and make it anew.")] = False,
    cache_gb: Annotated[float, typer.Option(help="Gigabytes that remote shards may take in $MAEKIT_CACHE.")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Embed every image of every shard into one parquet file per shard.

    Columns: key, shard, index, embedding. A shard counts when its commit record is written; the same command again does
    what is left, and new shards in the input are simply added. Keys without a readable image are listed with the reason
    in OUT/_maekit/errors.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.embedding.run import EmbedConfig, embed, raise_if_damaged

    config = EmbedConfig(
        model=model,
        shards=tuple(shards),
        out=out,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        overwrite=overwrite,
        cache_gb=cache_gb,
    )
    result = embed(config, make_progress())
    speed = (
        f"; {result.images_per_second:.1f} img/s on {result.provider}, {result.binds} binds" if result.shards else ""
    )
    print(
        f"{result.rows} rows, {result.errors} errors; {result.shards} shards embedded, {result.skipped} already there"
        f"{speed}: {result.out}"
    )
    if as_json:
        print_json(dataclasses.asdict(result))
    raise_if_damaged(result)
