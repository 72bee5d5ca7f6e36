"""An encoder with a linear head; all or only the last blocks are trained (He et al. 2021, appendix A, section 5)."""

from types import SimpleNamespace
from typing import Any

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import param_groups_layer_decay
from timm.optim.lars import Lars
from torch import nn
from torch.nn import functional

from maekit.config.finetune import ClassifierConfig, MixConfig, SupervisedOptimizer
from maekit.config.poolings import vectors_in
from maekit.mae.normalize import Normalizer
from maekit.mae.pooling import pooled, tokens_by_layer
from maekit.system.errors import InputError
from maekit.training.crops import Chunk
from maekit.training.step import Objective

_BATCH_NORM_EPS = 1e-6
_HEAD_STD, _PROBE_STD = 2e-5, 0.01


class Classifier(nn.Module):
    """Maps images to logits.

    Args:
        encoder: a timm VisionTransformer.
        classes: number of classes.
        config: its `pool` is the pooling, as in `maekit.mae.pooling`, applied after the final norm, as in the export;
            `batch_norm` normalises the pooled features with a BatchNorm without affine parameters (for linear probing,
            He et al. 2021, appendix A.1); `blocks` is the number of last blocks to train, with the final norm: 0.5
            trains the MLP of the last block, 0 nothing, None everything.
        seed: seed of the head.
    """

    def __init__(self, encoder: VisionTransformer, classes: int, config: ClassifierConfig, *, seed: int) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, config.pool
        dim = encoder.embed_dim * vectors_in(config.pool)
        self.norm = nn.BatchNorm1d(dim, eps=_BATCH_NORM_EPS, affine=False) if config.batch_norm else nn.Identity()
        self.head = nn.Linear(dim, classes)
        std, generator = _PROBE_STD if config.batch_norm else _HEAD_STD, torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self.head.weight, std=std, generator=generator)
        nn.init.zeros_(self.head.bias)
        freeze(encoder, config.blocks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify normalised images: float32 `[B, C, H, W]` -> float32 `[B, classes]`."""
        features = pooled(self.encoder, tokens_by_layer(self.encoder, images, [self.pool]), self.pool)
        return self.head(self.norm(features)).float()


def freeze(encoder: VisionTransformer, blocks: float | None) -> None:
    """Train only the last blocks of an encoder; see `Classifier`. Frozen branches lose their stochastic depth.

    Raises:
        InputError: the encoder has fewer blocks.
    """
    encoder.requires_grad_(blocks is None)
    if blocks is None:
        return
    depth = len(encoder.blocks)
    if blocks > depth:
        raise InputError(f"`blocks` {blocks:g}: this model has {depth}")
    last: Any = encoder.blocks[-1]
    trained = [last.norm2, last.mlp, last.ls2] if blocks == 0.5 else encoder.blocks[depth - int(blocks) :]
    if blocks:
        trained = [*trained, encoder.norm, encoder.fc_norm]
    for module in trained:
        module.requires_grad_(True)
    for block in encoder.blocks:
        for branch, drop_path in (("attn", "drop_path1"), ("mlp", "drop_path2")):
            if _is_frozen(getattr(block, branch)):
                setattr(block, drop_path, nn.Identity())


def _is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a module is trained."""
    return not any(p.requires_grad for p in module.parameters())


class ClassifierObjective(Objective):
    """Cross-entropy with soft targets.

    Args:
        classifier: images -> logits.
    """

    model: Classifier

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier

    def train(self, mode: bool = True) -> "ClassifierObjective":
        """Set the mode; frozen blocks stay in evaluation mode."""
        super().train(mode)
        for block in self.model.encoder.blocks:
            if _is_frozen(block):
                block.eval()
        return self

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss for normalised images, float32 `[B, C, H, W]`, and soft targets `[B, classes]`."""
        return torch.sum(-targets * functional.log_softmax(self.model(images), dim=-1), dim=-1).mean()

    def example(self, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Return arguments of `forward` for `count` images of (height, width) pixels."""
        encoder, device = self.model.encoder, next(self.parameters()).device
        images = torch.zeros(count, encoder.patch_embed.proj.weight.shape[1], *size, device=device)
        classes = self.model.head.out_features
        return images, torch.full((count, classes), 1 / classes, device=device)


class LabelledUpload:
    """From chunks on the host to normalised, mixed images and soft targets on the device.

    Mirrors, erases and mixes (timm's RandomErasing and Mixup). Their random numbers come from the global generators of
    torch, NumPy and Python, which each step seeds.

    Args:
        normalizer: normalises the images.
        device: device of the model.
        classes: number of classes.
        mix: strengths of erasing, mixing and label smoothing.
    """

    def __init__(self, normalizer: Normalizer, device: torch.device, classes: int, mix: MixConfig) -> None:
        self._normalizer, self._device = normalizer, device
        self._classes, self._smoothing = classes, mix.label_smoothing
        self._mixup = self._erasing = None
        if mix.mixup or mix.cutmix:
            self._mixup = Mixup(mix.mixup, mix.cutmix, label_smoothing=mix.label_smoothing, num_classes=classes)
        if mix.erase:
            self._erasing = RandomErasing(mix.erase, mode="pixel", max_count=1, device=str(device))

    def __call__(self, chunks: list[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images, float32 `[B, C, H, W]`, and soft targets, float32 `[B, classes]`."""

        def together(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([tensor.to(self._device, non_blocking=True) for tensor in tensors])

        images = together([chunk.images for chunk in chunks])
        flips = together([chunk.flips for chunk in chunks])
        labels = together([chunk.labels for chunk in chunks if chunk.labels is not None])
        x = self._normalizer(torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images))
        if self._erasing is not None:
            x = self._erasing(x)
        if self._mixup is not None:
            return self._mixup(x, labels)
        return x, mixup_target(labels, self._classes, smoothing=self._smoothing)


def make_optimizer(classifier: Classifier, config: SupervisedOptimizer) -> torch.optim.Optimizer:
    """Return AdamW with layer-wise learning-rate decay (timm's groups), or LARS.

    Args:
        classifier: the model; parameters that require a gradient are trained.
        config: see `SupervisedOptimizer`.
    """
    encoder, decay = classifier.encoder, config.weight_decay
    optimizer: torch.optim.Optimizer
    if config.kind == "lars":
        trained = [p for p in classifier.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            # Weights are scaled by the trust ratio, with or without weight decay; biases never are (You et al. 2017).
            {"params": [p for p in trained if p.ndim > 1], "always_adapt": True},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = _Lars(groups, lr=0.0, momentum=config.momentum, weight_decay=decay)
    else:
        # What timm's grouping reads of a model: the parameters by timm's names, and which layers these belong to. Names
        # that the encoder's matcher does not know, those of the head, belong to the last layer.
        named = [(name.removeprefix("encoder."), p) for name, p in classifier.named_parameters()]
        layers: Any = SimpleNamespace(named_parameters=lambda: named, group_matcher=encoder.group_matcher)
        groups = param_groups_layer_decay(layers, decay, encoder.no_weight_decay(), layer_decay=config.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
    names = {p: name for name, p in classifier.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[p] for p in group["params"]]
    return optimizer


class _Lars(Lars):
    """timm's LARS that skips a step with a non-finite gradient; the check waits for the device."""

    found_inf: torch.Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        return None if self.found_inf is not None and bool(self.found_inf) else super().step(closure)
