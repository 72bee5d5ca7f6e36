"""The module that becomes the ONNX graph: uint8 NHWC -> patches -> encoder -> pooling -> whitening -> L2 -> float32.

Written so that the exporter emits few, standard nodes, and the batch is the only dynamic dimension:

    tokens are the rows of one matrix, [B·T, D], so each linear layer is one Gemm, bias included;
    pixel scaling and normalisation are folded into the patch embedding (an fp16 graph keeps them separate, in fp32);
    class and register tokens are added together with the positions (no Expand, no Concat);
    query, key and value are three Gemms, so no Split is needed;
    attention is one `Attention` node on 3-D inputs (opset 23), or MatMul and Softmax for older runtimes.
"""

import copy
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn import functional as F

from maekit.config.export import OPSET_WITH_ATTENTION
from maekit.config.poolings import parts_of
from maekit.images import LUMA, Preprocess
from maekit.mae.pooling import check_pooling, pool_tokens
from maekit.system.errors import InputError
from maekit.vectors.whitening import Whitening


class EmbeddingModule(nn.Module):
    """Maps uint8 images to embeddings.

    Args:
        encoder: a timm VisionTransformer in evaluation mode; not modified.
        preprocess: gives mean and std; resizing stays outside the graph.
        pool: `avg`, the mean of the patch tokens after the final LayerNorm (without class and register tokens; timm's
            own `avg` pools before its norm); `cls`, the class token after the final LayerNorm; `std`, the standard
            deviation of the patch tokens; `avg2x2`, the mean of each quarter of the image, row by row; several of
            these joined by `+`, concatenated; or `tokens`, the patch tokens themselves, row by row. With layers as in
            `avg@8:pre` (maekit/config/poolings.py), the graph ends at the last one that is named.
        normalize: divide each embedding (or token) by its L2 norm.
        whitening: applied between pooling and L2 normalisation.
        half: compute the encoder in fp16; normalisation, pooling, whitening and L2 stay in fp32.
        opset: opset of the exported graph.

    Raises:
        InputError: the encoder has no class token to pool, or its architecture cannot be exported.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        preprocess: Preprocess,
        *,
        pool: str = "avg",
        normalize: bool = True,
        whitening: Whitening | None = None,
        half: bool = False,
        opset: int = OPSET_WITH_ATTENTION,
    ) -> None:
        super().__init__()
        check_exportable(encoder, pool)
        encoder = copy.deepcopy(encoder)
        self.pool, self.normalize, self.is_half = pool, normalize, half
        self.prefix: int = encoder.num_prefix_tokens
        self.width: int = encoder.embed_dim
        self.patch: int = encoder.patch_embed.patch_size[0]
        self.rows, self.columns = encoder.patch_embed.grid_size
        self.tokens: int = self.prefix + self.rows * self.columns
        self._set_patch_embedding(encoder, preprocess)
        self.table = nn.Buffer(_token_table(encoder))
        self.patch_norm, self.norm_pre = encoder.patch_embed.norm, encoder.norm_pre
        is_fused = opset >= OPSET_WITH_ATTENTION
        depth = len(encoder.blocks)
        self.taken = {part[1:]: part.layer or depth for part in parts_of(pool)}  # (layer, is normed) -> block
        blocks = list(encoder.blocks)[: max(self.taken.values())]
        self.blocks = nn.ModuleList(_in_rows(block, self.tokens, fused=is_fused) for block in blocks)
        self.norm, self.pooled_norm = encoder.norm, encoder.fc_norm
        self.quarters = nn.Buffer(_quarter_weights((self.rows, self.columns)))
        if half:
            for part in (self.embedding, self.patch_norm, self.norm_pre, self.blocks, self.norm):
                part.half()
            self.table = nn.Buffer(self.table.half())
        self.whitening: nn.Linear | None = None
        if whitening is not None:
            self.whitening = _linear(torch.from_numpy(whitening.matrix), torch.from_numpy(whitening.bias))

    def _set_patch_embedding(self, encoder: VisionTransformer, preprocess: Preprocess) -> None:
        """Turn the patch convolution into one linear layer over pixels in (row, column, channel) order."""
        projection = encoder.patch_embed.proj
        weight = projection.weight.detach().double()  # [D, C, p, p]
        bias = torch.zeros(self.width).double() if projection.bias is None else projection.bias.detach().double()
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
        if weight.shape[1] == 1:
            # One channel: the luma of the image, with the luma of mean and std. The luma sum is folded into the weight.
            luma = torch.tensor(LUMA, dtype=torch.float64).view(1, -1, 1, 1)
            weight = weight * luma
            mean, std = (v.mul(luma).sum().expand(1, 3, 1, 1) for v in (mean, std))
        scale, shift = 1 / (255 * std), mean / std  # pixel * scale - shift is the normalised pixel
        if self.is_half:
            pixels = (1, weight.shape[1], self.patch, self.patch)
            self.scale, self.shift = (nn.Buffer(_by_pixel(v.expand(pixels)).float()) for v in (scale, shift))
        else:
            bias = bias - (weight * shift).sum(dim=(1, 2, 3))
            weight = weight * scale
        self.embedding = _linear(_by_pixel(weight).float(), bias.float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings: uint8 `[B, H, W, C]` -> float32 `[B, D]`; for the pooling `tokens` `[B, N, D]`."""
        x = images.reshape(-1, self.rows, self.patch, self.columns, self.patch * 3)  # [B, H, W, C] -> by row of patches
        # PyTorch 2.11 would write a `reshape` of it as Shape, Mul and Concat.
        x = x.transpose(2, 3).contiguous()  # [B, rows, p, columns, p·C] -> [B, rows, columns, p, p·C]
        x = x.view(-1, self.embedding.in_features).float()  # -> [B·N, p·p·C]
        if self.is_half:
            x = (x * self.scale - self.shift).half()
        x = self.patch_norm(self.embedding(x)).view(-1, self.rows * self.columns, self.width)  # -> [B, N, D]
        # Zero rows are padded in front; adding the table turns them into the class and register tokens.
        x = F.pad(x, (0, 0, self.prefix, 0)) + self.table  # -> [B, T, D]
        x = self.norm_pre(x.reshape(-1, self.width))  # -> [B·T, D]
        outputs = {}
        for number, block in enumerate(self.blocks, 1):
            outputs[number] = x = block(x)
        tokens = {
            key: (self.norm(outputs[number]) if key[1] else outputs[number]).float().view(-1, self.tokens, self.width)
            for key, number in self.taken.items()
        }  # [B·T, D] -> [B, T, D]
        x = pool_tokens(
            tokens, self.pool, prefix=self.prefix, norm=self.pooled_norm, quarters=lambda rows: self.quarters @ rows
        )
        if self.whitening is not None:
            x = self.whitening(x)
        if self.normalize:
            # F.normalize would add Shape and Expand nodes.
            x = x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
        return x


