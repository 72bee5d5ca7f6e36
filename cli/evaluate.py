"""`maekit evaluate`."""

from collections import Counter
from functools import partial
from typing import Any

import typer

from maekit.cli.options import Summary, configured
from maekit.cli.show import describe_unused, is_main_process, make_progress, print_table, say
from maekit.config.evaluate import EvaluateConfig
from maekit.config.finetune import FinetuneConfig, finetuning, linear_probing, training_from_scratch

app = typer.Typer(
    help="Is the embedding any good? Judge it on labelled shards.", no_args_is_help=True, rich_markup_mode="rich"
)
# What a supervised training has in common with pre-training, and does not offer as options of its own.
_ONLY_PRETRAINING = (
    *("data.augmentation", "data.color_jitter", "data.cache_gb", "data.val", "optimizer.clip_grad", "run.compile"),
    *("run.checkpoint_every", "run.checkpoint_minutes", "run.keep_checkpoints", "run.keep_every", "run.log_every"),
    *("run.skip_nonfinite", "run.tensorboard"),
)
_NOT_PROBED = (
    *("model.from_scratch", "model.blocks", "model.drop_path", "optimizer.weight_decay", "optimizer.layer_decay"),
    *("mix.rand_augment", "mix.mixup", "mix.cutmix", "mix.label_smoothing", "mix.erase", "run.precision"),
)
_evaluation = partial(configured, EvaluateConfig)
_training = partial(
    configured,
    required=["shards", "test", "out"],
    toml="finetune.toml",
    help={"data.max_bad": "Largest share of training samples without readable image or label."},
)


@app.command("knn")
@_evaluation(defaults={"task": "knn"}, required=["test"], help={"test": "Likewise, held out."})
def knn(config: EvaluateConfig) -> Summary:
    """Classify test images by their nearest training images: the quickest answer.

    The k nearest by cosine vote, weighted; accuracy is that of --k, and columns tell of other numbers of neighbours.
    """
    return _evaluate(config)


@app.command("linear")
@_evaluation(
    defaults={"task": "linear"},
    required=["test"],
    without=["k", "temperature", "whiten", "whiten_dims"],
    help={"test": "Likewise, held out."},
)
def linear(config: EvaluateConfig) -> Summary:
    """Fit a linear classifier on embeddings that are computed once.

    Multinomial logistic regression by L-BFGS on standardised embeddings; its regularisation C is chosen on a tenth of
    the training images, then all of them are fitted. `maekit evaluate probe` is the published, slower protocol.
    """
    return _evaluate(config)


@app.command("retrieval")
@_evaluation(
    defaults={"task": "retrieval"},
    without=["k", "temperature"],
    help={"test": "The queries; without them, each image of `train` searches for the others of its class."},
)
def retrieval(config: EvaluateConfig) -> Summary:
    """Search the training images by cosine: does a query find those of its class first?

    map: mean average precision over the whole ranking. r_precision: share of the class among the first R, R being its
    size. recall@k: share of queries with one of their class among the first k.
    """
    return _evaluate(config)


@app.command("finetune")
@_training(finetuning, without=_ONLY_PRETRAINING, instead={"model.from_scratch": training_from_scratch})
def finetune(config: FinetuneConfig) -> Summary:
    """Train the encoder, or its last blocks, with labels; the same command resumes a stopped run.

    The published fine-tuning: layer-wise decay of the learning rate, stochastic depth, RandAugment, mixup, cutmix,
    erasing, label smoothing. OUT gets the weights: OUT/encoder.safetensors can be exported as any other.
    """
    return _train(config)


@app.command("probe")
@_training(linear_probing, without=(*_ONLY_PRETRAINING, *_NOT_PROBED))
def probe(config: FinetuneConfig) -> Summary:
    """Linear probing as published: SGD with LARS on random resized crops, the encoder frozen.

    A BatchNorm without affine parameters, then a linear layer; batches of 16,384, a base rate of 0.1, 90 epochs. It
    sees each crop through the whole encoder; `maekit evaluate linear` is the quick answer. The same command
    resumes a stopped run.
    """
    return _train(config)


def _train(config: FinetuneConfig) -> Summary:
    from maekit.finetuning.finetune import finetune

    result = finetune(config, make_progress())
    if not is_main_process():
        return
    say(
        f"{result.steps} steps, {result.trained} parameters trained, accuracy {100 * (result.accuracy or 0):.2f} %: "
        f"{result.out}"
    )
    if result.path:
        say(f"kept in {result.path}")
    yield result


def _evaluate(config: EvaluateConfig) -> Summary:
    from maekit.evaluation.evaluate import evaluate

    result = evaluate(config, make_progress())
    if result.rows:
        headings = list(dict.fromkeys(key for row in result.rows for key in row))
        table = [[_shown(key, row.get(key)) for key in headings] for row in result.rows]
        print_table(["", *headings[1:]], table, right=range(1, len(headings)))
    of = "" if result.test is None else f", {result.test['images']} test images"
    unused = Counter(result.train["unused"]) + Counter(result.test["unused"] if result.test else {})
    said = f"{result.train['images']} training images of {result.train['classes']} classes{of}"
    say(f"{said}{describe_unused(unused)}: {result.model}")
    if result.path:
        say(f"kept in {result.path}")
    yield result


def _shown(key: str, value: Any) -> str:
    """Return a value of the table: shares in percent."""
    if value is None:
        return ""
    if key == "c":
        return f"{value:g}"
    if key == "rank":
        return f"{value:.1f}"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)
