"""How the processes of an installation share their processors.

Broker, services and gateways wake each other thousands of times a second. By default Linux lets whoever is woken
interrupt whoever works, and much of a busy machine's time goes into changing between them. As batch work (sched(7),
SCHED_BATCH) a process that is woken waits for its turn, which takes milliseconds at most, and finds more to do at once.
On a machine with a processor to spare nothing changes.
"""

from __future__ import annotations

import contextlib
import os


def prefer_throughput() -> None:
    """Make this process, and the threads and processes that it starts from now on, batch work.

    Where the system knows no such thing, or does not allow it, everything stays as it is.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
