"""What can be asked of `maekit evaluate`. Imports nothing heavy: its `--help` shows these defaults."""

from dataclasses import dataclass

from maekit.config.poolings import check_pool
from maekit.system.errors import InputError

TASKS = ("knn", "linear", "retrieval")
PRECISIONS = ("fp32", "fp16", "int8")
_NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
_RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class EvaluateOptions:
    """How embeddings are judged.

    Attributes:
        pool: poolings to judge, each for itself; empty is all of `avg` and `cls` that the model has.
        whiten: judge them whitened as well, by a PCA fitted without labels on the training set.
        whiten_dims: lengths of a whitened embedding; empty is all directions of any variance (64 for raw pixels).
        baselines: judge raw pixels and the encoder as initialised beside it.
        train_images: at most so many samples of the training set, drawn at random; None is all.
        test_images: likewise of the test set.
        precisions: of the model, `fp32`, `fp16` or `int8`; all but `fp32` are those of an exported file.
        k: neighbours that vote (kNN).
        ks: other numbers of neighbours to tell of.
        temperature: of the votes (kNN).
        recalls: the k of recall@k (retrieval).
        model: timm's name of the architecture, for a file of weights that does not tell.
        seed: of the part that the regularisation is chosen on (linear), and of the untrained encoder.
        device: `auto`, `cpu` or `cuda`.
    """

    pool: tuple[str, ...] = ()
    whiten: bool = True
    whiten_dims: tuple[int, ...] = ()
    baselines: bool = True
    train_images: int | None = None
    test_images: int | None = None
    precisions: tuple[str, ...] = ("fp32",)
    k: int = 20
    ks: tuple[int, ...] = _NEIGHBOURS
    temperature: float = 0.07
    recalls: tuple[int, ...] = _RECALLS
    model: str | None = None
    seed: int = 0
    device: str = "auto"

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value.
        """
        for pool in self.pool:
            check_pool("--pool", pool)
        for option, values, allowed in (
            ("--precision", self.precisions, PRECISIONS),
            ("--device", (self.device,), ("auto", "cpu", "cuda")),
        ):
            for value in values:
                if value not in allowed:
                    raise InputError(f"{option} {value}: must be one of {', '.join(allowed)}")
        for option, number in (
            ("--train-images", self.train_images),
            ("--test-images", self.test_images),
            ("--k", self.k),
            ("--temperature", self.temperature),
            *(("--whiten-dim", dim) for dim in self.whiten_dims),
        ):
            if number is not None and not number > 0:
                raise InputError(f"{option} {number}: must be greater than 0")
        if not self.precisions:
            raise InputError("--precision: at least one is needed")
        if not self.whiten and self.whiten_dims:
            raise InputError(f"--whiten-dim {self.whiten_dims[0]} does not go with --no-whiten")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed {self.seed}: must lie between 0 and 2^63")
