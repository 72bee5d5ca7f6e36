"""The decoder: a light transformer over kept and mask tokens (He et al. 2021, section 3, "MAE decoder")."""

import torch
from timm.models.vision_transformer import Block
from torch import nn

from maekit.mae.masking import Masking, gather_tokens
from maekit.mae.positions import sincos_positions


class Decoder(nn.Module):
    """Predict the removed patches from the latent of the kept ones.

    Args:
        encoder_width: D of the latent.
        width: the decoder's own.
        depth: blocks.
        heads: attention heads.
        grid: (rows, columns) of patches.
        outputs: values predicted per patch.
    """

    def __init__(
        self, encoder_width: int, *, width: int, depth: int, heads: int, grid: tuple[int, int], outputs: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # A parameter, as timm keeps its own: saved and loaded with the rest, never trained.
        self.pos_embed = nn.Parameter(sincos_positions(width, grid, class_token=True), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, outputs)

    def forward(self, latent: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Add mask tokens for the removed patches, decode, and predict those.

        The row is never put back into the order of the image: attention does not see the order of tokens, only their
        positions, and so what was removed stays one slice at the end.

        Args:
            latent: class token, then the kept patches, `[B, 1 + K, D]`.
            masking: where patches were kept and removed.

        Returns:
            the removed patches in the order of `masking.ids_masked`, `[B, N - K, outputs]`.
        """
        x = self.embed(latent)  # [B, 1 + K, D] -> [B, 1 + K, width]
        kept = masking.ids_keep.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masking.ids_masked.shape[1], -1)
        positions = self.pos_embed.expand(x.shape[0], -1, -1)
        order = torch.cat([masking.ids_keep, masking.ids_masked], dim=1)
        shuffled = torch.cat([positions[:, :1], gather_tokens(positions[:, 1:], order)], dim=1)
        x = torch.cat([x, mask_tokens], dim=1) + shuffled  # -> [B, 1 + N, width]
        x = self.blocks(x)[:, 1 + kept :]  # -> [B, N - K, width]
        return self.pred(self.norm(x))  # -> [B, N - K, outputs]
