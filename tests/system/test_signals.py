"""Signals ask for a stop; a second one, later, enforces it."""

import os
import signal
import threading

import pytest

from maekit.system import signals
from maekit.system.signals import stop_on_signal


def test_the_first_signal_is_reported_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    calls = []
    with stop_on_signal(lambda: calls.append("then")) as stopped_by:
        assert stopped_by() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # of the same wish: a scheduler and a launcher
        assert (stopped_by(), calls) == ("SIGTERM", ["then"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_later_signal_has_its_usual_effect(monkeypatch) -> None:
    monkeypatch.setattr(signals, "_SAME_WISH_SECONDS", 0.0)
    pid = os.fork()
    if pid == 0:
        with stop_on_signal():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_in_a_thread_no_signal_is_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    handlers = []

    def work() -> None:
        with stop_on_signal() as stopped_by:
            handlers.extend([signal.getsignal(signal.SIGTERM), stopped_by()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before, None]


@pytest.fixture(autouse=True)
def _default_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
