"""`maekit evaluate`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from maekit.cli.show import make_progress, print_json, print_table
from maekit.evaluation.options import EvaluateOptions

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
    typer.Option(help="At most so many, evenly spread.", show_default="all", rich_help_panel=_IMAGES),
]
TestImages = Annotated[
    int | None,
    typer.Option(help="At most so many, evenly spread.", show_default="all", rich_help_panel=_IMAGES),
]
Pool = Annotated[
    list[str] | None,
    typer.Option(
        help="avg, cls or avg+cls; may be repeated.", show_default="all of avg and cls", rich_help_panel=_JUDGED
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
Baselines = Annotated[
    bool, typer.Option(help="Beside it, raw pixels and the encoder as initialised.", rich_help_panel=_JUDGED)
]
Seed = Annotated[int, typer.Option(help="Of the untrained encoder, and of the part held out.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


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
    baselines: Baselines = True,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    seed: Seed = _DEFAULT.seed,
    device: Device = _DEFAULT.device,
    as_json: Json = False,
) -> None:
    """Fit a linear classifier on embeddings that are computed once.

    Multinomial logistic regression by L-BFGS on standardised embeddings; its regularisation C is chosen on a tenth of
    the training images, then all of them are fitted.
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


def _options(given: dict[str, Any], **more: Any) -> EvaluateOptions:
    """Return the options of a command from its arguments; lists under their plural."""
    lists = {"pool": "pool", "whiten_dim": "whiten_dims", "precision": "precisions"}
    chosen: dict[str, Any] = {name: tuple(given[option]) for option, name in lists.items() if given.get(option)}
    names = ("whiten", "baselines", "train_images", "test_images", "seed", "device")
    chosen |= {name: given[name] for name in names if name in given}
    return EvaluateOptions(**chosen, **more)


def _evaluate(
    task: str, model: str, train: Sequence[str], test: Sequence[str], options: EvaluateOptions, as_json: bool
) -> None:
    from maekit.evaluation.run import evaluate

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
