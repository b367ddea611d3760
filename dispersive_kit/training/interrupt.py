"""Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint, instead of in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, SIGINT and SIGTERM only set `signal_number`; a second SIGINT acts at once.

    Handlers can be set in the main thread only; elsewhere this does nothing, and signals act as usual.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}
        self._over = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        for number in self._previous:
            if signal.getsignal(number) == self._note:  # else a run that was begun later has it, and gives it back
                signal.signal(number, self._before(number))

    def _before(self, number: int) -> Any:
        """The handler there was before this run and before all that have ended since."""
        handler = self._previous[number]
        owner = getattr(handler, "__self__", None)
        return owner._before(number) if isinstance(owner, StopRequest) and owner._over else handler

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def end_run(self) -> None:
        """Ends the run as the signal would have: KeyboardInterrupt, or exit status 128 + 15.

        A process that was not signalled itself, but whose neighbour was, ends as by SIGTERM.
        """
        if self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal_number or signal.SIGTERM))
