import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.errors import raises
from support.processes import TINY, tiny_config
from torch.nn import functional

import maekit
from maekit.cli.options import with_flags
from maekit.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, OptimizerConfig, parse_duration
from maekit.mae import kernels
from maekit.mae.autoencoder import build_autoencoder
from maekit.mae.kernels import OneDnnLinear, choose_kernels
from maekit.mae.normalize import Normalizer
from maekit.runs import RunDirectory, find_checkpoint
from maekit.system.errors import InputError, MaekitError, Stopped
from maekit.system.progress import Silent
from maekit.training import checkpoint
from maekit.training.checkpoint import CheckpointWriter
from maekit.training.crops import Chunk
from maekit.training.data import Uploader
from maekit.training.distributed import DistributedContext
from maekit.training.optim import Schedule, make_optimizer
from maekit.training.step import MaskedObjective, Step, choose_micro_batch

CPU = torch.device("cpu")


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(with_flags(text))


def tiny_objective(**changes) -> MaskedObjective:
    model = build_autoencoder(ModelConfig(**{k[6:]: v for k, v in TINY.items()} | changes), seed=0)
    return MaskedObjective(model, Normalizer(IMAGENET_MEAN, IMAGENET_STD, CPU)).train()


def make_step(objective: MaskedObjective, **options) -> tuple[Step, torch.optim.Optimizer]:
    optimizer = make_optimizer(objective.model, OptimizerConfig())
    forward = choose_kernels(objective.model, CPU, "fp32")
    step = Step(
        objective,
        optimizer,
        Schedule(1e-2, 0.0, 0, 100),
        forward=forward,
        upload=Uploader(CPU),
        world=DistributedContext(),
        **options,
    )
    return step, optimizer


def make_chunk(count: int, seed: int = 0) -> Chunk:
    generator = torch.Generator().manual_seed(seed)
    return Chunk(
        torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.rand(count, generator=generator) < 0.5,
        torch.rand(count, 16, generator=generator),
        [],
    )


def parts(chunk: Chunk, size: int) -> list[Chunk]:
    return [
        Chunk(chunk.images[i : i + size], chunk.flips[i : i + size], chunk.noise[i : i + size], [])
        for i in range(0, len(chunk.images), size)
    ]


def test_micro_batches_and_chunks_add_up_to_the_step() -> None:
    chunk = make_chunk(12)
    results = []
    for division in ([[chunk]], [parts(chunk, 4)], [[part] for part in parts(chunk, 3)]):
        objective = tiny_objective()
        step, _ = make_step(objective)
        loss, norm = step(division, 0)
        results.append((loss.item(), norm.item(), objective.model.encoder.blocks[0].attn.qkv.weight.detach().clone()))
    for loss, norm, weight in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-5)
        torch.testing.assert_close(weight, results[0][2], rtol=1e-4, atol=1e-5)


