"""The scores of `maekit evaluate` beside those of faiss and scikit-learn: the same features, one run, times as ratios.

    python bench/evaluation.py EMBEDDINGS --train SHARDS --test SHARDS [--rounds 3] [--json FILE]

EMBEDDINGS is an --out of `maekit embed` that holds both sets. kNN: k = 20, cosine, weights exp(cosine / 0.07), beside
faiss's exact search (IndexFlatIP) with the same votes, and scikit-learn's KNeighborsClassifier (brute force, weights as
ours). Linear: one fit at C = 1 on standardised features, beside scikit-learn's LogisticRegression (lbfgs, tol 1e-4, the
default), each judged by the value of the objective that both minimise, and by accuracy. In each round every one is
timed in turn, in another order; the table gives medians and the ratio to ours.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression as SklearnRegression
from sklearn.neighbors import KNeighborsClassifier

from maekit.embedding.stored import EmbeddingFolder
from maekit.evaluation.features import stored_features
from maekit.evaluation.labelled import classes_of, encode, open_labelled
from maekit.evaluation.linear import LogisticRegression
from maekit.system.progress import Silent
from maekit.vectors.knn import knn_accuracy
from maekit.vectors.nearest import unit

K, TEMPERATURE, C = 20, 0.07, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = EmbeddingFolder(options.embeddings)
    sets = [
        open_labelled(specs, name, Silent()) for specs, name in ((options.train, "--train"), (options.test, "--test"))
    ]
    features = [stored_features(labelled, folder, "shards") for labelled in sets]
    classes = classes_of(sets[0].texts)
    train_y, test_y = (encode(s.texts, classes)[f.kept] for s, f in zip(sets, features, strict=True))
    train, test = (part.rows["embeddings"] for part in features)
    mean, std = train.mean(axis=0), train.std(axis=0)
    x, held = ((part - mean) / np.where(std > 0, std, 1) for part in (train, test))

    def ours() -> dict[str, float]:
        return {"accuracy": knn_accuracy(train, train_y, test, test_y, k=K, temperature=TEMPERATURE)}

    def by_faiss() -> dict[str, float]:
        index = faiss.IndexFlatIP(train.shape[1])
        index.add(unit(train))
        cosines, rows = index.search(unit(test), K)
        votes = np.zeros((len(test), len(classes)))
        np.add.at(votes, (np.arange(len(test))[:, None], train_y[rows]), np.exp(cosines / TEMPERATURE))
        return {"accuracy": float((votes.argmax(axis=1) == test_y).mean())}

    def by_sklearn() -> dict[str, float]:
        model = KNeighborsClassifier(
            K, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
        )
        return {"accuracy": float(model.fit(train, train_y).score(test, test_y))}

    def objective(weight: Any, bias: Any) -> float:
        logits = x.astype(np.float64) @ weight.T + bias
        top = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        return float((log_sum - logits[np.arange(len(x)), train_y]).mean() + np.square(weight).sum() / (2 * C * len(x)))

    def linear() -> dict[str, float]:
        model = LogisticRegression(train, train_y, len(classes), torch.device("cpu"))
        model.fit(C)
        weight, bias = (t.detach().double().numpy() for t in (model._weight, model._bias))
        return {"accuracy": model.accuracy(test, test_y), "objective": objective(weight, bias)}

    def linear_by_sklearn() -> dict[str, float]:
        model = SklearnRegression(C=C, max_iter=5000).fit(x, train_y)
        return {"accuracy": float(model.score(held, test_y)), "objective": objective(model.coef_, model.intercept_)}

    groups: dict[str, dict[str, Callable[[], dict[str, float]]]] = {
        "kNN": {"maekit": ours, "faiss": by_faiss, "scikit-learn": by_sklearn},
        "linear": {"maekit": linear, "scikit-learn": linear_by_sklearn},
    }
    table = []
    for task, ways in groups.items():
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, dict[str, float]] = {}
        for number in range(options.rounds):
            names = list(ways)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                before = time.perf_counter()
                found[name] = ways[name]()
                seconds[name].append(time.perf_counter() - before)
        base = statistics.median(seconds["maekit"])
        for name in ways:
            middle = statistics.median(seconds[name])
            table.append({"task": task, "name": name, "seconds": middle, "x_ours": middle / base, **found[name]})
            print(table[-1], flush=True)
    if options.json:
        about = {"what": "scores beside peers", "train": list(train.shape), "test": list(test.shape)}
        options.json.write_text(json.dumps({**about, "rounds": options.rounds, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
