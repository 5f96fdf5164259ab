"""How far this process's views are behind the own log: a replica that does not lead must know before it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from libs.eventlog.deadline import Deadline
from libs.eventlog.inbox import FETCH_SHARE, LagMeter
from libs.eventlog.ports import EventLog, LogError, TopicPartition

logger = logging.getLogger(__name__)


class Freshness:
    """Compares the tail with the read-committed ends of the log, once in a while or when asked."""

    def __init__(self, log: EventLog, places: Sequence[TopicPartition], every_s: float) -> None:
        self._log = log
        self._places = places
        self._every_s = every_s
        self._meter = LagMeter(places)
        self._positions: dict[TopicPartition, int] = {}
        self._moved = asyncio.Event()
        self.fetch_wait_s = every_s * FETCH_SHARE
        """A tail notices commit markers only when a fetch ends."""

    async def measure(self) -> None:
        """Until cancelled. A log that does not answer makes the lag grow, which is the truth."""
        while True:
            at = asyncio.get_running_loop().time()
            try:
                self.measured(at, await self._log.end_positions(self._places))
            except LogError as error:
                logger.warning("the ends of the own log cannot be read: %s", error)
            for place, position in self._positions.items():
                self._meter.reached(place, position)
            await asyncio.sleep(self._every_s)

    def measured(self, at: float, ends: Mapping[TopicPartition, int]) -> None:
        """The ends as they were at a time: what a start has to reach makes it fresh, without waiting for a round."""
        self._meter.measured(at, ends)

    def reached(self, place: TopicPartition, position: int) -> None:
        """The view holds everything below a position."""
        if self._positions.get(place) != position:
            self._positions[place] = position
            self._moved.set()
        self._meter.reached(place, position)

    def lag(self, place: TopicPartition) -> float:
        """Seconds since the view is known to have held all that was committed."""
        return self._meter.lag(place)

    async def catch_up(self, place: TopicPartition, deadline: Deadline) -> bool:
        """Wait until the view holds all that is committed now; false when it does not in time."""
        try:
            async with asyncio.timeout(deadline.remaining()):
                end = (await self._log.end_positions([place]))[place]
                while self._positions.get(place, -1) < end:
                    self._moved.clear()
                    await self._moved.wait()
        except (TimeoutError, LogError):
            return False
        return True
