"""Reading the own log into the replicas of all partitions; the only caller of `Replica.feed`.

A start takes the newest usable snapshots first and reads on from there; a tail that broke is opened again where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Generic, TypeVar

from libs.eventlog.chores import Failures
from libs.eventlog.deadline import monotonic
from libs.eventlog.freshness import Freshness
from libs.eventlog.ports import EventLog, LogError, TopicPartition
from libs.eventlog.replica import Replica
from libs.eventlog.snapshots import Snapshots

logger = logging.getLogger(__name__)

S = TypeVar("S")


class OwnTail(Generic[S]):
    """One tail for all partitions."""

    def __init__(
        self,
        log: EventLog,
        topic: str,
        replicas: Sequence[Replica[S]],
        freshness: Freshness,
        snapshots: Snapshots[S] | None,
    ) -> None:
        self._log = log
        self._topic = topic
        self._replicas = replicas
        self._freshness = freshness
        self._snapshots = snapshots
        self._failures = Failures(0.1, 2.0)
        self._reading = [(TopicPartition(topic, replica.partition), replica) for replica in replicas]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._begin()
                await self._read()
            except LogError as error:
                logger.warning("reading %s failed: %s", self._topic, error)
            await self._failures.pause()

    async def _begin(self) -> None:
        """Load snapshots, once."""
        snapshots, self._snapshots = self._snapshots, None
        if snapshots is not None:
            ends = await self._log.end_positions([place for place, _ in self._reading])
            await asyncio.gather(
                *(snapshots.load(replica, self._log, place, ends[place]) for place, replica in self._reading)
            )

    async def _read(self) -> None:
        tail = await self._log.open_tail({place: replica.next_position for place, replica in self._reading})
        try:
            at = monotonic()
            ends = await self._log.end_positions([place for place, _ in self._reading])
            self._freshness.measured(at, ends)
            while True:
                for place, replica in self._reading:
                    if not replica.caught_up and tail.position(place) >= ends[place]:
                        replica.mark_caught_up()
                records = await tail.fetch(self._freshness.fetch_wait_s)
                self._failures.end()
                start = 0
                while start < len(records):
                    partition = records[start].partition
                    stop = start + 1
                    while stop < len(records) and records[stop].partition == partition:
                        stop += 1
                    self._replicas[partition].feed(records[start:stop])
                    start = stop
                for place, replica in self._reading:
                    replica.next_position = tail.position(place)
                    self._freshness.reached(place, replica.next_position)
        finally:
            await tail.close()
