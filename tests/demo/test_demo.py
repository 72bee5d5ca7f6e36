import re
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises

from maekit.demo import run as demo
from maekit.demo.pictures import CLASSES, draw
from maekit.system.errors import InputError
from maekit.vectors.knn import knn_accuracy

pytestmark = pytest.mark.whole


def test_knn_against_plain_loops() -> None:
    """Weighted votes of the k nearest by cosine, counted one row at a time."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 5)).astype(np.float32), rng.normal(size=(40, 5)).astype(np.float32)
    train_labels, test_labels = rng.integers(0, 4, 60), rng.integers(0, 4, 40)
    right = 0
    for row, label in zip(test, test_labels, strict=True):
        cosine = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in train]
        votes = dict.fromkeys(range(4), 0.0)
        for i in sorted(range(60), key=lambda i: -cosine[i])[:7]:
            votes[int(train_labels[i])] += np.exp(cosine[i] / 0.07)
        right += max(votes, key=votes.__getitem__) == label
    assert knn_accuracy(train, train_labels, test, test_labels, k=7) == right / 40


def test_knn_of_separate_clusters_is_perfect() -> None:
    centres = np.eye(10, dtype=np.float32)
    labels = np.arange(50) % 10
    rows = centres[labels] + 0.05 * np.random.default_rng(0).normal(size=(50, 10)).astype(np.float32)
    assert knn_accuracy(rows, labels, rows[::-1], labels[::-1], k=200) == 1.0
    with pytest.raises(ValueError, match="0 rows"):
        knn_accuracy(rows[:0], labels[:0], rows, labels)


def test_pictures_are_a_function_of_the_seed() -> None:
    assert len(CLASSES) == 10
    for name in CLASSES:
        a, b, other = (draw(name, np.random.default_rng(seed), 64) for seed in (1, 1, 2))
        assert a.shape == (64, 64, 3)
        assert a.std() > 20
        np.testing.assert_array_equal(a, b)
        assert (a != other).mean() > 0.5


def test_the_whole_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's flow with fewer pictures and steps: everything it names is there, and a second run replaces it."""
    monkeypatch.setattr(demo, "TRAIN_PICTURES", 60)
    monkeypatch.setattr(demo, "TEST_PICTURES", 20)
    monkeypatch.setattr(demo, "STEPS", 3)
    for _ in range(2):
        result = demo.run_demo(tmp_path / "demo")
    assert result.parity <= 1e-4
    assert all(0 <= a <= 1 for a in (result.knn_pixels, result.knn_untrained, result.knn_trained, result.knn_whitened))
    for name in ("pictures", "shards", "run", "encoder.onnx", "embeddings/train/00000.parquet", "report.html"):
        assert (tmp_path / "demo" / name).exists()
    page = Path(result.report).read_text(encoding="utf-8")
    shares = (result.chance, result.knn_pixels, result.knn_untrained, result.knn_trained, result.knn_whitened)
    assert re.findall(r'<td class="number">(?:<b>)?([\d.]+%)', page) == [f"{share:.1%}" for share in shares]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with raises(InputError, match="no demo made"):
        demo.run_demo(tmp_path / "mine")
