"""`maekit sweep`: one pre-training per cell of a small grid, all evaluated in the same way and drawn as curves.

The file is a config of `maekit pretrain` with an additional table:

    [sweep]
    train = ["train-*.tar"]             # labelled, for the evaluation
    test = ["test-*.tar"]
    judge = ["knn"]                     # knn, linear, or both
    every = "one"                       # vary one setting of the base at a time; "all" runs all combinations

    [sweep.vary]
    "model.mask_ratio" = [0.5, 0.75, 0.9]
    "model.decoder_depth" = [1, 2, 4]

Each cell is a separate run below OUT. A repeated call resumes a stopped cell and skips what is already trained and
evaluated.
"""

import contextlib
import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from maekit.config import PretrainConfig
from maekit.config.evaluate import EvaluateConfig
from maekit.config.fields import Config, check, setting
from maekit.config.poolings import check_pool
from maekit.config.settings import fields_of, load_toml, set_value
from maekit.config.sweep import SweepConfig
from maekit.pages import html
from maekit.pages.chart import Line, line_chart
from maekit.pages.html import Html
from maekit.runs import RunDirectory
from maekit.system import files
from maekit.system.errors import InputError, MaekitError, OtherRankError, Stopped
from maekit.system.progress import Progress, Silent
from maekit.system.redaction import redact, redacted

_TABLE = "sweep."
_VARY = "sweep.vary."
_BASE = "base"
_MOST_CELLS = 200


class SweepSettings(Config):
    """The table `[sweep]` of the file: how cells are formed and evaluated."""

    train: tuple[str, ...] = setting((), "Labelled shards to judge with.")
    test: tuple[str, ...] = setting((), "Likewise, held out.")
    judge: tuple[Literal["knn", "linear"], ...] = setting(("knn",), "knn, linear, or both.")
    every: Literal["one", "all"] = setting(
        "one", "one varies one setting at a time, from the base; all goes through all combinations."
    )
    pool: str = setting("avg", "Of the embeddings.")
    train_images: int | None = setting(None, "At most this many, drawn at random.", above=0)
    test_images: int | None = setting(None, "Likewise.", above=0)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: names the first impossible value.
        """
        if not self.train or not self.test:
            raise InputError("[sweep] needs train and test: labelled shards to judge with")
        check_pool("sweep.pool", self.pool)
        check(self, _TABLE)
        if not self.judge:
            raise InputError("`sweep.judge` = []: must be one of knn, linear, or both")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        name: name of its directory.
        changes: settings that differ from the base, by dotted key.
        config: its training.
    """

    name: str
    changes: dict[str, Any]
    config: PretrainConfig


@dataclass(frozen=True)
class SweepResult:
    """Result of the sweep; `--json` prints it.

    Attributes:
        out: the directory.
        page: the page with the curves and the table.
        rows: name, changes and scores of each cell; a failed cell has `failed`, the reason, in place of scores.
        trained: number of cells that this call trained.
    """

    out: str
    page: str
    rows: list[dict[str, Any]]
    trained: int


@dataclass(frozen=True)
class SweepPlan:
    """The content of a sweep's file.

    Attributes:
        base: the config that the cells change.
        settings: how cells are formed and evaluated.
        vary: the values of each varied setting.
    """

    base: PretrainConfig
    settings: SweepSettings
    vary: dict[str, list[Any]]

    def cells(self) -> list[Cell]:
        """Return the cells, the base first; a cell that changes nothing is merged into the base.

        Raises:
            InputError: nothing is varied, or there are too many cells.
        """
        base = _values(self.base)
        if self.settings.every == "one":
            chosen = [{key: value} for key, values in self.vary.items() for value in values]
        else:
            chosen = [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]
        cells = {_BASE: Cell(_BASE, {}, copy.deepcopy(self.base))}
        for changes in chosen:
            config = copy.deepcopy(self.base)
            for key, value in changes.items():
                set_value(config, key, value)
            now = _values(config)
            if differing := {key: now[key] for key in changes if now[key] != base[key]}:
                name = _slug(differing)
                cells[name] = Cell(name, differing, config)
        if len(cells) > _MOST_CELLS:
            raise InputError(f"this sweep has {len(cells)} cells; at most {_MOST_CELLS} are trained")
        if len(cells) == 1:
            raise InputError("[sweep.vary] changes nothing; give it settings and their values")
        return list(cells.values())


