"""`maekit pretrain`."""

from maekit.cli.options import Summary, configured
from maekit.cli.show import describe_unused, is_main_process, make_progress, say
from maekit.config import PretrainConfig


@configured(PretrainConfig, toml="config.toml", panel="Output")
def command(config: PretrainConfig) -> Summary:
    """Pre-train a masked autoencoder on tar shards.

    After a kill or a stop, the same command resumes exactly; on a finished run it says so. Defaults are the
    published recipe (He et al. 2021).
    """
    import math

    from maekit.pretraining.pretrain import pretrain

    result = pretrain(config, make_progress())
    if not is_main_process():
        return
    if not result.already_finished:
        held_out = [
            text.format(value)
            for value, text in (
                (result.val_loss, "held-out loss {:.4f}, "),
                (result.val_rank, "effective rank {:.1f}, "),
                (result.val_knn, "kNN {:.1%}"),
                (result.val_knn_whitened, " (whitened {:.1%}), "),
            )
            if value is not None
        ]
        say(
            f"{result.steps} steps, {result.samples} images, loss {result.loss or math.nan:.4f}, {''.join(held_out)}"
            f"{result.images_per_second:.1f} img/s, data-wait {result.data_wait:.0%}{describe_unused(result.unused)}: "
            f"{result.out}/encoder.safetensors"
        )
    say(f"next: maekit export {result.out} --out encoder.onnx --whiten SHARDS")
    yield result
