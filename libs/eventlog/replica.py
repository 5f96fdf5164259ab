"""One partition's committed state in this process, fed by the tail only.

Owns who waits for what: a leader for its own event (`watch`), readers for a position (`wait_applied`), anybody for the
next change. A record that cannot be applied halts the partition: it keeps its last good state, serves nothing more, and
says why.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Sequence
from typing import Generic, TypeVar

from libs.errors import UnavailableError
from libs.eventlog.deadline import Deadline
from libs.eventlog.model import Snapshot, Token
from libs.eventlog.ports import Record
from libs.eventlog.state import PartitionState, Schema

logger = logging.getLogger(__name__)

S = TypeVar("S")


class HaltedError(Exception):
    """The partition met a record that it cannot apply."""


class Replica(Generic[S]):
    """Committed state and its waiters."""

    def __init__(self, schema: Schema[S], service: str, partition: int) -> None:
        self.schema = schema
        self.service = service
        self.partition = partition
        self.state = PartitionState(schema, partition)
        self.halted = ""
        self.caught_up = False
        self.next_position = 0
        """Where a reopened tail goes on."""
        self._watches: dict[str, asyncio.Future[int]] = {}
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._waiter_count = 0
        self._changed: asyncio.Event | None = None

    # Writers.

    def feed(self, records: Sequence[Record]) -> None:
        """Apply committed records in order."""
        if self.halted:
            return
        state = self.state
        watches = self._watches
        try:
            for record in records:
                if record.position <= state.applied:
                    continue  # a reopened tail repeats what lies between its start and the applied position
                event_id = state.apply(record)
                if event_id in watches:
                    # Whoever waits goes on after this call, when everything applied is visible.
                    watch = watches.pop(event_id)
                    if not watch.done():
                        watch.set_result(record.position)
        except Exception as error:
            logger.exception("%s/%d halted", self.service, self.partition)
            self._halt(f"{type(error).__name__}: {error}")
        state.publish_versions()
        self._notify()

    def _halt(self, reason: str) -> None:
        self.halted = reason
        for watch in self._watches.values():
            if not watch.done():
                watch.set_exception(HaltedError(reason))
                watch.exception()
        self._watches.clear()

    def mark_caught_up(self) -> None:
        if not self.caught_up:
            self.caught_up = True
            self._notify()

    def _notify(self) -> None:
        waiters = self._waiters
        applied = self.state.applied
        while waiters and (waiters[0][0] <= applied or self.halted):
            waiter = heapq.heappop(waiters)[2]
            if not waiter.done():
                waiter.set_result(None)
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    # Readers.

    def check(self) -> None:
        if self.halted:
            raise HaltedError(self.halted)

    def watch(self, event_id: str) -> asyncio.Future[int]:
        """Resolves with the position at which the event was applied."""
        self.check()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watches[event_id] = future
        return future

    def unwatch(self, event_id: str) -> None:
        self._watches.pop(event_id, None)

    async def wait_applied(self, position: int, deadline: Deadline) -> None:
        """Wait until the record at `position` is applied."""
        if self.state.applied < position:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiter_count += 1
            heapq.heappush(self._waiters, (position, self._waiter_count, waiter))
            try:
                async with asyncio.timeout(deadline.remaining()):
                    await waiter
            except TimeoutError:
                raise not_caught_up(self.service, self.partition) from None
        self._refuse_halted()

    async def wait_change(self, deadline: Deadline) -> None:
        """Wait until something was applied or the tail caught up."""
        if self._changed is None:
            self._changed = asyncio.Event()
        try:
            async with asyncio.timeout(deadline.remaining()):
                await self._changed.wait()
        except TimeoutError:
            raise not_caught_up(self.service, self.partition) from None

    def _refuse_halted(self) -> None:
        if self.halted:
            raise UnavailableError(
                "NOT_SERVING",
                f"partition {self.partition} of {self.service} is halted: its log cannot be applied",
                retry_after_s=5.0,
                partition=self.partition,
            )

    def token(self) -> Token:
        state = self.state
        return Token(self.service, self.partition, state.log_id, state.applied, state.public_seq)

    def snapshot(self) -> Snapshot:
        self._refuse_halted()
        if not self.caught_up:
            raise UnavailableError(
                "NOT_READY", f"partition {self.partition} of {self.service} is still being read", retry_after_s=0.5
            )
        state = self.state
        return Snapshot(state.domain, self.token(), state.versions, state.tasks, state.parked_resources())


def not_caught_up(service: str, partition: int) -> UnavailableError:
    """A read here would not see what the caller has seen."""
    return UnavailableError(
        "NOT_CAUGHT_UP", f"partition {partition} of {service} has not been read far enough yet", retry_after_s=0.2
    )
