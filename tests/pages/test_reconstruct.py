"""`maekit reconstruct`: pixels against arithmetic, and what it draws of which samples."""

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.errors import raises
from support.processes import tiny_config
from support.reference import reference_names
from support.shards import jpeg, write_shard
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app
from maekit.config import ModelConfig
from maekit.mae.autoencoder import build_autoencoder
from maekit.mae.masking import gather_tokens, random_masking
from maekit.mae.reconstruction import reconstruct
from maekit.mae.targets import patchify
from maekit.pretrained.load import load_autoencoder
from maekit.runs import find_checkpoint
from maekit.system.errors import InputError

pytestmark = pytest.mark.whole

SIZES = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3}
SIZES |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}


@pytest.mark.parametrize("target", ["norm_pixel", "pixel", "pca"])
@pytest.mark.parametrize(
    "changes", [{}, {"decoder": "cross", "predict_ratio": 0.3}, {"mask_tokens": "encoder"}, {"channels": 1}], ids=str
)
def test_pixels_are_those_of_the_prediction(target: str, changes: dict) -> None:
    """Removed patches are the prediction, with the true patch's mean and deviation where those are divided out."""
    config = ModelConfig(**{**SIZES, "target": target, "pca_components": 20, **changes})
    model = build_autoencoder(config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, config.channels, 32, 32, generator=generator) * 2 + 1
    noise = torch.rand(3, 16, generator=generator)
    patches = patchify(images, 8)
    if target == "pca":
        model.target.fit([torch.randn(40, 16, patches.shape[-1], generator=generator)])
    shown = reconstruct(model, images, noise)
    masking = random_masking(noise, 0.75)
    model.predict_ratio = 1.0
    with torch.no_grad():
        pred = model(images, noise).pred
    truth = gather_tokens(patches, masking.ids_masked)
    wanted = {
        "pixel": lambda: pred,
        "norm_pixel": lambda: pred * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True),
        "pca": lambda: pred @ model.target.components + model.target.mean,
    }[target]()
    for picture in (shown.predicted, shown.overlaid):
        got = gather_tokens(patchify(picture, 8), masking.ids_masked)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(gather_tokens(patchify(shown.overlaid, 8), masking.ids_keep), gather_tokens(patches, masking[0]))
    assert not torch.equal(shown.predicted, shown.overlaid)
    assert not gather_tokens(patchify(shown.masked, 8), masking.ids_masked).any()
    assert torch.equal(gather_tokens(patchify(shown.masked, 8), masking.ids_keep), gather_tokens(patches, masking[0]))
    with torch.no_grad():
        losses = [model(images[i : i + 1], noise[i : i + 1]).loss for i in range(3)]
    torch.testing.assert_close(shown.losses, torch.stack(losses), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `shards` (12 images in a.tar, 5 and a web page in b.tar) and a `run` on them."""
    folder = tmp_path_factory.mktemp("reconstruct")
    write_shard(folder / "shards/a.tar", {f"{i:03d}": {"jpg": jpeg(i)} for i in range(12)})
    more = {f"{i:03d}": {"jpg": jpeg(i)} for i in range(10, 15)} | {"page": {"jpg": b"<html>"}}
    write_shard(folder / "shards/b.tar", more)
    maekit.pretrain(tiny_config(folder / "shards", folder / "run", steps=2, data__max_bad=0.5))
    return folder


def draw(run: Path, name: str, *, source: str = "run", **options):
    path = run / name
    return path, maekit.reconstruct(maekit.ReconstructConfig(str(run / source), [str(run / "shards")], path, **options))


def rows_of(path: Path) -> list[list[np.ndarray]]:
    """Return the images of a page, three a row."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', path.read_text())
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
    return [images[i : i + 3] for i in range(0, len(images), 3)]


def test_a_page_shows_the_samples_asked_for(run: Path) -> None:
    path, result = draw(run, "two.html", keys=("003", "b.tar:011"), masking="grid", overlay_visible=True)
    assert [(sample.shard, sample.key) for sample in result.samples] == [("a.tar", "003"), ("b.tar", "011")]
    text = html.unescape(path.read_text())
    for sample in result.samples:
        assert f"{sample.key} ({sample.shard}), loss {sample.loss:.4f}" in text
    assert "75% of the patches removed (grid)" in text
    assert result.loss == pytest.approx(np.mean([sample.loss for sample in result.samples]))
    assert "http" not in text.replace("http-equiv", "")
    rows = rows_of(path)
    assert len(rows) == 2
    for masked, shown, original in rows:
        assert masked.shape == (32, 32, 3)
        is_kept = (masked == original).all(-1).reshape(4, 8, 4, 8).all((1, 3))
        assert is_kept.sum() == 4  # of 16 patches
        mask = np.kron(is_kept, np.ones((8, 8), bool))
        assert np.array_equal(shown[mask], original[mask])
        assert np.abs(masked[~mask].astype(int) - np.rint(255 * np.array([0.485, 0.456, 0.406]))).max() <= 1
    # A sample's mask is its own, whoever else is drawn.
    alone, _ = draw(run, "one.html", keys=("b.tar:011",), masking="grid", overlay_visible=True)
    assert np.array_equal(rows_of(alone)[0], rows[1])
    bare, _ = draw(run, "bare.html", keys=("b.tar:011",), masking="grid")
    assert np.array_equal(rows_of(bare)[0][0], rows[1][0])
    assert not np.array_equal(rows_of(bare)[0][1][mask], rows[1][2][mask])


def test_a_random_set_is_a_function_of_its_seed(run: Path) -> None:
    """Without repeats; what cannot be read is left out and another taken; more than there are is all there are."""
    chosen = {seed: draw(run, "r.png", seed=seed, count=5)[1].samples for seed in (0, 0, 1)}
    assert chosen[0] == draw(run, "again.png", seed=0, count=5)[1].samples
    assert chosen[0] != chosen[1]
    assert len({(s.shard, s.key) for s in chosen[0]}) == 5
    path, everything = draw(run, "all.png", count=100, mask_ratio=0.5)
    assert len({(s.shard, s.key) for s in everything.samples}) == 17
    assert everything.mask_ratio == 0.5
    assert Image.open(path).size == (3 * 100 + 4, 17 * 100 + 4 + 18)


def test_a_checkpoint_and_an_imported_model(run: Path, tmp_path: Path) -> None:
    """All of them draw what the run draws."""
    wanted = rows_of(draw(run, "run.html", keys=("003",))[0])
    checkpoint = find_checkpoint(run / "run")[1].path
    assert np.array_equal(rows_of(draw(run, "c.html", source=str(checkpoint), keys=("003",))[0]), wanted)
    model = build_autoencoder(
        ModelConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2, decoder_depth=1), seed=0
    )
    torch.save({"model": reference_names(model)}, tmp_path / "mae.pth")
    notes: list[str] = []
    again = load_autoencoder(str(tmp_path / "mae.pth"), on_note=notes.append)
    assert again.model.target.normalized
    assert "does not say what it predicts" in notes[-1]
    path, result = draw(run, "mae.html", source=str(tmp_path / "mae.pth"), keys=("003",), target="pixel")
    assert len(rows_of(path)) == 1
    other = draw(run, "mae.html", source=str(tmp_path / "mae.pth"), keys=("003",))[1]
    assert other.loss != result.loss
    with raises(InputError, match="says itself that it predicts norm_pixel"):
        draw(run, "no.png", target="pixel")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keys": ("nobody",)}, r"--key nobody: there is no such sample; the first is a\.tar:000"),
        ({"keys": ("011",)}, r"--key 011: 2 samples have this key; name one, as in --key a\.tar:011"),
        ({"keys": ("page",)}, r"b\.tar page holds no readable image: not_an_image"),
        ({"mask_ratio": 0.99}, "keeps none or all of the 16 patches"),
        ({"mask_ratio": 1.0}, "must lie between 0 and 1"),
        ({"masking": "stripes"}, "--masking stripes: must be one of random, block, grid"),
        ({"count": 0}, "--count 0: must be at least 1"),
        ({"count": 10**9}, "at most 1000"),
        ({"seed": -1}, "--seed -1"),
        ({"device": "tpu"}, "--device tpu"),
        ({"target": "pca"}, "--target pca"),
        ({"source": "run/encoder.safetensors"}, "holds no decoder"),
        ({"source": "nothing"}, "does not exist"),
        ({"source": "timm:vit_tiny_patch16_224"}, "does not exist|holds no decoder"),
    ],
)
def test_what_cannot_be_drawn(run: Path, options: dict, said: str) -> None:
    with raises(InputError, match=said):
        draw(run, "no.png", **options)
    assert not (run / "no.png").exists()


