"""The decoder: a light transformer over kept and mask tokens (He et al. 2021, section 3, "MAE decoder")."""

import torch
from timm.models.vision_transformer import Block
from torch import nn

from maekit.mae.masking import Masking, gather_tokens
from maekit.mae.positions import sincos_positions


class Decoder(nn.Module):
    """Predict the removed patches from the latent of the kept ones.

    Args:
        encoder_width: D, the width of the latent.
        width: width of the decoder.
        depth: number of blocks.
        heads: attention heads.
        grid: (rows, columns) of patches.
        prefix_tokens: class and register tokens in front of the latent.
        outputs: values predicted per patch.
        mask_tokens: whether the decoder adds mask tokens; if not, the encoder did, and its latent covers all patches.
    """

    def __init__(
        self,
        encoder_width: int,
        *,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        outputs: int,
        mask_tokens: bool = True,
    ) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_tokens else None
        # A frozen parameter, as in timm: saved and loaded with the weights, never trained.
        self.pos_embed = nn.Parameter(sincos_positions(width, grid, prefix_tokens=prefix_tokens), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, outputs)

    def forward(
        self, layers: list[torch.Tensor], masking: Masking, predicted: int, *, kept_too: bool = False
    ) -> torch.Tensor:
        """Add mask tokens for the removed patches to predict, decode, and predict these patches.

        Tokens are never put back into image order. Attention ignores their order and sees only their positions, so the
        removed patches stay one slice at the end.

        Args:
            layers: outputs of the encoder, the latent last: class and register tokens, then the kept patches (all
                patches if the encoder takes mask tokens), `[B, prefix + K, D]`.
            masking: which patches were kept and removed.
            predicted: P, the number of removed patches to predict: the first P of `masking.ids_masked`.
            kept_too: also predict the kept patches; they come first.

        Returns:
            `[B, (K +) P, outputs]`.
        """
        x = self.embed(layers[-1])  # [B, prefix + K, D] -> [B, prefix + K, width]
        ids = masking.ids
        if self.mask_token is not None:
            ids = ids[:, : masking.ids_keep.shape[1] + predicted]
            x = torch.cat([x, self.mask_token.to(x.dtype).expand(x.shape[0], predicted, -1)], dim=1)
        positions = self.pos_embed.expand(x.shape[0], -1, -1)
        before = self.prefix_tokens
        shuffled = torch.cat([positions[:, :before], gather_tokens(positions[:, before:], ids)], dim=1)
        x = self.blocks(x + shuffled)  # -> [B, prefix + K + P, width]
        last = before + masking.ids_keep.shape[1] + predicted
        first = before if kept_too else last - predicted
        return self.pred(self.norm(x[:, first:last]))  # -> [B, (K +) P, outputs]
