"""The effective rank of embeddings, and kNN among them."""

import numpy as np
import pytest
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from maekit.vectors.knn import leave_one_out_accuracy
from maekit.vectors.rank import collapse, effective_rank
from maekit.vectors.whitening import whiten_sample


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 5), (5, 1)])
def test_it_is_rankme(shape: tuple[int, int], random: np.random.Generator) -> None:
    """As the paper's equations 2 and 3 read, for embeddings with a mean far from 0 too."""
    rows = (random.normal(size=shape) + 2).astype(np.float32)
    values = np.sqrt(np.linalg.eigvalsh(rows.astype(float) @ rows.T.astype(float)).clip(min=0))
    values = np.sort(values)[::-1][: min(shape)]
    p = values / np.abs(values).sum() + 1e-7
    assert effective_rank(rows) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
def test_planted_ranks(rank: int, random: np.random.Generator) -> None:
    """Directions of equal strength count as many; of one far stronger than the others, few."""
    left, _ = np.linalg.qr(random.normal(size=(64, rank)))
    right, _ = np.linalg.qr(random.normal(size=(16, rank)))
    assert effective_rank(left @ right.T) == pytest.approx(rank, rel=1e-4)
    assert effective_rank(1000 * left @ right.T) == pytest.approx(rank, rel=1e-4)
    if rank > 1:
        strengths = np.where(np.arange(rank) == 0, 1000.0, 1.0)
        assert effective_rank(left * strengths @ right.T) < 1.5


def test_what_has_no_rank() -> None:
    assert effective_rank(np.zeros((4, 3))) == 1
    for rows in (np.empty((0, 3)), np.array([[1.0, np.nan]]), np.array([[np.inf, 1.0]])):
        with pytest.raises(ValueError, match="finite"):
            effective_rank(rows)


def test_a_collapse_in_words() -> None:
    assert collapse(2.1, 500) is None
    assert collapse(1.02, 500) == "collapsed: 500 held-out images have about the same embedding, effective rank 1.02"
    assert collapse(1.0, 1) is None  # of one image


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_vectors_that_differ_by_rounding_only_are_a_collapse(precision: str, random: np.random.Generator) -> None:
    import torch

    same = torch.from_numpy(random.normal(size=384)).expand(500, -1)
    noisy = same * (
        1 + torch.from_numpy(random.uniform(-1, 1, (500, 384))) * torch.finfo(getattr(torch, precision)).eps
    )
    assert collapse(effective_rank(noisy.numpy()), 500) is not None
    assert collapse(effective_rank(random.normal(size=(500, 384))), 500) is None


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_leaving_one_out_is_that_of_scikit_learn(k: int, random: np.random.Generator) -> None:
    labels = random.integers(0, 4, 120)
    rows = (random.normal(size=(4, 8))[labels] + random.normal(0, 1.2, (120, 8))).astype(np.float32)
    oracle = KNeighborsClassifier(
        min(k, 119), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute"
    )
    expected = cross_val_score(oracle, rows, labels, cv=LeaveOneOut()).mean()
    assert leave_one_out_accuracy(rows, labels, k=k) == pytest.approx(expected)
    assert 0.3 < expected < 0.95


def test_a_row_never_votes_for_itself() -> None:
    """Even among more copies of itself than there are neighbours; and rows of zeros have neighbours, too."""
    rows, labels = np.ones((50, 3), np.float32), np.arange(50)
    assert leave_one_out_accuracy(rows, labels, k=5) == 0
    assert leave_one_out_accuracy(rows, np.zeros(50, np.int64), k=5) == 1
    rows[7] = 0
    assert leave_one_out_accuracy(rows, np.zeros(50, np.int64), k=5) == 1
    with pytest.raises(ValueError, match="1 rows"):
        leave_one_out_accuracy(rows[:1], labels[:1])


def test_a_sample_is_whitened_by_itself(random: np.random.Generator) -> None:
    """To a tenth as many directions as rows, of unit length; with all directions that vary, where there are enough."""
    rows = (random.normal(size=(300, 40)) * np.geomspace(1, 0.05, 40) + 5).astype(np.float32)
    whitened, dim = whiten_sample(rows)
    assert whitened.shape == (300, 30)
    assert dim == 30
    np.testing.assert_allclose(np.linalg.norm(whitened, axis=1), 1, rtol=1e-5)
    assert effective_rank(whitened) > 29
    assert effective_rank(rows) < 8
    rows[:, 0] = 7  # a direction without variance, as of a LayerNorm
    assert whiten_sample(np.tile(rows, (2, 1)))[1] == 39
    same, dim = whiten_sample(np.ones((20, 4), np.float32))
    np.testing.assert_allclose(same, 0.5)
    assert dim is None