def test_tokens_cannot_be_drawn(run: Path, tmp_path: Path) -> None:
    from support.design_space import brightness_tokenizer

    path = brightness_tokenizer(tmp_path / "t.onnx")
    settings = {"model__target": "tokens", "model__vocabulary": 9, "model__image_size": (32, 48)}
    settings |= {"model__tokenizer": str(path), "data__max_bad": 0.5}
    maekit.pretrain(tiny_config(run / "shards", tmp_path / "run", steps=1, **settings))
    with raises(InputError, match="predicts tokens, which are no pixels"):
        draw(run, "no.png", source=str(tmp_path / "run"))


def test_damaged_shards_are_left_out_and_directories_refused(run: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    whole = (run / "shards/a.tar").read_bytes()
    (shards / "a.tar").write_bytes(whole)
    (shards / "b.tar").write_bytes(whole[: len(whole) // 2])
    result = maekit.reconstruct(maekit.ReconstructConfig(str(run / "run"), [str(shards)], tmp_path / "p.png", count=3))
    assert {sample.shard for sample in result.samples} == {"a.tar"}
    (tmp_path / "d.png").mkdir()
    with raises(InputError, match=r"d\.png: is a directory"):
        maekit.reconstruct(maekit.ReconstructConfig(str(run / "run"), [str(shards)], tmp_path / "d.png"))
    with raises(InputError, match="does not exist"):
        maekit.reconstruct(maekit.ReconstructConfig("nothing", [str(shards)], tmp_path / "new/deep/p.png"))
    assert not (tmp_path / "new").exists()


def test_the_command(run: Path) -> None:
    arguments = ["reconstruct", str(run / "run"), str(run / "shards")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(run / "c.png"), "--count", "2", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert {"path", "loss", "mask_ratio", "masking", "samples"} == set(summary)
    assert (run / "c.png").is_file()
    for ending in ("jpg", ""):
        refused = CliRunner().invoke(app, [*arguments, "--out", str(run / f"c{ending and '.'}{ending}")])
        assert isinstance(refused.exception, InputError)
        assert "must end in .png or .html" in str(refused.exception)
