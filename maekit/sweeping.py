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

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from maekit.config import PretrainConfig
from maekit.config.fields import Config, check, setting
from maekit.config.poolings import check_pool
from maekit.config.settings import fields_of, load_toml, set_value
from maekit.config.sweep import SweepConfig
from maekit.system import files
from maekit.system.errors import InputError, MaekitError, OtherRankError, Stopped
from maekit.system.progress import Progress, Silent

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
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)


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
        there = {key: value for key, value, _ in fields_of(self.base)}
        if self.settings.every == "one":
            chosen = [{key: value} for key, values in self.vary.items() for value in values]
        else:
            keys = list(self.vary)
            chosen = [dict(zip(keys, values, strict=True)) for values in itertools.product(*self.vary.values())]
        cells = {_BASE: Cell(_BASE)}
        for changes in chosen:
            config = copy.deepcopy(self.base)
            for key, value in changes.items():
                set_value(config, key, value)
            now = {key: value for key, value, _ in fields_of(config)}
            differing = {key: now[key] for key in changes if now[key] != there[key]}
            if differing:
                name = _slug(differing)
                cells[name] = Cell(name, differing)
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
    known = {f.name for f in fields(SweepSettings)}
    for key, value in load_toml(path).items():
        if key.startswith(_VARY):
            name = key.removeprefix(_VARY)
            if not isinstance(value, list) or not value:
                raise InputError(f"`{key}` = {value!r}: must be a list of values")
            for one in value:
                set_value(copy.deepcopy(base), name, one)  # an unknown setting, or a value of the wrong type
            vary[name] = value
        elif key.startswith(_TABLE):
            name = key.removeprefix(_TABLE)
            if name not in known:
                raise InputError(f"unknown setting {key!r} (there are {', '.join(sorted(known))}, and [sweep.vary])")
            set_value(settings, name, value, _TABLE)
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
    runs = [_config(plan.base, cell, out) for cell in cells]
    for cell, run in zip(cells, runs, strict=True):
        _check_cell(plan.settings, cell, run)
    _check_judges(plan.settings, progress)
    files.require_writable(out)
    rows: list[dict[str, Any]] = []
    trained = 0
    page = out / "sweep.html"
    for number, (cell, run) in enumerate(zip(cells, runs, strict=True), 1):
        progress.note(f"cell {number} of {len(cells)}: {cell.name}")
        row: dict[str, Any] = {"name": cell.name, "changes": cell.changes}
        try:
            result = pretrain(run, progress)
            trained += not result.already_finished
            row |= {"loss": result.loss, **_judged(plan, cell, run, progress)}
        except (InputError, Stopped, OtherRankError):
            raise
        except MaekitError as error:  # for example, a diverging learning rate must not stop the other cells
            progress.note(f"{cell.name} failed: {error}")
            row["failed"] = str(error)
        rows.append(row)
        files.write_atomically(out / "sweep.json", json.dumps({"rows": rows}, indent=1).encode())
        files.write_atomically(page, _page(plan, rows, len(cells)))
    failed = [row for row in rows if "failed" in row]
    if failed:
        first = f"{failed[0]['name']}: {failed[0]['failed']}"
        raise MaekitError(f"{len(failed)} of {len(rows)} cells failed, the others are in {page}; the first: {first}")
    return SweepResult(str(out), str(page), rows, trained)


def _check_cell(settings: SweepSettings, cell: Cell, config: PretrainConfig) -> None:
    """Refuse a cell that cannot be trained or evaluated, before any training.

    Raises:
        InputError: names the cell.
    """
    import torch

    from maekit.mae.autoencoder import build_autoencoder
    from maekit.mae.pooling import check_pooling

    try:
        config.validate()
        if config.model.init_from is None:  # otherwise the weights determine the model
            with torch.device("meta"):  # takes no memory and no time
                check_pooling(build_autoencoder(config.model, seed=config.seed).encoder, settings.pool)
    except InputError as error:
        raise InputError(f"{cell.name}: {error}") from error


def _check_judges(settings: SweepSettings, progress: Progress) -> None:
    """Check that the labelled shards exist and have labels.

    Raises:
        InputError: they are missing or have no labels.
    """
    from maekit.evaluation.labelled import open_labelled

    for specs, option, images in (
        (settings.train, "sweep.train", settings.train_images),
        (settings.test, "sweep.test", settings.test_images),
    ):
        open_labelled(specs, option, progress, images=images)


def _config(base: PretrainConfig, cell: Cell, out: Path) -> PretrainConfig:
    config = copy.deepcopy(base)
    for key, value in cell.changes.items():
        set_value(config, key, value)
    config.out = str(out / cell.name)
    return config


