"""Weights at another image or patch size: against timm's own resampling, and from every kind of source."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from support.processes import tiny_config
from support.reference import reference_names, vit_mae_config
from support.shards import jpeg, write_shard
from timm.models.vision_transformer import checkpoint_filter_fn

import maekit
from maekit.config import ModelConfig
from maekit.config.export import ExportConfig
from maekit.exporters.export import export
from maekit.mae.autoencoder import build_autoencoder
from maekit.mae.positions import sincos_positions
from maekit.pretrained.files import load_strictly
from maekit.pretrained.load import _resized, initialize_from, load_encoder
from maekit.pretrained.resize import resized_encoder, resized_positions, trained_grid
from maekit.pretrained.sources import read_source
from maekit.system.errors import InputError

SIZES = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 3}
DECODER = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 16}


def test_sine_cosine_positions_span_the_trained_grid() -> None:
    """Of each patch's centre, at the spot of the image where it was in training."""
    got = sincos_positions(8, (4, 2), prefix_tokens=1, trained_grid=(2, 1))[0].double()
    for row in range(4):
        for column in range(2):
            y, x = (row + 0.5) / 2 - 0.5, (column + 0.5) / 2 - 0.5
            wanted = [np.sin(x), np.sin(x / 100), np.cos(x), np.cos(x / 100)]
            wanted += [np.sin(y), np.sin(y / 100), np.cos(y), np.cos(y / 100)]
            np.testing.assert_allclose(got[1 + row * 2 + column], wanted, atol=1e-7)
    assert torch.equal(
        sincos_positions(64, (5, 7), prefix_tokens=0),
        sincos_positions(64, (5, 7), prefix_tokens=0, trained_grid=(5, 7)),
    )


@pytest.mark.parametrize("width", [32, 192, 768])
@pytest.mark.parametrize("trained", [(4, 4), (14, 14), (3, 5)])
def test_positions_resized_twice_are_those_resized_once(width: int, trained: tuple[int, int]) -> None:
    first = sincos_positions(width, trained, prefix_tokens=1)
    larger, kind = resized_positions(first, trained, (10, 8))
    assert kind == "sine-cosine"
    assert trained_grid(larger[0, 1:].half(), (10, 8)) == trained
    back, _ = resized_positions(larger, (10, 8), trained)
    torch.testing.assert_close(back, first, atol=1e-6, rtol=0)
    assert torch.equal(back[:, :1], first[:, :1])


