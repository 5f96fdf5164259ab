"""Named places where a test may end the process, as a power cut would: SIGKILL to itself, nothing flushed.

Off unless `GROUNDSWELL_FAIL_POINTS` names points when the process starts (or a test calls `arm`); `armed` is then empty
and a place costs one lookup. A name may carry a count: `after-commit-before-answer:3` acts at the third passage.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

BEFORE_SEND = "before-send"
AFTER_SEND = "after-send"
DURING_COMMIT = "during-commit"
AFTER_COMMIT_BEFORE_ANSWER = "after-commit-before-answer"
AFTER_READBACK = "after-readback-before-answer"

armed: dict[str, int] = {}
"""Point -> passages left, the acting one included."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_action: Callable[[], None] = _kill


def arm(text: str, action: Callable[[], None] = _kill) -> None:
    """Replace the armed points by those that `text` lists; an empty text disarms all."""
    global _action  # noqa: PLW0603 - one process, one switch
    armed.clear()
    _action = action
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, count = item.partition(":")
        armed[name] = int(count) if count else 1


def hit(name: str) -> None:
    """Act if the point is armed and its count is used up."""
    if not armed or name not in armed:
        return
    armed[name] -= 1
    if armed[name] <= 0:
        del armed[name]
        _action()


arm(os.environ.get("GROUNDSWELL_FAIL_POINTS", ""))