def _slug(changes: Mapping[str, Any]) -> str:
    """Return the changed settings as a directory name: `mask_ratio=0.5`."""
    parts = [f"{key.rpartition('.')[2]}={_text(value)}" for key, value in changes.items()]
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(parts))


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "x".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _judged(plan: SweepPlan, cell: Cell, config: PretrainConfig, progress: Progress) -> dict[str, Any]:
    """Return the scores of a cell; stored scores are reused if step and evaluation settings are the same."""
    from maekit.config.evaluate import EvaluateConfig
    from maekit.evaluation.evaluate import evaluate
    from maekit.runs import RunDirectory

    settings = plan.settings
    asked = {**asdict(settings), "shards": [settings.train, settings.test]}
    path = Path(config.out) / "evaluations" / ".sweep.json"
    step = RunDirectory(Path(config.out)).list_checkpoints()[0].step
    kept = _read(path)
    if kept.get("asked") == json.loads(json.dumps(asked)) and kept.get("step") == step:
        scores: dict[str, Any] = kept["scores"]
        return scores
    scores = {}
    for task in settings.judge:
        asked_of_task = EvaluateConfig(
            task,
            config.out,
            settings.train,
            settings.test,
            pool=(settings.pool,),
            baselines=cell.name == _BASE,
            train_images=settings.train_images,
            test_images=settings.test_images,
            device=config.run.device,
        )
        found = evaluate(asked_of_task, progress)
        for row in found.rows:
            name = row["name"]
            if name == settings.pool:
                scores[task] = row["accuracy"]
            elif name == f"{settings.pool}, whitened":
                scores[f"{task}, whitened"] = row["accuracy"]
            else:
                scores.setdefault("baselines", {})[f"{task}: {name}"] = row["accuracy"]
    files.write_atomically(path, json.dumps({"asked": asked, "step": step, "scores": scores}).encode())
    return scores


def _read(path: Path) -> dict[str, Any]:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return there if isinstance(there, dict) else {}


def _page(plan: SweepPlan, rows: Sequence[dict[str, Any]], cells: int) -> bytes:
    """Return the page: a curve for each varied numeric setting, and one table of all cells."""
    from maekit.pages import html
    from maekit.pages.chart import Line, line_chart

    measures = measures_of(rows)
    there = {key: value for key, value, _ in fields_of(plan.base)}
    charts = []
    for key, values in plan.vary.items():
        if plan.settings.every != "one" or not all(type(value) in (int, float) for value in values):
            continue
        points = [(there[key], row) for row in rows if not row["changes"]] if _is_number(there[key]) else []
        points += [(row["changes"][key], row) for row in rows if key in row["changes"]]
        if len(points) > 1:
            points.sort(key=lambda point: point[0])
            across = key.rpartition(".")[2]
            for task in plan.settings.judge:
                named = [name for name in measures if name.split(", ")[0] == task]
                lines = [Line(name, [(float(x), row[name]) for x, row in points if name in row]) for name in named]
                if any(line.points for line in lines):
                    charts.append(line_chart(f"{key}: {task}", lines, unit="accuracy", share=True, across=across))
    baselines = rows[0].get("baselines", {})
    body = [[row["name"], *(_share(row, name) for name in measures), _loss(row)] for row in rows]
    numbers = range(1, len(measures) + 2)
    judged_rows = [number for number, row in enumerate(rows) if "failed" not in row]
    best = [(max(judged_rows, key=lambda n: rows[n][name]), column) for column, name in enumerate(measures, 1)]
    heads = ["", *(f"{name}, %" for name in measures), "loss"]
    parts = [html.section("One setting at a time", html.group("charts", charts))] if charts else []
    parts.append(html.section("Cells", html.table(heads, body, numbers=numbers, best=best if len(rows) > 1 else [])))
    if baselines:
        beside = [[name, f"{100 * value:.1f}"] for name, value in baselines.items()]
        parts.append(html.section("Beside them", html.table(["", "accuracy, %"], beside, numbers=[1])))
    if len(rows) < cells:
        parts.append(html.note(f"{len(rows)} of {cells} cells are there so far."))
    judged = f"{len(rows)} runs, judged by their {plan.settings.pool} embeddings"
    return html.document("Sweep", f"{judged}; losses under different masks or targets do not compare", parts)


def measures_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of all scores in the rows."""
    others = ("name", "changes", "loss", "baselines", "failed")
    return list(dict.fromkeys(key for row in rows for key in row if key not in others))


def _share(row: dict[str, Any], name: str) -> str:
    return f"{100 * row[name]:.1f}" if name in row else "–"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _loss(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return "failed"
    return "" if row["loss"] is None else f"{row['loss']:.4f}"
