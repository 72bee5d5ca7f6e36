"""Errors as people read them."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from maekit.cli.options import with_flags


@contextlib.contextmanager
def raises(kind: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo]:
    """As `pytest.raises`, for a message as the library gives it or as the command line shows it."""
    with pytest.raises(kind) as caught:
        yield caught
    said = str(caught.value)
    shown = (said.replace("`", ""), with_flags(said), said)
    assert any(re.search(match, text) for text in shown), f"{match!r} is not in {shown[1]!r}"
