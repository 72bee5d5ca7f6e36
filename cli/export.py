"""`maekit export`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The ONNX file.", show_default=False)],
    pool: Annotated[str, typer.Option(help="avg: mean of the patch tokens; cls: the class token.")] = "avg",
    normalize: Annotated[bool, typer.Option(help="Divide each embedding by its L2 norm.")] = True,
    parity: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARDS", help="Images to compare on; the run's own by default.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    r"""Export the encoder of a run to one ONNX file, verified against PyTorch.

    Input `images`, uint8 \[batch, height, width, 3]; output `embeddings`, float32 \[batch, dim]. The written file is
    run in ONNX Runtime on real images and compared; beyond a difference of 1e-4 of the largest value no file is left.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.exporters.export import export
    from maekit.files import describe_bytes

    result = export(run, out, pool=pool, normalize=normalize, parity=parity or (), progress=make_progress())
    print(
        f"{result.path}: {describe_bytes(result.bytes)}, dim {result.dim}, {sum(result.nodes.values())} nodes, parity "
        f"{result.parity.max_relative_difference:.1e} on {result.parity.images} images"
    )
    print(f"next: maekit embed {result.path} SHARDS --out EMBEDDINGS")
    if as_json:
        print_json(dataclasses.asdict(result))
