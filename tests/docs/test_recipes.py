"""The recipes: each loads, starts and costs what it says; the SLURM script, with stand-ins for SLURM's commands."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner

from maekit.cli.app import app
from maekit.config import ModelConfig, PretrainConfig, load_config
from maekit.config.settings import fields_of, load_toml
from maekit.pretrained import load as loading

SCRIPT = Path(__file__).parents[2] / "recipes" / "pretrain.sbatch"
pytestmark = pytest.mark.source

STAND_INS = {
    # As srun: starts the processes, passes their numbers, gives the highest exit code.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & processes+=($!); done
        echo "${processes[@]}" > pids
        highest=0
        for process in "${processes[@]}"; do
            code=0; wait "$process" || code=$?
            ((code > highest)) && highest=$code
        done
        exit $highest
    """,
    "scontrol": """
        if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "$@" >> requeued; fi
    """,
    "maekit": """
        echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >> calls
        trap 'exit 75' TERM
        for ((i = 0; i < ${SECONDS_OF_WORK:-0} * 20; i++)); do sleep 0.05; done
        exit "${EXIT:-0}"
    """,
}


@pytest.fixture
def submit(tmp_path: Path):
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(**changes: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            **changes,
        }
        return subprocess.Popen(["bash", SCRIPT, "my shards/", "--out", "run"], cwd=tmp_path, env=environment)

    return start


def test_each_process_gets_its_place(submit, tmp_path: Path) -> None:
    assert submit().wait(20) == 0
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert calls == [f"{rank} {rank} 2 2 node1 20007: pretrain my shards/ --out run" for rank in (0, 1)]
    assert not (tmp_path / "requeued").exists()


def test_a_stopped_run_is_queued_again_and_a_failed_one_is_not(submit, tmp_path: Path) -> None:
    assert submit(EXIT="1").wait(20) == 1
    assert not (tmp_path / "requeued").exists()
    job = submit(SECONDS_OF_WORK="20")
    until = time.monotonic() + 10
    while (tmp_path / "calls").read_text().count("\n") < 4 and time.monotonic() < until:
        time.sleep(0.02)
    # As at the end of a pre-empted job: to the processes and to the script.
    job.send_signal(signal.SIGTERM)
    for process in (tmp_path / "pids").read_text().split():
        os.kill(int(process), signal.SIGTERM)
    assert job.wait(20) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 20007\n"


GPU_HOURS = SCRIPT.parent.parent / "bench" / "gpu_hours.py"
RECIPES = {path.stem: path for path in sorted(SCRIPT.parent.glob("*.toml"))}
# Width and depth by timm's name (Dosovitskiy et al. 2021, table 1; tiny: DeiT).
ENCODERS = {
    "vit_tiny_patch16_224": (192, 12),
    "vit_small_patch16_224": (384, 12),
    "vit_base_patch16_224": (768, 12),
    "vit_large_patch16_224": (1024, 24),
    "vit_huge_patch14_224": (1280, 32),
}
# A cheaper encoder of the same kind: what the recipe says of everything else stays.
CHEAP = ("model.depth=1", "model.width=48", "model.heads=2", "model.decoder_width=32", "model.decoder_heads=2")


