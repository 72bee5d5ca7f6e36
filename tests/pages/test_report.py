"""`maekit report`: what is on the page, of whole runs, poor ones and damaged ones."""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pages import Notes, parse
from support.processes import tiny_config
from support.shards import jpeg, write_shard
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app
from maekit.cli.options import with_flags
from maekit.config.settings import dump_toml
from maekit.pages import embedding_map, html
from maekit.pages.chart import Line, Scale, line_chart, thin, tick_label
from maekit.pages.thumbnails import nearest_others
from maekit.system.errors import InputError

pytestmark = pytest.mark.whole

HOSTILE = "<script>alert('&\"')</script>"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained run, for things to be put into it."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_whole_run(run: Path) -> None:
    """Summary, five charts, pictures of some steps, neighbours, map, tables and settings are there."""
    (run / "pictures").mkdir(exist_ok=True)
    for step in range(1, 10):
        Image.new("RGB", (60, 40), (20 * step, 0, 0)).save(run / f"pictures/step-{step:09d}.png")
    (run / "evaluations").mkdir()
    rows = [
        {"name": "avg", "accuracy": 0.5, "seconds": 0.25, "k": 20, "c": 0.1, "even": 0.2},
        {"name": HOSTILE, "accuracy": 0.613, "seconds": 0.5, "k": 20, "map": None, "even": 0.2},
    ]
    train = {"shards": ["a.tar"], "images": 1234, "classes": 10}
    test = {"shards": 3, "samples": 60, "images": 50, "classes": 10, "unlabelled": 0, "unreadable": 7}
    table = {"task": "knn", "model": "run & co", "step": 8, "train": train, "test": test, "rows": rows}
    (run / "evaluations/knn.json").write_text(json.dumps(table))
    (run / "evaluations/broken.json").write_text('{"task": "knn"')
    (run / "evaluations/other.json").write_text('{"task": "knn", "model": "m", "rows": [3]}')
    progress = Notes()
    result = maekit.report(maekit.ReportConfig(run, samples=20, device="cpu"), progress)
    assert (result.path, result.step, result.samples, result.evaluations) == (str(run / "report.html"), 8, 20, 1)
    assert result.bytes == (run / "report.html").stat().st_size < 5e6
    found = parse(run / "report.html")
    assert "Steps 8 of 8" in found.text
    assert "State finished" in found.text
    assert "Images seen 48" in found.text
    assert f"Last loss {result.loss:.4f}" in found.text
    charts = [attributes["aria-label"] for tag, attributes in found.tags if tag == "svg"]
    assert [str(chart).split()[0] for chart in charts] == ["training", "learning", "throughput", "wait", "norm"]
    assert f"{result.loss:.4g} at step 8" in str(charts[0])
    # Pictures: the first, the last, and four between.
    reds = [image.convert("RGB").getpixel((5, 5))[0] // 20 for image in found.images()[:6]]
    assert reds == [1, 2, 4, 5, 7, 9]
    # Eight queries of eight neighbours, and the map.
    assert len(found.images()) == 6 + 8 * 9 + 1
    assert ["avg", "50.0%", "0.25", "20", "0.1", "20.0%", "–"] in found.cells
    assert [HOSTILE, "61.3%", "0.5", "20", "–", "20.0%", "–"] in found.cells
    assert re.findall("<b>(.*?)</b>", found.source) == ["61.3%"]
    sides = "train: 1,234 images of 10 classes (a.tar); test: 50 images of 10 classes, 7 unreadable"
    assert f"run & co, step 8; {sides}" in found.text
    for name in ("broken.json", "other.json"):
        assert f"{name} is damaged, or no evaluation" in found.text
        assert any(name in said for said in progress.said)
    assert result.missing == ("broken.json is damaged, or no evaluation", "other.json is damaged, or no evaluation")
    assert ["batch_size", "6", "256"] in found.cells
    assert ["seed", "0"] in found.cells  # among all, in <details>
    assert ["seed", "0", "0"] not in found.cells


def test_hostile_names_stay_text(run: Path, tmp_path: Path) -> None:
    """Of keys, classes, settings; a class beyond the twelve of the legend is grey."""
    key = HOSTILE.replace("/", "_")
    samples = {f"{key}{i}": {"jpg": jpeg(i), "cls": b"%d" % i} for i in range(14)}
    write_shard(tmp_path / "odd" / "a.tar", samples)
    (tmp_path / "odd" / "classes.txt").write_text(f"{HOSTILE}\nsecond\n")
    config = tiny_config(tmp_path / "odd", run, model__init_from=HOSTILE)
    (run / "config.toml").write_text(dump_toml(config))
    maekit.report(maekit.ReportConfig(run, tmp_path / "r.html", device="cpu"))
    found = parse(tmp_path / "r.html")
    assert ["model.init_from", HOSTILE, "–"] in found.cells
    legend = [str(a["style"]) for tag, a in found.tags if tag == "i"]
    assert len(set(legend)) == len(legend) == 13
    assert "2 more classes" in found.text
    assert f"a.tar:{key}0, {HOSTILE}" in found.text
    assert "second" in found.text


def test_what_is_gone_is_said_and_the_page_is_made(run: Path, tmp_path: Path) -> None:
    """Shards that are gone, a checkpoint that is damaged, metrics that are nonsense, pictures that are none."""
    rows = [{"step": 1, "loss": math.nan, "lr": "x"}, {"step": 2, "loss": True, "grad_norm": 1e999}, {"step": 10**400}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "pictures").mkdir(exist_ok=True)
    (run / "pictures/step-000000003.png").write_bytes(b"no picture")
    progress = Notes()
    options = dict(shards=(str(tmp_path / "nowhere"),), device="cpu")
    result = maekit.report(maekit.ReportConfig(run, **options), progress)
    found = parse(run / "report.html")
    assert "nowhere" in result.missing[0]
    assert found.text.count("Not shown: neighbours and map:") == 2
    assert any("nowhere" in said for said in progress.said)
    assert "step-000000003.png cannot be read" in found.text
    assert "the run has no row of metrics yet" in found.text
    assert (result.samples, result.loss) == (0, None)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    result = maekit.report(maekit.ReportConfig(run, device="cpu"))
    assert "no checkpoint yet" in parse(run / "report.html").text
    assert result.step is None


def test_a_single_row_and_a_held_out_loss(run: Path) -> None:
    rows = [{"step": 5, "loss": 0.5, "samples": 100, "images_per_second": 50.0}, {"step": 5, "val_loss": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    maekit.report(maekit.ReportConfig(run, samples=2, device="cpu"))
    found = parse(run / "report.html")
    assert "Last held-out loss 0.7500" in found.text
    assert "training 0.5 at step 5; held out 0.75 at step 5" in found.text
    assert "Time in training 2 s" in found.text
    assert "2 samples are too few for a map" in found.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "nothing does not exist; a run is the --out of"),
        ((".",), "is no run"),
        (("run", "--samples", "1"), "--samples 1: must be at least 2"),
        (("run", "--device", "tpu"), "--device tpu"),
        (("run", "--out", "r.txt"), "must end in .html"),
    ],
)
def test_bad_usage(run: Path, monkeypatch: pytest.MonkeyPatch, arguments, said: str) -> None:
    monkeypatch.chdir(run.parent)
    refused = CliRunner().invoke(app, ["report", *arguments])
    assert isinstance(refused.exception, InputError)
    assert said in with_flags(str(refused.exception))


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(out), "--samples", "12", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert set(summary) == {"path", "bytes", "step", "loss", "samples", "evaluations", "missing"}
    assert summary["missing"] == []
    assert "12 samples at their places" in parse(out).text
    assert not (run / "report.html").exists()


