"""The module that becomes the ONNX graph: uint8 NHWC -> scale, normalise -> encoder -> pooling -> L2 -> float32.

Written so that the exporter emits few and standard nodes, with the batch as the only dynamic size: one `Attention` node
per block on 3-D inputs (opset 23), the class token folded into the position sum (no Expand), no Shape.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from maekit.images import Preprocess

POOLINGS = ("avg", "cls")


class EmbeddingModule(nn.Module):
    """Images as bytes in, embeddings out.

    Args:
        encoder: a timm VisionTransformer with a class token, in evaluation mode.
        preprocess: gives mean and std; resizing stays outside of the graph.
        pool: `avg`, the mean of the patch tokens after the final LayerNorm (the class token left out; timm's own `avg`
            pools before its norm), or `cls`, the class token after it.
        normalize: divide each embedding by its L2 norm.
    """

    def __init__(self, encoder: VisionTransformer, preprocess: Preprocess, *, pool: str, normalize: bool) -> None:
        super().__init__()
        self.projection = encoder.patch_embed.proj
        self.width: int = encoder.embed_dim
        self.patches: int = encoder.patch_embed.num_patches
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (preprocess.mean, preprocess.std))
        assert encoder.pos_embed is not None
        assert encoder.cls_token is not None
        positions = encoder.pos_embed.detach().clone()
        positions[:, :1] += encoder.cls_token.detach()
        self.scale = nn.Buffer((1 / (255 * std)).float())
        self.shift = nn.Buffer((mean / std).float())
        self.positions = nn.Buffer(positions)
        self.blocks: Any = nn.ModuleList(encoder.blocks)
        self.norm = encoder.norm
        self.pool, self.normalize = pool, normalize

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings: uint8 `[B, H, W, C]` -> float32 `[B, D]`."""
        x = images.float() * self.scale - self.shift
        x = self.projection(x.permute(0, 3, 1, 2))  # [B, H, W, C] -> [B, D, rows, columns]
        x = x.flatten(2).transpose(1, 2)  # -> [B, N, D]
        # A row of zeros in front becomes the class token when the positions are added.
        x = F.pad(x, (0, 0, 1, 0)) + self.positions  # -> [B, 1 + N, D]
        for block in self.blocks:
            x = x + block.ls1(_attention(block.attn, block.norm1(x)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = self.norm(x)
        x = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(dim=1)  # [B, 1 + N, D] -> [B, D]
        if self.normalize:
            # F.normalize would bring Shape and Expand back.
            x = x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
        return x


def _attention(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """Run a timm Attention through the standard ONNX operator: `[B, N, D]` -> `[B, N, D]`."""
    if not isinstance(attention.q_norm, nn.Identity) or getattr(attention, "gate", None) is not None:
        return attention(x)
    heads = attention.num_heads
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    x, *_ = torch.onnx.ops.attention(q, k, v, q_num_heads=heads, kv_num_heads=heads, scale=attention.scale)
    return attention.proj(attention.norm(x))


@torch.no_grad()
def reference_embeddings(
    encoder: VisionTransformer, preprocess: Preprocess, images: torch.Tensor, *, pool: str, normalize: bool
) -> torch.Tensor:
    """Return what the graph must give, by timm's own forward pass: uint8 `[B, H, W, C]` -> float32 `[B, D]`."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
    tokens = encoder.forward_features((images.permute(0, 3, 1, 2).float() / 255 - mean) / std)
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
    return F.normalize(pooled, dim=-1) if normalize else pooled
