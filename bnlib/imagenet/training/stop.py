"""SIGTERM and SIGINT as a request to save and stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Stop", "stop_signals"]

_LOGGER = logging.getLogger(__name__)
_PATIENCE_S = 5.0


class Stop:
    """Whether a stop has been requested, and when."""

    requested, since = False, 0.0


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and SIGINT ask for a stop after the step.

    Schedulers, terminals and ``torchrun`` may each send the same request, so further ones change
    nothing; but a SIGINT that comes seconds later is from somebody who will not wait.
    """
    stop = Stop()
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        if not stop.requested:
            stop.requested, stop.since = True, time.monotonic()
            _LOGGER.warning("%s: saving and stopping", signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - stop.since > _PATIENCE_S:
            raise KeyboardInterrupt

    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        with contextlib.suppress(ValueError):  # not in the main thread: signals go elsewhere
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
