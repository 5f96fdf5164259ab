"""What devices send that is no HTTP, in the log as one line now and then: a flood of it must not fill the disk.

aiohttp answers such a request and logs it as an error, each time, with a traceback and with what was sent.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Final

from aiohttp.http import HttpProcessingError

LOGGER: Final = "aiohttp.server"
_LOG_INTERVAL_S: Final = 5.0


class MalformedRequests(logging.Filter):
    """A filter of aiohttp's log that counts; other errors pass as they are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.count = 0
        self._clock = clock
        self._logged_at = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        self.count += 1
        now = self._clock()
        if now - self._logged_at < _LOG_INTERVAL_S:
            return False
        self._logged_at = now
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args = "malformed request: %s, %d so far", (type(error).__name__, self.count)
        record.exc_info = record.exc_text = None
        return True
