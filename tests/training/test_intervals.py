"""When a run logs, saves, validates and draws."""

import pytest

from maekit.config import RunConfig
from maekit.training.intervals import Intervals


@pytest.mark.parametrize(
    ("steps", "changes", "log", "checkpoint", "pictures", "validate"),
    [
        (10, {}, 1, 1, 1, 1),
        (1_000, {}, 10, 100, 100, 100),
        (1_000_000, {}, 50, 1000, 1000, 1000),
        (1_000, {"checkpoint_every": 7, "pictures_every": 0, "val_every": 3, "log_every": 2}, 2, 7, 0, 3),
    ],
)
def test_what_the_config_leaves_open_follows_from_the_length(
    steps, changes, log, checkpoint, pictures, validate
) -> None:
    intervals = Intervals.of(RunConfig(**changes), steps)
    found = (intervals.log, intervals.checkpoint, intervals.pictures, intervals.validate)
    assert found == (log, checkpoint, pictures, validate)


def test_boundaries() -> None:
    """Multiples of each interval; the last step saves, draws and validates too (metrics are written with a save)."""
    intervals = Intervals(log=4, checkpoint=10, keep=7, pictures=5, validate=6, last=23)
    steps = range(1, 24)
    assert [n for n in steps if intervals.logs(n)] == [4, 8, 12, 16, 20]
    assert [n for n in steps if intervals.saves(n)] == [7, 10, 14, 20, 21, 23]
    assert [n for n in steps if intervals.keeps(n)] == [7, 14, 21]
    assert [n for n in steps if intervals.draws(n)] == [5, 10, 15, 20, 23]
    assert [n for n in steps if intervals.validates(n)] == [6, 12, 18, 23]
    never = Intervals(log=1, checkpoint=100, keep=0, pictures=0, validate=0, last=3)
    assert not any(never.keeps(n) or never.draws(n) or never.validates(n) for n in (1, 2, 3))
