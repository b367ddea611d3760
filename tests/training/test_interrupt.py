"""Signals go back to whoever had them, in whatever order runs end."""

import signal

import pytest

from dispersive_kit.training.parallel import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_runs_side_by_side_leave_the_signals_as_they_found_them(first_out):
    before = [signal.getsignal(number) for number in SIGNALS]
    runs = [StopRequest().__enter__(), StopRequest().__enter__()]
    signal.raise_signal(signal.SIGTERM)
    assert [run.signal_number for run in runs] == [None, signal.SIGTERM]  # the one begun last has them
    left = runs[1 - first_out]
    runs[first_out].__exit__(None, None, None)
    assert [signal.getsignal(number) for number in SIGNALS] == [left._note] * 2
    left.__exit__(None, None, None)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_ctrl_c_acts_at_once():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.end_run()
