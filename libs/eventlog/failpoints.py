"""Named places where a test may end the process, as a power cut would: SIGKILL to itself, nothing flushed.

Off unless `GROUNDSWELL_FAIL_POINTS` names points when the process starts (or a test calls `arm`); `armed` is then empty
and a place costs one lookup. A name may carry a count: `after-commit-before-answer:3` acts at the third passage.

A running process can be armed too: `GROUNDSWELL_FAIL_POINTS_DIR` names a directory, and a file `<scope>.<point>` in
it arms that point once; the passage that acts removes it. The scope is the service's name, so that one directory serves
a whole installation.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

BEFORE_SEND = "before-send"
AFTER_SEND = "after-send"
DURING_COMMIT = "during-commit"
AFTER_COMMIT_BEFORE_ANSWER = "after-commit-before-answer"
AFTER_COMMIT_BEFORE_ANSWER_REQUEST = "after-commit-before-answer-request"
"""As above, for a batch that holds a command with a request id: not for a beat, a timer or an inbox record."""
AFTER_READBACK = "after-readback-before-answer"

armed: dict[str, int] = {}
"""Point -> passages left, the acting one included."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_action: Callable[[], None] = _kill
_directory: Path | None = None


def arm(text: str, action: Callable[[], None] = _kill) -> None:
    """Replace the armed points by those that `text` lists; an empty text disarms all."""
    global _action  # noqa: PLW0603 - one process, one switch
    armed.clear()
    _action = action
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, count = item.partition(":")
        armed[name] = int(count) if count else 1


def watch_directory(path: str) -> None:
    """Look for armed points in this directory too; an empty text stops that."""
    global _directory  # noqa: PLW0603 - one process, one switch
    _directory = Path(path) if path else None


def _found(name: str, scope: str) -> bool:
    """Whether a file armed the point; whoever removes it acts, nobody else."""
    if _directory is None:
        return False
    try:
        (_directory / f"{scope}.{name}").unlink()
    except OSError:
        return False
    return True


def hit(name: str, scope: str = "") -> None:
    """Act if the point is armed and its count is used up."""
    if _found(name, scope):
        _action()
        return
    if not armed or name not in armed:
        return
    armed[name] -= 1
    if armed[name] <= 0:
        del armed[name]
        _action()


arm(os.environ.get("GROUNDSWELL_FAIL_POINTS", ""))
watch_directory(os.environ.get("GROUNDSWELL_FAIL_POINTS_DIR", ""))
