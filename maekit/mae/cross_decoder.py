"""A decoder of cross-attention alone: each prediction is read from the encoder by itself.

Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders" (CrossMAE), section 3. Mask tokens do not see each
other, so any part of them can be predicted, at its own cost. Each block reads its own mixture of all the encoder's
layers, with learned weights ("inter-block attention").
"""

import torch
from timm.layers.mlp import Mlp
from torch import nn
from torch.nn import functional

from maekit.mae.masking import Masking, gather_tokens
from maekit.mae.positions import sincos_positions


class CrossAttention(nn.Module):
    """Attention from queries of one width to a memory of another (Vaswani et al. 2017, section 3.2).

    Args:
        width: of the queries, and within.
        memory_width: of what is read.
        heads: divide `width`.
    """

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused_attn = True
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Read: `[B, P, width]`, `[B, T, memory_width]` -> `[B, P, width]`."""
        b, p, width = x.shape
        q = self.q(x).view(b, p, self.heads, -1).transpose(1, 2)  # -> [B, h, P, d]
        kv = self.kv(memory).view(b, memory.shape[1], 2, self.heads, -1)  # -> [B, T, 2, h, d]
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # -> 2 x [B, h, T, d]
        if self.fused_attn:
            read = functional.scaled_dot_product_attention(q, k, v)
        else:
            read = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(read.transpose(1, 2).reshape(b, p, width))  # [B, h, P, d] -> [B, P, width]


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.memory_norm = nn.LayerNorm(memory_width, eps=1e-6)
        self.attn = CrossAttention(width, memory_width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Read from the encoder: `[B, P, width]`, `[B, T, D]` -> `[B, P, width]`."""
        x = x + self.attn(self.norm1(x), self.memory_norm(memory))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """Predict removed patches, each by itself, from what the encoder made of the kept ones.

    Args:
        encoder_width: D of the encoder.
        encoder_depth: its number of blocks.
        width: the decoder's own.
        depth: blocks.
        heads: attention heads.
        grid: (rows, columns) of patches.
        outputs: values predicted per patch.
    """

    def __init__(
        self,
        encoder_width: int,
        encoder_depth: int,
        *,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        outputs: int,
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # A parameter, as timm keeps its own: saved and loaded with the rest, never trained.
        self.pos_embed = nn.Parameter(sincos_positions(width, grid, prefix_tokens=0), requires_grad=False)
        # Of each block, for what goes into the encoder's first block and comes out of each.
        self.layer_weights = nn.Parameter(torch.zeros(depth, encoder_depth + 1))
        self.blocks = nn.ModuleList(CrossBlock(width, encoder_width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, outputs)

    def forward(
        self, layers: list[torch.Tensor], masking: Masking, predicted: int, *, kept_too: bool = False
    ) -> torch.Tensor:
        """Predict removed patches.

        Args:
            layers: what goes into the encoder's first block and comes out of each, `[B, prefix + K, D]` each.
            masking: where patches were kept and removed.
            predicted: P, how many of the removed patches are predicted: the first of `masking.ids_masked`.
            kept_too: predict the kept patches as well, in front.

        Returns:
            `[B, (K +) P, outputs]`.
        """
        kept = masking.ids_keep.shape[1]
        ids = masking.ids[:, 0 if kept_too else kept : kept + predicted]
        x = self.mask_token + gather_tokens(self.pos_embed.expand(len(ids), -1, -1), ids)  # -> [B, P, width]
        stacked = torch.stack(layers)  # -> [layers, B, T, D]
        memories = (self.layer_weights @ stacked.flatten(1)).view(-1, *stacked.shape[1:])  # -> [depth, B, T, D]
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block(x, memory)
        return self.pred(self.norm(x))  # -> [B, (K +) P, outputs]
