"""`maekit reconstruct`."""

from maekit.cli.options import Summary, configured
from maekit.cli.show import make_progress, say
from maekit.config.pages import ReconstructConfig


@configured(ReconstructConfig)
def command(config: ReconstructConfig) -> Summary:
    """Draw masked | reconstruction | original of some samples.

    A model of normalised patches predicts no brightness and contrast: those are taken from the true patches.
    Kept patches are shown as predicted, which no training ever asked for; --overlay-visible shows them as they are.
    """
    from maekit.pages.reconstruct import reconstruct

    result = reconstruct(config, make_progress())
    say(f"{result.path}: {len(result.samples)} samples, mean loss {result.loss:.4f}")
    yield result
