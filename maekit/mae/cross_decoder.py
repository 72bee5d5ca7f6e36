"""A decoder with cross-attention only: each mask token reads from the encoder independently of the others.

Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders" (CrossMAE), section 3. Mask tokens do not attend
to each other, so any subset can be predicted, at a cost proportional to its size. Each block reads its own learned
mixture of all encoder layers ("inter-block attention").
"""

import torch
from timm.layers.mlp import Mlp
from torch import nn
from torch.nn import functional

from maekit.mae.masking import Masking, gather_tokens
from maekit.mae.positions import sincos_positions


class CrossAttention(nn.Module):
    """Attention from queries of one width to a memory of another width (Vaswani et al. 2017, section 3.2).

    Args:
        width: width of the queries, keys and values.
        memory_width: width of the memory.
        heads: number of heads; must divide `width`.
    """

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused_attn = True
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Attend to the memory: `[B, P, width]`, `[B, T, memory_width]` -> `[B, P, width]`."""
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
    """Cross-attention and MLP, each with a LayerNorm before it and a residual connection."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.memory_norm = nn.LayerNorm(memory_width, eps=1e-6)
        self.attn = CrossAttention(width, memory_width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Attend to the encoder's tokens: `[B, P, width]`, `[B, T, D]` -> `[B, P, width]`."""
        x = x + self.attn(self.norm1(x), self.memory_norm(memory))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """Predict each removed patch independently from the encoder's layers.

    Args:
        encoder_width: D, the width of the encoder.
        encoder_depth: number of blocks of the encoder.
        width: width of the decoder.
        depth: number of blocks.
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
        # A frozen parameter, as in timm: saved and loaded with the weights, never trained.
        self.pos_embed = nn.Parameter(sincos_positions(width, grid, prefix_tokens=0), requires_grad=False)
        # One row per decoder block: weights of the encoder's first input and of each encoder block's output.
        self.layer_weights = nn.Parameter(torch.zeros(depth, encoder_depth + 1))
        self.blocks = nn.ModuleList(CrossBlock(width, encoder_width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, outputs)

    def forward(
        self, layers: list[torch.Tensor], masking: Masking, predicted: int, *, kept_too: bool = False
    ) -> torch.Tensor:
        """Predict removed patches.

        Args:
            layers: input of the encoder's first block and output of each block, `[B, prefix + K, D]` each.
            masking: which patches were kept and removed.
            predicted: P, the number of removed patches to predict: the first P of `masking.ids_masked`.
            kept_too: also predict the kept patches; they come first.

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