def test_the_map_keeps_groups_together() -> None:
    """Three groups of vectors are three groups of cells; the same vectors give the same map."""
    random = np.random.default_rng(0)
    groups = np.arange(60) % 3
    vectors = (np.eye(8)[groups] + 0.05 * random.normal(size=(60, 8))).astype(np.float32)
    places = embedding_map.lay_out(vectors)
    assert np.array_equal(places, embedding_map.lay_out(vectors))
    cells = np.array(embedding_map.assign_cells(places, 11, farthest=99), float)
    near = np.argsort(np.linalg.norm(cells[:, None] - cells[None], axis=-1), axis=1)[:, 1:5]
    assert (groups[near] == groups[:, None]).mean() > 0.9


def test_no_thumbnail_covers_another() -> None:
    """Samples at one place get cells beside each other, or are left out; the picture holds each at its cell."""
    places = np.zeros((40, 2), np.float32)
    places[0], places[1] = (1, 1), (0, 1)
    cells = embedding_map.assign_cells(places, 9, farthest=2)
    given = [cell for cell in cells if cell is not None]
    assert len(given) == len(set(given)) < 40
    assert cells[:2] == [(8, 8), (8, 0)]
    assert all(math.hypot(*cell) <= 2 for cell in given[2:])
    thumbnails = [np.full((8, 8, 3), 60 + number, np.uint8) for number in range(40)]
    picture, drawn = embedding_map.draw_map(thumbnails, places, ["#ff0000"] * 40)
    side = math.ceil(math.sqrt(80))
    cell = picture.shape[0] // side
    expected = embedding_map.assign_cells(places, side)
    assert drawn == sum(place is not None for place in expected)
    for number, place in enumerate(expected):
        if place is not None:
            assert (picture[place[0] * cell + cell // 2, place[1] * cell + cell // 2] == 60 + number).all()
            assert tuple(picture[place[0] * cell, place[1] * cell]) == (255, 0, 0)


def test_neighbours_leave_the_query_out() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    vectors[7] = vectors[3]  # a duplicate is a neighbour all the same
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = [3, 7, 12]
    for query, near in zip(queries, nearest_others(vectors[queries], queries, [vectors], 5), strict=True):
        cosines = unit @ unit[query]
        cosines[query] = -2
        assert [number for number, _ in near] == np.argsort(-cosines, kind="stable")[:5].tolist()
        np.testing.assert_allclose([cosine for _, cosine in near], np.sort(cosines)[::-1][:5], rtol=1e-5)


def test_thinning_keeps_every_spike() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    values[[17, 5000, 9999]] = 50, -60, 70
    points = list(enumerate(values.tolist()))
    kept = thin(points)
    assert len(kept) <= 300
    assert {(17, 50.0), (5000, -60.0), (9999, 70.0)} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert thin(points[:300]) == points[:300]


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Scale(0, 0.0015), [0, 0.0005, 0.001, 0.0015]),
        (Scale(20, 1954), [500, 1000, 1500]),
        (Scale(0.01, 100, True), [0.01, 0.05, 0.2, 1, 5, 20, 100]),
        (Scale(-3, 3), [-2, 0, 2]),
    ],
)
def test_ticks_are_round(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "label"), [(0.5, "0.5"), (2e-5, "2e-05"), (20000, "20k"), (1.5e6, "1.5M"), (0, "0"), (2000, "2000")]
)
def test_tick_labels(value: float, label: str) -> None:
    assert tick_label(value) == label


