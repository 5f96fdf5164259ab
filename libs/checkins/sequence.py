"""Replay protection: a sequence that is not above the last one of its gateway process and partition is dropped.

A consumer may read records again (at-least-once), so a record at or below the last *position* judged here is told apart
from a replay, which always has a position of its own. What is kept is bounded: per gateway and partition the latest
processes. Keep ``last`` with the consumer's own watermark when replays across restarts matter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from libs.checkins.record import Rejected, VerifiedBatch

_PROCESSES: Final = 64


class SequenceGuard:
    """Last (sequence, position) of each (gateway, partition, process)."""

    def __init__(self, last: Mapping[tuple[str, int, str], tuple[int, int]] | None = None) -> None:
        self._last: dict[tuple[str, int], OrderedDict[str, tuple[int, int]]] = {}
        for (gateway, partition, process), mark in (last or {}).items():
            self._last.setdefault((gateway, partition), OrderedDict())[process] = mark

    def judge(self, verified: VerifiedBatch, position: int) -> VerifiedBatch | Rejected:
        """Let a record pass once per position; remember it."""
        processes = self._last.setdefault((verified.gateway, verified.partition), OrderedDict())
        sequence, last_position = processes.get(verified.process, (0, -1))
        if verified.sequence <= sequence:
            redelivered = position < last_position or (position == last_position and verified.sequence == sequence)
            if redelivered:
                return verified
            return Rejected(
                "REPLAYED_SEQUENCE",
                f"sequence {verified.sequence} of {verified.gateway} is not above {sequence}",
            )
        processes[verified.process] = (verified.sequence, max(position, last_position))
        processes.move_to_end(verified.process)
        while len(processes) > _PROCESSES:
            processes.popitem(last=False)
        return verified

    @property
    def last(self) -> dict[tuple[str, int, str], tuple[int, int]]:
        """What to keep, and to give to the next guard."""
        return {
            (gateway, partition, process): mark
            for (gateway, partition), processes in self._last.items()
            for process, mark in processes.items()
        }
