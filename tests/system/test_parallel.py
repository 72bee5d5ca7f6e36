"""Work in processes and threads: results in order, read as fast as they are wanted, and no silent loss."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support.errors import raises

from maekit.system.errors import DamagedShard, ImageError, MaekitError
from maekit.system.parallel import Workers, batched, map_in_threads


def square(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


def fail(error: Exception) -> None:
    raise error


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order(count: int) -> None:
    with Workers(count) as pool:
        assert list(pool.map(square, range(50))) == [number * number for number in range(50)]
    assert list(map_in_threads(square, range(50), threads=count)) == [number * number for number in range(50)]


def test_errors_of_a_process_arrive_as_they_were() -> None:
    with Workers(2) as pool:
        with pytest.raises(DamagedShard) as damage:
            list(pool.map(fail, [DamagedShard("a.tar", 512, "reason")]))
        with pytest.raises(ImageError) as refused:
            list(pool.map(fail, [ImageError("empty", "nothing in it")]))
    assert (damage.value.path, damage.value.offset, damage.value.reason) == ("a.tar", 512, "reason")
    assert str(damage.value) == "a.tar: damaged at byte 512: reason"
    assert (refused.value.reason, str(refused.value)) == ("empty", "nothing in it")


def test_a_killed_process_ends_the_work() -> None:
    with Workers(2) as pool, raises(MaekitError, match="a worker process was killed"):
        list(pool.map(die, range(10)))


def test_items_are_read_no_further_than_wanted() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield number

    with Workers(2) as pool:
        results = pool.map(square, items(), ahead=3)
        assert next(results) == 0
        assert read <= 5
    threads = threading.active_count()
    ahead = map_in_threads(square, items(), threads=2)
    assert next(ahead) == 0
    ahead.close()
    assert threading.active_count() == threads


def test_batches() -> None:
    assert list(batched(range(7), 3)) == [(0, 1, 2), (3, 4, 5), (6,)]
    assert list(batched([], 3)) == []
