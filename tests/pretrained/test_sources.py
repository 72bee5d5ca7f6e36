"""Weights of others: the reference implementation's, transformers', timm's; read strictly, and without running code."""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support.errors import raises
from support.processes import tiny_config
from support.reference import reference_names, vit_mae_config
from support.shards import jpeg

import maekit
from maekit.cli.options import with_flags
from maekit.config import ModelConfig
from maekit.config.export import ExportConfig
from maekit.exporters.export import export
from maekit.images import Preprocess
from maekit.mae.autoencoder import build_autoencoder
from maekit.pretrained.files import read_weights
from maekit.pretrained.load import initialize_from, load_autoencoder, load_encoder
from maekit.pretrained.sources import read_source
from maekit.runs import RunDirectory
from maekit.system.errors import InputError
from maekit.system.files import sha256_file

# A small one of a published width: three heads, and nothing in the file says so.
SIZES = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 3}
DECODER = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 16}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    autoencoder = build_autoencoder(ModelConfig(**SIZES, **DECODER), seed=3).eval()
    for parameter in autoencoder.parameters():  # biases of zero would hide one that is lost
        parameter.data += 0.01 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    return autoencoder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens(encoder, images) -> torch.Tensor:
    with torch.no_grad():
        return encoder.forward_features(images)


