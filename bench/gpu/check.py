"""Stage `check`: whether what runs on CUDA alone works, one function for each part.

data        two dozen JPEGs as shards
doctor      what `maekit doctor` finds
losses      bf16, compiled, against fp32 as it is written; nothing recompiled, nothing waited for within a step
resume      SIGTERM, SIGKILL, and on to the end that an undisturbed run comes to
encoder     a few steps, exported in fp32 and fp16
embedding   both files on CUDA against the rows of the CPU, every node on CUDA
memory      a batch that does not fit is halved
devices     a device that is not there is refused, and `auto` says what it chose
"""

import signal
import subprocess
import tarfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    DATA,
    TINY,
    Bench,
    Ended,
    Failed,
    Found,
    Skipped,
    as_options,
    drawn,
    maekit,
    maekit_command,
    metrics,
    run_part,
    write_shard,
)

STEPS, WARM_STEPS = 40, 5
LARGEST_LOSS_DIFFERENCE = 0.01  # of bf16 to fp32, at every step
LARGEST_RESUMED_DIFFERENCE = 0.005  # kernels that add up in another order each time, over some hundred steps
LEAST_COSINE = {"fp32": 0.99999, "fp16": 0.999}
MANY = 640  # images in one shard, for a batch too large


def data(bench: Bench) -> Found:
    """Two dozen images: two shards to train on, and one that repeats them for large batches."""
    packed = DATA / "check.tar"
    if packed.exists() and not bench.dry:
        with tarfile.open(packed) as tar:
            images = [tar.extractfile(member).read() for member in tar if member.isfile()]  # type: ignore[union-attr]
        source = packed.name
    else:
        images = [image for image, _ in drawn(24, 40 if bench.dry else 320)]
        source = "drawn"
    half = len(images) // 2
    for number, part in enumerate((images[:half], images[half:])):
        samples = [(f"{number}{place:03d}", {"jpg": image}) for place, image in enumerate(part)]
        write_shard(bench.shards / f"{number:02d}.tar", samples)
    repeated = [(f"{place:05d}", {"jpg": images[place % len(images)]}) for place in range(MANY)]
    write_shard(bench.work / "many" / "00.tar", repeated)
    return Found(f"{len(images)} images, {source}", {"images": len(images), "source": source})


def doctor(bench: Bench) -> Found:
    """On a GPU machine nothing may be wrong; in a dry run it must only give its findings."""
    try:
        ended = maekit(bench, "doctor", "--json")
    except Failed:
        ended = maekit(bench, "doctor", "--json", expect=1)
    summary = ended.summary
    shown = {f["subject"]: f["value"] for f in summary["findings"] if f["subject"] in ("GPU", "CUDA provider", "torch")}
    figures = {"findings": summary["findings"], "problems": summary["problems"], "rates": summary["rates"]}
    # A machine whose own onnxruntime is hidden by the CUDA build on PYTHONPATH has two of them installed, and is well.
    serious = [found for found in summary["problems"] if "installed together" not in found["problem"]]
    if serious and not bench.dry:
        first = serious[0]
        raise Failed(f"{first['subject']}: {first['problem']}; {first['fix']}", figures)
    return Found("; ".join(f"{subject}: {value}" for subject, value in shown.items()), figures)


