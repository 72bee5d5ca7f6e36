"""A sweep: the cells it should have, each done once, drawn."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.errors import raises
from support.planted import plant
from support.processes import TINY
from support.shards import write_shard
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app
from maekit.pages.score_tables import evaluation_parts
from maekit.runs import RunDirectory
from maekit.sweeping import read_plan
from maekit.system.errors import InputError, MaekitError

pytestmark = pytest.mark.whole

BASE = {
    **TINY,
    "optimizer.lr": 1e-2,
    "data.workers": 0,
    "run.device": "cpu",
    "run.precision": "fp32",
    "run.threads": 1,
    "run.pictures_every": 0,
    "run.tensorboard": False,
}


@pytest.fixture(autouse=True)
def _few_pixels(monkeypatch) -> None:
    monkeypatch.setattr("maekit.evaluation.features.PIXELS", 8)


def write(folder: Path, vary: str, sweep: str = "") -> Path:
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in BASE.items())
    path = folder / "sweep.toml"
    path.write_text(
        f'shards = ["{folder}/train"]\nsteps = 3\nbatch_size = 6\n{settings}\n\n'
        f'[sweep]\ntrain = ["{folder}/train"]\ntest = ["{folder}/test"]\n{sweep}\n\n[sweep.vary]\n{vary}\n'
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sweep")
    plant(made / "train", 0, 24)
    plant(made / "test", 500, 12)
    return made


def test_cells_vary_one_setting_at_a_time(folder: Path) -> None:
    vary = '"model.mask_ratio" = [0.5, 0.75]\n"model.target" = ["pixel", "norm_pixel"]\n"data.crop_scale" = [[0.5, 1]]'
    cells = read_plan(write(folder, vary)).cells()
    assert [cell.name for cell in cells] == ["base", "mask_ratio=0.5", "target=pixel", "crop_scale=0.5x1"]
    assert cells[3].changes == {"data.crop_scale": (0.5, 1.0)}


def test_cells_of_a_whole_grid(folder: Path) -> None:
    vary = '"model.mask_ratio" = [0.5, 0.75]\n"model.decoder_depth" = [1, 2, 3]'
    cells = read_plan(write(folder, vary, 'every = "all"')).cells()
    assert len(cells) == 6  # the base is one of them
    assert "mask_ratio=0.5,decoder_depth=3" in [cell.name for cell in cells]


def test_it_is_done_once_and_goes_on(folder: Path, tmp_path: Path) -> None:
    plan = write(folder, '"model.mask_ratio" = [0.5]')
    first = maekit.sweep(maekit.SweepConfig(plan, tmp_path / "out", device="cpu"))
    assert first.trained == 2
    assert [row["name"] for row in first.rows] == ["base", "mask_ratio=0.5"]
    assert set(first.rows[0]["baselines"]) == {
        f"knn: {name}" for name in ("raw pixels", "raw pixels, whitened", "untrained avg", "untrained avg, whitened")
    }
    ratios = [RunDirectory(tmp_path / "out" / name).config().model.mask_ratio for name in ("base", "mask_ratio=0.5")]
    assert ratios == [0.75, 0.5]
    again = maekit.sweep(
        maekit.SweepConfig(write(folder, '"model.mask_ratio" = [0.5, 0.6]', 'judge = ["knn"]'), tmp_path / "out")
    )
    assert again.trained == 1
    assert again.rows[:2] == [{**row, "loss": row["loss"]} for row in first.rows]
    judged = maekit.sweep(
        maekit.SweepConfig(write(folder, '"model.mask_ratio" = [0.5]', 'judge = ["knn", "linear"]'), tmp_path / "out")
    )
    assert judged.trained == 0
    assert judged.rows[1]["linear"] > 0.5
    assert judged.rows[1]["knn"] == first.rows[1]["knn"]
    assert json.loads((tmp_path / "out/sweep.json").read_text())["rows"] == judged.rows


def test_the_page_draws_numbers_as_curves(folder: Path, tmp_path: Path) -> None:
    vary = '"model.mask_ratio" = [0.5]\n"model.target" = ["pixel"]'
    result = maekit.sweep(maekit.SweepConfig(write(folder, vary), tmp_path / "out"))
    text = Path(result.page).read_text()

    charts: list[str] = []
    cells: set[str] = set()

    class Page(HTMLParser):
        def handle_starttag(self, tag, attributes) -> None:
            if tag == "svg":
                charts.append(dict(attributes)["aria-label"])

        def handle_data(self, data: str) -> None:
            cells.add(data)

    Page().feed(text)
    assert len(charts) == 1  # a target is no number
    assert "at mask_ratio 0.5" in charts[0]
    assert "at mask_ratio 0.75" in charts[0]
    assert {"base", "mask_ratio=0.5", "target=pixel", "knn: raw pixels"} <= cells


def test_a_cell_that_fails_keeps_no_other_from_being_tried(folder: Path, tmp_path: Path) -> None:
    """A rate that is far too high ends its own cell alone; it is told at the end, and by the page."""
    plan = write(folder, '"optimizer.lr" = [1e30, 0.02]')
    with raises(MaekitError, match=r"1 of 3 cells failed, .*sweep\.html; the first: lr=1e\+30: ") as raised:
        maekit.sweep(maekit.SweepConfig(plan, tmp_path / "out"))
    assert raised.value.exit_code == 1
    base, failed, other = json.loads((tmp_path / "out/sweep.json").read_text())["rows"]
    assert [row["name"] for row in (base, failed, other)] == ["base", "lr=1e+30", "lr=0.02"]
    assert "knn" in base
    assert "knn" in other
    assert set(failed) == {"name", "changes", "failed"}
    assert "failed" in (tmp_path / "out/sweep.html").read_text()


def test_a_cell_is_a_run_that_can_be_reported(folder: Path, tmp_path: Path) -> None:
    """What the sweep keeps of its judging is no damaged evaluation."""
    maekit.sweep(maekit.SweepConfig(write(folder, '"model.mask_ratio" = [0.5]'), tmp_path / "out"))
    tables, damaged = evaluation_parts(tmp_path / "out/base/evaluations")
    assert len(tables) == 1
    assert damaged == []


def test_each_way_of_judging_has_its_curve(folder: Path, tmp_path: Path) -> None:
    judged = 'judge = ["knn", "linear"]'
    text = Path(
        maekit.sweep(maekit.SweepConfig(write(folder, '"model.mask_ratio" = [0.5]', judged), tmp_path / "out")).page
    ).read_text()
    assert "model.mask_ratio: knn" in text
    assert "model.mask_ratio: linear" in text


def test_labels_are_looked_for_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    plan = write(folder, '"model.mask_ratio" = [0.5]')
    bare = write_shard(tmp_path / "bare/0.tar", {"a": {"png": b"none"}}).parent
    plan.write_text(plan.read_text().replace(f'test = ["{folder}/test"]', f'test = ["{bare}"]'))
    with raises(InputError, match=r"sweep\.test .*none of 1 samples has a \.cls member"):
        maekit.sweep(maekit.SweepConfig(plan, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("vary", "sweep", "said"),
    [
        ('"model.mask_ration" = [0.5]', "", "did you mean model.mask_ratio"),
        ('"model.mask_ratio" = 0.5', "", "must be a list of values"),
        ('"model.mask_ratio" = ["half"]', "", "must be a number"),
        ('"model.mask_ratio" = [0.75]', "", "changes nothing"),
        ('"model.mask_ratio" = [1.5]', "", "mask_ratio=1.5: .*must lie between 0 and 1"),
        ('"model.decoder_heads" = [3]', "", "decoder_heads=3: .*must be a multiple of 4 and of"),
        ('"model.name" = ["vit_tinny_patch16_224"]', "", "did you mean vit_tiny"),
        (
            '"model.class_token" = [false]',
            'pool = "cls"',
            "class_token=False: --pool cls: this model has no class token",
        ),
        ('"model.mask_ratio" = [0.5]', "test_images = 0", "sweep.test_images = 0: must be greater than 0"),
        ('"model.mask_ratio" = [0.5]', "judges = []", "unknown setting 'sweep.judges'"),
        ('"model.mask_ratio" = [0.5]', 'judge = ["tsne"]', "sweep.judge"),
        ("seed = [" + ", ".join(map(str, range(1, 300))) + "]", "", "at most 200"),
    ],
)
def test_what_is_refused(folder: Path, tmp_path: Path, vary: str, sweep: str, said: str) -> None:
    with raises(InputError, match=said):
        maekit.sweep(maekit.SweepConfig(write(folder, vary, sweep), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command(folder: Path, tmp_path: Path) -> None:
    plan = write(folder, '"optimizer.lr" = [0.001]')
    done = CliRunner().invoke(app, ["sweep", str(plan), "--out", str(tmp_path / "out"), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["base", "lr=0.001"]
    assert f"2 cells, 2 trained now: {tmp_path}/out/sweep.html" in done.stdout