@pytest.mark.parametrize("wrapped", ["bare", "model", "training"])
def test_the_reference_implementations_file(model, images, tmp_path: Path, wrapped: str) -> None:
    """As it is published, and as a training of it saves: with its optimiser and its command line."""
    weights = reference_names(model)
    content = {
        "bare": weights,
        "model": {"model": weights},
        "training": {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
    }[wrapped]
    torch.save(content, tmp_path / "mae.pth")
    trained = load_encoder(str(tmp_path / "mae.pth"))
    assert torch.equal(tokens(trained.encoder, images), tokens(model.encoder, images))
    assert trained.encoder.blocks[0].attn.num_heads == 3
    whole = load_autoencoder(str(tmp_path / "mae.pth")).model
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(whole(images, noise).pred, model(images, noise).pred)


@pytest.fixture(scope="module")
def vit_mae(tmp_path_factory):
    """A transformers ViTMAE with weights that are no zeros, saved."""
    import transformers

    config = vit_mae_config(decoder_num_attention_heads=4, norm_pix_loss=True, layer_norm_eps=1e-3)
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    folder = tmp_path_factory.mktemp("vit_mae")
    theirs.save_pretrained(folder)
    return theirs, folder


def test_transformers_encoder_and_decoder(vit_mae, images) -> None:
    """Latents, predictions and loss equal theirs, with their epsilon; in both spellings of the names."""
    theirs, folder = vit_mae
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    ours = load_autoencoder(str(folder)).model
    with torch.no_grad():
        got, wanted = ours(images, noise), theirs(images, noise=noise)
    assert got.loss == pytest.approx(wanted.loss.item(), rel=1e-5)
    for row in range(4):
        removed = got.masking.ids_masked[row]
        torch.testing.assert_close(got.pred[row], wanted.logits[row, removed], atol=1e-5, rtol=1e-4)
    unmasked = type(theirs).from_pretrained(folder, mask_ratio=0.0).eval()
    with torch.no_grad():
        order = torch.arange(16).expand(4, -1).float()
        latent = unmasked.vit(images, noise=order).last_hidden_state
    torch.testing.assert_close(tokens(load_encoder(str(folder)).encoder, images), latent, atol=1e-5, rtol=1e-4)


def test_transformers_older_names(vit_mae, images, tmp_path: Path) -> None:
    """Releases before 5 called the decoder's blocks `decoder_layers`, and wrote pickles."""
    from safetensors.torch import load_file

    _, folder = vit_mae
    old = {
        k.replace("decoder_encoder.layer", "decoder_layers"): v
        for k, v in load_file(folder / "model.safetensors").items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        preds = [load_autoencoder(str(path)).model(images, noise).pred for path in (folder, tmp_path)]
    assert torch.equal(*preds)


def test_init_from_takes_the_decoder_too(model, make_shards, tmp_path: Path) -> None:
    torch.save({"model": reference_names(model)}, tmp_path / "mae.pth")
    settings = {f"model__{key}": value for key, value in {**SIZES, **DECODER}.items()}
    for number, (changes, has_decoder) in enumerate((({}, True), ({"model__decoder_depth": 2}, False))):
        config = tiny_config(make_shards(7), tmp_path / f"run{number}", **{**settings, **changes})
        config.model.init_from, config.steps, config.optimizer.lr = str(tmp_path / "mae.pth"), 1, 1e-30
        for name in ("name", "patch_size", "width", "depth", "heads"):
            setattr(config.model, name, None)
        maekit.pretrain(config)
        run = RunDirectory(tmp_path / f"run{number}")
        assert (run.config().model.width, run.config().model.heads) == (192, 3)
        got = read_source(str(run.path))
        assert all(torch.equal(tensor, model.encoder.state_dict()[name]) for name, tensor in got.encoder.items())
        same = [
            torch.equal(t, got.decoder[name]) for name, t in model.decoder.state_dict().items() if "mask_token" in name
        ]
        assert same == [has_decoder]


def timm_vit(**arguments):
    """A small ViT of timm with weights that are no zeros."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    encoder = timm.create_model("vit_base_patch16_224", **{**settings, **arguments}).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    return encoder


def test_a_file_of_a_named_architecture(tmp_path: Path) -> None:
    """DINOv2 has registers and LayerScale, and its positions leave them out: the shapes alone do not tell."""
    encoder = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, num_classes=10).eval()
    save_file(encoder.state_dict(), tmp_path / "dino.safetensors")
    notes: list[str] = []
    name = "vit_small_patch14_reg4_dinov2"
    loaded = load_encoder(str(tmp_path / "dino.safetensors"), model=f"{name}.lvd142m", on_note=notes.append)
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(tokens(loaded.encoder, images), tokens(encoder, images))
    assert "left out, a classifier: head.bias, head.weight" in notes
    assert loaded.preprocess.mean == (0.485, 0.456, 0.406)


def test_published_weights_are_fetched_by_timm(make_shards, tmp_path: Path, monkeypatch) -> None:
    """Offline here: timm's answer is replaced, what is done with it is not."""
    encoder = timm_vit()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: encoder)
    result = export(ExportConfig("timm:vit_base_patch16_224.mae", tmp_path / "e.onnx", parity=(str(make_shards(5)),)))
    assert result.dim == 48
    monkeypatch.undo()
    with raises(InputError, match="timm knows no such model"):
        load_encoder("timm:vit_immense")
    with raises(InputError, match="says itself which model it is"):
        load_encoder("timm:vit_base_patch16_224.mae", model="vit_base_patch16_224")


def test_timm_format_goes_there_and_back(trained: Path, tmp_path: Path) -> None:
    """What is written is loaded by timm, and by maekit, as the encoder it was."""
    result = export(ExportConfig(trained / "run", tmp_path / "timm", format="timm"))
    assert sorted(path.name for path in (tmp_path / "timm").iterdir()) == ["config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    own = load_encoder(str(trained / "run"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(tokens(theirs, images), tokens(own.encoder, images))
    cfg = timm.data.resolve_model_data_config(theirs)
    assert (tuple(cfg["mean"]), cfg["crop_pct"], cfg["interpolation"]) == ((0.485, 0.456, 0.406), 1.0, "bicubic")
    again = load_encoder(str(tmp_path / "timm"))
    assert again.preprocess == own.preprocess
    assert torch.equal(tokens(again.encoder, images), tokens(own.encoder, images))
    assert (result.dim, result.parity) == (32, None)
    export(ExportConfig(trained / "run", tmp_path / "timm", format="timm"))  # over an earlier one
    (tmp_path / "timm" / "notes.txt").touch()
    with raises(InputError, match="must be a new directory"):
        export(ExportConfig(trained / "run", tmp_path / "timm", format="timm"))
    with raises(InputError, match="--pool is not for --format timm"):
        export(ExportConfig(trained / "run", tmp_path / "other", format="timm", pool="cls"))


def test_every_key_that_does_not_fit_is_named(model, tmp_path: Path) -> None:
    weights = reference_names(model)
    del weights["blocks.1.norm2.weight"], weights["norm.bias"]
    weights["blocks.0.attn.qkv.weight"] = torch.zeros(3, 4)
    weights["gamma"] = torch.zeros(1)
    torch.save(weights, tmp_path / "mae.pth")
    with pytest.raises(InputError) as caught:
        load_encoder(str(tmp_path / "mae.pth"))
    for said in (
        "missing blocks.1.norm2.weight",
        "missing norm.bias",
        "unexpected gamma",
        "blocks.0.attn.qkv.weight is [3, 4], the model wants [576, 192]",
    ):
        assert said in str(caught.value)
    deeper = read_source(str(tmp_path / "mae.pth"))
    assert deeper.sizes["depth"] == 2
    with raises(InputError, match=r"missing blocks\.2\.\*; missing blocks\.3\.\*.*missing blocks\.11\.\*"):
        load_encoder(str(tmp_path / "mae.pth"), model="vit_tiny_patch16_224")


def test_sizes_that_no_file_tells(tmp_path: Path) -> None:
    odd = timm_vit()
    save_file(odd.state_dict(), tmp_path / "odd.safetensors")
    with raises(InputError, match="a width of 48 is none of the published"):
        load_encoder(str(tmp_path / "odd.safetensors"))
    save_file({"weight": torch.zeros(3)}, tmp_path / "none.safetensors")
    with raises(InputError, match="holds no ViT encoder under timm's names"):
        load_encoder(str(tmp_path / "none.safetensors"))
    with raises(InputError, match="timm knows no such model"):
        load_encoder(str(tmp_path / "odd.safetensors"), model="vit_odd")
    empty = {**odd.state_dict(), "pos_embed": torch.zeros(1, 0, 48)}
    save_file(empty, tmp_path / "empty.safetensors")
    with raises(InputError, match="no square of patches"):
        load_encoder(str(tmp_path / "empty.safetensors"), model="vit_tiny_patch16_224")
    oblong = timm_vit(img_size=(32, 40), embed_dim=192)
    save_file(oblong.state_dict(), tmp_path / "oblong.safetensors")
    with raises(InputError, match="no square of patches"):
        load_encoder(str(tmp_path / "oblong.safetensors"))


def test_directories_that_are_no_models(vit_mae, tmp_path: Path) -> None:
    _, folder = vit_mae
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(InputError, match=r"none of model\.safetensors, pytorch_model\.bin"):
        load_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for change, said in (
        ({"model_type": "bert"}, "of a model of type 'bert'"),
        ({"hidden_size": None}, "no config of ViTMAE"),
        ({"num_hidden_layers": 1}, r"unexpected blocks\.1\.\*"),
        ({"hidden_act": "relu"}, "exact GELU"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with raises(InputError, match=said):
            load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with raises(InputError, match="no JSON object"):
        load_encoder(str(tmp_path))


class Payload:
    """A pickle that touches a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_file_of_weights_runs_code(model, vit_mae, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    weights = reference_names(model)
    torch.save({"model": weights, "args": Payload(touched)}, tmp_path / "args.pth")
    torch.save({"model": {**weights, "norm.bias": Payload(touched)}}, tmp_path / "deep.pth")
    torch.save(Payload(touched), tmp_path / "pytorch_model.bin")
    # A Namespace is let through; what it holds is not.
    torch.save({"model": weights, "args": argparse.Namespace(lr=Payload(touched))}, tmp_path / "namespace.pth")
    torch.save({"model": weights, "args": Payload(touched)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text((vit_mae[1] / "config.json").read_text())
    for name in ("args.pth", "deep.pth", "namespace.pth", "old.pth", "."):
        with raises(InputError, match="cannot read weights"):
            load_encoder(str(tmp_path / name))
    assert not touched.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_files_of_weights(model, tmp_path: Path, damage: str) -> None:
    torch.save(reference_names(model), tmp_path / "mae.pth")
    save_file({k: v.contiguous() for k, v in model.encoder.state_dict().items()}, tmp_path / "mae.safetensors")
    for name in ("mae.pth", "mae.safetensors"):
        data = (tmp_path / name).read_bytes()
        broken = {"empty": b"", "cut": data[: len(data) // 2], "text": b"<html>not found</html>"}[damage]
        (tmp_path / name).write_bytes(broken)
        with raises(InputError, match=f"cannot read weights from .*{name}"):
            load_encoder(str(tmp_path / name))


def test_weights_that_are_not_finite_are_not_exported(model, make_shards, tmp_path: Path) -> None:
    weights = reference_names(model)
    weights["norm.bias"] = torch.full_like(weights["norm.bias"], np.nan)
    torch.save(weights, tmp_path / "mae.pth")
    with raises(InputError, match=r"norm\.bias holds values that are not finite"):
        export(ExportConfig(str(tmp_path / "mae.pth"), tmp_path / "e.onnx", parity=(str(make_shards(5)),), force=True))
    assert not (tmp_path / "e.onnx").exists()


def timm_directory(folder: Path, encoder, **config) -> Path:
    """What timm's hub keeps: weights, and what the model is built with."""
    folder.mkdir()
    save_file(encoder.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    whole = {"architecture": "vit_base_patch16_224", "model_args": sizes, "pretrained_cfg": cfg, **config}
    whole["model_args"] = {**sizes, **config.get("model_args", {})} if isinstance(whole["model_args"], dict) else 1
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [{"act_layer": "quick_gelu"}, {"reg_tokens": 4}, {"qk_norm": True}, {"global_pool": "avg"}, {"pre_norm": True}],
)
def test_all_that_timm_builds_a_model_with_counts(tmp_path: Path, images, arguments: dict) -> None:
    """An activation does not show in the weights: the model would be another one, without a word."""
    encoder = timm_vit(**arguments)
    loaded = load_encoder(str(timm_directory(tmp_path / "m", encoder, model_args=arguments)))
    assert torch.equal(tokens(loaded.encoder, images), tokens(encoder, images))
    assert torch.equal(loaded.encoder(images), encoder(images))
    assert (loaded.preprocess.resize, loaded.preprocess.interpolation) == ((35, 35), "bilinear")
    model = build_autoencoder(ModelConfig(**{**SIZES, "width": 48}), seed=0)
    with raises(InputError, match=f"was built with {next(iter(arguments))}"):
        initialize_from(model, str(tmp_path / "m"), ModelConfig(**{**SIZES, "width": 48}))


def test_preprocessing_of_timm_is_what_timm_does(tmp_path: Path) -> None:
    """Its crop modes, on an image that is no square."""
    encoder = timm_vit()
    image = Image.open(io.BytesIO(jpeg(3, (90, 40))))
    for mode in ("center", "squash"):
        cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
        cfg |= {"interpolation": "bicubic", "crop_mode": mode}
        loaded = load_encoder(str(timm_directory(tmp_path / mode, encoder, pretrained_cfg=cfg)))
        transform = timm.data.create_transform(**{**cfg, "input_size": (3, 32, 32)})
        theirs = (transform(image) * 0.5 + 0.5).permute(1, 2, 0).numpy() * 255
        np.testing.assert_allclose(loaded.preprocess.prepare(image), theirs, atol=1.01)
        assert Preprocess.from_json(loaded.preprocess.to_json()) == loaded.preprocess
    bordered = timm_directory(tmp_path / "border", encoder, pretrained_cfg={**cfg, "crop_mode": "border"})
    with raises(InputError, match="crop mode 'border'"):
        load_encoder(str(bordered))


def test_a_norm_behind_the_pooling_is_no_classifier(tmp_path: Path, images) -> None:
    name = "vit_base_patch16_reg4_gap_256"
    encoder = timm.create_model(name, img_size=32, num_classes=3).eval()
    assert "fc_norm.weight" in encoder.state_dict()
    save_file(encoder.state_dict(), tmp_path / "gap.safetensors")
    loaded = load_encoder(str(tmp_path / "gap.safetensors"), model=name).encoder
    assert torch.equal(loaded(images), encoder.forward_head(encoder.forward_features(images), pre_logits=True))


def test_no_foreign_model_is_overwritten(trained: Path, vit_mae, tmp_path: Path) -> None:
    _, folder = vit_mae
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).write_bytes((folder / name).read_bytes())
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    for source in (trained / "run", tmp_path / "m"):
        with raises(InputError, match="must be a new directory"):
            export(ExportConfig(source, tmp_path / "m", format="timm", parity=(str(trained / "shards"),)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_timm_format_of_another_epsilon(vit_mae, trained: Path, tmp_path: Path) -> None:
    """transformers' epsilon cannot be said in timm's config: the weights are right, and the difference is told."""
    from maekit.system.progress import Silent

    class Notes(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(with_flags(text))

    notes = Notes()
    options = dict(format="timm", parity=(str(trained / "shards"),))
    export(ExportConfig(vit_mae[1], tmp_path / "t", **options), notes)
    assert any("epsilon of 0.001" in line for line in notes.lines)


MALFORMED = [
    {"model_args": 3},
    {"pretrained_cfg": [1]},
    {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 4, "std": [0.5] * 4}},
    {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.0] * 3}},
    {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1e-310}},
    {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": -1}},
    {"model_args": {"img_size": float("inf")}},
    {"model_args": {"num_heads": 0}},
    {"model_args": {"patch_size": 0}},
    {"architecture": "vit_immense"},
    {"architecture": "resnet18"},
]


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_malformed_configs_of_timm(tmp_path: Path, change: dict) -> None:
    folder = timm_directory(tmp_path / "m", timm_vit(), **change)
    with pytest.raises(InputError):
        export(ExportConfig(folder, tmp_path / "e.onnx", parity=("nowhere",)))


@pytest.mark.parametrize(
    "metadata",
    ['{"timm_arguments": []}', '{"timm_arguments": {"img_size": 32}, "model": "vit_tiny_patch16_224"}', "[" * 100_000],
)
def test_malformed_metadata_of_an_encoder(tmp_path: Path, metadata: str) -> None:
    save_file(timm_vit().state_dict(), tmp_path / "e.safetensors", metadata={"maekit": metadata})
    with pytest.raises(InputError):
        load_encoder(str(tmp_path / "e.safetensors"))
    with raises(InputError, match="cannot read"):
        load_encoder("x" * 5000)


def test_tensors_that_are_no_weights(model, tmp_path: Path) -> None:
    for tensor in (torch.zeros(192, device="meta"), torch.zeros(192).to_sparse(), torch.zeros(192, dtype=torch.cfloat)):
        torch.save({**reference_names(model), "norm.bias": tensor}, tmp_path / "mae.pth")
        with raises(InputError, match=r"norm\.bias is no plain tensor"):
            load_encoder(str(tmp_path / "mae.pth"))


def test_published_models_of_another_kind(monkeypatch) -> None:
    other = timm.create_model("resnet18")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: other)
    with raises(InputError, match="is a ResNet; VisionTransformers are known"):
        load_encoder("timm:resnet18")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_the_digest_is_of_the_weights_that_were_loaded(tmp_path: Path, suffix: str) -> None:
    """Two files take turns under one name while it is read: digest, description and tensors are of one of them."""
    known = {}
    for number in range(2):
        weights, path = {"w": torch.full((300_000,), float(number))}, tmp_path / f"{number}.{suffix}"
        about = {"maekit": json.dumps({"number": number})} if suffix == "safetensors" else {}
        save_file(weights, path, metadata=about) if about else torch.save(weights, path)
        known[sha256_file(path)] = number
    os.link(tmp_path / f"0.{suffix}", tmp_path / f"w.{suffix}")
    swap = (
        "import itertools, os\n"
        "for number in itertools.cycle('10'):\n"
        f"    os.link(f'{{number}}.{suffix}', 'next'); os.rename('next', 'w.{suffix}')\n"
        "    os.path.exists('next') and os.unlink('next')\n"
    )
    swapper = subprocess.Popen([sys.executable, "-c", swap], cwd=tmp_path)
    try:
        seen = set()
        for _ in range(100):
            read = read_weights(tmp_path / f"w.{suffix}")
            number = known[read.sha256]
            assert read.tensors["w"].unique().tolist() == [number]
            assert read.description == ({"number": number} if suffix == "safetensors" else {})
            seen.add(number)
    finally:
        swapper.kill()
        swapper.wait()
    assert seen == {0, 1}
