"""Named places where a test can stop the agent and kill it.

`GROUNDSWELL_AGENT_FAILPOINT=<step>` makes the agent write `<state>/at-<step>` when it gets there and then wait to be
killed, so that whoever kills it acts on something seen and not on time.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "GROUNDSWELL_AGENT_FAILPOINT"
STEPS = (
    "before-download",
    "mid-download",
    "downloaded",
    "installed",
    "before-switch",
    "after-switch",
    "in-trial",
    "before-confirm",
)
RENEWAL_STEPS = (
    "renewal-key",
    "renewal-announced",
    "renewal-answered",
    "renewal-stored",
    "renewal-confirmed",
)


class FailPoints:
    """At most one place is armed; in production none."""

    __slots__ = ("_armed", "_directory")

    def __init__(self, directory: Path, armed: str | None = None) -> None:
        self._directory = directory
        self._armed = os.environ.get(VARIABLE, "") if armed is None else armed
        if self._armed and self._armed not in STEPS + RENEWAL_STEPS:
            raise ValueError(f"{VARIABLE}={self._armed!r} is none of {', '.join(STEPS + RENEWAL_STEPS)}")

    def reached(self, name: str) -> None:
        if name != self._armed:
            return
        (self._directory / f"at-{name}").write_text(str(os.getpid()), encoding="ascii")
        while True:
            signal.pause()
