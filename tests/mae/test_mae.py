import re

import numpy as np
import pytest
import timm
import torch
from support.errors import raises

from maekit.config import ModelConfig
from maekit.config.poolings import vectors_in
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder, initialize_encoder
from maekit.mae.encoder import build_encoder, encode
from maekit.mae.mask_shapes import kept_patches
from maekit.mae.masking import gather_tokens, random_masking
from maekit.mae.pooling import pooled
from maekit.mae.positions import sincos_positions
from maekit.mae.targets import normalize_patches, patchify, unpatchify
from maekit.system.errors import InputError

TINY = {"width": 48, "depth": 2, "heads": 3, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}


def tiny(**changes) -> MaskedAutoencoder:
    sizes = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, **TINY, **changes}
    return build_autoencoder(ModelConfig(**sizes), seed=0)


def in_transformers_names(model: MaskedAutoencoder, take) -> dict[str, torch.Tensor]:
    """Return something of each parameter of ours (itself, its gradient) under the name of transformers' ViTMAE."""
    encoder, decoder = model.encoder, model.decoder
    named = {
        "vit.embeddings.cls_token": encoder.cls_token,
        "vit.embeddings.position_embeddings": encoder.pos_embed,
        "vit.embeddings.patch_embeddings.projection.weight": encoder.patch_embed.proj.weight,
        "vit.embeddings.patch_embeddings.projection.bias": encoder.patch_embed.proj.bias,
        "vit.layernorm.weight": encoder.norm.weight,
        "vit.layernorm.bias": encoder.norm.bias,
        "decoder.mask_token": decoder.mask_token,
        "decoder.decoder_pos_embed": decoder.pos_embed,
        "decoder.decoder_embed.weight": decoder.embed.weight,
        "decoder.decoder_embed.bias": decoder.embed.bias,
        "decoder.decoder_norm.weight": decoder.norm.weight,
        "decoder.decoder_norm.bias": decoder.norm.bias,
        "decoder.decoder_pred.weight": decoder.pred.weight,
        "decoder.decoder_pred.bias": decoder.pred.bias,
    }
    taken = {name: take(parameter) for name, parameter in named.items()}
    for prefix, blocks in (("vit.layers", encoder.blocks), ("decoder.decoder_layers", decoder.blocks)):
        for i, block in enumerate(blocks):
            for kind in ("weight", "bias"):
                for ours, parts in (
                    (getattr(block.attn.qkv, kind), ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
                    (getattr(block.attn.proj, kind), ("attention.o_proj",)),
                    (getattr(block.mlp.fc1, kind), ("mlp.fc1",)),
                    (getattr(block.mlp.fc2, kind), ("mlp.fc2",)),
                    (getattr(block.norm1, kind), ("layernorm_before",)),
                    (getattr(block.norm2, kind), ("layernorm_after",)),
                ):
                    for part, value in zip(parts, take(ours).chunk(len(parts)), strict=True):
                        taken[f"{prefix}.{i}.{part}.{kind}"] = value
    return taken


def to_transformers(model: MaskedAutoencoder):
    """Return transformers' ViTMAE with our weights: the oracle.

    Built from a config it would train with all-zero positions (a bug of that library), so ours are loaded too.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder, decoder = model.encoder, model.decoder
    width = encoder.embed_dim
    oracle = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=width,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=encoder.blocks[0].attn.num_heads,
            intermediate_size=4 * width,
            image_size=encoder.patch_embed.img_size[0],
            patch_size=model.patch_size,
            decoder_hidden_size=decoder.embed.out_features,
            decoder_num_hidden_layers=len(decoder.blocks),
            decoder_num_attention_heads=decoder.blocks[0].attn.num_heads,
            decoder_intermediate_size=4 * decoder.embed.out_features,
            mask_ratio=model.mask_ratio,
            norm_pix_loss=model.target.normalized,
            layer_norm_eps=1e-6,
        )
    )
    weights = in_transformers_names(model, lambda parameter: parameter.detach())
    names = set(oracle.state_dict())
    assert set(weights) == names, (sorted(set(weights) - names)[:4], sorted(names - set(weights))[:14])
    oracle.load_state_dict(weights)
    return oracle.eval()


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_equals_transformers_vitmae(target: str, ratio: float) -> None:
    """Loss, latents, predictions and all gradients equal an independent implementation, with its weights and noise."""
    model = tiny(target=target, mask_ratio=ratio, image_size=48)
    # At initialisation LayerNorms and biases are trivial; disturb them so that each one counts.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    images = torch.randn(3, 3, 48, 48, generator=generator)
    noise = torch.rand(3, 36, generator=generator)
    oracle = to_transformers(model)
    expected = oracle(images, noise=noise)
    got = model(images, noise)
    ids_keep, ids_masked = masking = random_masking(noise, ratio)
    latent = encode(model.encoder, gather_tokens(patchify(images, model.patch_size), ids_keep), ids_keep)
    expected_latent = oracle.vit(images, noise=noise).last_hidden_state
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(latent, expected_latent, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.pred, gather_tokens(expected.logits, ids_masked), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masking.mask, expected.mask)
    got.loss.backward()
    expected.loss.backward()
    theirs = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    ours = in_transformers_names(model, lambda p: torch.full_like(p, torch.nan) if p.grad is None else p.grad)
    assert {name for name, gradient in ours.items() if not gradient.isnan().any()} == set(theirs)
    for name, gradient in theirs.items():
        # A bias of the keys moves all scores of a query alike, so that its gradient is 0 but for rounding.
        atol = 1e-8 + 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=atol)


def test_encoding_all_patches_equals_timm() -> None:
    encoder = tiny().encoder.eval()
    images = torch.randn(2, 3, 32, 32)
    latent = encode(encoder, patchify(images, 8), torch.arange(16).expand(2, -1))
    torch.testing.assert_close(latent, encoder.forward_features(images), rtol=1e-5, atol=1e-5)


def test_positions_by_hand() -> None:
    """First half column, second half row; sin before cos; zeros for the class token."""
    positions = sincos_positions(8, (2, 3), prefix_tokens=1)[0]
    assert positions.shape == (7, 8)
    assert not positions[0].any()
    row, column = 1, 2
    expected = []
    for place in (column, row):
        expected += [np.sin(place), np.sin(place / 100), np.cos(place), np.cos(place / 100)]
    np.testing.assert_allclose(positions[1 + row * 3 + column], expected, rtol=1e-6)


def test_masking_keeps_the_published_number() -> None:
    assert kept_patches(196, 0.75) == 49
    masking = random_masking(torch.rand(5, 196), 0.75)
    assert masking.ids_keep.shape == (5, 49)
    assert (masking.mask.sum(1) == 147).all()
    assert (masking.mask.gather(1, masking.ids_keep) == 0).all()


def test_patchify_order_and_inverse() -> None:
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    # patch (row 1, column 2), pixel (3, 1), channel 2
    assert patches[1, 1 * 3 + 2, (3 * 4 + 1) * 3 + 2] == images[1, 2, 4 + 3, 8 + 1]
    torch.testing.assert_close(unpatchify(patches, 4, (2, 3)), images)


def test_norm_pixel_by_hand() -> None:
    patches = torch.randn(2, 3, 48)
    expected = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(normalize_patches(patches), expected)


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
def test_loss_is_that_of_the_paper(target: str) -> None:
    """Σ(loss · mask) / Σ mask over the whole image; what is predicted for kept patches does not count."""
    model = tiny(target=target)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    loss, pred, _, masking = model(images, noise)
    patches = patchify(images, 8)
    target = normalize_patches(patches) if target == "norm_pixel" else patches
    everywhere = torch.full_like(target, 1e3).scatter(1, masking.ids_masked.unsqueeze(-1).expand_as(pred), pred)
    per_patch = (everywhere - target).square().mean(-1)
    torch.testing.assert_close(loss, (per_patch * masking.mask).sum() / masking.mask.sum())


def test_no_gradient_from_a_removed_patch_through_the_encoder() -> None:
    model = tiny()
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    noise = torch.rand(1, 16)
    masking = random_masking(noise, 0.75)
    encode(model.encoder, gather_tokens(patchify(images, 8), masking.ids_keep), masking.ids_keep).sum().backward()
    touched = patchify(images.grad, 8).abs().sum(-1) > 0
    assert torch.equal(touched, masking.mask == 0)


def test_initialisation_follows_the_formulas() -> None:
    """Xavier-uniform over the fused qkv matrix and the flattened patch convolution; zero biases; N(0, .02) tokens."""
    model = build_autoencoder(ModelConfig(name="vit_small_patch16_224", image_size=32), seed=0)
    qkv = model.encoder.blocks[0].attn.qkv
    bound = (6 / (384 + 3 * 384)) ** 0.5
    assert qkv.weight.abs().max() <= bound
    assert qkv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    bound = (6 / (384 + 768)) ** 0.5
    projection = model.encoder.patch_embed.proj
    assert projection.weight.abs().max() <= bound
    assert projection.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not projection.bias.any()
    assert not qkv.bias.any()
    assert model.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(module.eps == 1e-6 for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    again = build_autoencoder(ModelConfig(name="vit_small_patch16_224", image_size=32), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "encoder", "whole"),
    [
        ("vit_small_patch16_224", 21.7, None),
        ("vit_base_patch16_224", 85.8, 111.9),
        ("vit_large_patch16_224", 303.3, 329.5),
        ("vit_huge_patch14_224", 630.8, 657.1),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, encoder: float, whole: float | None) -> None:
    """In millions, of S, B, L and H; with frozen positions. Nothing is computed: the weights are on no device."""
    with torch.device("meta"):
        model = build_autoencoder(ModelConfig(name=name), seed=0)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model)]
    assert round(counts[0], 1) == encoder
    assert whole is None or round(counts[1], 1) == whole


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_every_group_of_parameters_is_initialised_by_its_formula(decoder: str) -> None:
    """Standard deviation and mean of each: xavier-uniform √(2 / (in + out)), tokens .02, norms 1, biases 0."""
    model = tiny(width=192, decoder_width=128, decoder=decoder, positions="learned", mask_ratio=0.5)
    for name, p in model.named_parameters():
        if name == "decoder.pos_embed":
            continue
        if name == "decoder.layer_weights":
            std = (1 / p.shape[1]) ** 0.5
        elif name.endswith(("_token", "pos_embed")):
            std = 0.02
        elif p.ndim >= 2:
            std = (2 / (p.shape[0] + p[0].numel())) ** 0.5
        else:
            expected = 1.0 if name.endswith("norm.weight") or re.search(r"norm\d?\.weight", name) else 0.0
            assert (p == expected).all(), name
            continue
        count = p.numel()
        assert p.std().item() == pytest.approx(std, rel=4 / count**0.5), name
        assert p.mean().item() == pytest.approx(0, abs=4 * std / count**0.5), name


def test_positions_are_frozen_and_weights_load_into_timm() -> None:
    model = tiny()
    assert not model.encoder.pos_embed.requires_grad
    assert not model.decoder.pos_embed.requires_grad
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0
    )
    plain.load_state_dict(model.encoder.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "vit_bas_patch16_224"}, "did you mean vit_base_patch16_224"),
        ({"name": "vit_tiny_patch16_224", "image_size": 100}, "100"),
        ({"name": "vit_base_patch16_siglip_224"}, "--no-class-token"),
        ({"name": "vit_base_patch16_rope_224"}, "is no plain VisionTransformer"),
        ({"name": "vit_tiny_patch16_224", "width": 50, "heads": 5}, "multiple of 4"),
    ],
)
def test_impossible_models_are_refused(changes: dict, said: str) -> None:
    with raises(InputError, match=said):
        build_encoder(ModelConfig(**changes))


def test_parts_of_a_pooling_stand_one_after_the_other() -> None:
    encoder = tiny().encoder
    tokens = torch.randn(3, 1 + 16, 48)
    parts = [pooled(encoder, {(None, True): tokens}, part) for part in ("std", "cls", "avg2x2", "avg")]
    assert [part.shape[1] for part in parts] == [48, 48, 192, 48]
    torch.testing.assert_close(pooled(encoder, {(None, True): tokens}, "std+cls+avg2x2+avg"), torch.cat(parts, 1))
    assert vectors_in("std+cls+avg2x2+avg") == 7
    torch.testing.assert_close(parts[0], tokens[:, 1:].std(dim=1, correction=0))
    torch.testing.assert_close(parts[1], tokens[:, 0])
    torch.testing.assert_close(parts[2][:, :48], tokens[:, [1, 2, 5, 6]].mean(1))  # rows 0 and 1, columns 0 and 1
    torch.testing.assert_close(parts[3], tokens[:, 1:].mean(1))


def test_equal_patches_have_a_gradient() -> None:
    """A blank image must not make the deviation's root infinitely steep."""
    tokens = torch.ones(1, 17, 48, requires_grad=True)
    pooled(tiny().encoder, {(None, True): tokens}, "avg+std").sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_layer_scale_is_initialised_anew() -> None:
    """Or what is called untrained would keep a part of what was trained."""
    encoder = timm.create_model("vit_tiny_patch16_224", init_values=0.25, num_classes=0, depth=1)
    encoder.blocks[0].ls2.gamma.data.fill_(7)
    initialize_encoder(encoder, seed=0)
    assert encoder.blocks[0].ls2.gamma.unique().tolist() == [0.25]
