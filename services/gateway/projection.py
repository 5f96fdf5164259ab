"""Fills the gateways' shelf in Redis from the public log of one service.

Every gateway runs one for each of registry and pki; they need no leader, because each batch is applied only onto the
position it follows. The story of a batch:

1. Redis stands where the projector thinks: rows and the new position are written in one script.
2. Redis is further (another gateway was quicker): what it has is left out, the rest is tried again.
3. Redis is behind or has nothing (it was deleted, or restored to yesterday): the tail goes back to where Redis stands.

Meanwhile readers see the position, and ask the owner for what Redis cannot know yet. Nothing here is waited for by a
check-in, and nothing here can stop the gateway: every failure is tried again with back-off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from redis.exceptions import RedisError

from libs.eventlog.chores import Failures
from libs.eventlog.codec import LOG_ID, header
from libs.eventlog.config import public_topic
from libs.eventlog.deadline import monotonic
from libs.eventlog.ending import end
from libs.eventlog.ports import EventLog, LogError, Record, TopicPartition
from services.gateway.shelf import Row, Shelves

log = logging.getLogger(__name__)

BATCH: Final = 500
CHECK_S: Final = 1.0
"""How often it is checked that Redis still holds what was written: it may be deleted at any time."""
KEEP_S: Final = 60.0


class _RewindError(Exception):
    """Redis stands before the tail."""


class Projector:
    """Applies one service's public records to its shelves."""

    def __init__(
        self,
        log_: EventLog,
        shelves: Shelves,
        env: str,
        service: str,
        partitions: int,
        log_id: Callable[[int], str],
        row: Callable[[Record], Row | None],
    ) -> None:
        self._log = log_
        self._shelves = shelves
        self._topic = public_topic(env, service)
        self._service = service
        self._partitions = partitions
        self._known_log_id = log_id
        self._row = row
        self._log_ids: dict[int, str] = {}
        self._stands: dict[int, int | None] = {}
        self._task: asyncio.Task[None] | None = None
        self._kept_at = -KEEP_S
        self._failures = Failures(0.2, 2.0)
        self.rewinds = 0
        """How often Redis was found to be behind or empty."""

    async def start(self) -> None:
        """Begin in the background."""
        self._task = asyncio.create_task(self._run(), name=f"project-{self._service}")

    async def stop(self) -> None:
        """End; what was not applied will be by whoever runs next."""
        if self._task is not None:
            await end(self._task)

    def positions(self) -> dict[int, int | None]:
        """Where Redis stood in each partition when it was last looked at."""
        return dict(self._stands)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except _RewindError as rewind:
                self.rewinds += 1
                log.info("projection of %s goes back: %s", self._service, rewind)
            except (RedisError, LogError, OSError) as error:
                if self._failures.count % 20 == 0:
                    log.warning("projection of %s waits: %s: %s", self._service, type(error).__name__, error)
            except Exception:
                log.exception("projection of %s failed", self._service)
            await self._failures.pause()

    async def _follow(self) -> None:
        starts = {}
        for partition in range(self._partitions):
            log_id = self._log_ids[partition] = self._known_log_id(partition)
            stands = await self._shelves.position(partition, log_id) if log_id else None
            self._stands[partition] = stands
            starts[TopicPartition(self._topic, partition)] = stands or 0
        ends = await self._log.end_positions(starts)
        tail = await self._log.open_tail({place: min(at, ends[place]) for place, at in starts.items()})
        checked_at = monotonic()
        try:
            while True:
                records = await tail.fetch(CHECK_S / 2)
                for partition in range(self._partitions):
                    own = [record for record in records if record.partition == partition]
                    for first in range(0, len(own), BATCH):
                        await self._apply(partition, own[first : first + BATCH])
                if monotonic() - checked_at >= CHECK_S:
                    await self._check()
                    checked_at = monotonic()
                    self._failures.end()
        finally:
            await tail.close()

    async def _apply(self, partition: int, records: Sequence[Record]) -> None:
        log_id = header(records[-1], LOG_ID).decode("utf-8", "replace")
        if self._log_ids[partition] and log_id != self._log_ids[partition]:
            raise _RewindError(f"partition {partition} is another log now")
        if not self._log_ids[partition]:
            # The first record ever. Without a hash the tail began at the log's first position, here and below.
            self._log_ids[partition] = log_id
            self._stands[partition] = await self._shelves.position(partition, log_id)
        while True:
            stands = self._stands[partition]
            fresh = [record for record in records if stands is None or record.position > stands]
            if not fresh:
                return
            rows = {row[0]: row for record in fresh if (row := self._row(record)) is not None}
            at = await self._shelves.apply(partition, log_id, stands, fresh[-1].position, list(rows.values()))
            if at == fresh[-1].position:
                self._stands[partition] = at
                return
            if at is None or (stands is not None and at < stands):
                raise _RewindError(f"partition {partition} stands at {at}, not at {stands}")
            self._stands[partition] = at

    async def _check(self) -> None:
        """Redis still has what was written, and hashes in use are marked as such."""
        for partition, stands in self._stands.items():
            if stands is None:
                continue
            at = await self._shelves.position(partition, self._log_ids[partition])
            if at is None or at < stands:
                raise _RewindError(f"partition {partition} stands at {at}, not at {stands}")
        if monotonic() - self._kept_at >= KEEP_S:
            used = [(partition, self._log_ids[partition]) for partition, at in self._stands.items() if at is not None]
            if used:
                await self._shelves.keep(used)
            self._kept_at = monotonic()
