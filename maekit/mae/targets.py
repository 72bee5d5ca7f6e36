"""Prediction targets of the decoder and their losses (He et al. 2021, section 3 and table 1d).

    norm_pixel   pixels, each patch normalised by its own mean and standard deviation (the default)
    pixel        pixels of the normalised image
    pca          the first coefficients of a principal component analysis of patches
    tokens       integers that a tokenizer assigns to the patches (as in BEiT, Bao et al. 2021)

Each target is a module. It gives the number of values predicted per patch, computes the loss, and, except for tokens,
converts a prediction to pixels.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from maekit.config import ModelConfig
from maekit.system.errors import InputError


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into patches, pixels in (row, column, channel) order: `[B, C, H, W]` -> `[B, N, p·p·C]`."""
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p)  # [B, C, H, W] -> [B, C, rows, p, columns, p]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Reassemble images from patches: `[B, N, p·p·C]` -> `[B, C, H, W]`; the inverse of `patchify`."""
    b, _, d = patches.shape
    p, (rows, columns) = patch_size, grid
    c = d // (p * p)
    x = patches.reshape(b, rows, columns, p, p, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * p, columns * p)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each patch, over all p²·C values: `[B, N, P]` -> 2 x `[B, N, 1]`.

    The variance is the unbiased one, with 1e-6 added before the root.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def normalize_patches(patches: torch.Tensor) -> torch.Tensor:
    """Normalise each patch by its own mean and standard deviation: `[B, N, P]` -> `[B, N, P]`."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


class PixelTarget(nn.Module):
    """Pixels, with mean squared error.

    Args:
        values: values per patch, p²·C.
        normalized: normalise each patch by its own mean and standard deviation.
    """

    def __init__(self, values: int, *, normalized: bool) -> None:
        super().__init__()
        self.outputs, self.normalized = values, normalized

    def loss(self, pred: torch.Tensor, patches: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """Compare predictions with true patches, float32 `[B, P, p·p·C]` each -> scalar."""
        return (pred - (normalize_patches(patches) if self.normalized else patches)).square().mean()

    def pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return predicted pixels; for normalised patches, mean and deviation come from the true patch."""
        if not self.normalized:
            return pred
        mean, std = patch_statistics(patches)
        return pred * std + mean


class PcaTarget(nn.Module):
    """The first principal components of patches, with mean squared error.

    Args:
        values: values per patch, p²·C.
        components: number of predicted coefficients.
    """

    def __init__(self, values: int, *, components: int) -> None:
        super().__init__()
        self.outputs = components
        # Frozen parameters, like positions: saved and loaded with the weights, broadcast once, never trained.
        self.mean = nn.Parameter(torch.zeros(values), requires_grad=False)
        self.components = nn.Parameter(torch.zeros(components, values), requires_grad=False)

    @property
    def is_fitted(self) -> bool:
        """Whether the basis has been fitted."""
        return bool(self.components.any())

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> float:
        """Fit the basis to batches of patches, float32 `[n, N, p·p·C]`; return the share of variance that it keeps.

        Raises:
            InputError: there are too few patches, or all are equal.
        """
        count = 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        products = torch.zeros(len(total), len(total), dtype=torch.float64, device=total.device)
        for batch in batches:
            rows = batch.flatten(0, 1).double()
            count += len(rows)
            total += rows.sum(0)
            products += rows.T @ rows
        if count <= self.outputs:
            raise InputError(f"model.pca_components = {self.outputs} cannot be fitted to {count} patches")
        mean = total / count
        variances, vectors = torch.linalg.eigh(products / count - mean.outer(mean))  # ascending
        if not variances.sum() > 0:
            raise InputError(f"model.pca_components = {self.outputs} cannot be fitted to {count} patches all alike")
        components = vectors.T.flip(0)[: self.outputs]
        # The sign of an eigenvector is arbitrary, so its largest entry is made positive.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components.copy_(components * largest.sign())
        self.mean.copy_(mean)
        return float(variances.flip(0)[: self.outputs].sum() / variances.sum())

    def loss(self, pred: torch.Tensor, patches: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """Compare predicted coefficients, float32 `[B, P, k]`, with those of patches, `[B, P, p·p·C]` -> scalar."""
        return (pred - (patches - self.mean) @ self.components.T).square().mean()

    def pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return the patches of the predicted coefficients: `[B, P, k]` -> `[B, P, p·p·C]`."""
        return pred @ self.components + self.mean


class TokenTarget(nn.Module):
    """Tokens of patches, with cross-entropy. Tokens cannot be converted back to pixels.

    Args:
        vocabulary: number of different tokens.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.outputs = vocabulary

    def loss(self, pred: torch.Tensor, patches: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """Compare logits, float32 `[B, P, vocabulary]`, with the true tokens, int64 `[B, P]` -> scalar."""
        assert tokens is not None
        return functional.cross_entropy(pred.flatten(0, 1), tokens.flatten())


Target = PixelTarget | PcaTarget | TokenTarget


def build_target(config: ModelConfig, values: int) -> Target:
    """Build the target that a config names, for patches of p²·C values.

    Raises:
        InputError: more coefficients than values.
    """
    if config.target == "tokens":
        assert config.vocabulary is not None
        return TokenTarget(config.vocabulary)
    if config.target == "pca":
        if config.pca_components > values:
            raise InputError(f"model.pca_components = {config.pca_components}: a patch has {values} values")
        return PcaTarget(values, components=config.pca_components)
    return PixelTarget(values, normalized=config.target == "norm_pixel")