def test_a_chart_stays_within_its_frame() -> None:
    """The highest value is the highest point; a falling line falls; all the same is a line in the middle."""
    chart = line_chart("t<", [Line("n", [(0, 9.0), (50, 1.0), (100, 3.0)])], unit="u", from_zero=True)
    assert "t&lt;" in chart
    path = re.search(r'class="line line-0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
    x0, y0, x1, y1, x2, y2 = map(float, path.groups())
    assert (x0, y0, x2) == (54, 26, 388)
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert y0 < y2 < y1 < 210
    flat = line_chart("t", [Line("n", [(0, 2.0), (1, 2.0)])], unit="u")
    assert re.search(r'd="M54 118L388 118"', flat)


def test_large_pictures_are_jpegs_and_small_ones_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    small, large = html.picture(pixels, "a"), html.picture(pixels.repeat(8, 0).repeat(8, 1), "b")
    assert 'width="96"' in small
    data = base64.b64decode(re.search(r"png;base64,([^\"]+)", small)[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert "image/jpeg" in large
    assert 'width="256"' in large


def test_how_often_neighbours_share_a_class(run: Path, tmp_path: Path) -> None:
    """Of two classes that look different, the neighbours are of the same class; of many classes nothing is said."""
    flat = {}
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 40, (32, 32, 3), np.uint8) + (0 if i < 20 else 200)
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        flat[f"{i:02d}"] = {"png": buffer.getvalue(), "cls": b"%d" % (i >= 20)}
    write_shard(tmp_path / "two/a.tar", flat)
    options = dict(shards=(str(tmp_path / "two"),), device="cpu")
    maekit.report(maekit.ReportConfig(run, **options))
    text = parse(run / "report.html").text
    said = re.search(r"8 nearest of every sample, ([\d.]+)% are of its class; of all others 48.7%", text)
    assert said is not None
    assert float(said[1]) > 80
    write_shard(tmp_path / "two/a.tar", {key: {**members, "cls": key.encode()} for key, members in flat.items()})
    maekit.report(maekit.ReportConfig(run, **options))
    assert "are of its class" not in parse(run / "report.html").text
