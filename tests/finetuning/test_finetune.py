"""Supervised training: it learns, trains what it should, mixes as published, and goes on exactly."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.errors import raises
from support.planted import picture, plant
from support.processes import TINY, finish, start, tiny_config
from support.shards import write_shard
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app
from maekit.config import ModelConfig
from maekit.config.check import InspectConfig
from maekit.config.finetune import (
    ClassifierConfig,
    FinetuneConfig,
    MixConfig,
    SupervisedOptimizer,
    finetuning,
    linear_probing,
    training_from_scratch,
)
from maekit.config.settings import set_value
from maekit.finetuning.classifier import Classifier, LabelledUpload, make_optimizer
from maekit.finetuning.finetune import finetune
from maekit.finetuning.rand_augment import RandAugment
from maekit.mae.encoder import build_encoder
from maekit.mae.normalize import Normalizer
from maekit.runs import RunDirectory
from maekit.system.errors import InputError, MaekitError
from maekit.training.crops import Chunk

CPU = torch.device("cpu")
PLAIN = {"mix.rand_augment": "none", "mix.mixup": 0.0, "mix.cutmix": 0.0, "mix.erase": 0.0, "model.drop_path": 0.0}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with labelled `train` and `test`, and a `run` of a tiny model."""
    folder = tmp_path_factory.mktemp("planted")
    plant(folder / "train", 0, 24, 24)
    plant(folder / "test", 1000, 20)
    maekit.pretrain(tiny_config(folder / "train", folder / "run"))
    return folder


