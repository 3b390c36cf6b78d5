"""Signals that ask a run to stop, from its first line to its last."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from medtrain.trainer.distributed import StopFlag
from medtrain.trainer.errors import StopRequested


@contextmanager
def stop_on_signals(stop: StopFlag) -> Iterator[None]:
    """SIGTERM and SIGUSR1 (what schedulers send before the end) set ``stop`` instead of killing the process.

    Steps, exports and checkpoints are finished; between them, and in the middle of reading, tokenising, the reference pass,
    evaluation and exams, the flag ends the run with :class:`StopRequested`. Child processes end at once.
    """
    owner, before = os.getpid(), {}

    def handle(number: int, _frame: object) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        stop.requested = True
        if stop.interruptible:
            stop.interruptible = False
            raise StopRequested

    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the embedding program handles signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