def losses(bench: Bench) -> Found:
    """Two runs on the same samples: one as CUDA runs by default, watched from within, one in fp32 and not compiled."""
    from maekit.config import PretrainConfig
    from maekit.config.settings import set_value
    from maekit.pretraining.pretrain import pretrain

    plain = bench.work / "plain"
    command = maekit_command("pretrain", bench.shards, "--out", plain, *as_options(settings(bench)), "--steps", STEPS)
    command += ["--precision", "fp32", "--no-compile"]
    with subprocess.Popen(command, cwd=bench.work) as other:
        config = PretrainConfig((str(bench.shards),), str(bench.work / "compiled"), steps=STEPS)
        for key, value in settings(bench).items():
            set_value(config, key, value)
        config.run.precision, config.run.compile = "bf16", True
        with watched_steps(bench) as watched:
            pretrain(config)
        if other.wait():
            raise Failed(f"the run in fp32 exited with {other.returncode}")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(metrics(bench.work / "compiled"), metrics(plain), strict=True)]
    worst = max(abs(a - b) / b for a, b in pairs)
    figures = {"largest_difference": worst, "losses": pairs, **watched}
    if len(pairs) != STEPS:
        raise Failed(f"{len(pairs)} rows of metrics, not {STEPS}", figures)
    if worst > LARGEST_LOSS_DIFFERENCE:
        raise Failed(f"bf16 differs from fp32 by {worst:.2%} of the loss", figures)
    if watched["recompiled"]:
        raise Failed(f"{watched['recompiled']} graphs were compiled after step {WARM_STEPS}", figures)
    if watched["waits"]:
        raise Failed(f"a step waits for the device: {watched['waits'][0]}", figures)
    return Found(f"bf16 compiled within {worst:.3%} of fp32; nothing recompiled, no wait in a step", figures)


@contextmanager
def watched_steps(bench: Bench) -> Iterator[dict[str, Any]]:
    """Watch all steps after the first few: graphs compiled in them, and what waits for the device within one."""
    import torch
    from torch._dynamo.utils import counters

    from maekit.training.step import Step

    take = Step.__call__
    watched: dict[str, Any] = {"recompiled": 0, "waits": [], "graphs": 0}
    on_cuda = bench.device == "cuda"

    def step(self: Step, micro_batches: Any, done: int) -> Any:
        before = counters["stats"]["unique_graphs"]
        with warnings.catch_warnings(record=True) as caught:
            if on_cuda and done >= WARM_STEPS:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            try:
                result = take(self, micro_batches, done)
            finally:
                if on_cuda:
                    torch.cuda.set_sync_debug_mode("default")
        watched["graphs"] = counters["stats"]["unique_graphs"]
        if done >= WARM_STEPS:
            watched["recompiled"] += watched["graphs"] - before
            watched["waits"] += [str(w.message).splitlines()[0] for w in caught if "synchroniz" in str(w.message)]
        return result

    Step.__call__ = step  # type: ignore[method-assign]
    try:
        yield watched
    finally:
        Step.__call__ = take  # type: ignore[method-assign]
    if not watched["graphs"]:
        raise Failed("nothing was compiled", watched)


