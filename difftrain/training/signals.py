"""Stopping by a signal: SIGTERM and SIGINT are handled here and nowhere else."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[int, Any], None]


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Handle SIGTERM and SIGINT within the context; the earlier handlers come back afterwards.

    Outside the main thread, where Python handles no signals, this changes nothing.

    Args:
        handler: What is called with the signal's number and the frame.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopRequest:
    """Remembers that a signal asked for a stop: the step is finished and a checkpoint is saved.

    A second SIGINT, at least a second later, interrupts at once.

    Attributes:
        requested: Whether this process got a signal.
        agreed: Whether all processes know that one of them did.
    """

    SAME = 1.0  # seconds within which a terminal and a launcher may both send one signal

    def __init__(self) -> None:
        self.requested = self.agreed = False
        self.asked_at = 0.0

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Listen for signals within the context."""
        return handling(self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        is_interrupt = self.requested and number == signal.SIGINT
        if is_interrupt and time.monotonic() - self.asked_at > self.SAME:
            raise KeyboardInterrupt
        if not self.requested:
            self.asked_at = time.monotonic()
        self.requested = True