def read_plan(path: Path) -> SweepPlan:
    """Read a sweep's file.

    Raises:
        InputError: the file cannot be read or holds an impossible setting; names the key.
    """
    base, settings = PretrainConfig(), SweepSettings()
    vary: dict[str, list[Any]] = {}
    for key, value in load_toml(path).items():
        if key.startswith(_VARY):
            name = key.removeprefix(_VARY)
            if not isinstance(value, list) or not value:
                raise InputError(f"`{key}` = {value!r}: must be a list of values")
            for one in value:
                set_value(copy.deepcopy(base), name, one)  # an unknown setting, or a value of the wrong type
            vary[name] = value
        elif key.startswith(_TABLE):
            set_value(settings, key.removeprefix(_TABLE), value, _TABLE)
        else:
            set_value(base, key, value)
    settings.validate()
    return SweepPlan(base, settings, vary)


def sweep(config: SweepConfig, progress: Progress | None = None) -> SweepResult:
    """Train and evaluate every cell of a grid; a repeated call resumes.

    Args:
        config: the sweep's file and the output directory.
        progress: receives progress updates.

    Raises:
        InputError: an impossible plan, labelled shards that are missing or have no labels, or a cell that was started
            with other settings; all but the last are found before any training.
        Stopped: a signal arrived; everything is saved, and the same call resumes.
        MaekitError: a cell failed during training or evaluation; the other cells still ran.
    """
    from maekit.pretraining.pretrain import pretrain

    progress = progress or Silent()
    config.validate()
    plan, out = read_plan(Path(config.plan)), Path(config.out)
    if config.device is not None:
        plan.base.run.device = config.device
    cells = plan.cells()
    for cell in cells:
        cell.config.out = str(out / cell.name)
    _check(cells, plan.settings, progress)
    files.require_writable(out)
    rows: list[dict[str, Any]] = []
    trained = 0
    page = out / "sweep.html"
    for number, cell in enumerate(cells, 1):
        progress.note(f"cell {number} of {len(cells)}: {cell.name}")
        row: dict[str, Any] = {"name": cell.name, "changes": cell.changes}
        try:
            result = pretrain(cell.config, progress)
            trained += not result.already_finished
            row |= {"loss": result.loss, **_scores(plan.settings, cell, progress)}
        except (InputError, Stopped, OtherRankError):
            raise
        except MaekitError as error:  # for example, a diverging learning rate must not stop the other cells
            progress.note(f"{cell.name} failed: {error}")
            row["failed"] = str(error)
        rows.append(row)
        files.write_atomically(out / "sweep.json", json.dumps({"rows": redacted(rows)}, indent=1).encode())
        files.write_atomically(page, _page(plan, rows, len(cells)))
    failed = [row for row in rows if "failed" in row]
    if failed:
        first = f"{failed[0]['name']}: {failed[0]['failed']}"
        raise MaekitError(f"{len(failed)} of {len(rows)} cells failed, the others are in {page}; the first: {first}")
    return SweepResult(str(out), str(page), rows, trained)


def _check(cells: Sequence[Cell], settings: SweepSettings, progress: Progress) -> None:
    """Refuse, before any training, cells that cannot be trained and shards that cannot be judged with.

    Raises:
        InputError: names the first impossible cell, or the labelled shards that are missing or have no labels.
    """
    import torch

    from maekit.evaluation.labelled import open_labelled
    from maekit.mae.autoencoder import build_autoencoder
    from maekit.mae.pooling import check_pooling

    for cell in cells:
        try:
            cell.config.validate()
            if cell.config.model.init_from is None:  # otherwise the weights determine the model
                with torch.device("meta"):  # takes no memory and no time
                    check_pooling(build_autoencoder(cell.config.model, seed=cell.config.seed).encoder, settings.pool)
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from error
    image = cells[0].config.data.image
    open_labelled(settings.train, "sweep.train", progress, images=settings.train_images, image=image)
    open_labelled(settings.test, "sweep.test", progress, images=settings.test_images, image=image)


def _values(config: PretrainConfig) -> dict[str, Any]:
    return {key: value for key, value, _ in fields_of(config)}


