"""The decoder: a light transformer over kept and mask tokens (He et al. 2021, section 3, "MAE decoder")."""

import torch
from timm.models.vision_transformer import Block
from torch import nn

from maekit.mae.masking import gather_tokens
from maekit.mae.positions import sincos_positions


class Decoder(nn.Module):
    """Predict every patch from the latent of the kept ones.

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

    def forward(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Put mask tokens where patches were removed, decode, and predict.

        Args:
            latent: class token, then the kept patches, `[B, 1 + K, D]`.
            ids_restore: int64 `[B, N]`, as `random_masking` gives it.

        Returns:
            `[B, N, outputs]`, in the order of the image.
        """
        x = self.embed(latent)  # [B, 1 + K, D] -> [B, 1 + K, width]
        removed = ids_restore.shape[1] + 1 - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], removed, -1)
        patches = gather_tokens(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)  # -> [B, N, width]
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.pred(x[:, 1:])  # [B, N, width] -> [B, N, outputs]
