"""What the documentation says is there is there: messages, commands, links, computed figures; and completion works."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maekit.cli.options import with_flags
from maekit.config import ModelConfig
from maekit.mae.targets import normalize_patches
from maekit.system.errors import ImageError

ROOT = Path(__file__).parents[2]
PAGES = [page for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))) if page.is_file()]
TROUBLES = ROOT / "docs" / "troubleshooting.md"

pytestmark = pytest.mark.source


def templates() -> list[str]:
    """Return every text of the source as the command line shows it, `…` in place of what changes."""
    found = []
    for folder in ("maekit", "cli", "exporters"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return [with_flags(text) for text in found]


def messages() -> list[str]:
    """Return the first column of every table of messages."""
    tables = TROUBLES.read_text(encoding="utf-8").split("\n### ")[1:]
    rows = [line for table in tables for line in table.splitlines() if line.startswith("| `")]
    cells = [row[2:].partition(" | ")[0] for row in rows]
    # Two backticks and a space around a message that holds some itself.
    return [cell[3:-3] if cell.startswith("``") else cell[1:-1] for cell in cells]


def test_every_message_is_one_that_is_given() -> None:
    there = templates()
    reasons = [message for message in messages() if message in ImageError.REASONS]
    assert set(reasons) == set(ImageError.REASONS) - {"no_label"}  # of fine-tuning
    given = [message for message in messages() if message not in reasons]
    assert len(given) >= 50
    for message in given:
        # The … of the page may stand for more than one … of the source, and for plain text.
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(template) for template in there), message


def commands() -> list[tuple[str, str]]:
    """Return (page, command) of every command of maekit that stands in a block of its own."""
    found = []
    for page in PAGES:
        language = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("```"):
                language = "" if language else line[3:] or "text"
                continue
            if language == "sh" or (not language and line.startswith("    ")):
                # Behind two spaces and more: a remark.
                match = re.match(r"(?:torchrun .* -m |srun .*?)?(maekit .+?)(?:\s{2,}|$)", line.strip())
                found += [(page.name, match[1])] if match else []
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_is_understood(page: str, line: str) -> None:
    """Names and options are known, values of the right kind, and nothing is missing; nothing is run."""
    from typer.main import get_command

    from maekit.cli.app import app

    command, arguments = get_command(app), shlex.split(line)[1:]
    context = command.make_context("maekit", list(arguments), resilient_parsing=True)
    if arguments[0].startswith("-"):
        return
    name = "maekit"
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
        context = type(context)(command, info_name=name, parent=context)
    command.make_context(name, list(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    def anchors(path: Path) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:bench|tests|recipes|docs|maekit)/[\w./-]+\.(?:json|py|toml|md|sbatch))`", text):
        assert (ROOT / name).exists(), name


def test_hours_are_the_computed_ones() -> None:
    path = ROOT / "bench" / "gpu_hours.py"
    spec = importlib.util.spec_from_file_location("gpu_hours", path)
    assert spec is not None
    assert spec.loader is not None
    gpu_hours = importlib.util.module_from_spec(spec)
    sys.modules["gpu_hours"] = gpu_hours  # dataclasses look there
    spec.loader.exec_module(gpu_hours)
    rows = re.findall(r"^\| (vit_\w+) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", TROUBLES.read_text("utf-8"), re.M)
    assert len(rows) == 10
    for name, decoder, flops, *hours in rows:
        options = {} if decoder == "default" else {"decoder": "cross", "predict_ratio": 0.25}
        counted = gpu_hours.flops_per_image(ModelConfig(name=name, **options))
        assert flops == f"{counted / 1e9:.1f}"
        for gpu, shown in zip(("A100", "H100"), hours, strict=True):
            assert shown == gpu_hours.show_hours(1e8 * counted / (0.4 * gpu_hours.PEAKS[gpu]) / 3600)


@pytest.mark.parametrize(("patch", "said"), [(4, "0.979 for patches of 4"), (16, "0.999 for patches of 16")])
def test_the_loss_of_predicting_the_mean(patch: int, said: str) -> None:
    patches = torch.randn(2, 50, patch * patch * 3, generator=torch.Generator().manual_seed(0))
    assert f"{normalize_patches(patches).square().mean():.3f}" == said.split()[0]
    assert said in " ".join(TROUBLES.read_text("utf-8").split())


def test_losses_are_those_of_the_bench() -> None:
    import json

    rows = json.loads((ROOT / "bench/results/design-space-cifar.json").read_text("utf-8"))["rows"]
    named = {"grid masks": "grid", "block masks": "block", "pixels": "pixel", "PCA": "pca"}
    named |= {"tokens (cross-entropy)": "tokens", "default": "default", "fixed crop": "fixed crop"}
    text = TROUBLES.read_text("utf-8")
    for shown, name in named.items():
        (row,) = [row for row in rows if row["name"] == name]
        assert f"| {shown} | {row['loss']:.3f} | {100 * row['knn_whitened']:.1f} % |" in text


COMPLETION = """
source <(maekit --show-completion)
COMP_WORDS=(maekit {words}); COMP_CWORD={place}
_maekit_completion maekit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [
        ("pre", 1, {"pretrain"}),
        ("evaluate k", 2, {"knn"}),
        ("pretrain --mask-r", 2, {"--mask-ratio"}),
    ],
)
def test_bash_completes(tmp_path: Path, words: str, place: int, expected: set[str]) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    # As the installed script is: what is completed goes by its name.
    (bin / "maekit").write_text(f"#!{sys.executable}\nfrom maekit.cli.app import main\n\nmain()\n")
    (bin / "maekit").chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    script = COMPLETION.format(words=words, place=place)
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == expected


def test_zsh_completes(tmp_path: Path) -> None:
    """What zsh asks by the script that it is given: whether zsh is there or not."""
    environment = {**os.environ, "_MAEKIT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "maekit evaluate k"}
    command = [sys.executable, "-c", "import sys; sys.argv = ['maekit']; from maekit.cli.app import main; main()"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert '"knn"' in done.stdout, done.stderr


def test_every_measurement_is_listed() -> None:
    """Each script and each result of bench/ stands in its README, which names nothing else."""
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/*.-]+\.(?:py|json|sh))`", text.partition("| script |")[2])
    for name in named:
        folder = ROOT / "bench" / ("results" if name.endswith(".json") else "")
        assert list(folder.glob(name)), name
    there = [*(ROOT / "bench").glob("*.py"), *(ROOT / "bench" / "results").glob("*.json")]
    assert [path.name for path in there if not any(path.match(name) for name in named)] == []
