"""`maekit export`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from maekit.cli.options import Json, configured
from maekit.cli.show import make_progress, print_json
from maekit.config.export import ExportConfig
from maekit.config.poolings import UNPOOLED

_PROVES = "What it is held against"


# Neither is needed to verify a file.
@configured(ExportConfig, arguments=["source"], defaults={"source": "", "out": ""})
def command(
    config: ExportConfig,
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
        typer.Option(
            help="For --verify: auto, cpu, cuda or cuda:N. [dim]\\[default: auto][/dim]",
            show_default=False,
            rich_help_panel=_PROVES,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    r"""Export an encoder to one ONNX file, verified against PyTorch.

    Input `images`, uint8 \[batch, height, width, 3]; output `embeddings`, float32 \[batch, dim] (or `tokens`,
    \[batch, tokens, dim]). The written file is run in ONNX Runtime on real images, and kept if it agrees with PyTorch
    in fp32: fp32 within 1e-4 of the largest value, fp16 with a cosine of at least 0.999 for each image, int8 with one
    of 0.99 on average. Its metadata hold the figures, the preprocessing and where the weights come from.
    """
    from maekit.system.errors import InputError

    if verify is not None:
        given = [
            name for name in config.changed() if name not in ("source", "parity", "model") and getattr(config, name)
        ]
        if given:
            raise InputError(f"`{given[0]}` does not go with `verify`, which writes nothing")
        _verify(verify, config.source or None, device or "auto", config.parity, config.model, as_json)
        return
    if not config.source or not config.out:
        raise InputError("export needs a source and `out`: maekit export RUN --out encoder.onnx")
    if device is not None:
        raise InputError("`device` is for `verify`")
    _export(config, as_json)


def _export(config: ExportConfig, as_json: bool) -> None:
    from maekit.exporters.export import export
    from maekit.system.files import describe_bytes
    from maekit.system.signals import stop_on_signal

    progress = make_progress()
    with stop_on_signal(_interrupt):
        result = export(config, progress)
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
        if config.pool != UNPOOLED:
            print(f"next: maekit embed {result.path} SHARDS --out EMBEDDINGS")
    if result.parity and not result.whitening and config.pool != UNPOOLED:
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
