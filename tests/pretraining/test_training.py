import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.errors import raises
from support.processes import TINY, tiny_config
from support.shards import jpeg, write_shard

import maekit
from maekit.cli.options import with_flags
from maekit.config import ModelConfig, OptimizerConfig
from maekit.config.settings import set_value
from maekit.mae.autoencoder import build_autoencoder
from maekit.pretrained.load import load_autoencoder
from maekit.runs import RunDirectory, find_checkpoint
from maekit.system.errors import InputError, MaekitError, Stopped
from maekit.system.progress import Silent
from maekit.training import checkpoint
from maekit.training.optim import make_optimizer, make_schedule

pytestmark = pytest.mark.whole


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_autoencoder(str(run)).model.state_dict()


def assert_equal_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_schedule_against_closed_forms() -> None:
    schedule = make_schedule(
        OptimizerConfig(lr=1.5e-4, warmup_epochs=40), batch_size=4096, samples=1_281_167, steps=250_300
    )
    peak = 1.5e-4 * 16
    warmup = math.ceil(40 * 1_281_167 / 4096)
    assert schedule.warmup_steps == warmup
    assert schedule.at(0) == 0
    assert schedule.at(warmup // 2) == pytest.approx(peak * (warmup // 2) / warmup)
    assert schedule.at(warmup) == pytest.approx(peak)
    half = warmup + (250_300 - warmup) / 2
    assert schedule.at(int(half)) == pytest.approx(peak / 2, rel=1e-4)
    last = peak * 0.5 * (1 + math.cos(math.pi * (250_299 - warmup) / (250_300 - warmup)))
    assert schedule.at(250_299) == pytest.approx(last)
    assert 0 < last < 1e-8
    assert schedule.at(250_300) == pytest.approx(0, abs=1e-12)


def test_warmup_is_at_most_a_tenth() -> None:
    assert make_schedule(OptimizerConfig(), batch_size=16, samples=334, steps=60).warmup_steps == 6


def test_weight_decay_groups() -> None:
    model = build_autoencoder(ModelConfig(**{k[6:]: v for k, v in TINY.items()}), seed=0)
    decayed, plain = make_optimizer(model, OptimizerConfig()).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} <= set(decayed["param_names"])
    assert all(name.endswith(".bias") or "norm" in name for name in plain["param_names"])
    assert not any("pos_embed" in name for group in (decayed, plain) for name in group["param_names"])