def test_clipping_scales_the_gradient() -> None:
    norms = {}
    for clip in (None, 0.01):
        objective = tiny_objective()
        step, _ = make_step(objective, clip=clip)
        _, norm = step([[make_chunk(6)]], 0)
        gradients = [p.grad for p in objective.parameters() if p.grad is not None]
        norms[clip] = torch.nn.utils.get_total_norm(gradients).item()
        assert norm.item() > 0.1  # before clipping
    assert norms[None] == pytest.approx(norm.item(), rel=1e-5)
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """Weights, moments and their step count stay, and the next step is taken as if it had not been."""
    chunk = make_chunk(6)
    objective, same = tiny_objective(), tiny_objective()
    (step, optimizer), (other, _) = make_step(objective), make_step(same)
    step([[chunk]], 0)
    before = {name: tensor.clone() for name, tensor in checkpoint.optimizer_tensors(optimizer).items()}
    handle = objective.model.encoder.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    _, norm = step([[chunk]], 1)
    assert not math.isfinite(norm.item())
    after = checkpoint.optimizer_tensors(optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    handle.remove()
    step([[chunk]], 1)
    other([[chunk]], 0)
    other([[chunk]], 1)
    for ours, theirs in zip(objective.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_steps_without_a_finite_gradient_are_counted(make_shards, tmp_path: Path, monkeypatch) -> None:
    """Up to --skip-nonfinite of them, over the whole run, kills and resumes included."""
    take = Step.__call__

    def sometimes_broken(self: Step, micro_batches, done: int):
        handle = self._parameters[0].register_hook(lambda g: g * math.nan if done + 1 in (2, 5, 7) else None)
        result = take(self, micro_batches, done)
        handle.remove()
        return result

    monkeypatch.setattr(Step, "__call__", sometimes_broken)
    shards = make_shards(7, 6)
    with raises(MaekitError, match=r"the gradient is not finite at step 2 \(samples: .*\.tar \d{6}.*--skip-nonfinite"):
        maekit.pretrain(tiny_config(shards, tmp_path / "strict"))
    assert not RunDirectory(tmp_path / "strict").list_checkpoints()
    notes = Notes()
    with raises(MaekitError, match="not finite at step 7"):
        maekit.pretrain(tiny_config(shards, tmp_path / "run", run__skip_nonfinite=2, steps=9), notes)
    assert [line.split(" (")[0] for line in notes.lines if "not finite" in line] == [
        "the gradient is not finite at step 2",
        "the gradient is not finite at step 5",
    ]
    assert [row["skipped"] for row in RunDirectory(tmp_path / "run").metrics()] == [0, 1, 1, 1, 2, 2]
    result = maekit.pretrain(tiny_config(shards, tmp_path / "run", run__skip_nonfinite=3, steps=9))
    assert (result.skipped, result.steps, result.resumed_from) == (3, 9, 6)


def test_weights_that_are_not_finite_are_not_written(make_shards, tmp_path: Path) -> None:
    """Of the last step before a checkpoint no loss tells; the writer looks for itself."""
    run = RunDirectory(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    objective = tiny_objective()
    step, optimizer = make_step(objective)
    step([[make_chunk(6)]], 0)
    with CheckpointWriter(run, objective.model, optimizer, keep=2) as writer:
        writer.save({"step": 1})
        writer.finish()
        with torch.no_grad():
            objective.model.decoder.pred.bias[3] = math.inf
        writer.save({"step": 2})
        with raises(MaekitError, match=r"decoder\.pred\.bias is not finite after step 2; no checkpoint holds it"):
            writer.finish()
    assert [saved.step for saved in run.list_checkpoints()] == [1]
    with raises(MaekitError, match=r"decoder\.\S+ is not finite|not finite"):
        maekit.pretrain(tiny_config(make_shards(7), tmp_path / "hot", steps=2, optimizer__lr=1e38))


def test_a_copy_is_written_not_what_came_after(tmp_path: Path) -> None:
    """The loop goes on while the thread writes."""
    run = RunDirectory(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    objective = tiny_objective()
    step, optimizer = make_step(objective)
    step([[make_chunk(6)]], 0)
    expected = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    with CheckpointWriter(run, objective.model, optimizer, keep=2) as writer:
        writer.save({"step": 1})
        step([[make_chunk(6)]], 1)
        writer.finish()
    loaded = safetensors.torch.load_file(run.checkpoint(1).path / "model.safetensors")
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not torch.equal(loaded["decoder.pred.weight"], objective.model.decoder.pred.weight)


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """Byte for byte, for every type and shape that occurs."""
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(()),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "ä": torch.arange(5),
        "none": torch.empty(0, 4),
        "flag": torch.tensor([True, False, True]),
    }
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    ours = b"".join(bytes(part) for part in checkpoint.serialize(tensors))
    (tmp_path / "ours").write_bytes(ours)
    loaded = safetensors.torch.load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert ours == (tmp_path / "theirs").read_bytes()


def test_onednn_computes_the_same_layers(monkeypatch) -> None:
    """Outputs and all gradients within rounding; small layers keep the usual kernel."""
    monkeypatch.setattr(kernels, "_WORTH_ONEDNN", 1000)
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 7, 20), (30, 20), (30,)))
    upstream = torch.randn(3, 7, 30)

    def results() -> list[torch.Tensor]:
        output = functional.linear(x, weight, bias)
        return [output, *torch.autograd.grad(output, (x, weight, bias), upstream)]

    expected = results()
    with OneDnnLinear():
        got = results()
        assert type(got[0].grad_fn).__name__ == "_LinearBackward"
        frozen = functional.linear(x.detach(), weight, bias)
        assert torch.autograd.grad(frozen, weight, upstream)[0].shape == weight.shape
        monkeypatch.setattr(kernels, "_WORTH_ONEDNN", 1 << 40)
        assert type(functional.linear(x, weight, bias).grad_fn).__name__ != "_LinearBackward"
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attention_written_out_is_the_same_in_bf16() -> None:
    losses = {}
    chunk = make_chunk(4)
    for precision in ("fp32", "bf16"):
        objective = tiny_objective()
        forward = choose_kernels(objective.model, CPU, precision)
        assert objective.model.encoder.blocks[0].attn.fused_attn == (precision == "fp32")
        with forward():
            losses[precision] = objective(chunk.images, chunk.flips, chunk.noise).item()
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"decoder": "cross", "predict_ratio": 0.5, "class_token": False}], ids=str)
def test_the_step_compiles_as_one_graph_and_only_once(changes: dict) -> None:
    """No break in the graph and no second compilation: on CUDA each would cost more than it looks."""
    torch._dynamo.reset()  # what it compiled for another model counts as a first compilation
    objective = tiny_objective(**changes)
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            chunk = make_chunk(4, seed)
            loss = compiled(chunk.images, chunk.flips, chunk.noise)
            loss.backward()
            losses.append(loss.item())
    plain = [objective(c.images, c.flips, c.noise).item() for c in map(lambda seed: make_chunk(4, seed), range(3))]
    assert losses == pytest.approx(plain, rel=1e-5)


