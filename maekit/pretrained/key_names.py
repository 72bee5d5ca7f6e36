"""Renames the weights of other implementations: timm's names for the encoder, maekit's for the decoder.

Two sources are known: the reference implementation of He et al. 2021 (its encoder has timm's names already) and
transformers' ViTMAE, with the names of its releases 4 and 5. This module handles names only; tensor shapes are checked
on loading. A name without a rule is kept, so that loading reports it.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

Weights = Mapping[str, torch.Tensor]

# He et al.: decoder_blocks.N.…, and mask_token without a prefix.
_REFERENCE_DECODER = re.compile(r"decoder_(embed\.|pos_embed$|blocks\.|norm\.|pred\.)|(?=mask_token$)")
_BLOCK_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_BLOCK = re.compile(r"(?:(?:vit\.)?encoder\.layer|decoder\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.*)")
_ENCODER_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


class Parts(NamedTuple):
    """The two halves of a masked autoencoder.

    Attributes:
        encoder: weights under timm's names.
        decoder: weights under the names of `maekit.mae.decoder.Decoder`; empty without a decoder.
    """

    encoder: dict[str, torch.Tensor]
    decoder: dict[str, torch.Tensor]


def from_reference(weights: Weights) -> Parts:
    """Split the weights of the reference implementation; a plain timm encoder's weights pass unchanged."""
    parts = Parts({}, {})
    for name, tensor in weights.items():
        if match := _REFERENCE_DECODER.match(name):
            parts.decoder[name.removeprefix("decoder_") if match[1] else name] = tensor
        else:
            parts.encoder[name] = tensor
    return parts


def from_transformers(weights: Weights) -> Parts:
    """Rename the weights of transformers' ViTMAEModel or ViTMAEForPreTraining, and join query, key and value."""
    parts = Parts({}, {})
    for name, tensor in weights.items():
        is_decoder = name.startswith("decoder.")
        if match := _BLOCK.fullmatch(name):
            ours = f"blocks.{match[1]}.{_block_name(match[2])}"
        elif is_decoder:
            ours = name.removeprefix("decoder.").removeprefix("decoder_")
        else:
            ours = _ENCODER_NAMES.get(name.removeprefix("vit."), name)
        (parts.decoder if is_decoder else parts.encoder)[ours] = tensor
    return Parts(_join_qkv(parts.encoder), _join_qkv(parts.decoder))


def _block_name(name: str) -> str:
    layer, dot, kind = name.rpartition(".")
    return f"{_BLOCK_NAMES.get(layer, layer)}{dot}{kind}"


def _join_qkv(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenate query, key and value; if they have no biases, add a zero bias, which is equivalent."""
    joined = dict(weights)
    for attention in [name.removesuffix("query.weight") for name in weights if name.endswith("attn.query.weight")]:
        for kind in ("weight", "bias"):
            names = [f"{attention}{part}.{kind}" for part in ("query", "key", "value")]
            if all(name in joined for name in names):
                joined[f"{attention}qkv.{kind}"] = torch.cat([joined.pop(name) for name in names])
            elif f"{attention}qkv.weight" in joined and not any(name in joined for name in names):
                joined[f"{attention}qkv.bias"] = torch.zeros(len(joined[f"{attention}qkv.weight"]))
    return joined
