"""How background tasks are ended for good, and how an end that nobody asked for is told apart."""

from __future__ import annotations

import asyncio
from typing import Any, Final

AGAIN_S: Final = 5.0
"""A task that has not ended by then lost its cancellation, or cleans up slowly."""


def is_cancelled() -> bool:
    """Whether somebody asked the current task to end: libraries let out cancellations of their own making too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks until all have ended, whatever they end with.

    Once is not enough: a cancellation that meets a time-out of a library's own in the same instant comes out as that
    time-out, and a loop that outlives time-outs goes on.
    """
    running = [task for task in tasks if not task.done()]
    while running:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=AGAIN_S)
        running = [task for task in running if not task.done()]
    await asyncio.gather(*tasks, return_exceptions=True)