def check_exportable(encoder: Any, pool: str) -> None:
    """Check that an encoder with this pooling can be exported as this graph.

    Raises:
        InputError: it cannot; gives the reason.
    """
    if type(encoder) is not VisionTransformer:
        raise InputError(f"a model of timm's class {type(encoder).__name__} is not known here; VisionTransformers are")
    embedding = encoder.patch_embed
    height, width = embedding.img_size or (0, 0)
    divides = height > 0 and not height % embedding.patch_size[0] and not width % embedding.patch_size[1]
    wanted = {
        "embeds its patches by more than one projection": type(embedding) is PatchEmbed,
        "takes other than one or three channels": embedding.proj.weight.shape[1] in (1, 3),
        "has patches that are not square": len(set(embedding.patch_size)) == 1,
        f"takes images of {height} x {width}, which its patches do not divide": divides,
        "drops patches": isinstance(encoder.patch_drop, nn.Identity),
    }
    for problem, fine in wanted.items():
        if not fine:
            raise InputError(f"this model {problem}")
    check_pooling(encoder, pool)


def _quarter_weights(grid: tuple[int, int]) -> torch.Tensor:
    """Return the weight of each patch in the mean of each quarter of a (rows, columns) grid: `[4, N]`."""
    halves = (
        torch.tensor([[float(line < (size + 1) // 2), float(line >= size // 2)] for line in range(size)]).T
        for size in grid
    )
    rows, columns = halves  # [2, rows], [2, columns]
    inside = torch.einsum("ar,bc->abrc", rows, columns).reshape(4, -1)  # -> [2, 2, rows, columns] -> [4, N]
    return inside / inside.sum(dim=1, keepdim=True)


def _by_pixel(weight: torch.Tensor) -> torch.Tensor:
    """Flatten patch weights in (row, column, channel) order: `[D, C, p, p]` -> `[D, p·p·C]`."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _token_table(encoder: VisionTransformer) -> torch.Tensor:
    """Return class and register tokens (with their positions) followed by the patch positions: `[1, T, D]`."""
    prefix = [token.detach() for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    table = torch.cat([*prefix, torch.zeros(1, encoder.patch_embed.num_patches, encoder.embed_dim)], dim=1)
    if encoder.pos_embed is not None:
        positions = encoder.pos_embed.detach()  # of all tokens, or of the patches alone
        table[:, -positions.shape[1] :] += positions
    return table


def _in_rows(block: Any, tokens: int, *, fused: bool) -> nn.Module:
    """Return a block that takes the tokens as rows of one matrix, `[B·T, D]`."""
    if type(block) in (Block, ResPostBlock) and type(block.attn) is Attention:
        block.attn = _RowAttention(block.attn, tokens, fused=fused)
        return block
    return _AsTimmWroteIt(block, tokens)


class _AsTimmWroteIt(nn.Module):
    """Any other kind of block, run on `[B, T, D]`; the exporter traces its attention as it is."""

    def __init__(self, block: nn.Module, tokens: int) -> None:
        super().__init__()
        self.block, self.tokens = block, tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.view(-1, self.tokens, x.shape[-1])).reshape(-1, x.shape[-1])


class _RowAttention(nn.Module):
    """timm's Attention on tokens as rows of one matrix, `[B·T, D]` -> `[B·T, D]`."""

    def __init__(self, attention: Any, tokens: int, *, fused: bool) -> None:
        super().__init__()
        self.tokens, self.fused = tokens, fused
        self.heads, self.scale, self.inner = attention.num_heads, attention.scale, attention.proj.in_features
        self.query, self.key, self.value = _thirds(attention.qkv)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.gate, self.proj = getattr(attention, "gate", None), attention.proj  # timm 1.0.20 has no gates

    def forward(self, x: torch.Tensor, **unused: Any) -> torch.Tensor:
        # [B·T, h·d] -> [B, T, h·d]
        q, k, v = (layer(x).view(-1, self.tokens, self.inner) for layer in (self.query, self.key, self.value))
        out = self._attend(self._normalised(self.q_norm, q), self._normalised(self.k_norm, k), v)
        out = self.norm(out.reshape(-1, self.inner))  # [B, T, h·d] -> [B·T, h·d]
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj(out)

    def _normalised(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Normalise each head by itself: `[B, T, h·d]` -> `[B, T, h·d]`."""
        return x if isinstance(norm, nn.Identity) else norm(self._heads(x)).view(-1, self.tokens, self.inner)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, self.tokens, self.heads, self.inner // self.heads)  # [B, T, h·d] -> [B, T, h, d]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.fused:
            heads = {"q_num_heads": self.heads, "kv_num_heads": self.heads}
            return torch.onnx.ops.attention(q, k, v, scale=self.scale, **heads)[0]
        q, k, v = (self._heads(x).transpose(1, 2) for x in (q, k, v))  # -> [B, h, T, d]
        weights = ((q * self.scale) @ k.transpose(2, 3)).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).reshape(-1, self.tokens, self.inner)


def _thirds(qkv: Any) -> list[nn.Linear]:
    """Split timm's fused qkv layer into three: query, key, value."""
    biases = [None] * 3 if qkv.bias is None else qkv.bias.chunk(3)
    return [_linear(*pair) for pair in zip(qkv.weight.chunk(3), biases, strict=True)]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
