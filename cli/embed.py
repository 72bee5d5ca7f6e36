"""`maekit embed`."""

from typing import Annotated

import typer


def command(
    model: Annotated[
        str, typer.Argument(metavar="ENCODER.ONNX", help="What `maekit export` wrote.", show_default=False)
    ],
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Directories, .tar files, globs, brace patterns or URLs; or one directory of images.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(help="The output directory.", show_default=False, rich_help_panel="Output")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="parquet: one file per shard. npy: img_emb/*.npy and metadata/*.parquet, as clip-retrieval writes.",
            rich_help_panel="Output",
        ),
    ] = "parquet",
    dtype: Annotated[
        str, typer.Option(help="Of the stored embeddings: float32 or float16.", rich_help_panel="Output")
    ] = "float32",
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="EXTENSIONS",
            help="Members of each sample that become columns, such as json,cls.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete what is in --out and make it anew.", rich_help_panel="Output"),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="At the end, read everything again: digests, keys, lengths, values. Exit 1 if anything is wrong.",
            rich_help_panel="Output",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="Only the first so many samples of the input.", show_default=False, rich_help_panel="Input"),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB", help="Only samples whose key matches.", show_default=False, rich_help_panel="Input"
        ),
    ] = None,
    cache_gb: Annotated[
        float,
        typer.Option(help="Gigabytes that remote shards may take in $MAEKIT_CACHE.", rich_help_panel="Input"),
    ] = 50.0,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda or cuda:N. cuda means on CUDA, or exit 2 with the fix.", rich_help_panel="Hardware"
        ),
    ] = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,…",
            help="Several GPUs (or cpu,cpu), one process each, which share the work.",
            show_default=False,
            rich_help_panel="Hardware",
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Images per run of the model. auto: what --out has; else 8 on a CPU, where more only fall out of the "
            "caches, and as many pixels as 256 images of 224 x 224 on a GPU. Halved where memory is short.",
            rich_help_panel="Hardware",
        ),
    ] = "auto",
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Decoding processes, over all devices. auto: one per core; on a CPU they only take the time that "
            "the model leaves.",
            rich_help_panel="Hardware",
        ),
    ] = "auto",
    provider_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Of ONNX Runtime's CUDA provider, such as gpu_mem_limit=8000000000.",
            show_default=False,
            rich_help_panel="Hardware",
        ),
    ] = None,
    num_splits: Annotated[
        int | None,
        typer.Option(
            help="Divide the input among so many runs on one --out. [dim]\\[default: as SLURM or torchrun says][/dim]",
            show_default=False,
            rich_help_panel="Many machines",
        ),
    ] = None,
    split: Annotated[
        int | None,
        typer.Option(help="Which of them this is, from 0.", show_default=False, rich_help_panel="Many machines"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Embed every image of every shard: one row for each key, or a line that says why not.

    A shard counts when its commit record is written; the same command again does what is left, and new shards in the
    input are simply added. Keys without a readable image are listed with the reason in OUT/_maekit/errors.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.embedding.embed import EmbedConfig, embed, raise_if_incomplete

    config = EmbedConfig(
        model=model,
        shards=tuple(shards),
        out=out,
        device=device,
        devices=_devices(devices),
        provider_options=_options(provider_option or []),
        format=format_,
        dtype=dtype,
        keep=tuple(part.strip().lower().lstrip(".") for part in keep.split(",")) if keep is not None else (),
        limit=limit,
        select=select,
        batch_size=_number("--batch-size", batch_size),
        workers=_number("--workers", workers),
        num_splits=num_splits,
        split=split,
        overwrite=overwrite,
        verify=verify,
        cache_gb=cache_gb,
    )
    result = embed(config, make_progress())
    print(
        f"{result.rows} rows, {result.errors} errors; {result.shards} shards embedded, {result.skipped} already there"
        f": {result.out}"
    )
    if result.binds:
        stages = ", ".join(f"{stage} {rate:.1f}" for stage, rate in result.rates.items())
        print(
            f"{result.images_per_second:.1f} img/s on {result.provider}, {result.limit_share:.0%} of the limit "
            f"(alone: {stages} img/s); {result.binds} binds"
        )
    if result.verified is not None and not result.verified.problems:
        verified = result.verified
        print(f"verified: {verified.rows} rows and {verified.errors} errors are all keys of {verified.shards} shards")
    if as_json:
        print_json(dataclasses.asdict(result))
    raise_if_incomplete(result)


def _number(option: str, text: str) -> int | None:
    """Return a number, or None for `auto`."""
    from maekit.system.errors import InputError

    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option} {text}: must be a number or auto") from None


def _devices(text: str | None) -> tuple[str, ...]:
    """Return the devices of a list such as 0,1 or cpu,cpu."""
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",")]
    return tuple(f"cuda:{name}" if name.isdecimal() else name for name in names)


def _options(pairs: list[str]) -> dict[str, str]:
    """Return the options of a provider."""
    from maekit.system.errors import InputError

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"--provider-option {pair}: must be KEY=VALUE")
        options[key] = value
    return options
