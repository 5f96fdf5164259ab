"""A point in time that everything below a call shares. Bare second counts would start anew at every hop.

The clock is the running event loop's, so a simulated loop simulates deadlines too.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Self


def monotonic() -> float:
    """Seconds of the running loop's clock; of the process when no loop runs."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at` on the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        return cls(monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - monotonic())

    @property
    def expired(self) -> bool:
        return monotonic() >= self.at

    def earlier(self, seconds: float) -> Deadline:
        """The same deadline less a margin, or `seconds` from now if that is sooner."""
        return Deadline(min(self.at, monotonic() + seconds))
