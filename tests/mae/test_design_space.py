"""Every encoder, decoder and target, each against something that was written independently of it."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support.design_space import PATCHES, brightness_tokenizer, build
from support.errors import raises
from torch.nn import functional

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.images import CROP_DRAWS
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.encoder import encode
from maekit.mae.masking import gather_tokens, random_masking
from maekit.mae.normalize import Normalizer
from maekit.mae.targets import PcaTarget, TokenTarget, patchify
from maekit.pretraining.tokenizer import Tokenizer
from maekit.system.errors import InputError
from maekit.training.crops import Augmentation, jitter_colors


def inputs(images: int = 3, masks: int = 1, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(images, channels, 32, 48, generator=generator),
        torch.rand(images * masks, PATCHES, generator=generator),
    )


# ---- encoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False},
        {"positions": "learned"},
        {"channels": 1},
        {"name": "vit_small_patch14_reg4_dinov2"},
        {"name": "vit_base_patch16_clip_224"},
        {"name": "vit_base_patch16_siglip_224", "class_token": False},
        {"name": "vit_base_patch16_gap_224", "class_token": True},
        {"name": "vit_base_patch16_rpn_224", "class_token": False},
        {"name": "vit_small_patch16_18x2_224"},
        {"name": "vit_base_patch16_xp_224"},
    ],
    ids=str,
)
def test_all_patches_in_order_equal_timm(changes: dict) -> None:
    """A mask of nothing: every kind of encoder gives what timm's own forward pass gives."""
    encoder = build(**changes).encoder.eval()
    images, _ = inputs(channels=changes.get("channels", 3))
    latent = encode(encoder, patchify(images, 8), torch.arange(PATCHES).expand(3, -1))
    torch.testing.assert_close(latent, encoder.forward_features(images), rtol=1e-5, atol=1e-5)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(3)).expand(3, -1)
    mixed = encode(encoder, gather_tokens(patchify(images, 8), order), order)
    prefix = encoder.num_prefix_tokens
    torch.testing.assert_close(mixed[:, prefix:], gather_tokens(latent[:, prefix:], order), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "vit_base_patch16_siglip_224"}, "pools by attention .*--no-class-token"),
        ({"name": "vit_base_patch16_rpn_224"}, "has no norm before its pooling .*--class-token"),
        ({"name": "vit_base_patch16_rope_224"}, "is no plain VisionTransformer"),
        ({"name": "vit_base_r26_s32_224", "patch_size": None}, "more than one projection"),
        ({"image_size": (32, 44)}, "model.image_size = 44 is not a multiple of the patch size 8"),
        ({"channels": 2}, "must be one of 1, 3"),
        ({"predict_ratio": 0.05}, "predicts none of 18 patches"),
        ({"predict_ratio": 1.5}, "at most 1"),
        ({"target": "pca", "pca_components": 193}, "a patch has 192 values"),
        ({"target": "tokens"}, "needs --tokenizer and --vocabulary"),
        ({"vocabulary": 8}, "are for --target tokens"),
        ({"pca_components": 8}, "is for --target pca"),
        ({"masks_per_image": 65}, "at most 64"),
        ({"target": "tokens", "tokenizer": "t", "vocabulary": 10**12}, "the decoder cannot be built|at most"),
        ({"decoder_width": 4 * 10**9, "decoder_heads": 1}, "the decoder cannot be built|at most"),
        ({"decoder": "cross", "mask_tokens": "encoder"}, "no patch to read from"),
        ({"masking": "blocks"}, "model.masking = blocks: must be one of random, block, grid"),
        ({"decoder": "cross", "decoder_heads": 5}, "must be a multiple of 4 and of"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, said: str) -> None:
    with raises(InputError, match=said):
        build(**changes)


def test_learned_positions_are_trained_and_fixed_ones_are_not() -> None:
    images, noise = inputs()
    for positions, trained in (("sincos", False), ("learned", True)):
        model = build(positions=positions)
        model(images, noise).loss.backward()
        assert (model.encoder.pos_embed.grad is not None) == trained
        assert model.decoder.pos_embed.grad is None


def test_grey_is_the_luma() -> None:
    """Of a grey image that image, of colours what Pillow makes of them (rounded there to whole levels)."""
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), np.uint8)
    normalizer = Normalizer(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"), channels=1)
    got = normalizer(torch.from_numpy(colours).permute(0, 3, 1, 2))
    mean, std = (np.dot(values, (0.299, 0.587, 0.114)) for values in (IMAGENET_MEAN, IMAGENET_STD))
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colours])
    np.testing.assert_allclose(got[:, 0] * std + mean, grey / 255, atol=0.51 / 255)
    same = np.repeat(grey[..., None], 3, axis=-1)
    exact = normalizer(torch.from_numpy(same).permute(0, 3, 1, 2))
    np.testing.assert_allclose(exact[:, 0], (grey / 255 - mean) / std, atol=1e-5)
    assert np.array_equal(normalizer.to_pixels(exact).permute(0, 2, 3, 1), same)