def _slug(changes: Mapping[str, Any]) -> str:
    """Return the changed settings as a directory name: `mask_ratio=0.5`."""
    parts = [f"{key.rpartition('.')[2]}={_text(value)}" for key, value in changes.items()]
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(parts))


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "x".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else redact(str(value))


def _scores(settings: SweepSettings, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Return the scores of a cell; stored scores are reused if step and evaluation settings are the same."""
    from maekit.evaluation.evaluate import evaluate

    run = RunDirectory(Path(cell.config.out))
    path = run.path / "evaluations" / ".sweep.json"
    asked = redacted({**asdict(settings), "shards": [settings.train, settings.test]})
    step = run.list_checkpoints()[0].step
    kept: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # missing or damaged
        kept = json.loads(path.read_text(encoding="utf-8"))
    if redacted(kept.get("asked")) == json.loads(json.dumps(asked)) and kept.get("step") == step:
        return dict(kept["scores"])
    scores: dict[str, Any] = {}
    for task in settings.judge:
        names = {settings.pool: task, f"{settings.pool}, whitened": f"{task}, whitened"}
        config = EvaluateConfig(
            task,
            cell.config.out,
            settings.train,
            settings.test,
            pool=(settings.pool,),
            baselines=cell.name == _BASE,
            train_images=settings.train_images,
            test_images=settings.test_images,
            device=cell.config.run.device,
            image=cell.config.data.image,
        )
        for row in evaluate(config, progress).rows:
            if row["name"] in names:
                scores[names[row["name"]]] = row["accuracy"]
            else:
                scores.setdefault("baselines", {})[f"{task}: {row['name']}"] = row["accuracy"]
    files.write_atomically(path, json.dumps({"asked": asked, "step": step, "scores": scores}).encode())
    return scores


def _page(plan: SweepPlan, rows: Sequence[dict[str, Any]], cells: int) -> bytes:
    """Return the page: a curve for each varied numeric setting, and one table of all cells."""
    measures = measures_of(rows)
    heads = ["", *(f"{name}, %" for name in measures), "loss"]
    body = [[row["name"], *(_percent(row.get(name)) for name in measures), _loss(row)] for row in rows]
    judged = [number for number, row in enumerate(rows) if "failed" not in row] if len(rows) > 1 else []
    best = [(max(judged, key=lambda n: rows[n][name]), column) for column, name in enumerate(measures, 1) if judged]
    parts = [html.section("Cells", html.table(heads, body, numbers=range(1, len(heads)), best=best))]
    if charts := _charts(plan, rows, measures):
        parts.insert(0, html.section("One setting at a time", html.group("charts", charts)))
    if baselines := rows[0].get("baselines"):
        beside = [[name, _percent(value)] for name, value in baselines.items()]
        parts.append(html.section("Beside them", html.table(["", "accuracy, %"], beside, numbers=[1])))
    if len(rows) < cells:
        parts.append(html.note(f"{len(rows)} of {cells} cells are there so far."))
    about = f"{len(rows)} runs, judged by their {plan.settings.pool} embeddings"
    return html.document("Sweep", f"{about}; losses under different masks or targets do not compare", parts)


def _charts(plan: SweepPlan, rows: Sequence[dict[str, Any]], measures: Sequence[str]) -> list[Html]:
    """Return a chart for each varied numeric setting and task; none where several settings change at once."""
    charts = []
    base = _values(plan.base)
    for key, values in plan.vary.items() if plan.settings.every == "one" else ():
        if not all(map(_is_number, values)):
            continue
        beside = [(row["changes"].get(key, base[key]), row) for row in rows if row["changes"].keys() <= {key}]
        points = sorted((point for point in beside if _is_number(point[0])), key=itemgetter(0))
        if len(points) < 2:
            continue
        for task in plan.settings.judge:
            named = [name for name in measures if name.split(", ")[0] == task]
            lines = [Line(name, [(float(x), row[name]) for x, row in points if name in row]) for name in named]
            if any(line.points for line in lines):
                across = key.rpartition(".")[2]
                charts.append(line_chart(f"{key}: {task}", lines, unit="accuracy", share=True, across=across))
    return charts


def measures_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of all scores in the rows."""
    others = ("name", "changes", "loss", "baselines", "failed")
    return list(dict.fromkeys(key for row in rows for key in row if key not in others))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _loss(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return "failed"
    return "" if row["loss"] is None else f"{row['loss']:.4f}"
