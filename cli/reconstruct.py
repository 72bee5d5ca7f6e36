"""`maekit reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from maekit.config.pages import ReconstructOptions

_DEFAULT = ReconstructOptions()


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A run, a checkpoint, or others' weights with a decoder: a .pth of the reference implementation, a "
            "directory of transformers' ViTMAE.",
            show_default=False,
        ),
    ],
    shards: Annotated[
        list[str], typer.Argument(help="Directories, .tar files, globs, brace patterns or URLs.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The picture: .png, or .html with keys and losses as well.")] = Path(
        "reconstruction.png"
    ),
    key: Annotated[
        list[str] | None,
        typer.Option(help="A sample, KEY or SHARD:KEY; may be repeated. Without it, a random set.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(help="How many samples are drawn at random.")] = _DEFAULT.count,
    seed: Annotated[int, typer.Option(help="Of the samples and the masks.")] = _DEFAULT.seed,
    mask_ratio: Annotated[
        float | None,
        typer.Option(help="Share of patches removed. [dim]\\[default: as trained][/dim]", show_default=False),
    ] = None,
    masking: Annotated[
        str | None,
        typer.Option(help="random, block or grid. [dim]\\[default: as trained][/dim]", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="norm_pixel or pixel, for a file of weights that does not tell what it predicts.", show_default=False
        ),
    ] = None,
    overlay_visible: Annotated[
        bool,
        typer.Option("--overlay-visible", help="Show kept patches as they are, and not as they are predicted."),
    ] = _DEFAULT.overlay_visible,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _DEFAULT.device,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Draw masked | reconstruction | original of some samples.

    A model of normalised patches predicts no brightness and contrast: those are taken from the true patches.
    Kept patches are shown as predicted, which no training ever asked for; --overlay-visible shows them as they are.
    """
    import dataclasses

    from maekit.cli.show import make_progress, print_json
    from maekit.pages.reconstruct import reconstruct

    keys = tuple(key or ())
    options = ReconstructOptions(keys, count, seed, mask_ratio, masking, target, overlay_visible, device)
    result = reconstruct(source, shards, out, options, make_progress())
    print(f"{result.path}: {len(result.samples)} samples, mean loss {result.loss:.4f}")
    if as_json:
        print_json(dataclasses.asdict(result))