def test_mask_tokens_in_the_encoder() -> None:
    """The latent is that of an encoder whose embedding of removed patches is one token; no gradient reaches them."""
    model = build(mask_tokens="encoder")
    images, noise = inputs()
    images.requires_grad_(True)
    masking = random_masking(noise, 0.75)
    got = model(images, noise)
    got.loss.backward()
    encoder = model.encoder
    tokens = encoder.patch_embed(images)  # [B, N, D]
    tokens = torch.where(masking.mask.unsqueeze(-1).bool(), model.mask_token, tokens) + encoder.pos_embed[:, 1:]
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(3, -1, -1), tokens], 1)
    latent = encoder.norm(encoder.blocks(x))
    decoder = model.decoder
    decoded = decoder.norm(decoder.blocks(decoder.embed(latent) + decoder.pos_embed))[:, 1:]
    expected = gather_tokens(decoder.pred(decoded), masking.ids_masked)
    torch.testing.assert_close(got.pred, expected, rtol=1e-4, atol=1e-5)
    images.grad = None
    model.encode(gather_tokens(patchify(images, 8), masking.ids_keep), masking)[-1].sum().backward()
    touched = patchify(images.grad, 8).abs().sum(-1) > 0
    assert torch.equal(touched, masking.mask == 0)
    assert decoder.mask_token is None
    assert model.mask_token.grad.any()


# ---- decoders -------------------------------------------------------------------------------------------------------


def cross_oracle(model: MaskedAutoencoder, images: torch.Tensor, masking) -> torch.Tensor:
    """Predict every removed patch with PyTorch's own multi-head attention, one query at a time."""
    encoder, decoder = model.encoder, model.decoder
    tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    x = torch.cat(
        [(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1), gather_tokens(tokens, masking[0])],
        dim=1,
    )
    layers = [x]
    for block in encoder.blocks:
        layers.append(block(layers[-1]))
    layers[-1] = encoder.norm(layers[-1])
    rows = []
    for image in range(len(images)):
        predictions = []
        for place in masking[1][image].tolist():
            query = decoder.mask_token[0] + decoder.pos_embed[0, place]  # [1, width]
            for block, weights in zip(decoder.blocks, decoder.layer_weights, strict=True):
                memory = block.memory_norm(sum(w * layer[image] for w, layer in zip(weights, layers, strict=True)))
                q, (wk, wv) = block.norm1(query), block.attn.kv.weight.chunk(2)
                attention = functional.multi_head_attention_forward(
                    q.unsqueeze(1),
                    memory.unsqueeze(1),
                    memory.unsqueeze(1),
                    q.shape[-1],
                    block.attn.heads,
                    None,
                    torch.cat([block.attn.q.bias, block.attn.kv.bias]),
                    None,
                    None,
                    False,
                    0.0,
                    block.attn.proj.weight,
                    block.attn.proj.bias,
                    use_separate_proj_weight=True,
                    q_proj_weight=block.attn.q.weight,
                    k_proj_weight=wk,
                    v_proj_weight=wv,
                )[0]
                query = query + attention[:, 0]
                query = query + block.mlp.fc2(functional.gelu(block.mlp.fc1(block.norm2(query))))
            predictions.append(decoder.pred(decoder.norm(query)))
        rows.append(torch.cat(predictions))
    return torch.stack(rows)


@pytest.mark.parametrize("fused", [True, False])
def test_cross_decoder_against_a_plain_oracle(fused: bool) -> None:
    model = build(decoder="cross")
    for block in model.decoder.blocks:
        block.attn.fused_attn = fused
    images, noise = inputs(2)
    got = model(images, noise)
    expected = cross_oracle(model, images, got.masking)
    assert got.pred.shape == (2, 18, 192)
    torch.testing.assert_close(got.pred, expected, rtol=1e-4, atol=1e-5)


def test_partial_cross_prediction_is_a_part_of_the_whole() -> None:
    """Queries do not see each other: a quarter of the predictions is a quarter of all of them, and so is their loss."""
    images, noise = inputs()
    whole, part = build(decoder="cross"), build(decoder="cross", predict_ratio=0.25)
    part.load_state_dict(whole.state_dict())
    everything, some = whole(images, noise), part(images, noise)
    assert some.pred.shape == (3, 4, 192)
    assert torch.equal(some.ids, everything.ids[:, :4])
    torch.testing.assert_close(some.pred, everything.pred[:, :4], rtol=1e-5, atol=1e-6)
    target = gather_tokens(patchify(images, 8), some.ids)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(some.loss, functional.mse_loss(everything.pred[:, :4], target))


