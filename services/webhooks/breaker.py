"""A circuit breaker for one endpoint. Pure in its inputs: every method is told the time.

It opens after ten failures in a row, or when of at least ten attempts within five minutes 70 % failed. While open no
attempt is made, so that an outage does not use up anybody's schedule. After a pause one probe is let through: a success
closes the breaker, a failure doubles the pause.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Final

WINDOW_MS: Final = 5 * 60_000
MIN_ATTEMPTS: Final = 10
FAILURE_SHARE: Final = 0.7
IN_A_ROW: Final = 10
FIRST_PAUSE_MS: Final = 5_000
MOST_PAUSE_MS: Final = 5 * 60_000


class Phase(enum.Enum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


@dataclass(slots=True)
class Breaker:
    """Counts of one endpoint. Its owner is one leader; a new leader begins with a closed one."""

    phase: Phase = Phase.CLOSED
    in_a_row: int = 0
    """Failures since the last success."""
    probe_at_ms: int = 0
    probes: int = 0
    """Probes since it opened."""
    _pause_ms: int = FIRST_PAUSE_MS
    _window: deque[tuple[int, bool]] = field(default_factory=deque)
    _failures: int = 0

    def may_probe(self, now_ms: int) -> bool:
        """Whether the one probe may go out now."""
        return self.phase is Phase.OPEN and now_ms >= self.probe_at_ms

    def probing(self) -> None:
        """The probe is on its way."""
        self.phase = Phase.PROBING
        self.probes += 1

    def succeeded(self, now_ms: int) -> None:
        """Any success says the endpoint is back."""
        self.in_a_row = 0
        if self.phase is not Phase.CLOSED:
            self.phase, self._pause_ms, self.probes = Phase.CLOSED, FIRST_PAUSE_MS, 0
            # What failed before belongs to the outage that is over.
            self._window.clear()
            self._failures = 0
        self._note(now_ms, failed=False)

    def failed(self, now_ms: int, *, probe: bool = False) -> None:
        """A failed attempt; ``probe`` when it was the one let through."""
        self.in_a_row += 1
        self._note(now_ms, failed=True)
        if probe:
            self._pause_ms = min(self._pause_ms * 2, MOST_PAUSE_MS)
            self._open(now_ms)
        elif self.phase is Phase.CLOSED and self._tripped():
            self._open(now_ms)

    def _open(self, now_ms: int) -> None:
        self.phase = Phase.OPEN
        self.probe_at_ms = now_ms + self._pause_ms

    def _tripped(self) -> bool:
        attempts = len(self._window)
        return self.in_a_row >= IN_A_ROW or (attempts >= MIN_ATTEMPTS and self._failures >= FAILURE_SHARE * attempts)

    def _note(self, now_ms: int, *, failed: bool) -> None:
        self._window.append((now_ms, failed))
        self._failures += failed
        while self._window[0][0] <= now_ms - WINDOW_MS:
            self._failures -= self._window.popleft()[1]
