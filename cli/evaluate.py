"""`maekit evaluate`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from maekit.cli.show import make_progress, print_json, print_table
from maekit.config.evaluate import EvaluateOptions
from maekit.config.poolings import CHOICES

_DEFAULT = EvaluateOptions()
_JUDGED, _IMAGES = "What is judged", "Labelled images"

app = typer.Typer(
    help="Is the embedding any good? Judge it on labelled shards.", no_args_is_help=True, rich_markup_mode="rich"
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run, a checkpoint, timm:NAME, a file of weights, an exported .onnx, or a directory of embeddings.",
        show_default=False,
    ),
]
Weights = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run, a checkpoint, timm:NAME, a file of weights, or the --out of another fine-tuning.",
        show_default=False,
    ),
]
Train = Annotated[
    list[str],
    typer.Option(metavar="SHARDS", help="With a .cls member each.", show_default=False, rich_help_panel=_IMAGES),
]
Test = Annotated[
    list[str],
    typer.Option(metavar="SHARDS", help="Likewise, held out.", show_default=False, rich_help_panel=_IMAGES),
]
Queries = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHARDS",
        help="The queries; without them, each image of --train searches for the others of its class.",
        show_default=False,
        rich_help_panel=_IMAGES,
    ),
]
TrainImages = Annotated[
    int | None,
    typer.Option(help="At most so many, drawn at random.", show_default="all", rich_help_panel=_IMAGES),
]
TestImages = Annotated[
    int | None,
    typer.Option(help="At most so many, drawn at random.", show_default="all", rich_help_panel=_IMAGES),
]
Pool = Annotated[
    list[str] | None,
    typer.Option(
        help=f"{CHOICES}; may be repeated.",
        show_default="all of avg and cls",
        rich_help_panel=_JUDGED,
    ),
]
Whiten = Annotated[
    bool,
    typer.Option(help="Also whitened by a PCA, fitted without labels on the training images.", rich_help_panel=_JUDGED),
]
WhitenDim = Annotated[
    list[int] | None,
    typer.Option(
        help="Length of a whitened embedding; may be repeated.",
        show_default="all directions; 64 for raw pixels",
        rich_help_panel=_JUDGED,
    ),
]
Precision = Annotated[
    list[str] | None,
    typer.Option(
        help="fp32, fp16 or int8, the last two as exported; may be repeated.",
        show_default="fp32",
        rich_help_panel=_JUDGED,
    ),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="timm's name of the architecture, for a file of weights that does not tell.",
        show_default=False,
        rich_help_panel=_JUDGED,
    ),
]
Baselines = Annotated[
    bool, typer.Option(help="Beside it, raw pixels and the encoder as initialised.", rich_help_panel=_JUDGED)
]
Seed = Annotated[int, typer.Option(help="Of the untrained encoder, and of the part held out.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


_TRAINING, _AUGMENTED, _MACHINE = "Training", "Augmentation and regularisation", "Machine"


def _setting(help: str, panel: str, *names: str, default: str | None = None) -> Any:
    """Return an option that is None unless given; the help states the default of fine-tuning."""
    shown = f" [dim]\\[default: {default}][/dim]" if default is not None else ""
    return typer.Option(*names, help=help + shown, rich_help_panel=panel, show_default=False)


TrainingSeed = Annotated[int, typer.Option(help="Of the head, order, crops, and all that is mixed.")]
Out = Annotated[str, typer.Option(help="The directory of this training.", show_default=False)]
Epochs = Annotated[
    float | None, _setting("Passes over the training images.", _TRAINING, default="100; 300 from scratch; 90 to probe")
]
Steps = Annotated[int | None, _setting("Optimiser steps, instead of epochs.", _TRAINING)]
BatchSize = Annotated[int | None, _setting("Images per step, over all devices.", _TRAINING, default="as published")]
Rate = Annotated[float | None, _setting("Base learning rate, per 256 images.", _TRAINING, default="as published")]
Warmup = Annotated[
    float | None, _setting("Length of the warm-up; at most a tenth of the run.", _TRAINING, default="as published")
]
Workers = Annotated[int | None, _setting("Processes that read and decode.", _MACHINE, default="by the machine")]
MicroBatch = Annotated[int | None, _setting("Images at a time on each device.", _MACHINE, default="as memory allows")]
SkipDamaged = Annotated[bool, typer.Option("--skip-damaged", help="Leave damaged shards out.", rich_help_panel=_IMAGES)]
MaxBad = Annotated[
    float | None,
    typer.Option(
        help="Largest share of training samples without readable image or label.",
        show_default="0.01",
        rich_help_panel=_IMAGES,
    ),
]
Cache = Annotated[str | None, _setting("ram keeps small sets decoded in memory; off.", _MACHINE, default="off")]
MaxTime = Annotated[str | None, _setting("Save and stop after such a time: 3h50m.", _MACHINE)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting of finetune.toml.", show_default=False),
]


@app.command("knn")
def knn(
    model: Model,
    train: Train,
    test: Test,
    k: Annotated[int, typer.Option(help="Neighbours that vote.")] = _DEFAULT.k,
    temperature: Annotated[
        float, typer.Option(help="Each votes with exp(cosine / temperature).")
    ] = _DEFAULT.temperature,
    pool: Pool = None,
    whiten: Whiten = True,
    whiten_dim: WhitenDim = None,
    precision: Precision = None,
    architecture: Architecture = None,
    baselines: Baselines = True,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    seed: Seed = _DEFAULT.seed,
    device: Device = _DEFAULT.device,
    as_json: Json = False,
) -> None:
    """Classify test images by their nearest training images: the quickest answer.

    The k nearest by cosine vote, weighted; accuracy is that of --k, and columns tell of other numbers of neighbours.
    """
    options = _options(locals(), k=k, temperature=temperature)
    _evaluate("knn", model, train, test, options, as_json)


@app.command("linear")
def linear(
    model: Model,
    train: Train,
    test: Test,
    pool: Pool = None,
    precision: Precision = None,
    architecture: Architecture = None,
    baselines: Baselines = True,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    seed: Seed = _DEFAULT.seed,
    device: Device = _DEFAULT.device,
    as_json: Json = False,
) -> None:
    """Fit a linear classifier on embeddings that are computed once.

    Multinomial logistic regression by L-BFGS on standardised embeddings; its regularisation C is chosen on a tenth of
    the training images, then all of them are fitted. `maekit evaluate probe` is the published, slower protocol.
    """
    _evaluate("linear", model, train, test, _options(locals()), as_json)


@app.command("retrieval")
def retrieval(
    model: Model,
    train: Train,
    test: Queries = None,
    pool: Pool = None,
    whiten: Whiten = True,
    whiten_dim: WhitenDim = None,
    precision: Precision = None,
    architecture: Architecture = None,
    baselines: Baselines = True,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    seed: Seed = _DEFAULT.seed,
    device: Device = _DEFAULT.device,
    as_json: Json = False,
) -> None:
    """Search the training images by cosine: does a query find those of its class first?

    map: mean average precision over the whole ranking. r_precision: share of the class among the first R, R being its
    size. recall@k: share of queries with one of their class among the first k.
    """
    _evaluate("retrieval", model, train, test or (), _options(locals()), as_json)


@app.command("finetune")
def finetune(
    model: Weights,
    train: Train,
    test: Test,
    out: Out,
    blocks: Annotated[
        str | None,
        _setting(
            "Train the last so many blocks only: all, 12, 4, 1, 0.5 (the MLP of the last), 0 (the head).",
            _JUDGED,
            default="all",
        ),
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="For comparison: the same architecture, trained from nothing by its published schedule.",
            rich_help_panel=_JUDGED,
        ),
    ] = False,
    architecture: Architecture = None,
    pool: Annotated[str | None, _setting(f"{CHOICES}.", _JUDGED, default="avg")] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    layer_decay: Annotated[
        float | None,
        _setting("Each layer's learning rate is that of the next one times this.", _TRAINING, default="0.75"),
    ] = None,
    weight_decay: Annotated[float | None, _setting("On matrices.", _TRAINING, default="0.05")] = None,
    warmup_epochs: Warmup = None,
    rand_augment: Annotated[
        str | None, _setting("RandAugment as timm writes it, or none.", _AUGMENTED, default="rand-m9-mstd0.5-inc1")
    ] = None,
    mixup: Annotated[float | None, _setting("α of mixup; 0 is none.", _AUGMENTED, default="0.8")] = None,
    cutmix: Annotated[float | None, _setting("α of cutmix; 0 is none.", _AUGMENTED, default="1.0")] = None,
    erase: Annotated[
        float | None, _setting("Probability that a rectangle is erased.", _AUGMENTED, default="0.25")
    ] = None,
    label_smoothing: Annotated[
        float | None, _setting("Share that goes to all classes alike.", _AUGMENTED, default="0.1")
    ] = None,
    drop_path: Annotated[float | None, _setting("Largest rate of stochastic depth.", _AUGMENTED, default="0.1")] = None,
    test_images: TestImages = None,
    skip_damaged: SkipDamaged = False,
    max_bad: MaxBad = None,
    seed: TrainingSeed = _DEFAULT.seed,
    device: Annotated[str | None, _setting("auto, cpu or cuda.", _MACHINE, default="auto")] = None,
    precision: Annotated[str | None, _setting("auto, fp32 or bf16.", _MACHINE, default="auto")] = None,
    workers: Workers = None,
    micro_batch: MicroBatch = None,
    cache: Cache = None,
    max_time: MaxTime = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train the encoder, or its last blocks, with labels; the same command goes on where it was stopped.

    The published fine-tuning: layer-wise decay of the learning rate, stochastic depth, RandAugment, mixup, cutmix,
    erasing, label smoothing. OUT gets the weights: OUT/encoder.safetensors can be exported as any other.
    """
    from maekit.config.finetune import finetuning, training_from_scratch

    config = training_from_scratch() if from_scratch else finetuning()
    given = {
        "model.blocks": None if blocks in (None, "all") else _blocks(str(blocks)),
        "model.pool": pool,
        "model.drop_path": drop_path,
        "optimizer.layer_decay": layer_decay,
        "optimizer.weight_decay": weight_decay,
        "mix.rand_augment": rand_augment,
        "mix.mixup": mixup,
        "mix.cutmix": cutmix,
        "mix.erase": erase,
        "mix.label_smoothing": label_smoothing,
        "run.precision": precision,
    }
    _train(config, given, locals(), as_json)


