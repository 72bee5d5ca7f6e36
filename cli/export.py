"""`maekit export`."""

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, say
from maekit.config.export import ExportConfig, proves
from maekit.config.poolings import UNPOOLED
from maekit.system.errors import InputError, MaekitError


class Options(ExportConfig):
    """An export, or the verification of a file."""

    verify: str | None = proves(
        None,
        "Write nothing: hold an exported file, on this machine, against what it gave when it was exported, and against "
        "PyTorch where SOURCE is named.",
        metavar="FILE",
    )
    device: str | None = proves(None, "For --verify: auto, cpu, cuda or cuda:N.", shown="auto")


# Neither is needed to verify a file.
@configured(Options, defaults={"source": "", "out": ""})
def command(config: Options) -> Summary:
    r"""Export an encoder to one ONNX file, verified against PyTorch.

    Input `images`, uint8 \[batch, height, width, 3]; output `embeddings`, float32 \[batch, dim] (or `tokens`,
    \[batch, tokens, dim]). The written file is run in ONNX Runtime on real images, and kept if it agrees with PyTorch
    in fp32: fp32 within 1e-4 of the largest value, fp16 with a cosine of at least 0.999 for each image, int8 with one
    of 0.99 on average. Its metadata hold the figures, the preprocessing and where the weights come from.
    """
    if config.verify is not None:
        return _verify(config, config.verify)
    if not config.source or not config.out:
        raise InputError("export needs a source and `out`: maekit export RUN --out encoder.onnx")
    if config.device is not None:
        raise InputError("`device` is for `verify`")
    return _export(config)


def _export(config: Options) -> Summary:
    from maekit.exporters.export import export
    from maekit.system.files import describe_bytes

    progress = make_progress()
    result = export(config, progress)
    size = describe_bytes(result.bytes)
    if result.parity is None:
        say(f"{result.path}: {size}, dim {result.dim}; timm.create_model('local-dir:{result.path}', pretrained=True)")
    else:
        say(
            f"{result.path}: {size}, dim {result.dim}, {sum(result.nodes.values())} nodes, parity "
            f"{result.parity.max_relative_difference:.1e} and mean cosine {result.parity.mean_cosine:.5f} on "
            f"{result.parity.images} images"
        )
        if result.warning:
            progress.note(f"kept by --force, although it differs from PyTorch: {result.warning}")
        if config.pool != UNPOOLED:
            say(f"next: maekit embed {result.path} SHARDS --out EMBEDDINGS")
    if result.parity and not result.whitening and config.pool != UNPOOLED:
        progress.note("for cosine search, --whiten SHARDS makes the embeddings of a masked autoencoder far better")
    yield result


def _verify(config: Options, file: str) -> Summary:
    from maekit.exporters.verify import verify

    used = ("source", "parity", "model", "verify", "device")
    for key in config.changed():
        if key not in used and getattr(config, key):
            raise InputError(f"`{key}` does not go with `verify`, which writes nothing")
    result = verify(
        file,
        config.source or None,
        device=config.device or "auto",
        parity=config.parity,
        model=config.model,
        progress=make_progress(),
    )
    for name, figures in (("as exported", result.probe), ("as PyTorch", result.parity)):
        if figures is not None:
            say(
                f"{name}: largest difference {figures.max_relative_difference:.1e} of the largest value, "
                f"smallest cosine {figures.min_cosine:.5f}, {figures.images} images"
            )
    if result.unchecked:
        print(
            f"not checked, for this file has no digest of its metadata (an earlier version wrote it, or it was taken "
            f"out): {', '.join(result.unchecked)}"
        )
    if not result.problems:
        say(f"{file} is sound on {result.provider}")
    yield result
    if result.problems:
        raise MaekitError(f"{file} on {result.provider}: {'; '.join(result.problems)}")