def test_micro_batch_is_the_largest_part_that_memory_allows(monkeypatch) -> None:
    from maekit.training import step

    def chosen(share: int, room: int, **sizes) -> int:
        monkeypatch.setattr(step, "_CPU_ACTIVATIONS", room)
        objective = tiny_objective(**sizes)
        return choose_micro_batch(objective, share, (32, 32), choose_kernels(objective.model, CPU, "fp32"))

    assert chosen(48, 1 << 40) == 48
    assert chosen(48, 1) == 1
    some = chosen(48, 4_000_000)
    assert 1 < some < 48
    assert 48 % some == 0
    assert chosen(48, 4_000_000, depth=24) < some
    assert chosen(47, 4_000_000) == 1


def test_checkpoints_are_kept_by_number_and_by_multiples(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(7), tmp_path / "run", steps=11, run__keep_every=4, run__checkpoint_every=3)
    maekit.pretrain(config)
    assert [saved.step for saved in RunDirectory(tmp_path / "run").list_checkpoints()] == [11, 9, 8, 4]


def test_checkpoints_come_by_time_too(make_shards, tmp_path: Path) -> None:
    """However few steps there are between them; each with its row of metrics."""
    seen: list[int] = []

    class Watching(Silent):
        def advance(self, done: int) -> None:
            saved = RunDirectory(tmp_path / "run").list_checkpoints()
            seen.extend(checkpoint.step for checkpoint in saved[:1])

    config = tiny_config(
        make_shards(7), tmp_path / "run", steps=40, run__checkpoint_every=1000, run__checkpoint_minutes=1e-9
    )
    maekit.pretrain(config, Watching())
    assert len(set(seen)) > 10


def test_max_time_saves_and_stops(make_shards, tmp_path: Path) -> None:
    shards = make_shards(9, 14, 5)
    config = tiny_config(shards, tmp_path / "run", steps=100_000, run__max_time="1s", run__checkpoint_every=100_000)
    with raises(Stopped, match=r"stopped by --max-time 1s after step \d+ of 100000, everything is saved"):
        maekit.pretrain(config)
    assert find_checkpoint(tmp_path / "run")[1].step == RunDirectory(tmp_path / "run").metrics()[-1]["step"] > 5


@pytest.mark.parametrize(("text", "seconds"), [("3h50m", 13800), ("90s", 90), ("1d12h", 129600), (" 45m ", 2700)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "h", "3h50", "-1h", "0s", "1.5h", "50m3h"])
def test_what_is_no_duration(text: str) -> None:
    with raises(InputError, match=r"run\.max_time"):
        parse_duration(text)


