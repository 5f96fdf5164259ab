"""A token bucket for one endpoint. Pure in its inputs: every method is told the time.

The leader of an endpoint's partition is the only one that sends to it, so its memory is the right place for the
bucket.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """``per_second`` 0 means no limit. A burst is one second's worth, at least one."""

    per_second: int = 0
    _tokens: float = 0.0
    _at_ms: int = -1

    def _fill(self, now_ms: int) -> None:
        most = max(1.0, float(self.per_second))
        if self._at_ms < 0:
            self._tokens = most
        else:
            self._tokens = min(most, self._tokens + max(0, now_ms - self._at_ms) * self.per_second / 1000)
        self._at_ms = max(self._at_ms, now_ms)

    def allows(self, now_ms: int) -> bool:
        """Whether an attempt may begin now."""
        if not self.per_second:
            return True
        self._fill(now_ms)
        return self._tokens >= 1.0

    def take(self) -> None:
        """One begins."""
        if self.per_second:
            self._tokens -= 1.0

    def free_at_ms(self, now_ms: int) -> int:
        """When the next attempt may begin."""
        if self.allows(now_ms):
            return now_ms
        return now_ms + max(1, round((1.0 - self._tokens) * 1000 / self.per_second))
