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
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_BLOCK = re.compile(r"(.*)\.(weight|bias)")
_QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")
_ENCODER_BLOCK = re.compile(r"(?:vit\.)?encoder\.layer\.(\d+)\.(.*)")
_DECODER_BLOCK = re.compile(r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.*)")
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
        if match := _ENCODER_BLOCK.fullmatch(name):
            parts.encoder[f"blocks.{match[1]}.{_block_name(match[2])}"] = tensor
        elif match := _DECODER_BLOCK.fullmatch(name):
            parts.decoder[f"blocks.{match[1]}.{_block_name(match[2])}"] = tensor
        elif name.startswith("decoder."):
            parts.decoder[name.removeprefix("decoder.").removeprefix("decoder_")] = tensor
        else:
            bare = name.removeprefix("vit.")
            parts.encoder[_ENCODER_NAMES.get(bare, name)] = tensor
    return Parts(_join_qkv(parts.encoder), _join_qkv(parts.decoder))


def _block_name(name: str) -> str:
    if match := _QKV.fullmatch(name):
        return f"attn.{match[1]}.{match[2]}"
    match = _BLOCK.fullmatch(name)
    return f"{_BLOCK_NAMES.get(match[1], match[1])}.{match[2]}" if match else name


def _join_qkv(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenate query, key and value; if they have no biases, add a zero bias, which is equivalent."""
    joined = dict(weights)
    for name in weights:
        if not name.endswith("attn.query.weight"):
            continue
        block = name.removesuffix("query.weight")
        for kind in ("weight", "bias"):
            parts = [joined.get(f"{block}{part}.{kind}") for part in ("query", "key", "value")]
            there = [part for part in parts if part is not None]
            if len(there) == len(parts):
                joined[f"{block}qkv.{kind}"] = torch.cat(there)
                for part in ("query", "key", "value"):
                    del joined[f"{block}{part}.{kind}"]
            elif not there and kind == "bias":
                joined[f"{block}qkv.bias"] = torch.zeros(len(joined[f"{block}qkv.weight"]))
    return joined
