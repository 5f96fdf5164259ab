"""One strictly rising sequence for check-ins and reports.

Counters are reserved on disk in blocks before any of them is used, so a kill can only skip numbers, never use one
twice: a repeated counter with other content is how the server recognises a cloned device.
"""

from __future__ import annotations

from clients.device.errors import StateError
from clients.device.state import StateFile

BLOCK = 64


class Counter:
    """Hands out each number once, over all lives of the device."""

    __slots__ = ("_file", "_next", "_reserved")

    def __init__(self, file: StateFile) -> None:
        self._file = file
        body = file.load() or {"reserved": 0}
        reserved = body.get("reserved")
        if not isinstance(reserved, int) or isinstance(reserved, bool) or reserved < 0:
            raise StateError("STATE_CORRUPT", "the counter file holds no counter")
        # Whatever was reserved may have been used.
        self._reserved = reserved
        self._next = reserved + 1

    def take(self) -> int:
        if self._next > self._reserved:
            self._file.save({"reserved": self._reserved + BLOCK})
            self._reserved += BLOCK
        value = self._next
        self._next += 1
        return value