def test_the_recipes_are_these() -> None:
    imagenet = {f"imagenet1k-vit-{size}" for size in ("base", "large", "huge")}
    assert set(RECIPES) == imagenet | {"cifar10", "small-data", "one-gpu-day", "second-phase-448"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_only_what_differs_from_the_defaults(name: str) -> None:
    defaults, chosen = (dict(item[:2] for item in fields_of(c)) for c in (PretrainConfig(), load_config(RECIPES[name])))
    settings = load_toml(RECIPES[name])
    assert settings
    assert not [key for key in settings if chosen[key] == defaults[key]]
    if name == "one-gpu-day":
        assert {"model.decoder", "model.predict_ratio"} <= set(settings)
    if name.startswith("imagenet1k"):
        assert {"epochs": 1600, "batch_size": 4096}.items() <= settings.items()
        assert set(settings) <= {"epochs", "batch_size", "model.name"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_in_a_head_are_ones_that_maekit_takes(name: str) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    commands = re.findall(r"^#     (?:torchrun .* -m )?maekit (\w+) (.+)$", text, re.MULTILINE)
    assert [command for command, _ in commands if command != "pack"][:2] == ["pretrain", "export"]
    assert f"--config recipes/{name}.toml" in dict(commands)["pretrain"]
    for command, arguments in commands:
        typer.main.get_command(app).commands[command].make_context(command, shlex.split(arguments))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_starts(name: str, make_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own command; smaller in batch, length, width and depth alone."""
    asked = []

    def published(name: str, arguments: dict, said: str) -> torch.nn.Module:
        """As timm gives weights, without a network."""
        asked.append(name)
        return timm.create_model(name.split(".")[0], pretrained=False, **arguments)

    monkeypatch.setattr(loading, "fetch_timm", published)
    recipe, run = RECIPES[name], tmp_path / "run"
    small = ["--steps", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--set", "run.threads=1"]
    for setting in CHEAP:
        small += ["--set", setting]
    arguments = ["pretrain", str(make_shards(5)), *small, "--json", "--out"]
    if name == "second-phase-448":
        assert CliRunner().invoke(app, [*arguments, str(tmp_path / "first")]).exit_code == 0
        small += ["--init-from", str(tmp_path / "first")]
        arguments = [*arguments[:2], *small, "--json", "--out"]
    done = CliRunner().invoke(app, [*arguments, str(run), "--config", str(recipe)])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["steps"], result["samples"]) == (2, 4)
    assert math.isfinite(result["loss"])
    taken = {key: value for key, value, _ in fields_of(load_config(run / "config.toml"))}
    changed = {"batch_size", "epochs", *(setting.partition("=")[0] for setting in CHEAP)}
    assert {key: taken[key] for key in load_toml(recipe) if key not in changed} == {
        key: value
        for key, value, _ in fields_of(load_config(recipe))
        if key in load_toml(recipe) and key not in changed
    }
    assert asked == (["vit_base_patch16_224.mae"] if name == "small-data" else [])


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_and_flops_are_those_of_the_formulas(name: str, gpu_hours) -> None:
    config = load_config(RECIPES[name]).model
    model = gpu_hours.build_on_meta(config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parameters, flops = by_hand(config)
    assert trained == parameters
    assert gpu_hours.flops_per_image(config) == flops
    published = {"imagenet1k-vit-base": 111.7, "imagenet1k-vit-large": 329.2, "imagenet1k-vit-huge": 656.6}
    assert name not in published or round(trained / 1e6, 1) == published[name]


def by_hand(config: ModelConfig) -> tuple[int, int]:
    """Return the trained parameters, and the FLOPs of a forward and a backward pass of one image, of a recipe's model.

    D width, L depth and T = 1 + K tokens of the encoder; d, l, t of the decoder; N patches of v = p·p·3 values, K of
    them kept, P of the others predicted. Linear layers of i to o values: i·o + o parameters, i·o multiplications for
    each token. A block of self-attention has 12·D² weights and 13·D biases and norms; scores and mixtures take T²·D
    multiplications each. The backward pass takes twice the forward's: for the gradients of what goes in and of the
    weights. Those of the images nobody needs.
    """
    name = config.name or (config.init_from or "timm:vit_base_patch16_224").removeprefix("timm:").split(".")[0]
    width, depth = ENCODERS[name]
    depth = config.depth or depth
    patch = config.patch_size or int(name.split("patch")[1][:2])
    values, patches = patch**2 * 3, (config.image_size // patch) ** 2
    kept = int(patches * (1 - config.mask_ratio))
    predicted = int((patches - kept) * config.predict_ratio)
    tokens, inner, blocks = 1 + kept, config.decoder_width, config.decoder_depth

    embed = kept * values * width
    encoder = depth * (12 * width**2 * tokens + 2 * tokens**2 * width)
    encoder_parameters = (values + 1) * width + width + depth * (12 * width**2 + 13 * width) + 2 * width
    predict = predicted * inner * values
    rest_parameters = inner + 2 * inner + (inner + 1) * values  # mask token, norm, prediction
    if config.decoder == "self":
        row = tokens + predicted
        decoder = tokens * width * inner + blocks * (12 * inner**2 * row + 2 * row**2 * inner)
        decoder_parameters = (width + 1) * inner + blocks * (12 * inner**2 + 13 * inner)
    else:
        # Per block: a mixture of the encoder's layers; queries, output and MLP of P, keys and values of T tokens.
        mixture = (depth + 1) * tokens * width
        attention = 2 * inner**2 * predicted + 2 * width * inner * tokens + 2 * predicted * tokens * inner
        decoder = blocks * (mixture + attention + 8 * inner**2 * predicted)
        norms = 4 * inner + 2 * width
        linear = 2 * (inner + 1) * inner + 2 * (width + 1) * inner + 8 * inner**2 + 5 * inner
        decoder_parameters = blocks * (depth + 1 + norms + linear)
    flops = 2 * (2 * embed + 3 * (encoder + decoder + predict))
    return encoder_parameters + decoder_parameters + rest_parameters, flops


@pytest.mark.parametrize("name", RECIPES)
def test_the_hours_in_head_and_readme_are_the_computed_ones(name: str, gpu_hours, capsys) -> None:
    """The command in the head prints what stands below it."""
    text = RECIPES[name].read_text(encoding="utf-8")
    (command,) = re.findall(r"^#     python bench/gpu_hours\.py (.+)$", text, re.MULTILINE)
    assert command.split()[0] == f"recipes/{name}.toml"
    gpu_hours.main([str(RECIPES[name]), *command.split()[1:]])
    printed = capsys.readouterr().out
    assert "".join(f"#     {line}\n" for line in printed.splitlines()) in text
    hours = re.findall(r"^  ([\d.,]+) hours of one (\w+) ", printed, re.MULTILINE)
    assert hours
    readme = (SCRIPT.parent.parent / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}\.toml` .*$", readme, re.MULTILINE)
    *_, computed, expected, _ = row.split("|")
    assert computed.strip() == ", ".join(f"{number} ({gpu})" for number, gpu in hours)
    assert all(f" {accuracy} " in text for accuracy in re.findall(r"\d\d\.\d", expected))


def test_the_figures_of_one_gpu_day_and_of_published_times_are_the_computed_ones(gpu_hours) -> None:
    recipe, peak = RECIPES["one-gpu-day"], 0.3 * gpu_hours.PEAKS["A100"]
    text = recipe.read_text(encoding="utf-8")
    config = load_config(recipe)

    def flops(**changes: object) -> int:
        return gpu_hours.flops_per_image(dataclasses.replace(config.model, **changes))

    day = peak / flops() * 86_400 / gpu_hours.IMAGENET  # epochs
    assert 0.95 * day < config.epochs < day
    assert f"{peak / flops():,.0f} images a second" in text
    assert f"{peak / flops(name='vit_small_patch16_224'):,.0f} images a second" in text
    assert f"takes {flops() / flops(decoder='self', predict_ratio=1.0):.2f} of the default's FLOPs" in text

    large = load_config(RECIPES["imagenet1k-vit-large"])
    large.epochs = 800
    total = gpu_hours.cost(large, "", gpu_hours.IMAGENET, [], 1).flops
    said = " ".join(gpu_hours.__doc__.split())
    for count, gpu, hours in ((128, "TPUv3-core", 15.4), (64, "V100", 42)):
        share = total / (count * hours * 3600 * gpu_hours.PEAKS[gpu])
        assert re.search(rf"{share:.2f}\D* {count} ", said)
        assert f"{hours} hours" in said


@pytest.fixture(scope="module")
def gpu_hours():
    spec = importlib.util.spec_from_file_location("gpu_hours", GPU_HOURS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_hours"] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    count, known = module.flops_per_image, {}

    def count_once(config: ModelConfig) -> int:
        if repr(config) not in known:
            known[repr(config)] = count(config)
        return known[repr(config)]

    module.flops_per_image = count_once
    return module
