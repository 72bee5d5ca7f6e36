"""`maekit demo`."""

from pathlib import Path

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, say
from maekit.config.fields import Config, setting


class DemoConfig(Config):
    """Where the demo works."""

    out: str = setting("demo", "A folder for everything the demo makes.")


@configured(DemoConfig)
def command(config: DemoConfig) -> Summary:
    """Run the whole loop on pictures it draws itself, in under 3 minutes on a CPU.

    Draws a small labelled set, packs and checks it, pre-trains a tiny ViT, exports it, embeds every picture, and
    compares how well neighbours tell the class: by raw pixels, by the untrained encoder, by the trained one, and by
    the trained one with whitened embeddings. The report of the run shows all of it on one page.
    """
    from maekit.demo.run import run_demo

    result = run_demo(Path(config.out), make_progress())
    say()
    say(f"in {config.out}: pictures, shards, run (pictures in run/pictures), encoder.onnx, embeddings")
    say(f"loss {result.loss_first:.3f} -> {result.loss_last:.3f}; file and PyTorch differ by {result.parity:.1e}")
    say()
    say("nearest neighbours (k = 20, cosine) tell the class of a test picture:")
    for name, accuracy in (
        ("guessing", result.chance),
        ("raw pixels", result.knn_pixels),
        ("untrained encoder", result.knn_untrained),
        ("trained encoder", result.knn_trained),
        ("trained, whitened", result.knn_whitened),
    ):
        say(f"  {name:<18} {accuracy:6.1%}  {'█' * round(accuracy * 40)}")
    say()
    say(f"{result.seconds:.0f} seconds; look at {result.report}")
    yield result