def _blocks(text: str) -> float:
    from maekit.system.errors import InputError

    try:
        return float(text)
    except ValueError:
        raise InputError(f"--blocks {text}: must be all, 0, 0.5, or a whole number") from None


def _train(config: Any, given: dict[str, Any], arguments: dict[str, Any], as_json: bool) -> None:
    """Run supervised training with the settings of a preset, of options, and of --set, each over the one before."""
    from maekit.cli.show import is_main_process
    from maekit.config.settings import parse_setting, set_value
    from maekit.finetuning.finetune import finetune

    given |= {
        "shards": tuple(arguments["train"]),
        "test": tuple(arguments["test"]),
        "out": arguments["out"],
        "model.source": arguments["model"],
        "model.name": arguments["architecture"],
        "data.workers": arguments["workers"],
        "data.cache": arguments["cache"],
        "data.skip_damaged": arguments["skip_damaged"] or None,
        "data.max_bad": arguments["max_bad"],
        "run.device": arguments["device"],
        "run.micro_batch": arguments["micro_batch"],
        "run.max_time": arguments["max_time"],
        "optimizer.lr": arguments["lr"],
        "optimizer.warmup_epochs": arguments["warmup_epochs"],
    }
    given |= {name: arguments[name] for name in ("epochs", "steps", "batch_size", "seed", "test_images")}
    if given["steps"] is not None:
        config.epochs = None
    for key, value in given.items():
        if value is not None:
            set_value(config, key, value)
    for text in arguments["settings"] or []:
        set_value(config, *parse_setting(text))
    result = finetune(config, make_progress())
    if not is_main_process():
        return
    print(
        f"{result.steps} steps, {result.trained} parameters trained, accuracy {100 * (result.accuracy or 0):.2f} %: "
        f"{result.out}"
    )
    if result.path:
        print(f"kept in {result.path}")
    if as_json:
        print_json(dataclasses.asdict(result))