def settings(planted: Path, out: Path, preset: FinetuneConfig | None = None, **changes) -> FinetuneConfig:
    config = preset or finetuning()
    config.epochs = None
    config.shards, config.test, config.out = (str(planted / "train"),), (str(planted / "test"),), str(out)
    chosen = {
        "model.source": str(planted / "run"),
        "steps": 30,
        "batch_size": 12,
        "optimizer.lr": 0.05,
        "data.workers": 0,
        "run.device": "cpu",
        "run.precision": "fp32",
        "run.threads": 1,
        "run.log_every": 5,
        "run.checkpoint_every": 10,
        "run.tensorboard": False,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    for key, value in chosen.items():
        set_value(config, key, value)
    return config


@pytest.mark.parametrize(
    ("preset", "changes", "trained"),
    [
        (finetuning, {}, None),
        (finetuning, {"model__blocks": 1}, ("blocks.1.", "norm.")),
        (finetuning, {"model__blocks": 0.5}, ("blocks.1.norm2.", "blocks.1.mlp.", "norm.")),
        (finetuning, {"model__blocks": 0, "model__pool": "avg+cls"}, ()),
        (finetuning, {"model__blocks": 1, "model__pool": "avg+std"}, ("blocks.1.", "norm.")),
        (finetuning, {"model__blocks": 1, "model__pool": "avg2x2"}, ("blocks.1.", "norm.")),
        (linear_probing, {"optimizer__lr": 130.0, "steps": 300}, ()),
        (training_from_scratch, {"optimizer__lr": 0.02}, None),
    ],
)
def test_it_learns_a_planted_task_and_trains_what_it_should(
    planted: Path, tmp_path: Path, preset, changes: dict, trained: tuple[str, ...] | None
) -> None:
    config = settings(planted, tmp_path / "out", preset(), **changes)
    result = finetune(config)
    assert result.accuracy == 1.0
    assert result.steps == config.steps
    before, after = load_file(planted / "run/encoder.safetensors"), load_file(tmp_path / "out/encoder.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    if trained is None:
        assert changed == set(after)
    else:
        assert changed == {name for name in after if name.startswith(trained) and trained}
    head = load_file(tmp_path / "out/head.safetensors")
    assert len(head["head.weight"]) == 4
    assert ("norm.running_var" in head) == (preset is linear_probing)
    encoder = sum(after[name].numel() for name in after if trained is None or (trained and name.startswith(trained)))
    assert result.trained == encoder + head["head.weight"].numel() + 4


@pytest.mark.parametrize("preset", [finetuning, linear_probing])
def test_a_stopped_training_goes_on_exactly(planted: Path, tmp_path: Path, preset) -> None:
    changes = {"model__drop_path": 0.3} if preset is finetuning else {}
    finetune(settings(planted, tmp_path / "whole", preset(), **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    run = RunDirectory(tmp_path / "stopped")
    shutil.rmtree(run.checkpoint(30).path)
    run.encoder_file.unlink()
    result = finetune(settings(planted, tmp_path / "stopped", preset(), **changes))
    assert result.resumed_from == 20
    for name in ("encoder.safetensors", "head.safetensors", "checkpoints/step-000000030/optimizer.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = finetune(settings(planted, tmp_path / "stopped", preset(), **changes))
    assert again.already_finished
    assert again.accuracy == result.accuracy


def test_processes_divide_it(planted: Path, tmp_path: Path) -> None:
    plain = {key.replace(".", "__"): value for key, value in PLAIN.items()}
    finetune(settings(planted, tmp_path / "one", steps=6, **plain))
    config = settings(planted, tmp_path / "two", steps=6, **plain)
    assert finish(start(config, tmp_path / "log", world=2)) == [0, 0], (tmp_path / "log").read_text()
    one, two = (load_file(tmp_path / name / "encoder.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)
    measured = [RunDirectory(tmp_path / name).metrics()[-1] for name in ("one", "two")]
    assert measured[0]["accuracy"] == measured[1]["accuracy"]
    assert measured[0]["test_loss"] == pytest.approx(measured[1]["test_loss"], rel=1e-3)


def test_the_figures_are_kept_in_the_run_and_the_encoder_can_be_exported(planted: Path, tmp_path: Path) -> None:
    result = finetune(settings(planted, tmp_path / "half", steps=4, model__blocks=0.5))
    assert result.path is not None
    assert re.fullmatch(r".*/run/evaluations/finetune-half-[0-9a-f]{6}-step-000000008\.json", result.path)
    other = finetune(settings(planted, tmp_path / "other/half", steps=2, model__blocks=0.5))
    assert other.path not in (None, result.path)
    kept = json.loads(Path(result.path).read_text())
    assert kept["task"] == "finetune"
    assert kept["rows"] == [{"name": "half", "blocks": "0.5", "steps": 4, "accuracy": result.accuracy}]
    exported = maekit.export(
        maekit.ExportConfig(tmp_path / "half/encoder.safetensors", tmp_path / "e.onnx", parity=(str(planted / "test"),))
    )
    assert exported.dim == 32


def test_samples_without_a_label_are_replaced_and_counted(planted: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "train/bad.tar", {"a": {"png": picture(0)}, "b": {"png": b"x", "cls": b"1"}})
    plant(tmp_path / "train", 0, 22)
    shutil.copytree(planted / "test", tmp_path / "test")
    write_shard(tmp_path / "test/bad.tar", {"u": {"png": b"", "cls": b"1"}, "v": {"png": picture(1), "cls": b"new"}})
    (tmp_path / "run").symlink_to(planted / "run")
    result = finetune(settings(tmp_path, tmp_path / "out", steps=20, data__max_bad=0.2))
    assert result.bad == 2 * 20 * 12 // 24  # two of 24, each epoch
    assert result.accuracy == 20 / 21  # of those that can be read; a class that is not learned is never right
    with raises(InputError, match=r"1 of 24 training samples have no label, more than --max-bad 0.01"):
        finetune(settings(tmp_path, tmp_path / "strict"))
    with raises(MaekitError, match=r"samples cannot be used, more than --max-bad 0.05"):
        finetune(settings(tmp_path, tmp_path / "strict", data__max_bad=0.05))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__blocks": 3}, "--blocks 3: this model has 2"),
        ({"model__blocks": 1.5}, "must be all, 0, 0.5, or a whole number"),
        ({"model__blocks": 1, "model__from_scratch": True}, "does not go with --blocks"),
        ({"batch_size": 7}, "mix pairs of images"),
        ({"run__micro_batch": 1}, "mix pairs of images"),
        ({"run__micro_batch": 1, "model__batch_norm": True, "mix__mixup": 0.0, "mix__cutmix": 0.0}, "two images"),
        ({"model__blocks": math.inf}, "must be all, 0, 0.5"),
        ({"optimizer__layer_decay": 3}, "optimizer.layer_decay"),
        ({"optimizer__momentum": 0.5}, "optimizer.momentum is not for adamw"),
        ({"run__pictures_every": 3}, "it draws nothing"),
        ({"model__pool": "max"}, "--pool max"),
        ({"mix__rand_augment": "nonsense"}, "timm knows no such policy"),
        ({"mix__erase": 1.5}, "mix.erase"),
        ({"model__drop_path": 1.0}, "model.drop_path"),
        ({"test": ("missing/",)}, "missing"),
        ({"model__source": "missing"}, "does not exist"),
        ({"data__std": (0.5, 0.5, 0.5)}, "the model's own is taken"),
        ({"data__val_images": 7}, "use --test-images"),
    ],
)
def test_what_is_refused(planted: Path, tmp_path: Path, changes: dict, said: str) -> None:
    with raises(InputError, match=said):
        finetune(settings(planted, tmp_path / "out", **changes))
    assert not (tmp_path / "out/finetune.toml").exists()


def test_a_damaged_start_is_told(planted: Path, tmp_path: Path) -> None:
    finetune(settings(planted, tmp_path / "out", steps=4))
    for content in ("{", "[]", "{}"):
        (tmp_path / "out/start.json").write_text(content)
        with raises(InputError, match=r"start\.json is damaged"):
            finetune(settings(planted, tmp_path / "out", steps=4))


def test_a_test_set_of_other_classes_is_refused(planted: Path, tmp_path: Path) -> None:
    """Before a step, not at the first checkpoint."""
    other = plant(tmp_path / "other", 0, 12, label=lambda number: "zz")
    with raises(InputError, match="--train has none of its classes, such as 'zz'"):
        finetune(settings(planted, tmp_path / "out", test=(str(other),)))
    assert not (tmp_path / "out/finetune.toml").exists()


def test_another_training_is_refused(planted: Path, tmp_path: Path) -> None:
    finetune(settings(planted, tmp_path / "out", steps=4))
    with raises(InputError, match=r"started with mix.mixup = 0.8, and now it is 0.1"):
        finetune(settings(planted, tmp_path / "out", steps=4, mix__mixup=0.1))
    other = tmp_path / "other"
    maekit.pretrain(tiny_config(planted / "train", other, seed=5))
    with raises(InputError, match="holds other weights than"):
        finetune(settings(planted, tmp_path / "out", steps=4, model__source=str(other)))
    with raises(InputError, match="is no directory of fine-tuning"):
        finetune(settings(planted, other, steps=4))


def test_layers_learn_at_their_own_rates() -> None:
    encoder = build_encoder(ModelConfig(**{key[6:]: value for key, value in TINY.items() if "decoder" not in key}))
    model = Classifier(encoder, 3, ClassifierConfig(pool="avg"), seed=0)
    optimizer = make_optimizer(model, SupervisedOptimizer(layer_decay=0.5, weight_decay=0.1))
    scale = {name: g["lr_scale"] for g in optimizer.param_groups for name in g["param_names"]}
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert set(scale) == {name for name, _ in model.named_parameters()}
    assert scale["head.weight"] == 1
    # Two blocks: embedding, block 0, block 1, then norm and head (Clark et al. 2020; BEiT).
    assert scale["encoder.blocks.1.attn.qkv.weight"] == 0.5
    assert scale["encoder.blocks.0.mlp.fc1.bias"] == 0.25
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.cls_token"] == 0.125
    assert decay["encoder.blocks.0.mlp.fc1.bias"] == decay["encoder.cls_token"] == decay["encoder.pos_embed"] == 0
    assert decay["encoder.blocks.0.mlp.fc1.weight"] == 0.1


def test_lars_scales_by_the_ratio_of_norms() -> None:
    encoder = build_encoder(ModelConfig(**{key[6:]: value for key, value in TINY.items() if "decoder" not in key}))
    model = Classifier(encoder, 3, ClassifierConfig(pool="cls", batch_norm=True, blocks=0), seed=0)
    optimizer = make_optimizer(model, SupervisedOptimizer(kind="lars", weight_decay=0.0, momentum=0.9))
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    weight, bias = model.head.weight, model.head.bias
    before = weight.detach().clone(), bias.detach().clone()
    weight.grad, bias.grad = torch.full_like(weight, 0.5), torch.full_like(bias, 0.5)
    trust = 0.001 * before[0].norm() / weight.grad.norm()  # You et al. 2017, equation 6
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before[0] - 2 * trust * 0.5)
    torch.testing.assert_close(bias.detach(), before[1] - 2 * 0.5)
    optimizer.found_inf = torch.ones(())
    now = weight.detach().clone()
    optimizer.step()
    assert torch.equal(now, weight)


@pytest.mark.parametrize(
    ("mix", "share"), [(MixConfig("none", 0.0, 0.0, 0.1, 0.0), 0.9), (MixConfig("none", 0, 0, 0, 0), 1)]
)
def test_targets_without_mixing(mix: MixConfig, share: float) -> None:
    upload = LabelledUpload(Normalizer((0.5,) * 3, (0.5,) * 3, CPU), CPU, 4, mix)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    chunk = Chunk(images, torch.tensor([False, True]), torch.rand(2, 2), [], labels=torch.tensor([2, 0]))
    pixels, targets = upload([chunk])
    torch.testing.assert_close(pixels[0], images[0] / 127.5 - 1)
    torch.testing.assert_close(pixels[1], images[1].flip(2) / 127.5 - 1)
    expected = torch.full((2, 4), (1 - share) / 4)
    expected[0, 2] = expected[1, 0] = share + (1 - share) / 4
    torch.testing.assert_close(targets, expected)


def test_mixup_and_cutmix_mix_images_as_their_targets_say() -> None:
    mix = MixConfig("none", 0.8, 1.0, 0.0, 0.0)
    upload = LabelledUpload(Normalizer((0.0,) * 3, (1.0,) * 3, CPU), CPU, 2, mix)
    images = torch.stack([torch.zeros(3, 16, 16), torch.full((3, 16, 16), 255)]).to(torch.uint8)
    kinds = set()
    for seed in range(12):
        np.random.seed(seed)
        chunk = Chunk(images, torch.zeros(2, dtype=torch.bool), torch.rand(2, 2), [], labels=torch.tensor([0, 1]))
        pixels, targets = upload([chunk])
        # Black is class 0 and white class 1: the mean brightness is the share of class 1.
        torch.testing.assert_close(pixels.mean(dim=(1, 2, 3)), targets[:, 1], atol=1e-4, rtol=0)
        kinds.add(len(pixels[0].unique()))
    assert kinds == {1, 2}  # mixed all over, and pasted


def test_a_policy_is_a_function_of_its_seed() -> None:
    policy = RandAugment("rand-m9-mstd0.5-inc1", (32, 32), (0.5, 0.5, 0.5))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.uint8)
    one = [policy(pixels, seed) for seed in range(6)]
    np.random.seed(99)
    two = [policy(pixels, seed) for seed in range(6)]
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert len({image.tobytes() for image in one}) > 3
    for seed in range(400):  # 22 asks for a picture of no bits
        assert policy(pixels, seed).shape == pixels.shape


def test_the_final_weights_are_measured_on_the_set_that_is_asked_for(planted: Path, tmp_path: Path) -> None:
    first = finetune(settings(planted, tmp_path / "out"))
    wrong = plant(tmp_path / "wrong", 2000, 8, label=lambda number: str((number + 1) % 4))
    other = finetune(settings(planted, tmp_path / "out", test=(str(wrong),)))
    assert other.already_finished
    assert (first.accuracy, other.accuracy) == (1.0, 0.0)
    again = finetune(settings(planted, tmp_path / "out"))
    assert (again.accuracy, again.test_loss) == (first.accuracy, first.test_loss)
    # Killed behind the last checkpoint, before its test.
    run = RunDirectory(tmp_path / "out")
    rows = [row for row in run.metrics() if "accuracy" not in row or row["step"] < 30]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.encoder_file.unlink()
    late = finetune(settings(planted, tmp_path / "out"))
    assert (late.accuracy, late.test_loss) == (first.accuracy, pytest.approx(first.test_loss))


def test_it_goes_on_without_the_run_it_came_from(planted: Path, tmp_path: Path) -> None:
    shutil.copytree(planted / "run", tmp_path / "run")
    config = settings(planted, tmp_path / "out", model__source=str(tmp_path / "run"))
    whole = finetune(config)
    files = [tmp_path / "out/encoder.safetensors", tmp_path / "out/head.safetensors"]
    expected = [file.read_bytes() for file in files]
    shutil.rmtree(tmp_path / "run")
    run = RunDirectory(tmp_path / "out")
    shutil.rmtree(run.checkpoint(30).path)
    files[0].unlink()
    result = finetune(config)
    assert (result.resumed_from, result.path) == (20, None)
    assert [file.read_bytes() for file in files] == expected
    assert result.accuracy == whole.accuracy


def test_labels_that_changed_are_refused(planted: Path, tmp_path: Path) -> None:
    train = plant(tmp_path / "train", 0, 24)
    finetune(settings(planted, tmp_path / "out", steps=2, shards=(str(train),)))
    plant(train, 0, 24, label=lambda number: str((number + 1) % 4))
    with raises(InputError, match="started with labels_sha256"):
        finetune(settings(planted, tmp_path / "out", steps=2, shards=(str(train),)))


def test_a_micro_batch_by_memory_keeps_pairs_together(planted: Path, tmp_path: Path, monkeypatch) -> None:
    from maekit.training import step

    monkeypatch.setattr(step, "_CPU_ACTIVATIONS", 1)
    assert finetune(settings(planted, tmp_path / "out", steps=2, batch_size=18)).steps == 2


def test_the_commands(planted: Path, tmp_path: Path) -> None:
    common = ["--train", str(planted / "train"), "--test", str(planted / "test"), "--workers", "0", "--device", "cpu"]
    common += ["--set", "run.threads=1", "--set", "run.tensorboard=false", "--json"]
    for command, more in (
        ("finetune", ["--blocks", "1", "--batch-size", "12", "--steps", "4", "--rand-augment", "none"]),
        ("probe", ["--batch-size", "24", "--epochs", "1"]),
    ):
        out = str(tmp_path / command)
        done = CliRunner().invoke(app, ["evaluate", command, str(planted / "run"), "--out", out, *common, *more])
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["steps"] == (4 if command == "finetune" else 2)
        assert 0 <= result["accuracy"] <= 1
    done = CliRunner().invoke(app, ["evaluate", "finetune", str(planted / "run"), *common])
    assert done.exit_code == 2
    assert "--out" in done.output


def test_what_it_leaves_is_known_elsewhere(planted: Path, tmp_path: Path) -> None:
    from maekit.inspection import inspect

    result = finetune(settings(planted, tmp_path / "tuned", steps=4))
    seen = inspect(InspectConfig(str(tmp_path / "tuned")))
    assert (seen["kind"], seen["finished"]) == ("finetune", True)
    assert seen["tested"]["accuracy"] == result.accuracy
    again = finetune(settings(planted, tmp_path / "again", steps=2, model__source=str(tmp_path / "tuned")))
    assert again.path is None  # of no run
    (tmp_path / "tuned/encoder.safetensors").unlink()
    with raises(InputError, match="has not ended"):
        finetune(settings(planted, tmp_path / "third", steps=2, model__source=str(tmp_path / "tuned")))
