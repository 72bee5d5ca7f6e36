"""The snippets of the README run as they stand."""

import re
import subprocess
from pathlib import Path

import pytest
from support.shards import jpeg

pytestmark = pytest.mark.whole

README = Path(__file__).parents[2] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(python: list[str], code: str, folder: Path) -> str:
    done = subprocess.run([*python, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_embedder(trained: Path, tmp_path: Path, python: list[str]) -> None:
    (code,) = [snippet for snippet in snippets() if "maekit.Embedder" in snippet]
    (tmp_path / "encoder.onnx").symlink_to(trained / "encoder.onnx")
    for number, name in enumerate(("cat.jpg", "dog.jpg")):
        (tmp_path / name).write_bytes(jpeg(number))
    assert run(python, f"{code}\nprint(similarity.shape)", tmp_path).split("\n")[0] == "(2, 2)"


def test_numpy_and_onnxruntime_alone(trained: Path, tmp_path: Path, python: list[str]) -> None:
    """In ten lines, and with nothing of maekit, torch or onnx loaded."""
    (code,) = [snippet for snippet in snippets() if "InferenceSession" in snippet]
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "encoder.onnx").symlink_to(trained / "encoder.onnx")
    check = (
        "import sys; print(vectors.shape, vectors.dtype, about['dim'], "
        "{'maekit', 'torch', 'onnx', 'PIL'} & set(sys.modules), bool(np.isfinite(vectors).all()))"
    )
    assert run(python, f"{code}\n{check}", tmp_path).strip() == "(2, 32) float32 32 set() True"
