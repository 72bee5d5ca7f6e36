"""`maekit export`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from maekit.cli.show import make_progress, print_json
from maekit.config.export import ExportOptions
from maekit.config.poolings import UNPOOLED

_DEFAULT = ExportOptions()
_COMPUTES, _PROVES = "What it computes", "What it is held against"


def command(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A run, one of its checkpoints, timm:NAME, a file of weights (under timm's names, or the reference "
            "implementation's .pth), or a directory of transformers' ViTMAE.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The ONNX file.", show_default=False)] = None,
    pool: Annotated[
        str,
        typer.Option(
            help="avg: mean of the patch tokens; cls: the class token; std: standard deviation of the patch tokens; "
            "avg2x2: mean of each quarter of the image; several joined by +; or tokens: all patch tokens.",
            rich_help_panel=_COMPUTES,
        ),
    ] = _DEFAULT.pool,
    whiten: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS",
            help="Fit a whitening on images of these shards and bake it in: recommended for cosine search.",
            show_default=False,
            rich_help_panel=_COMPUTES,
        ),
    ] = None,
    whiten_dim: Annotated[
        int | None,
        typer.Option(
            help="Length of a whitened embedding; by default as many as the images vary in.",
            show_default=False,
            rich_help_panel=_COMPUTES,
        ),
    ] = None,
    whiten_images: Annotated[
        int, typer.Option(help="Images to fit the whitening on, evenly spread.", rich_help_panel=_COMPUTES)
    ] = _DEFAULT.whiten_images,
    normalize: Annotated[
        bool, typer.Option(help="Divide each embedding by its L2 norm.", rich_help_panel=_COMPUTES)
    ] = True,
    precision: Annotated[
        str, typer.Option(help="fp32; fp16, for CUDA; int8, for CPUs.", rich_help_panel=_COMPUTES)
    ] = _DEFAULT.precision,
    opset: Annotated[
        int,
        typer.Option(
            help="Of ONNX, 18 to 23; below 23 attention is written in older operators, for older runtimes.",
            rich_help_panel=_COMPUTES,
        ),
    ] = _DEFAULT.opset,
    format: Annotated[
        str,
        typer.Option(
            help="onnx; or timm: a directory that timm.create_model('local-dir:DIR') loads, the encoder alone.",
            rich_help_panel=_COMPUTES,
        ),
    ] = _DEFAULT.format,
    model: Annotated[
        str | None,
        typer.Option(
            help="timm's name of the architecture, for a file of weights that does not tell; with a tag "
            "(vit_base_patch16_224.mae), also its normalisation.",
            show_default=False,
            rich_help_panel=_COMPUTES,
        ),
    ] = None,
    parity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS",
            help="Images to compare on, and to calibrate int8 on; those of the training by default.",
            show_default=False,
            rich_help_panel=_PROVES,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep a file that differs too much.", rich_help_panel=_PROVES)
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write nothing: hold an exported file, on this machine, against what it gave when it was exported, "
            "and against PyTorch where SOURCE is named.",
            show_default=False,
            rich_help_panel=_PROVES,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="For --verify: auto, cpu, cuda or cuda:N.", show_default="auto", rich_help_panel=_PROVES),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    r"""Export an encoder to one ONNX file, verified against PyTorch.

    Input `images`, uint8 \[batch, height, width, 3]; output `embeddings`, float32 \[batch, dim] (or `tokens`,
    \[batch, tokens, dim]). The written file is run in ONNX Runtime on real images, and kept if it agrees with PyTorch
    in fp32: fp32 within 1e-4 of the largest value, fp16 with a cosine of at least 0.999 for each image, int8 with one
    of 0.99 on average. Its metadata hold the figures, the preprocessing and where the weights come from.
    """
    from maekit.system.errors import InputError

    options = {
        "pool": pool,
        "normalize": normalize,
        "whiten": tuple(whiten or ()),
        "whiten_dim": whiten_dim,
        "whiten_images": whiten_images,
        "precision": precision,
        "opset": opset,
        "format": format,
        "force": force,
    }
    if verify is not None:
        given = [name for name, value in options.items() if value != getattr(_DEFAULT, name)] + ["out"] * (
            out is not None
        )
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} does not go with --verify, which writes nothing")
        _verify(verify, source, device or "auto", parity or (), model, as_json)
        return
    if source is None or out is None:
        raise InputError("export needs a source and --out FILE: maekit export RUN --out encoder.onnx")
    if device is not None:
        raise InputError("--device is for --verify")
    _export(source, out, as_json, model=model, parity=tuple(parity or ()), **options)


def _export(source: str, out: Path, as_json: bool, **options: Any) -> None:
    from maekit.exporters.export import export
    from maekit.system.files import describe_bytes
    from maekit.system.signals import stop_on_signal

    progress = make_progress()
    with stop_on_signal(_interrupt):
        result = export(source, out, ExportOptions(**options), progress=progress)
    size = describe_bytes(result.bytes)
    if result.parity is None:
        print(f"{result.path}: {size}, dim {result.dim}; timm.create_model('local-dir:{result.path}', pretrained=True)")
    else:
        print(
            f"{result.path}: {size}, dim {result.dim}, {sum(result.nodes.values())} nodes, parity "
            f"{result.parity.max_relative_difference:.1e} and mean cosine {result.parity.mean_cosine:.5f} on "
            f"{result.parity.images} images"
        )
        if result.warning:
            progress.note(f"kept by --force, although it differs from PyTorch: {result.warning}")
        if options["pool"] != UNPOOLED:
            print(f"next: maekit embed {result.path} SHARDS --out EMBEDDINGS")
    if result.parity and not result.whitening and options["pool"] != UNPOOLED:
        progress.note("for cosine search, --whiten SHARDS makes the embeddings of a masked autoencoder far better")
    if as_json:
        print_json(dataclasses.asdict(result))


def _interrupt() -> None:
    """End a SIGTERM as Ctrl-C ends: what is unfinished is removed."""
    raise KeyboardInterrupt


def _verify(file: Path, source: str | None, device: str, parity: Any, model: str | None, as_json: bool) -> None:
    from maekit.exporters.verify import verify
    from maekit.system.errors import MaekitError

    result = verify(file, source, device=device, parity=parity, model=model, progress=make_progress())
    for name, figures in (("as exported", result.probe), ("as PyTorch", result.parity)):
        if figures is not None:
            print(
                f"{name}: largest difference {figures.max_relative_difference:.1e} of the largest value, "
                f"smallest cosine {figures.min_cosine:.5f}, {figures.images} images"
            )
    if not result.problems:
        print(f"{file} is sound on {result.provider}")
    if as_json:
        print_json(dataclasses.asdict(result))
    if result.problems:
        raise MaekitError(f"{file} on {result.provider}: {'; '.join(result.problems)}")