def test_held_out_loss(make_shards, tmp_path: Path) -> None:
    """It depends on weights and images alone: a row whenever asked for, lower after training, equal after resuming."""
    shards, held_out = make_shards(9, 8), make_shards(4, 3, name="held-out")
    changes = {"data__val": [str(held_out)], "run__val_every": 10, "steps": 30, "optimizer__warmup_epochs": 0.0}
    result = maekit.pretrain(tiny_config(shards, tmp_path / "run", **changes))
    rows = {row["step"]: row["val_loss"] for row in RunDirectory(tmp_path / "run").metrics() if "val_loss" in row}
    assert list(rows) == [10, 20, 30]
    assert rows[30] < rows[10]
    assert result.val_loss == rows[30]
    assert {row.get("val_images") for row in RunDirectory(tmp_path / "run").metrics()} == {None, 7}
    fewer = maekit.pretrain(tiny_config(shards, tmp_path / "fewer", **changes, data__val_images=3))
    assert RunDirectory(tmp_path / "fewer").metrics()[-1]["val_images"] == 3
    assert fewer.loss == result.loss  # looking changes nothing
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "x.tar").write_bytes(b"no tar")
    with raises(InputError, match=r"x\.tar"):
        maekit.pretrain(tiny_config(shards, tmp_path / "other", data__val=[str(broken)]))


def test_tensorboard_gets_rows_and_pictures(make_shards, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(make_shards(7, 6), tmp_path / "run", run__tensorboard=True, run__pictures_every=4)
    maekit.pretrain(config)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    rows = RunDirectory(tmp_path / "run").metrics()
    got = [(event.step, event.value) for event in events.Scalars("loss")]
    assert got == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert [event.step for event in events.Images("reconstructions")] == [4, 8]


def test_the_time_a_run_takes_is_told_once(make_shards, tmp_path: Path, monkeypatch) -> None:
    from maekit.training import engine

    monkeypatch.setattr(engine, "_ESTIMATE_SECONDS", 0.01)
    notes = Notes()
    maekit.pretrain(tiny_config(make_shards(7), tmp_path / "run", steps=60, run__checkpoint_every=100), notes)
    assert sum("img/s: about" in line and "steps left" in line for line in notes.lines) == 1


def test_a_row_without_a_finite_loss_is_shown(make_shards, tmp_path: Path) -> None:
    from maekit.cli.show import describe

    assert describe({"epoch": 1.0, "loss": None, "lr": 1e-3}) == "epoch 1.00  lr 1.00e-03"


def test_copies_of_weights_do_not_count_as_images(monkeypatch) -> None:
    """Under autocast each weight is kept in bf16 too, once for any number of images."""
    from maekit.training import step

    monkeypatch.setattr(step, "_CPU_ACTIVATIONS", 8_000_000)
    chosen = {}
    for precision in ("fp32", "bf16"):
        objective = tiny_objective(width=128, decoder_width=128)
        forward = choose_kernels(objective.model, CPU, precision)
        chosen[precision] = choose_micro_batch(objective, 1024, (32, 32), forward)
    assert chosen["bf16"] >= chosen["fp32"] > 1


def test_a_damaged_row_of_metrics_does_not_stop_a_run(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7)
    maekit.pretrain(tiny_config(shards, tmp_path / "run", steps=8))
    path = tmp_path / "run/metrics.jsonl"
    expected = path.read_bytes()
    for damage in (b"\xff\xfe{", b"[1]\n", b'{"step": "x"}\n', b'{"loss": 1}\n'):
        lines = expected.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:5]) + damage + b"".join(lines[5:]))
        (tmp_path / "run/encoder.safetensors").unlink()
        maekit.pretrain(tiny_config(shards, tmp_path / "run", steps=8))
        assert path.read_bytes() == b"".join(lines[:5])


def test_leftovers_of_a_kill_are_swept(make_shards, tmp_path: Path) -> None:
    shards = make_shards(7)
    config = tiny_config(shards, tmp_path / "run", steps=4)
    maekit.pretrain(config)
    (tmp_path / "run/encoder.safetensors").rename(tmp_path / "run/.encoder.safetensors.123.tmp")
    maekit.pretrain(config)
    assert not list((tmp_path / "run").glob(".*.tmp"))