@app.command("probe")
def probe(
    model: Weights,
    train: Train,
    test: Test,
    out: Out,
    architecture: Architecture = None,
    pool: Annotated[str | None, _setting(f"{CHOICES}.", _JUDGED, default="cls")] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    warmup_epochs: Warmup = None,
    test_images: TestImages = None,
    skip_damaged: SkipDamaged = False,
    max_bad: MaxBad = None,
    seed: TrainingSeed = _DEFAULT.seed,
    device: Annotated[str | None, _setting("auto, cpu or cuda.", _MACHINE, default="auto")] = None,
    workers: Workers = None,
    micro_batch: MicroBatch = None,
    cache: Cache = None,
    max_time: MaxTime = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Linear probing as published: SGD with LARS on random resized crops, the encoder frozen.

    A BatchNorm without affine parameters, then a linear layer; batches of 16,384, a base rate of 0.1, 90 epochs. It
    sees each crop through the whole encoder; `maekit evaluate linear` is the quick answer. The same command goes on
    where it was stopped.
    """
    from maekit.config.finetune import linear_probing

    _train(linear_probing(), {"model.pool": pool}, locals(), as_json)


def _options(given: dict[str, Any], **more: Any) -> EvaluateOptions:
    """Return the options of a command from its arguments; lists under their plural."""
    lists = {"pool": "pool", "whiten_dim": "whiten_dims", "precision": "precisions"}
    chosen: dict[str, Any] = {name: tuple(given[option]) for option, name in lists.items() if given.get(option)}
    names = ("whiten", "baselines", "train_images", "test_images", "seed", "device")
    chosen |= {name: given[name] for name in names if name in given}
    return EvaluateOptions(model=given["architecture"], **chosen, **more)


def _evaluate(
    task: str, model: str, train: Sequence[str], test: Sequence[str], options: EvaluateOptions, as_json: bool
) -> None:
    from maekit.evaluation.evaluate import evaluate

    progress = make_progress()
    result = evaluate(task, model, train, test, options, progress)
    if result.rows:
        headings = list(dict.fromkeys(key for row in result.rows for key in row))
        table = [[_shown(key, row.get(key)) for key in headings] for row in result.rows]
        print_table(["", *headings[1:]], table, right=range(1, len(headings)))
    of = "" if result.test is None else f", {result.test['images']} test images"
    print(f"{result.train['images']} training images of {result.train['classes']} classes{of}: {result.model}")
    if result.path:
        print(f"kept in {result.path}")
    if as_json:
        print_json(dataclasses.asdict(result))


def _shown(key: str, value: Any) -> str:
    """Return a value of the table: shares in percent."""
    if value is None:
        return ""
    if key == "c":
        return f"{value:g}"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)