def test_partial_self_prediction_decodes_only_what_it_predicts() -> None:
    """The row is the kept tokens and as many mask tokens as there are predictions."""
    model = build(predict_ratio=0.5)
    images, noise = inputs()
    got = model(images, noise)
    ids_keep, ids_masked = got.masking
    decoder = model.decoder
    latent = encode(model.encoder, gather_tokens(patchify(images, 8), ids_keep), ids_keep)
    order = torch.cat([ids_keep, ids_masked[:, :9]], 1) + 1
    x = torch.cat([decoder.embed(latent), decoder.mask_token.expand(3, 9, -1)], 1)
    positions = torch.cat([decoder.pos_embed[:, :1].expand(3, -1, -1), decoder.pos_embed[0][order]], 1)
    expected = decoder.pred(decoder.norm(decoder.blocks(x + positions)))[:, -9:]
    torch.testing.assert_close(got.pred, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.ids, ids_masked[:, :9])


@pytest.mark.parametrize("changes", [{}, {"decoder": "cross", "predict_ratio": 0.25}, {"mask_tokens": "encoder"}])
def test_several_masks_of_an_image_are_several_images(changes: dict) -> None:
    model = build(**changes)
    images, noise = inputs(2, masks=3)
    together = model(images, noise)
    apart = [model(images[i // 3 : i // 3 + 1], noise[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together.loss, torch.stack([one.loss for one in apart]).mean())
    torch.testing.assert_close(together.pred, torch.cat([one.pred for one in apart]), rtol=1e-4, atol=1e-5)


# ---- targets --------------------------------------------------------------------------------------------------------


def test_pca_against_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    random = np.random.default_rng(0)
    rows = (random.normal(size=(600, 24)) * np.linspace(3, 0.1, 24)) @ random.normal(size=(24, 24)) + 2
    target = PcaTarget(24, components=7)
    assert not target.is_fitted
    patches = torch.from_numpy(rows).float().reshape(-1, 6, 24)
    share = target.fit([patches[:30], patches[30:]])
    assert target.is_fitted
    oracle = PCA(7).fit(rows)
    assert share == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-5)
    signs = np.sign((target.components.numpy() * oracle.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(target.components.numpy(), oracle.components_ * signs, atol=1e-4)
    coefficients = torch.from_numpy(oracle.transform(rows) * signs.T).float().reshape(-1, 6, 7)
    pred = torch.zeros_like(coefficients)
    torch.testing.assert_close(target.loss(pred, patches, None), coefficients.square().mean(), rtol=1e-4, atol=1e-4)
    back = oracle.inverse_transform(oracle.transform(rows)).reshape(-1, 6, 24)
    np.testing.assert_allclose(target.pixels(coefficients, patches), back, atol=1e-3)
    # Every component is largest in one entry, which is positive: no sign is left to chance.
    assert (target.components.gather(1, target.components.abs().argmax(1, keepdim=True)) > 0).all()
    with raises(InputError, match="patches all alike"):
        PcaTarget(24, components=7).fit([torch.ones(2, 6, 24)])
    with raises(InputError, match="cannot be fitted to 6 patches"):
        PcaTarget(24, components=7).fit([patches[:1]])


def test_token_loss_by_hand() -> None:
    """Cross-entropy of the removed patches alone: -log of the softmax at the true token."""
    model = build(target="tokens", vocabulary=5, tokenizer="t.onnx")
    assert isinstance(model.target, TokenTarget)
    images, noise = inputs(2, masks=2)
    tokens = torch.randint(5, (2, PATCHES), generator=torch.Generator().manual_seed(5))
    loss, pred, ids, _ = model(images, noise, tokens)
    expected = []
    for row in range(4):
        for place, scores in zip(ids[row].tolist(), pred[row].double(), strict=True):
            expected.append(-(scores.exp() / scores.exp().sum()).log()[tokens[row // 2, place]])
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=0)


def by_hand(images: torch.Tensor) -> torch.Tensor:
    """Return the same tokens without ONNX: uint8 `[B, 3, 32, 48]` -> int64 `[B, 24]`."""
    return (patchify(images.float(), 8).mean(-1) / 32).long()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"first": "first"},
        {"dtype": TensorProto.FLOAT, "first": "first"},
        {"batch": 2},
        {"size": (16, 24), "first": "first"},
    ],
    ids=str,
)
def test_tokenizers_of_every_kind(tmp_path: Path, kind: dict) -> None:
    """Bytes or floats, channels first or last, a fixed batch, a smaller input: the tokens of the mirrored images."""
    path = brightness_tokenizer(tmp_path / "t.onnx", **kind)
    tokenizer = Tokenizer(path, size=(32, 48), grid=(4, 6), vocabulary=8, device=torch.device("cpu"), threads=1)
    # Flat patches, well within their steps: no rounding decides.
    levels = torch.randint(8, (3, 1, 4, 6), generator=torch.Generator().manual_seed(0)) * 32 + 16
    images = levels.to(torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1).contiguous()
    flips = torch.tensor([False, True, False])
    mirrored = torch.stack([image.flip(2) if flip else image for image, flip in zip(images, flips, strict=True)])
    assert torch.equal(tokenizer(images, flips), by_hand(mirrored))


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    path = brightness_tokenizer(tmp_path / "t.onnx")
    common = {"size": (32, 48), "grid": (4, 6), "vocabulary": 8, "device": torch.device("cpu"), "threads": 1}
    tokenizer = Tokenizer(path, **{**common, "vocabulary": 7})
    with raises(InputError, match=r"gives tokens from 7 to 7, and --vocabulary is 7"):
        tokenizer(torch.full((1, 3, 32, 48), 255, dtype=torch.uint8), torch.tensor([False]))
    with raises(InputError, match=r"8 x 6 patches want as many whole numbers"):
        Tokenizer(path, **{**common, "grid": (8, 6)})
    with raises(InputError, match="there is no such file"):
        Tokenizer(tmp_path / "none.onnx", **common)
    with raises(InputError, match="was replaced while the run was starting"):
        Tokenizer(path, **common, sha256="0" * 64)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with raises(InputError, match="cannot load"):
        Tokenizer(tmp_path / "bad.onnx", **common)
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [image], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4]))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "i.onnx")
    with raises(InputError, match="of four dimensions"):
        Tokenizer(tmp_path / "i.onnx", **common)


