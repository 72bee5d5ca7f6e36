"""Whole runs of each encoder, decoder and target: trained, stopped, gone on with, exported, and started from."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from support.design_space import SIZES, brightness_tokenizer, build
from support.errors import raises
from support.processes import tiny_config

import maekit
from maekit.config import ModelConfig, PretrainConfig, load_config
from maekit.config.settings import set_value
from maekit.mae.encoder import build_encoder
from maekit.mae.normalize import Normalizer
from maekit.pretrained.load import load_autoencoder, load_encoder
from maekit.pretraining.pretrain import tokenizer_digest
from maekit.runs import RunDirectory, find_checkpoint
from maekit.system.errors import InputError

RUNS = {
    "cross": {"decoder": "cross", "predict_ratio": 0.5, "masking": "block"},
    "masks": {"masks_per_image": 3, "masking": "grid", "positions": "learned", "class_token": False},
    "pca": {"target": "pca", "pca_components": 12, "mask_tokens": "encoder"},
    "tokens": {"target": "tokens", "vocabulary": 8, "image_size": (32, 48)},
    "grey": {"channels": 1, "image_size": (32, 48), "target": "pixel", "predict_ratio": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_each_trains_resumes_and_exports(make_shards, tmp_path: Path, name: str) -> None:
    """Stopped after a checkpoint and gone on with, it ends with the weights of the run that was not, bit for bit."""
    settings = {f"model__{key}": value for key, value in RUNS[name].items()}
    if name == "tokens":
        settings["model__tokenizer"] = str(brightness_tokenizer(tmp_path / "t.onnx"))
    if name == "grey":
        settings |= {"data__augmentation": "fixed_crop", "data__color_jitter": 0.4}
    shards = make_shards(7, 6)
    common = {"run__pictures_every": 6, "data__val": [str(shards)], "data__workers": 0, **settings}
    whole = maekit.pretrain(tiny_config(shards, tmp_path / "whole", run__keep_every=3, **common))
    assert whole.loss is not None
    assert whole.val_loss is not None
    run = RunDirectory(tmp_path / "whole")
    assert run.picture(8).is_file() == (name != "tokens")
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    (stopped / "encoder.safetensors").unlink()
    for step in (6, 8):
        shutil.rmtree(RunDirectory(stopped).checkpoint(step).path)
    assert maekit.pretrain(tiny_config(shards, stopped, run__keep_every=3, **common)).resumed_from == 3
    ours, theirs = (find_checkpoint(path)[1].path / "model.safetensors" for path in (stopped, tmp_path / "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    trained = load_autoencoder(str(tmp_path / "whole"))
    assert trained.masking == RUNS[name].get("masking", "random")
    exported = maekit.export(maekit.ExportConfig(str(tmp_path / "whole"), tmp_path / "encoder.onnx"))
    assert exported.parity.max_relative_difference < 1e-4
    vectors = maekit.Embedder(str(tmp_path / "encoder.onnx"), device="cpu")([np.zeros((40, 50, 3), np.uint8)])
    assert vectors.shape == (1, 32)
    timm_folder = tmp_path / "timm"
    maekit.export(maekit.ExportConfig(str(tmp_path / "whole"), timm_folder, format="timm"))
    loaded = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    assert torch.equal(loaded.pos_embed, trained.model.encoder.pos_embed)
    again = load_encoder(str(timm_folder))
    sides = again.preprocess.size, again.preprocess.resize
    assert sides == (trained.preprocess.size, trained.preprocess.resize)
    pixels = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8)
    channels = RUNS[name].get("channels", 3)
    ours, theirs = (
        Normalizer(p.mean, p.std, torch.device("cpu"), channels=channels)(pixels)
        for p in (trained.preprocess, again.preprocess)
    )
    torch.testing.assert_close(ours, theirs)
    # Its encoder alone, the run, and what timm would load start another training.
    both = {"model__init_from": str(timm_folder), "steps": 1}
    maekit.pretrain(tiny_config(shards, tmp_path / "from-timm", **settings, **both))
    assert load_encoder(str(tmp_path / "whole" / "encoder.safetensors")).name == "vit_tiny_patch16_224"
    fresh = tiny_config(shards, tmp_path / "next", steps=1, model__init_from=str(tmp_path / "whole"), **settings)
    maekit.pretrain(fresh)


def test_a_tokenizer_that_changed_is_refused_and_one_that_moved_is_not(make_shards, tmp_path: Path) -> None:
    path = brightness_tokenizer(tmp_path / "t.onnx", size=(32, 32))
    shards = make_shards(7)
    settings = {"model__target": "tokens", "model__vocabulary": 9, "model__image_size": 32}
    grid = brightness_tokenizer(path)  # of 4 x 6 patches, where there are 4 x 4
    with raises(InputError, match="4 x 4 patches want as many"):
        maekit.pretrain(tiny_config(shards, tmp_path / "run", model__tokenizer=str(grid), **settings))
    settings["model__image_size"] = (32, 48)
    config = tiny_config(shards, tmp_path / "ok", steps=2, model__tokenizer=str(path), **settings)
    maekit.pretrain(config)
    path.rename(tmp_path / "moved.onnx")
    set_value(config, "model.tokenizer", str(tmp_path / "moved.onnx"))
    assert maekit.pretrain(config).already_finished
    brightness_tokenizer(tmp_path / "moved.onnx", first="first")
    with raises(InputError, match=r"moved\.onnx is not the one that .* was started with"):
        maekit.pretrain(config)
    set_value(config, "model.tokenizer", str(tmp_path / "gone.onnx"))
    with raises(InputError, match=r"--tokenizer: cannot read .*gone\.onnx"):
        maekit.pretrain(config)


def test_a_tokenizers_weights_beside_it_count(tmp_path: Path) -> None:
    path = brightness_tokenizer(tmp_path / "t.onnx")
    alone = tokenizer_digest(path)
    model = onnx.load(path)
    weights = helper.make_tensor("unused", TensorProto.FLOAT, [600], np.zeros(600, np.float32).tobytes(), raw=True)
    model.graph.initializer.append(weights)
    onnx.save(model, path, save_as_external_data=True, location="t.data", size_threshold=1000)
    first = tokenizer_digest(path)
    assert first != alone
    (tmp_path / "t.data").write_bytes(np.ones(600, np.float32).tobytes())
    assert tokenizer_digest(path) != first
    (tmp_path / "t.data").unlink()
    with raises(InputError, match=r"--tokenizer: .*no such file beside it"):
        tokenizer_digest(path)


def test_what_never_took_a_step_can_be_started_otherwise(make_shards, tmp_path: Path) -> None:
    """A vocabulary that the first step finds too small is mended in the same run."""
    path = brightness_tokenizer(tmp_path / "t.onnx")
    settings = {"model__target": "tokens", "model__tokenizer": str(path), "model__image_size": (32, 48), "steps": 2}
    shards = make_shards(7)
    with raises(InputError, match="--vocabulary is 1"):
        maekit.pretrain(tiny_config(shards, tmp_path / "run", model__vocabulary=1, **settings))
    assert maekit.pretrain(tiny_config(shards, tmp_path / "run", model__vocabulary=8, **settings)).steps == 2


def test_a_target_on_the_command_line_drops_that_of_the_file(tmp_path: Path, monkeypatch) -> None:
    """With what belongs to it; and `--set` reads `none` where that is a value."""
    from typer.testing import CliRunner

    from maekit.cli.app import app
    from maekit.pretraining import pretrain as run

    seen: list[PretrainConfig] = []

    def stop(config: PretrainConfig, progress: object) -> None:
        seen.append(config)
        raise InputError("seen")

    monkeypatch.setattr(run, "pretrain", stop)
    file = tmp_path / "c.toml"
    file.write_text('[model]\ntarget = "tokens"\ntokenizer = "t.onnx"\nvocabulary = 8\n')
    arguments = ["pretrain", "shards", "--out", "run", "--config", str(file)]
    for more in ([], ["--target", "pca", "--pca-components", "8"], ["--target", "pixel"]):
        CliRunner().invoke(app, [*arguments, *more, "--set", "data.augmentation=none"])
    assert [(c.model.target, c.model.vocabulary, c.model.pca_components) for c in seen] == [
        ("tokens", 8, 96),
        ("pca", None, 8),
        ("pixel", None, 96),
    ]
    assert {c.data.augmentation for c in seen} == {"none"}
    CliRunner().invoke(app, ["pretrain", "shards", "--out", "run", "--set", "model.norm_pixel=false"])
    assert seen[-1].model.target == "pixel"


def test_twenty_steps_twice_are_bit_equal(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7, 6)
    changes = {"steps": 20, "model__decoder": "cross", "model__predict_ratio": 0.3, "model__masks_per_image": 2}
    for name in "ab":
        maekit.pretrain(tiny_config(shards, tmp_path / name, run__checkpoint_every=20, **changes))
    ours, theirs = (find_checkpoint(tmp_path / name)[1].path for name in "ab")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def test_weight_decay_by_name() -> None:
    """Norms and biases are not decayed; matrices, tokens and learned positions are; what is fixed is in no group."""
    from maekit.config import OptimizerConfig
    from maekit.training.optim import make_optimizer

    for changes in ({"positions": "learned"}, {"decoder": "cross"}, {"mask_tokens": "encoder"}, {"target": "pca"}):
        model = build(**changes)
        decayed, plain = (g["param_names"] for g in make_optimizer(model, OptimizerConfig()).param_groups)
        assert all(name.endswith(".bias") or re.search(r"norm\d?\.weight$", name) for name in plain)
        assert not any(name.endswith(".bias") or "norm" in name for name in decayed)
        fixed = {"decoder.pos_embed", "target.mean", "target.components", "encoder.pos_embed"}
        if "positions" in changes:
            fixed.remove("encoder.pos_embed")
            assert "encoder.pos_embed" in decayed
        assert {*decayed, *plain} == {name for name, _ in model.named_parameters()} - fixed
    assert {"mask_token"} <= set(
        make_optimizer(build(mask_tokens="encoder"), OptimizerConfig()).param_groups[0]["param_names"]
    )


def test_a_run_of_an_earlier_version_is_read(make_shards, tmp_path: Path) -> None:
    """It says `norm_pixel` where the target is said now, and goes on."""
    shards = make_shards(7)
    config = tiny_config(shards, tmp_path / "run", steps=4, model__target="pixel")
    maekit.pretrain(config)
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace('target = "pixel"', "norm_pixel = false"))
    assert load_config(file).model.target == "pixel"
    assert maekit.pretrain(config).already_finished


def test_a_square_said_twice_is_a_square(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7)
    config = tiny_config(shards, tmp_path / "run", steps=2)
    maekit.pretrain(config)
    set_value(config, "model.image_size", [32, 32])
    assert maekit.pretrain(config).already_finished
    with raises(InputError, match=r"model\.image_size = '32': must be a whole number or a list of 2 values"):
        set_value(config, "model.image_size", "32")


def test_build_encoder_needs_widths_for_positions() -> None:
    """Sine-cosine positions want a multiple of 4; learned ones do not."""
    sizes = {**SIZES, "width": 50, "heads": 5}
    with raises(InputError, match="multiple of 4"):
        build_encoder(ModelConfig(**sizes))
    assert build_encoder(ModelConfig(**sizes, positions="learned")).embed_dim == 50
