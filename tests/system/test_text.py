"""Numbers and lists in messages."""

import pytest

from maekit.system.files import describe_bytes
from maekit.system.text import count, first_few


def test_one_of_a_kind_is_singular() -> None:
    assert [count("shard", number) for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert [count("class", number, "classes") for number in (1, 3)] == ["1 class", "3 classes"]
    assert count("shard holds", 1, "shards hold") == "1 shard holds"


def test_long_lists_are_cut() -> None:
    assert first_few(["a"]) == "a"
    assert first_few(["a", "b", "c"]) == "a; b; c"
    assert first_few([1, 2, 3, 4, 5]) == "1; 2; 3; and 2 more"
    assert first_few(["a", "b"], most=1) == "a; and 1 more"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_500_000_000, "1.5 GB"), (5e15, "5000.0 TB")],
)
def test_sizes_have_a_unit(number: float, text: str) -> None:
    assert describe_bytes(number) == text