def resume(bench: Bench) -> Found:
    """Stop a run by SIGTERM, kill it, let it end; beside it, the same run undisturbed."""
    steps = 60 if bench.dry else 300
    options = (*as_options(settings(bench)), "--steps", steps, "--checkpoint-every", steps // 10)
    undisturbed = subprocess.Popen(
        maekit_command("pretrain", bench.shards, "--out", bench.work / "undisturbed", *options),
        cwd=bench.work,
    )
    run = bench.work / "disturbed"
    again = ("pretrain", bench.shards, "--out", run, *options)
    try:
        stopped = until(bench, again, run, rows=steps // 4, number=signal.SIGTERM)
        if stopped.code != 75:
            raise Failed(f"SIGTERM gives exit code {stopped.code}, not 75")
        after_stop = last_step(run)
        killed = until(bench, again, run, rows=steps // 2 + 3, number=signal.SIGKILL)
        if killed.code != -signal.SIGKILL:
            raise Failed(f"the run was over before it could be killed (exit code {killed.code})")
        ended = maekit(bench, *again, "--json").summary
        if undisturbed.wait():
            raise Failed(f"the undisturbed run exited with {undisturbed.returncode}")
    finally:
        undisturbed.kill()
    rows, expected = metrics(run), metrics(bench.work / "undisturbed")
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        raise Failed("a step is missing or was told twice")
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, expected, strict=True))
    same = all(a["loss"] == b["loss"] for a, b in zip(rows, expected, strict=True))
    figures = {"steps": steps, "stopped_at": after_stop, "resumed_from": ended["resumed_from"]}
    figures |= {"largest_difference": worst, "bit_equal": same}
    if worst > LARGEST_RESUMED_DIFFERENCE:
        raise Failed(f"the losses differ from those of an undisturbed run by {worst:.2%}", figures)
    said = "bit for bit" if same else f"within {worst:.1e}"
    return Found(f"75 at step {after_stop}, killed, on from {ended['resumed_from']}: the same losses {said}", figures)


def until(bench: Bench, arguments: tuple[object, ...], run: Path, *, rows: int, number: signal.Signals) -> Ended:
    """Start a run and send it a signal as soon as it has so many rows of metrics, and a checkpoint to go on from."""
    with open(bench.work / "until.log", "w+b") as log:
        process = subprocess.Popen(maekit_command(*arguments), cwd=bench.work, stdout=log, stderr=log)
        while process.poll() is None and not (len(metrics(run)) >= rows and any((run / "checkpoints").glob("step-*"))):
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    print(said, flush=True)
    return Ended(code, "", said)


def last_step(run: Path) -> int:
    """Return the step of the newest checkpoint."""
    from maekit.runs import RunDirectory

    return RunDirectory(run).list_checkpoints()[0].step


def encoder(bench: Bench) -> Found:
    """Train a few steps and export the encoder twice; each export is held against PyTorch by itself."""
    steps = ("--steps", 2, "--no-compile")
    maekit(bench, "pretrain", bench.shards, "--out", bench.work / "run", *as_options(settings(bench)), *steps)
    figures: dict[str, Any] = {}
    for precision in ("fp32",) if bench.quick else ("fp32", "fp16"):
        out = bench.work / f"{precision}.onnx"
        ended = maekit(bench, "export", bench.work / "run", "--out", out, "--precision", precision, "--json")
        figures[precision] = ended.summary["parity"]
    cosines = ", ".join(f"{name} {parity['min_cosine']:.6f}" for name, parity in figures.items())
    return Found(f"least cosine to PyTorch: {cosines}", figures)


def embedding(bench: Bench) -> Found:
    """Embed on CUDA with both files, and hold the rows against those of the CPU in fp32."""
    expected = rows_of(bench, "fp32", "cpu")[0]
    figures: dict[str, Any] = {}
    for precision, least in LEAST_COSINE.items():
        rows, summary, nodes = rows_of(bench, precision, bench.device)
        cosine = float((rows * expected).sum(1).min())
        elsewhere = {provider: count for provider, count in nodes.items() if provider != summary["provider"]}
        figures[precision] = {"least_cosine": cosine, "nodes": nodes, "provider": summary["provider"]}
        if summary["provider"] not in expected_providers(bench):
            raise Failed(f"{precision} ran on {summary['provider']}", figures)
        if elsewhere:
            raise Failed(f"nodes of {precision} ran elsewhere: {elsewhere}", figures)
        if not cosine >= least:
            raise Failed(f"{precision}: least cosine {cosine:.6f}, below {least}", figures)
    shown = ", ".join(f"{name} {figure['least_cosine']:.7f}" for name, figure in figures.items())
    nodes = figures["fp16"]["nodes"]
    return Found(f"least cosine to the CPU: {shown}; nodes of fp16: {nodes}", figures)


def rows_of(bench: Bench, precision: str, device: str) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Embed the shards: float64 `[n, dim]` of unit length, the summary, and the number of nodes on each provider."""
    import json

    import pyarrow.parquet as pq

    out = bench.work / f"{precision}-{device}"
    model = needed(bench, precision)
    arguments = ("--out", out, "--device", device, "--batch-size", 16, "--verify", "--json")
    summary = maekit(bench, "embed", model, bench.shards, *arguments).summary
    parts = sorted(out.rglob("*.parquet"))
    rows = np.concatenate([np.stack(pq.read_table(part)["embedding"].to_numpy()) for part in parts]).astype(np.float64)
    nodes: dict[str, int] = {}
    for record in sorted((out / "_maekit").glob("*.tar.json")):
        nodes = json.loads(record.read_text())["nodes"]
    if not nodes:
        raise Failed("no commit record says where the nodes ran")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), summary, nodes


def needed(bench: Bench, precision: str) -> Path:
    """Return the exported file of a precision, which the part `encoder` made."""
    path = bench.work / f"{precision}.onnx"
    if not path.exists():
        raise Skipped(f"no {path.name} was exported")
    return path


def memory(bench: Bench) -> Found:
    """Embed batches that do not fit into what the provider may take."""
    if bench.dry:
        raise Skipped("gpu_mem_limit is the CUDA provider's")
    limit = 400_000_000
    ended = maekit(
        *(bench, "embed", needed(bench, "fp16"), bench.work / "many", "--out", bench.work / "short", "--json"),
        *("--device", "cuda", "--batch-size", 512, "--provider-option", f"gpu_mem_limit={limit}"),
    )
    said = [line for line in ended.err.splitlines() if "going on with batches of" in line]
    figures = {"rows": ended.summary["rows"], "batch_size": ended.summary["batch_size"], "said": said}
    if not said or ended.summary["rows"] != MANY:
        raise Failed(f"{ended.summary['rows']} of {MANY} rows; {len(said)} times halved", figures)
    return Found(f"512 images do not fit into {limit // 10**6} MB: {said[-1].rpartition(': ')[2]}", figures)


def expected_providers(bench: Bench) -> tuple[str, ...]:
    """Return what may run a model: CUDA, or in a dry run what `auto` takes on this CPU."""
    return ("CPUExecutionProvider", "OpenVINO") if bench.dry else ("CUDAExecutionProvider",)


def devices(bench: Bench) -> Found:
    """Ask for a GPU that is not there, and for any that works."""
    from maekit.providers import gpu_count

    try:
        count = 0 if bench.dry else gpu_count() or 0
    except OSError:
        count = 0
    model, missing = needed(bench, "fp32"), f"cuda:{count}"
    refused = maekit(
        bench, "embed", model, bench.shards, "--out", bench.work / "missing", "--device", missing, expect=2
    )
    lines = refused.err.strip().splitlines()
    if f"--device {missing}" not in lines[-1] or (bench.work / "missing").exists():
        raise Failed(f"--device {missing}: {lines[-1]}")
    chosen = maekit(bench, "embed", model, bench.shards, "--out", bench.work / "auto", "--json")
    said = [line for line in chosen.err.splitlines() if line.startswith("provider:")]
    provider = chosen.summary["provider"]
    if len(said) != 1 or provider not in said[0] or provider not in expected_providers(bench):
        raise Failed(f"auto says {said}, and ran on {chosen.summary['provider']}")
    return Found(f"{missing} refused; {said[0]}", {"refused": lines[-1], "said": said[0], "gpus": count})


def settings(bench: Bench) -> dict[str, Any]:
    """Return what the runs of this stage have in common, by the keys of the config."""
    common = {"batch_size": 8 if bench.dry else 64, "run.device": bench.device, "run.log_every": 1}
    common |= {"run.pictures_every": 0, "data.workers": 1 if bench.dry else 4}
    return {**(TINY if bench.dry else {"model.name": "vit_small_patch16_224"}), **common}


PARTS = {
    "data": data,
    "doctor": doctor,
    "losses": losses,
    "resume": resume,
    "encoder": encoder,
    "embedding": embedding,
    "memory": memory,
    "devices": devices,
}

if __name__ == "__main__":
    run_part("check", PARTS)