def test_a_run_writes_what_it_promises(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(9, 8), tmp_path / "run", run__pictures_every=8, steps=8)
    result = maekit.pretrain(config)
    run = RunDirectory(tmp_path / "run")
    assert (result.steps, result.samples, result.bad) == (8, 48, 0)
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"epoch", "samples", "loss", "lr", "grad_norm", "images_per_second", "data_wait"} <= set(rows[0])
    assert [c.step for c in run.list_checkpoints()] == [8, 6]
    assert all(c.problem() is None for c in run.list_checkpoints())
    names = {p.name for p in run.checkpoint(8).path.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert run.picture(8).is_file()

    # 8 pictures in a column; 96 pixels each with 4 between them: masked | reconstruction | original
    sheet = Image.open(run.picture(8))
    assert sheet.size == (3 * 100 + 4, 8 * 100 + 4)
    import timm

    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    from safetensors.torch import load_file

    encoder.load_state_dict(load_file(run.encoder_file), strict=True)
    assert torch.equal(encoder.norm.weight, weights(run.path)["encoder.norm.weight"])


def test_training_learns(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(12, 12), tmp_path / "run", steps=60, batch_size=12)
    maekit.pretrain(config)
    losses = [row["loss"] for row in RunDirectory(tmp_path / "run").metrics()]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_the_same_config_gives_the_same_weights(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7, 6)
    for name, workers in (("a", 0), ("b", 2)):
        maekit.pretrain(tiny_config(shards, tmp_path / name, data__workers=workers))
    assert_equal_weights(tmp_path / "a", tmp_path / "b")


def test_a_finished_run_says_so_and_changes_nothing(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(7, 6), tmp_path / "run")
    first = maekit.pretrain(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    again = maekit.pretrain(config)
    assert again.already_finished
    assert (again.steps, again.loss) == (first.steps, first.loss)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}


SCRIPT = """
import sys, maekit
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.processes import tiny_config
from maekit.system.errors import Stopped
try:
    maekit.pretrain(tiny_config(Path({shards!r}), Path({out!r}), steps=40, run__checkpoint_every=4))
except Stopped:
    sys.exit(75)
"""


def start(shards: Path, out: Path, cwd: Path) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), shards=str(shards), out=str(out))
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for_checkpoint(out: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / f"step-{step:09d}").exists():
        assert process.poll() is None, "ended too early to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_and_resumed_is_bit_equal(make_shards, tmp_path: Path) -> None:
    """SIGKILL after a checkpoint; the same config at once goes on and ends as if nothing had happened."""
    shards = make_shards(9, 14, 5)
    config = tiny_config(shards, tmp_path / "whole", steps=40, run__checkpoint_every=4)
    maekit.pretrain(config)
    process = start(shards, tmp_path / "killed", tmp_path)
    wait_for_checkpoint(tmp_path / "killed", 8, process)
    process.kill()
    process.wait()
    config.out = str(tmp_path / "killed")
    result = maekit.pretrain(config)
    assert 8 <= result.resumed_from < 40
    assert_equal_weights(tmp_path / "whole", tmp_path / "killed")
    rows = {name: RunDirectory(tmp_path / name).metrics() for name in ("whole", "killed")}
    assert [(r["step"], r["loss"]) for r in rows["whole"]] == [(r["step"], r["loss"]) for r in rows["killed"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_exits_75(make_shards, tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal sends Ctrl-C and schedulers send SIGTERM: to the workers as well."""
    shards = make_shards(9, 14, 5)
    process = start(shards, tmp_path / "run", tmp_path)
    wait_for_checkpoint(tmp_path / "run", 4, process)
    os.killpg(process.pid, number)
    assert process.wait(60) == 75
    run = RunDirectory(tmp_path / "run")
    newest = run.newest_valid()
    assert newest is not None
    # Nothing behind the last step is lost: the checkpoint stands at the last logged step.
    assert newest.step == run.metrics()[-1]["step"]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(7, 6), tmp_path / "run")
    maekit.pretrain(config)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    newest = RunDirectory(tmp_path / "run").checkpoint(8).path / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(with_flags(text))

    result = maekit.pretrain(config, Notes())
    assert result.resumed_from == 6
    assert any("step-000000008 is damaged" in note for note in notes)
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


def test_without_any_valid_checkpoint_nothing_is_deleted(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(7, 6), tmp_path / "run")
    maekit.pretrain(config)
    for saved in RunDirectory(tmp_path / "run").list_checkpoints():
        (saved.path / "manifest.json").write_text("{}")
    with raises(InputError, match="none of 2 checkpoints"):
        maekit.pretrain(config)
    assert len(RunDirectory(tmp_path / "run").list_checkpoints()) == 2


def test_a_killed_worker_is_an_error_in_one_line(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(9, 14, 5), tmp_path / "run", steps=4000, run__checkpoint_every=4000)

    class KillWorker(Silent):
        def advance(self, done: int) -> None:
            if done == 3:
                import multiprocessing

                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)

    with raises(MaekitError, match="reading the data failed"):
        maekit.pretrain(config, KillWorker())


def test_optimizer_state_survives(make_shards, tmp_path: Path) -> None:
    maekit.pretrain(tiny_config(make_shards(7, 6), tmp_path / "run"))
    _, newest = find_checkpoint(tmp_path / "run")
    model = build_autoencoder(ModelConfig(**{k[6:]: v for k, v in TINY.items()}), seed=9)
    optimizer = make_optimizer(model, OptimizerConfig())
    assert checkpoint.load(newest, model, optimizer)["step"] == 8
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
            assert optimizer.state[parameter]["step"].item() == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 5),
        ("seed", 4),
        ("steps", 9),
        ("model.mask_ratio", 0.5),
        ("model.target", "pixel"),
        ("optimizer.lr", 2e-2),
        ("data.crop_scale", [0.5, 1.0]),
    ],
)
def test_what_changes_the_training_is_refused_by_name(make_shards, tmp_path: Path, key: str, value) -> None:
    config = tiny_config(make_shards(7, 6), tmp_path / "run", steps=2)
    maekit.pretrain(config)
    set_value(config, key, value)
    with raises(InputError, match=key.replace(".", r"\.")):
        maekit.pretrain(config)


def test_other_data_is_refused(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(7, 6), tmp_path / "run", steps=2)
    maekit.pretrain(config)
    config.shards = (str(make_shards(7, 7, name="other")),)
    with raises(InputError, match="other data"):
        maekit.pretrain(config)


def test_a_second_process_is_refused(make_shards, tmp_path: Path) -> None:
    shards = make_shards(9, 14, 5)
    process = start(shards, tmp_path / "run", tmp_path)
    wait_for_checkpoint(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGSTOP)
    try:
        with raises(InputError, match=f"in use by process {process.pid}"):
            maekit.pretrain(tiny_config(shards, tmp_path / "run", steps=40, run__checkpoint_every=4))
    finally:
        process.kill()
        process.wait()


def bad_shards(directory: Path, good: int, bad: int) -> Path:
    samples = {f"g{i}": {"jpg": jpeg(i)} for i in range(good)}
    samples |= {f"b{i}": {"jpg": b"<html>"} if i % 2 else {"txt": b""} for i in range(bad)}
    write_shard(directory / "x.tar", samples)
    return directory


def test_bad_samples_are_replaced_and_counted(tmp_path: Path) -> None:
    shards = bad_shards(tmp_path / "shards", 20, 2)
    result = maekit.pretrain(tiny_config(shards, tmp_path / "run", data__max_bad=0.5, steps=11, batch_size=4))
    assert result.bad == 4  # two epochs of two
    assert RunDirectory(tmp_path / "run").metrics()[-1]["bad"] == 4


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    shards = bad_shards(tmp_path / "shards", 4, 60)
    with raises(MaekitError, match=r"more than --max-bad 0\.01.*x\.tar b\d+"):
        maekit.pretrain(tiny_config(shards, tmp_path / "run", steps=50))


def test_max_bad_is_a_share_of_small_sets_too(tmp_path: Path) -> None:
    shards = bad_shards(tmp_path / "shards", 39, 1)
    with raises(MaekitError, match="1 of"):
        maekit.pretrain(tiny_config(shards, tmp_path / "strict", steps=10, batch_size=4))
    config = tiny_config(shards, tmp_path / "run", steps=10, batch_size=4, data__max_bad=0.05)
    assert maekit.pretrain(config).bad == 1  # one epoch, one bad sample


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    with raises(MaekitError, match="in a row cannot be used"):
        maekit.pretrain(tiny_config(bad_shards(tmp_path / "shards", 0, 5), tmp_path / "run"))


def test_a_loss_that_is_not_finite_is_never_saved(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(7, 6), tmp_path / "run", optimizer__lr=1e30, steps=20)
    with raises(MaekitError, match=r"not finite at step \d+ .*\d\d\d\.tar \d{6}"):
        maekit.pretrain(config)
    for saved in RunDirectory(tmp_path / "run").list_checkpoints():
        assert saved.problem() is None
        loaded = checkpoint.read_safetensors(saved.path / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in loaded.values())


def test_damaged_shards_exit_before_training(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7, 6)
    (shards / "001.tar").write_bytes((shards / "001.tar").read_bytes()[:3000])
    config = tiny_config(shards, tmp_path / "run")
    with raises(InputError, match=r"001\.tar.*--skip-damaged"):
        maekit.pretrain(config)
    assert not (tmp_path / "run").exists()
    config.data.skip_damaged = True
    assert maekit.pretrain(config).steps == 8


def test_init_from_run_and_file(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7, 6)
    maekit.pretrain(tiny_config(shards, tmp_path / "donor"))
    donor = weights(tmp_path / "donor")
    torch.save({"model": {k[8:]: v for k, v in donor.items() if k.startswith("encoder.")}}, tmp_path / "donor.pth")
    for number, source in enumerate(
        (tmp_path / "donor", tmp_path / "donor/encoder.safetensors", tmp_path / "donor.pth")
    ):
        out = tmp_path / f"run{number}"
        # A vanishing learning rate: the weights stay those it started from.
        maekit.pretrain(tiny_config(shards, out, model__init_from=str(source), steps=1, seed=5, optimizer__lr=1e-30))
        got = weights(out)
        assert all(torch.equal(got[k], donor[k]) for k in donor if k.startswith("encoder."))
        has_decoder = number == 0
        assert torch.equal(got["decoder.embed.weight"], donor["decoder.embed.weight"]) == has_decoder


def test_init_from_brings_its_sizes(make_shards, tmp_path: Path) -> None:
    """Neither name nor sizes are given again, and resuming works when the source is gone."""
    shards = make_shards(7, 6)
    maekit.pretrain(tiny_config(shards, tmp_path / "donor", steps=1))
    for number, source in enumerate(("donor", "donor/checkpoints/step-000000001", "donor/encoder.safetensors")):
        config = tiny_config(shards, tmp_path / f"run{number}", model__init_from=str(tmp_path / source), steps=1)
        for name in ("name", "patch_size", "width", "depth", "heads"):
            setattr(config.model, name, None)
        maekit.pretrain(config)
        assert RunDirectory(tmp_path / f"run{number}").config().model.width == 32
    shutil.rmtree(tmp_path / "donor")
    assert maekit.pretrain(config).already_finished


def test_init_from_what_does_not_fit(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7, 6)
    maekit.pretrain(tiny_config(shards, tmp_path / "donor", steps=1))
    config = tiny_config(shards, tmp_path / "run", model__init_from=str(tmp_path / "donor"), model__depth=3)
    with raises(InputError, match=r"missing blocks\.2"):
        maekit.pretrain(config)
    config = tiny_config(shards, tmp_path / "run", model__init_from="nowhere")
    with raises(InputError, match="does not exist"):
        maekit.pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_pickle_runs_no_code(make_shards, tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload()))
    torch.save({"model": Payload()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        config = tiny_config(make_shards(7), tmp_path / "run", model__init_from=str(tmp_path / name))
        with raises(InputError, match="cannot read weights"):
            maekit.pretrain(config)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.mask_ratio", 1.0),
        ("model.mask_ratio", 0.99),
        ("model.image_size", 30),
        ("model.decoder_width", 30),
        ("batch_size", 0),
        ("run.device", "tpu"),
        ("optimizer.lr", -1.0),
        ("data.crop_scale", [0.5, 0.2]),
        ("run.device", "cuda"),
    ],
)
def test_impossible_settings(make_shards, tmp_path: Path, key: str, value) -> None:
    if key == "run.device" and value == "cuda" and torch.cuda.is_available():
        value = "opencl"
    shards = make_shards(7)

    def train() -> None:
        config = tiny_config(shards, tmp_path / "run")
        set_value(config, key, value)
        maekit.pretrain(config)

    with pytest.raises(InputError):
        train()
    assert not (tmp_path / "run").exists()


def test_bf16_trains(make_shards, tmp_path: Path) -> None:
    """Through autocast, in whatever way this hardware does it; losses are close to fp32, weights stay fp32."""
    shards = make_shards(7, 6)
    losses = {}
    for precision in ("fp32", "bf16"):
        maekit.pretrain(tiny_config(shards, tmp_path / precision, run__precision=precision))
        losses[precision] = RunDirectory(tmp_path / precision).metrics()[-1]["loss"]
    assert losses["fp32"] != losses["bf16"]
    assert losses["fp32"] == pytest.approx(losses["bf16"], rel=0.02)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "bf16").values())


def test_stopped_is_an_error_with_exit_code_75() -> None:
    assert Stopped.exit_code == 75


def test_state_is_json(make_shards, tmp_path: Path) -> None:
    maekit.pretrain(tiny_config(make_shards(7), tmp_path / "run", steps=1))
    state = json.loads((RunDirectory(tmp_path / "run").checkpoint(1).path / "state.json").read_text())
    assert (state["step"], state["samples_per_epoch"]) == (1, 7)
