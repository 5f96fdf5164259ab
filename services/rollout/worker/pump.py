"""One pump for each partition: judges records in order, sends them to the leader, acknowledges after it has.

* Nothing leaves a pump as an exception: what fails is repeated with back-off, for ever.
* One call is outstanding at a time; when behind, it carries several records.
* A record is acknowledged to Kafka only when the leader holds it in its log (or it is on the dead-letter topic). What
  is delivered twice the leader's watermark makes harmless.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from groundswell.rollout.v1 import rollout_pb2

from libs.checkins import GatewayKeys, Rejected, SequenceGuard, VerifiedBatch, verify
from libs.eventlog.chores import back_off
from services.rollout.observations import Backlog, Observed, observe

log = logging.getLogger(__name__)

QUEUE: Final = 1000
KEY_WAIT_S: Final = 10.0
KEY_POLL_S: Final = 0.02
Record = Callable[[rollout_pb2.RecordObservationsRequest], Awaitable[rollout_pb2.RecordObservationsResponse]]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One record as it came from Kafka, with how to acknowledge it."""

    position: int
    append_time_ms: int
    headers: Sequence[tuple[str, bytes]]
    value: bytes
    acknowledge: Callable[[], None]


class Models(Protocol):
    """The read models; they never hold the stream up."""

    async def update(self, partition: int, records: Sequence[Observed]) -> None: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What every pump uses."""

    topic: str
    partitions: int
    keys: GatewayKeys
    guard: SequenceGuard
    record: Record
    reject: Callable[[int, Delivery, Rejected], Awaitable[None]]
    models: Models


class Pump:
    """One partition."""

    def __init__(self, partition: int, tools: Tools) -> None:
        self.partition = partition
        self._tools = tools
        self._queue: asyncio.Queue[Delivery] = asyncio.Queue(QUEUE)
        self._backlog = Backlog(partition)
        self._open: list[Delivery] = []
        self._task: asyncio.Task[None] | None = None
        self.moved_at = time.monotonic()
        """When the leader last took something, or the pump was last found empty."""

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return self._queue.empty() and not self._open

    async def put(self, delivery: Delivery) -> None:
        """Hand a record over; waits while too many are open."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"pump-{self.partition}")
        if self.idle:
            self.moved_at = time.monotonic()
        await self._queue.put(delivery)

    async def stop(self) -> None:
        """End without acknowledging what is open: it will be delivered again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._open.append(await self._queue.get())
            while not self._queue.empty() and len(self._open) < QUEUE:
                self._open.append(self._queue.get_nowait())
            for delivery in self._open:
                observed = await self._for_ever(lambda delivery=delivery: self._judge(delivery))  # type: ignore[misc]
                self._backlog.waiting.append(observed)
            while self._backlog.waiting:
                await self._send()

    async def _for_ever(self, step: Callable[[], Awaitable[Any]]) -> Any:
        attempt = 0
        while True:
            try:
                return await step()
            except Exception as error:  # noqa: BLE001 - an exception would lose the record (protocols.md section 5)
                attempt += 1
                if attempt in (1, 10) or attempt % 100 == 0:
                    log.warning("partition %d, try %d: %s: %s", self.partition, attempt, type(error).__name__, error)
                await asyncio.sleep(back_off(0.05, 2.0, attempt))

    async def _judge(self, delivery: Delivery) -> Observed:
        verdict = await self._verified(delivery)
        if isinstance(verdict, VerifiedBatch):
            verdict = self._tools.guard.judge(verdict, delivery.position)
        if isinstance(verdict, Rejected):
            log.warning("rejected %d@%d: %s: %s", self.partition, delivery.position, verdict.reason, verdict.detail)
            await self._tools.reject(self.partition, delivery, verdict)
            return Observed(delivery.position)
        return observe(verdict, delivery.position, delivery.append_time_ms)

    async def _verified(self, delivery: Delivery) -> VerifiedBatch | Rejected:
        """Wait for the registry's word on the key, but not for ever."""
        until = time.monotonic() + KEY_WAIT_S
        while True:
            verdict = verify(
                delivery.headers,
                delivery.value,
                self._tools.topic,
                self.partition,
                self._tools.keys,
                partitions=self._tools.partitions,
            )
            if not (isinstance(verdict, Rejected) and verdict.wait) or time.monotonic() >= until:
                return verdict
            await asyncio.sleep(KEY_POLL_S)

    async def _send(self) -> None:
        request, count = self._backlog.take()
        await self._for_ever(lambda: self._tools.record(request))
        await self._tools.models.update(self.partition, self._backlog.done(count))
        for delivery in self._open[:count]:
            delivery.acknowledge()
        del self._open[:count]
        self.moved_at = time.monotonic()
