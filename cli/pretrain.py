"""`maekit pretrain`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from maekit.config import DEFAULT_EPOCHS, PretrainConfig
from maekit.system.errors import InputError

_DEFAULT = PretrainConfig()
_TRAINING, _MODEL, _MACHINE, _OUTPUT = "Training", "Encoder", "Machine", "Output"
_DECODER, _MASKING, _TARGET, _IMAGES = "Decoder", "Masking", "Target", "Images"


def _option(help: str, panel: str, *names: str, default: Any = None) -> Any:
    """Return an option that is None unless given, so that a config file shines through; the help states the default."""
    shown = f" [dim]\\[default: {default}][/dim]" if default is not None else ""
    return typer.Option(*names, help=help + shown, rich_help_panel=panel, show_default=False)


def _image_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"--image-size {text!r}: must be a number of pixels, or two as in 192x256 (height x width)")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _micro_batch(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise InputError(f"--micro-batch {text!r}: must be a whole number greater than 0, or auto")
    return int(text)


def command(
    shards: Annotated[
        list[str] | None,
        typer.Argument(help="Directories, .tar files, globs, brace patterns or URLs.", show_default=False),
    ] = None,
    out: Annotated[Path | None, _option("The run directory.", _OUTPUT)] = None,
    model: Annotated[str | None, _option("Encoder, by its timm name.", _MODEL, default="vit_base_patch16_224")] = None,
    image_size: Annotated[
        str | None,
        _option("Side of the input in pixels, or HEIGHTxWIDTH.", _MODEL, default=_DEFAULT.model.image_size),
    ] = None,
    channels: Annotated[
        int | None, _option("3 for RGB, 1 for grey (the luma).", _MODEL, default=_DEFAULT.model.channels)
    ] = None,
    patch_size: Annotated[
        int | None, _option("Side of a patch, in pixels; the model's own by default.", _MODEL)
    ] = None,
    positions: Annotated[
        str | None, _option("sincos (fixed) or learned.", _MODEL, default=_DEFAULT.model.positions)
    ] = None,
    class_token: Annotated[
        bool | None,
        _option("The model's own way by default.", _MODEL, "--class-token/--no-class-token"),
    ] = None,
    masking: Annotated[
        str | None,
        _option("Which patches are removed: random, block or grid.", _MASKING, default=_DEFAULT.model.masking),
    ] = None,
    mask_ratio: Annotated[
        float | None, _option("Share of patches removed.", _MASKING, default=_DEFAULT.model.mask_ratio)
    ] = None,
    masks_per_image: Annotated[
        int | None,
        _option(
            "Train on so many masks of each image in a step: one decoding serves them all.",
            _MASKING,
            default=_DEFAULT.model.masks_per_image,
        ),
    ] = None,
    mask_tokens: Annotated[
        str | None,
        _option(
            "Where they stand for removed patches: in the decoder, or already in the encoder (slow).",
            _MASKING,
            default=_DEFAULT.model.mask_tokens,
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        _option(
            "self: blocks of self-attention; cross: of cross-attention to the encoder alone (CrossMAE).",
            _DECODER,
            default=_DEFAULT.model.decoder,
        ),
    ] = None,
    predict_ratio: Annotated[
        float | None,
        _option("Share of the removed patches that are predicted.", _DECODER, default=_DEFAULT.model.predict_ratio),
    ] = None,
    decoder_depth: Annotated[int | None, _option("Blocks.", _DECODER, default=_DEFAULT.model.decoder_depth)] = None,
    decoder_width: Annotated[int | None, _option("Width.", _DECODER, default=_DEFAULT.model.decoder_width)] = None,
    decoder_heads: Annotated[
        int | None, _option("Attention heads.", _DECODER, default=_DEFAULT.model.decoder_heads)
    ] = None,
    target: Annotated[
        str | None,
        _option(
            "What is predicted: norm_pixel (each patch normalised by itself), pixel, pca or tokens.",
            _TARGET,
            default=_DEFAULT.model.target,
        ),
    ] = None,
    pca_components: Annotated[
        int | None, _option("Coefficients of --target pca.", _TARGET, default=_DEFAULT.model.pca_components)
    ] = None,
    tokenizer: Annotated[
        Path | None,
        _option("Of --target tokens: an ONNX file, images in, a whole number for each patch out.", _TARGET),
    ] = None,
    vocabulary: Annotated[int | None, _option("How many different tokens there are.", _TARGET)] = None,
    augmentation: Annotated[
        str | None,
        _option(
            "random_resized_crop, fixed_crop, or none: the centre, never mirrored.",
            _IMAGES,
            default=_DEFAULT.data.augmentation,
        ),
    ] = None,
    color_jitter: Annotated[
        float | None,
        _option("Change brightness, contrast and saturation by up to this share.", _IMAGES, default="0: not at all"),
    ] = None,
    init_from: Annotated[
        str | None,
        _option(
            "Start from timm:NAME (published weights), a run, a file of weights, or transformers' ViTMAE directory.",
            _MODEL,
        ),
    ] = None,
    epochs: Annotated[float | None, _option("Passes over the data.", _TRAINING, default=f"{DEFAULT_EPOCHS:g}")] = None,
    steps: Annotated[int | None, _option("Optimiser steps, instead of epochs.", _TRAINING)] = None,
    batch_size: Annotated[
        int | None, _option("Images per step, over all devices.", _TRAINING, default=_DEFAULT.batch_size)
    ] = None,
    lr: Annotated[
        float | None, _option("Base learning rate, per 256 images.", _TRAINING, default=_DEFAULT.optimizer.lr)
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        _option(
            "Length of the warm-up; at most a tenth of the run.", _TRAINING, default=_DEFAULT.optimizer.warmup_epochs
        ),
    ] = None,
    seed: Annotated[
        int | None, _option("Of weights, order, crops, flips and masks.", _TRAINING, default=_DEFAULT.seed)
    ] = None,
    skip_damaged: Annotated[bool, _option("Leave damaged shards out.", _IMAGES, "--skip-damaged")] = False,
    max_bad: Annotated[
        float | None,
        _option("Stop when a larger share of samples holds no image.", _IMAGES, default=_DEFAULT.data.max_bad),
    ] = None,
    clip_grad: Annotated[
        float | None, _option("Scale longer gradients down to this norm.", _TRAINING, default="none, as published")
    ] = None,
    skip_nonfinite: Annotated[
        int | None,
        _option("Leave out up to so many steps whose gradient is not finite.", _TRAINING, default="0: stop"),
    ] = None,
    val: Annotated[
        list[str] | None,
        _option(
            "Held-out shards: the loss on 2000 of their images at every checkpoint (data.val_images, run.val_every).",
            _TRAINING,
        ),
    ] = None,
    workers: Annotated[
        int | None, _option("Processes that read and decode.", _MACHINE, default="by the machine")
    ] = None,
    micro_batch: Annotated[
        str | None,
        _option(
            "Images that go through the model at a time on each device, or auto.",
            _MACHINE,
            default="auto: as memory allows",
        ),
    ] = None,
    compile: Annotated[
        bool | None, _option("Compile the step.", _MACHINE, "--compile/--no-compile", default="on CUDA only")
    ] = None,
    cache: Annotated[
        str | None,
        _option("ram: keep the images of a small set decoded in memory; or off.", _MACHINE, default="off"),
    ] = None,
    cache_gb: Annotated[
        float | None,
        _option(
            "Gigabytes that remote shards may take in $MAEKIT_CACHE.",
            _MACHINE,
            default=f"{_DEFAULT.data.cache_gb:g}",
        ),
    ] = None,
    device: Annotated[str | None, _option("auto, cpu or cuda.", _MACHINE, default="auto")] = None,
    precision: Annotated[
        str | None, _option("auto (bf16 where the hardware has it), fp32 or bf16.", _MACHINE, default="auto")
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option("Steps between checkpoints.", _OUTPUT, default="a tenth of the run, at most 1000")
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        _option("Longest time between checkpoints.", _OUTPUT, default=f"{_DEFAULT.run.checkpoint_minutes:g}"),
    ] = None,
    keep_checkpoints: Annotated[
        int | None, _option("How many of the newest are kept.", _OUTPUT, default=_DEFAULT.run.keep_checkpoints)
    ] = None,
    keep_every: Annotated[
        int | None, _option("Besides, make and keep those of steps that are multiples of this.", _OUTPUT)
    ] = None,
    max_time: Annotated[
        str | None, _option("Save and exit with 75 after a time such as 3h50m; the same command goes on.", _OUTPUT)
    ] = None,
    tensorboard: Annotated[
        bool | None, _option("Write RUN/tensorboard.", _OUTPUT, "--tensorboard/--no-tensorboard", default="yes")
    ] = None,
    log_every: Annotated[
        int | None, _option("Steps between rows of metrics.", _OUTPUT, default="a hundredth, at most 50")
    ] = None,
    config: Annotated[
        Path | None, _option("Settings from a TOML file, as a run writes it to config.toml.", _OUTPUT)
    ] = None,
    settings: Annotated[
        list[str] | None,
        _option("Any setting, as in --set model.decoder_depth=4; may be repeated.", _OUTPUT, "--set"),
    ] = None,
    as_json: Annotated[bool, _option("Print one JSON object as the last line.", _OUTPUT, "--json")] = False,
) -> None:
    """Pre-train a masked autoencoder on tar shards.

    The same command again goes on after a kill or a stop, exactly; on a finished run it says so. Defaults are the
    published recipe (He et al. 2021).
    """
    import dataclasses
    import math

    from maekit.cli.show import is_main_process, make_progress, print_json
    from maekit.config.settings import load_toml, parse_setting, set_value

    chosen = PretrainConfig()
    for key, value in (load_toml(config) if config else {}).items():
        set_value(chosen, key, value)
    options = {
        "shards": tuple(shards) if shards else None,
        "out": str(out) if out else None,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "model.name": model,
        "model.image_size": _image_size(image_size),
        "model.channels": channels,
        "model.patch_size": patch_size,
        "model.positions": positions,
        "model.class_token": class_token,
        "model.masking": masking,
        "model.mask_ratio": mask_ratio,
        "model.masks_per_image": masks_per_image,
        "model.mask_tokens": mask_tokens,
        "model.decoder": decoder,
        "model.predict_ratio": predict_ratio,
        "model.decoder_depth": decoder_depth,
        "model.decoder_width": decoder_width,
        "model.decoder_heads": decoder_heads,
        "model.target": target,
        "model.pca_components": pca_components,
        "model.tokenizer": str(tokenizer) if tokenizer else None,
        "model.vocabulary": vocabulary,
        "data.augmentation": augmentation,
        "data.color_jitter": color_jitter,
        "model.init_from": init_from,
        "optimizer.lr": lr,
        "optimizer.warmup_epochs": warmup_epochs,
        "data.skip_damaged": skip_damaged or None,
        "data.max_bad": max_bad,
        "data.cache": cache,
        "data.val": tuple(val) if val else None,
        "data.workers": workers,
        "data.cache_gb": cache_gb,
        "run.device": device,
        "run.precision": precision,
        "optimizer.clip_grad": clip_grad,
        "run.skip_nonfinite": skip_nonfinite,
        "run.micro_batch": _micro_batch(micro_batch),
        "run.compile": compile,
        "run.checkpoint_every": checkpoint_every,
        "run.checkpoint_minutes": checkpoint_minutes,
        "run.keep_checkpoints": keep_checkpoints,
        "run.keep_every": keep_every,
        "run.max_time": max_time,
        "run.tensorboard": tensorboard,
        "run.log_every": log_every,
    }
    # A length on the command line replaces the other kind of length in the file.
    if steps is not None and epochs is None:
        chosen.epochs = None
    if epochs is not None and steps is None:
        chosen.steps = None
    # So does a target, with what belongs to it.
    if target is not None and target != chosen.model.target:
        for name in ("pca_components", "tokenizer", "vocabulary"):
            setattr(chosen.model, name, getattr(_DEFAULT.model, name))
    for key, value in options.items():
        if value is not None:
            set_value(chosen, key, value)
    if micro_batch == "auto":
        chosen.run.micro_batch = None
    for text in settings or []:
        set_value(chosen, *parse_setting(text))
    chosen.validate()

    from maekit.pretraining.pretrain import pretrain

    result = pretrain(chosen, make_progress())
    if not is_main_process():
        return
    if not result.already_finished:
        print(
            f"{result.steps} steps, {result.samples} images, loss {result.loss or math.nan:.4f}, "
            f"{result.images_per_second:.1f} img/s, data-wait {result.data_wait:.0%}: {result.out}/encoder.safetensors"
        )
    print(f"next: maekit export {result.out} --out encoder.onnx --whiten SHARDS")
    if as_json:
        print_json(dataclasses.asdict(result))