def test_other_positions_are_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    assert trained_grid(torch.randn(16, 32, generator=generator), (4, 4)) is None
    assert trained_grid(torch.zeros(16, 32), (4, 4)) is None
    moved = sincos_positions(32, (4, 4), prefix_tokens=0)[0] + 0.01 * torch.randn(16, 32, generator=generator)
    assert trained_grid(moved, (4, 4)) is None


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [((48, 48), 8), ((16, 16), 8), ((40, 64), 8), ((64, 64), 16), ((32, 32), 4)]
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_learned_positions_and_patches_as_timm_resamples_them(
    name: str, image_size: tuple[int, int], patch_size: int
) -> None:
    """Class and register tokens with positions, and without."""
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    trained = timm.create_model(name, img_size=32, patch_size=8, **sizes)
    trained.pos_embed.data.normal_(generator=torch.Generator().manual_seed(1))
    wanted = timm.create_model(name, img_size=image_size, patch_size=patch_size, **sizes).eval()
    wanted.load_state_dict(checkpoint_filter_fn(trained.state_dict(), wanted, interpolation="bicubic", antialias=True))
    got = timm.create_model(name, img_size=image_size, patch_size=patch_size, **sizes).eval()
    grid = (image_size[0] // patch_size, image_size[1] // patch_size)
    weights, done = resized_encoder(trained.state_dict(), old=(4, 4), new=grid, patch_size=patch_size)
    got.load_state_dict(weights)
    images = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(got.forward_features(images), wanted.forward_features(images), atol=1e-5, rtol=1e-5)
    assert ("patches are resampled from 8" in done) == (patch_size != 8)


@pytest.mark.parametrize("size", [16, 24, 48, 64, (32, 56)])
def test_exported_at_another_size_equals_pytorch(trained: Path, tmp_path: Path, size: int | tuple[int, int]) -> None:
    """The oracle is timm's model of that size, with its positions set by hand."""
    result = export(ExportConfig(trained / "run", tmp_path / "e.onnx", image_size=size))
    assert result.parity is not None
    height, width = (size, size) if isinstance(size, int) else size
    notes: list[str] = []
    loaded = load_encoder(str(trained / "run"), image_size=size, on_note=notes.append)
    assert any(
        f"sine-cosine positions are resized from 4 x 4 to {height // 8} x {width // 8} patches" in n for n in notes
    )
    oracle = timm.create_model(
        "vit_tiny_patch16_224", **loaded.arguments | {"embed_dim": 32, "depth": 2, "num_heads": 2}
    )
    weights = dict(read_source(str(trained / "run")).encoder)
    grid = (height // 8, width // 8)
    weights["pos_embed"] = sincos_positions(32, grid, prefix_tokens=1, trained_grid=(4, 4))
    oracle.eval().load_state_dict(weights)
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    session = ort.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.preprocess.mean, loaded.preprocess.std))
    with torch.no_grad():
        latent = oracle.forward_features((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
        expected = torch.nn.functional.normalize(latent[:, 1:].mean(1), dim=-1)
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=1e-5)


def test_the_crop_keeps_its_share(trained: Path) -> None:
    own = load_encoder(str(trained / "run")).preprocess
    assert own.at((64, 48)).resize == (64, 48)
    usual = type(own).for_size((224, 224), own.mean, own.std)
    assert (usual.resize, usual.at((448, 448)).resize, usual.at((192, 256)).resize) == (
        (256, 256),
        (512, 512),
        (219, 292),
    )


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_autoencoder(ModelConfig(**SIZES, **DECODER), seed=3).eval()


def of_reference(model, folder: Path) -> str:
    torch.save({"model": reference_names(model)}, folder / "mae.pth")
    return str(folder / "mae.pth")


def of_transformers(model, folder: Path) -> str:
    import transformers

    theirs = transformers.ViTMAEForPreTraining(vit_mae_config())
    # Published weights have them; built from a config, transformers leaves them at zero.
    theirs.vit.embeddings.position_embeddings.data = sincos_positions(192, (4, 4), prefix_tokens=1)
    theirs.decoder.decoder_pos_embed.data = sincos_positions(64, (4, 4), prefix_tokens=1)
    theirs.save_pretrained(folder / "vit_mae")
    return str(folder / "vit_mae")


def of_run(model, folder: Path) -> str:
    settings = {f"model__{key}": value for key, value in {**SIZES, **DECODER}.items()}
    config = tiny_config(folder / "shards", folder / "source", **settings)
    config.steps = 1
    maekit.pretrain(config)
    return str(folder / "source")


def of_file(model, folder: Path) -> str:
    return str(Path(of_run(model, folder)) / "encoder.safetensors")


def of_timm_format(model, folder: Path) -> str:
    export(ExportConfig(of_run(model, folder), folder / "timm", format="timm"))
    return str(folder / "timm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with shards for those sources that need a training."""
    folder = tmp_path_factory.mktemp("sources")
    write_shard(folder / "shards" / "0.tar", {str(i): {"jpg": jpeg(i)} for i in range(7)})
    return folder


@pytest.fixture(scope="module", params=[of_run, of_file, of_timm_format, of_reference, of_transformers])
def source(request, model, folder: Path) -> str:
    """Return the name of a source of each kind."""
    path = folder / request.param.__name__
    path.mkdir()
    (path / "shards").symlink_to(folder / "shards")
    return request.param(model, path)


@pytest.mark.parametrize(("image_size", "patch_size"), [(48, 8), (32, 4)])
def test_training_starts_from_every_source_at_another_size(source: str, image_size: int, patch_size: int) -> None:
    given = read_source(source)
    target = given.sizes.get("target", "norm_pixel")
    sizes = {**SIZES, **DECODER, "image_size": image_size, "patch_size": patch_size, "target": target}
    config = ModelConfig(**sizes)
    model, notes = build_autoencoder(config, seed=0), []
    said = initialize_from(model, source, config, notes.append)
    side = image_size // patch_size
    assert f"sine-cosine positions are resized from 4 x 4 to {side} x {side} patches" in notes[0]
    got = model.encoder.state_dict()
    for key, tensor in given.encoder.items():
        assert key in ("pos_embed", "patch_embed.proj.weight") or torch.equal(tensor, got[key]), key
    spanned = sincos_positions(192, (side, side), prefix_tokens=1, trained_grid=(4, 4))
    torch.testing.assert_close(got["pos_embed"], spanned, atol=1e-6, rtol=0)
    # Pixels of larger patches are other ones than the decoder has learned to predict.
    takes_decoder = bool(given.decoder) and patch_size == 8
    assert said.startswith("encoder and decoder start from" if takes_decoder else "the encoder starts from")
    if takes_decoder:
        spanned = sincos_positions(64, (side, side), prefix_tokens=1, trained_grid=(4, 4))
        torch.testing.assert_close(model.decoder.pos_embed, spanned, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 12, 192), (1, 17), (17, 192), (0,)])
def test_positions_that_do_not_fit_their_own_size_are_named(model, tmp_path: Path, shape: tuple[int, ...]) -> None:
    weights = {**reference_names(model), "pos_embed": torch.ones(shape)}
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=2, num_classes=0)
    assert _resized(encoder, weights, (32, 32), "x", print) is weights
    with pytest.raises(InputError, match="pos_embed is"):
        load_strictly(encoder, {**encoder.state_dict(), "pos_embed": weights["pos_embed"]}, "x")


def test_a_second_phase_at_another_size_resumes_and_is_exported(trained: Path, tmp_path: Path) -> None:
    config = tiny_config(trained / "shards", tmp_path / "run", model__image_size=48)
    config.model.init_from, config.steps = str(trained / "run"), 2
    maekit.pretrain(config)
    again = maekit.pretrain(config)
    assert again.already_finished
    spanned = sincos_positions(32, (6, 6), prefix_tokens=1, trained_grid=(4, 4))
    assert torch.equal(load_encoder(str(tmp_path / "run")).encoder.pos_embed, spanned)
    assert export(ExportConfig(tmp_path / "run", tmp_path / "e.onnx")).dim == 32
