"""Who imports whom: every module of the library, the exporters and the command line stands in one table."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import maekit

# Each room, a package or a module at the root, with the rooms that it imports; those stand above it.
ROOMS = {
    "system": "",
    "version": "",
    "config": "system",
    "providers": "system",
    "vectors": "system",
    "image_metadata": "",
    "images": "config image_metadata system",
    "runs": "config system",
    "shards": "config system",
    "sheet": "images",
    "checking": "config images shards system",
    "encoder_file": "config images system",
    "mae": "config images system",
    "openvino_runtime": "images providers system",
    "encoder_probe": "images",
    "embedding": "config encoder_file encoder_probe images openvino_runtime providers shards system",
    "pretrained": "config images mae runs system vectors",
    "diagnosis": "config embedding openvino_runtime providers shards system version",
    "inspection": "checking config embedding encoder_file openvino_runtime providers runs shards system",
    "training": "config images mae pretrained runs shards sheet system version",
    "exporters": "config encoder_file encoder_probe images mae pretrained providers shards system vectors version",
    "pages": "config embedding images mae pretrained runs shards sheet system vectors",
    "evaluation": "config embedding exporters images mae pretrained providers runs shards system vectors",
    "pretraining": "config encoder_file images mae pretrained providers runs shards sheet system training vectors",
    "sweeping": "config evaluation mae pages pretraining runs system",
    "finetuning": "config evaluation images mae pretrained runs system training",
    "demo": "checking config embedding exporters images pages pretraining runs shards system vectors",
    "maekit": "checking config diagnosis embedding evaluation exporters finetuning inspection pages pretraining shards "
    "sweeping system version",
    "cli": "checking config demo diagnosis embedding evaluation exporters finetuning inspection maekit pages "
    "pretraining runs shards sweeping system version",
    "__main__": "cli",
}
HEAVY = {"numpy", "PIL", "torch", "timm", "onnx", "onnxruntime", "pyarrow", "webdataset"}


def modules() -> dict[str, Path]:
    """Return the file of every module, as it is installed."""
    from maekit import cli, exporters

    found = {}
    for package in (maekit, cli, exporters):
        root = Path(str(package.__file__)).parent
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join([package.__name__, *parts]).removesuffix(".__init__")] = path
    return found


def imported(path: Path, names: set[str]) -> Iterator[str]:
    """Yield the modules of maekit that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in names else node.module


def room(module: str) -> str:
    """Return the part of a name that the table holds: `maekit.shards.tar` -> `shards`."""
    return module.split(".")[1] if "." in module else module


def arrows() -> dict[str, set[str]]:
    files = modules()
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found.setdefault(room(name), set()).update(room(other) for other in imported(path, set(files)))
    return {name: others - {name} for name, others in found.items()}


def test_the_table_is_what_the_imports_are() -> None:
    """No arrow that the table lacks, and none in the table that nobody needs; a new room is entered here."""
    found = {name: " ".join(sorted(others)) for name, others in sorted(arrows().items())}
    assert found == {name: " ".join(sorted(others.split())) for name, others in sorted(ROOMS.items())}


def test_no_two_rooms_import_each_other() -> None:
    list(TopologicalSorter({name: others.split() for name, others in ROOMS.items()}).static_order())


def test_what_never_meets() -> None:
    """The ONNX file is the contract between training, exporters and embedding; nobody imports the command line."""
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter({n: o.split() for n, o in ROOMS.items()}).static_order():
        direct = set(ROOMS[name].split())
        below[name] = direct.union(*(below[other] for other in direct))
    assert not below["embedding"] & {"mae", "pretrained", "training", "exporters"}
    assert not below["training"] & {"pretraining", "finetuning", "embedding", "exporters", "evaluation"}
    assert not below["exporters"] & {"embedding", "training", "evaluation"}
    assert not below["shards"] & {"images"}
    assert not below["evaluation"] & {"training", "pretraining", "finetuning"}
    assert [name for name, others in ROOMS.items() if "cli" in others.split()] == ["__main__"]


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        ("maekit maekit.config maekit.cli.app", set()),
        ("maekit.runs maekit.shards.spec", set()),
        ("maekit.images maekit.shards.read maekit.shards.order maekit.shards.pack maekit.checking", {"numpy", "PIL"}),
        ("maekit.embedding.embed maekit.embedding.embedder", {"numpy", "PIL", "onnxruntime", "pyarrow"}),
    ],
)
def test_what_a_fresh_interpreter_loads(modules: str, allowed: set[str], tmp_path: Path) -> None:
    """No torch on the way from an image to its row; nothing heavy where help is shown and options are read."""
    script = f"import sys, {', '.join(modules.split())}; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= allowed