# ---- augmentation ---------------------------------------------------------------------------------------------------


def test_crops_of_every_kind() -> None:
    draws = np.random.default_rng(0).random((200, CROP_DRAWS))
    square = Augmentation((224, 224), (256, 256), 0)
    none = dataclasses.replace(square, kind="none")
    fixed = dataclasses.replace(square, kind="fixed_crop")
    # 512 x 640 resized to 256 x 320 and cut at the centre: 448 pixels of the original.
    assert {none.crop(640, 512, row) for row in draws} == {(96, 32, 544, 480)}
    boxes = [fixed.crop(640, 512, row) for row in draws]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(448, 448)}
    assert min(box[0] for box in boxes) < 10
    assert max(box[2] for box in boxes) > 630
    assert min(box[1] for box in boxes) < 5
    assert max(box[3] for box in boxes) > 507
    assert len({square.crop(640, 512, row) for row in draws}) > 150
    # Below 128 pixels there is no margin: the whole of a square image.
    assert dataclasses.replace(fixed, size=(32, 32), covered=(32, 32)).crop(32, 32, draws[0]) == (0, 0, 32, 32)
    wide = Augmentation((64, 192), (73, 219), 0)
    aspects = [(r - left) / (bottom - top) for left, top, r, bottom in (wide.crop(900, 300, row) for row in draws)]
    assert np.median(aspects) == pytest.approx(3, rel=0.15)
    # Of whatever image and for however long an input: never nothing, and seldom the same crop twice.
    for size in ((8, 1024), (1024, 8), (16, 1536), (64, 320)):
        long = Augmentation(size, size, 0)
        for width, height in ((32, 32), (500, 375), (3, 700)):
            boxes = [long.crop(width, height, row) for row in draws]
            assert all(0 <= a < c <= width and 0 <= b < d <= height for a, b, c, d in boxes)
        assert len({long.crop(500, 375, row) for row in draws}) > 150


def test_color_jitter_against_torchvision() -> None:
    """With the same factors in the same order, the very bytes."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24), np.uint8)
    draws = np.array([0.9, 0.2, 0.7, 0.99])  # the last order: saturation, contrast, brightness
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image = transforms.adjust_saturation(image, 1 + 0.4 * (2 * 0.7 - 1))
    image = transforms.adjust_contrast(image, 1 + 0.4 * (2 * 0.2 - 1))
    image = transforms.adjust_brightness(image, 1 + 0.4 * (2 * 0.9 - 1))
    got = jitter_colors(pixels, 0.4, draws)
    assert np.array_equal(got, np.asarray(image).transpose(2, 0, 1))
    orders = {jitter_colors(pixels, 0.8, np.array([0.9, 0.1, 0.8, x])).tobytes() for x in np.linspace(0, 0.999, 12)}
    assert len(orders) > 3
