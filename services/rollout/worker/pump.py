"""One pump for each partition: judges records in order, sends them to the leader, stores what they say of devices.

* Four stages, each in order and on its own: while the leader answers, the next records are judged, and what it has
  answered is stored. Signatures are checked in a thread meanwhile, many in a row, when many wait: that needs no lock
  of Python's. Bounded queues between them hold back whoever is ahead.
* Nothing leaves a pump as an exception: what fails is repeated with back-off, for ever.
* One call is outstanding at a time; it carries all that came since the last one, which was a moment ago at least.
* A record is acknowledged to Kafka only when the leader holds it in its log (or it is on the dead-letter topic). What
  is delivered twice the leader's watermark makes harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from groundswell.rollout.v1 import rollout_pb2

from libs.checkins import Claim, GatewayKeys, Rejected, SequenceGuard, VerifiedBatch, claimed, read
from libs.eventlog.chores import Failures
from libs.eventlog.ending import end
from services.rollout.observations import Backlog, Observed, observe

log = logging.getLogger(__name__)

QUEUE: Final = 1000
"""Records that wait for a stage at most."""
TOGETHER: Final = 16
"""Records whose signatures are checked in a row."""
ALONE: Final = 64 * 1024
"""Bytes whose signatures are checked sooner than a thread has begun to."""
STORES: Final = 4
"""Answered calls that wait to be stored at most."""
PACE_S: Final = 0.05
"""From one call to the next at least: each is a transaction, which costs the same for one record as for hundreds."""
QUIET_S: Final = 0.25
"""The same while nothing is new to the leader: how far was read need not be told often."""
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
        self._checked: asyncio.Queue[tuple[Delivery, Claim | Rejected, bool]] = asyncio.Queue(TOGETHER)
        self._judged: asyncio.Queue[tuple[Delivery, Observed]] = asyncio.Queue(QUEUE)
        self._answered: asyncio.Queue[tuple[list[Delivery], Sequence[Observed]]] = asyncio.Queue(STORES)
        self._open = 0
        self._stages: tuple[asyncio.Task[None], ...] = ()
        self.moved_at = time.monotonic()
        """When the leader last took something, or the pump was last found empty."""

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return not self._open

    async def put(self, delivery: Delivery) -> None:
        """Hand a record over; waits while too many are open."""
        if not self._stages:
            stages = (self._check_all, self._judge_all, self._send_all, self._store_all)
            self._stages = tuple(
                asyncio.create_task(stage(), name=f"pump-{self.partition}-{stage.__name__}") for stage in stages
            )
        if self.idle:
            self.moved_at = time.monotonic()
        self._open += 1
        await self._queue.put(delivery)

    async def stop(self) -> None:
        """End without acknowledging what is open: it will be delivered again."""
        await end(*self._stages)

    async def _check_all(self) -> None:
        while True:
            deliveries = [await self._queue.get()]
            while not self._queue.empty() and len(deliveries) < TOGETHER:
                deliveries.append(self._queue.get_nowait())
            claims = [
                await self._for_ever(lambda delivery=delivery: self._claimed(delivery))  # type: ignore[misc]
                for delivery in deliveries
            ]
            proven = await self._for_ever(lambda claims=claims: self._proven(claims))  # type: ignore[misc]
            for checked in zip(deliveries, claims, proven, strict=True):
                await self._checked.put(checked)

    async def _judge_all(self) -> None:
        while True:
            delivery, claim, proven = await self._checked.get()
            observed = await self._for_ever(
                lambda delivery=delivery, claim=claim, proven=proven: self._judge(delivery, claim, proven)  # type: ignore[misc]
            )
            await self._judged.put((delivery, observed))
            await asyncio.sleep(0)  # judging waits for nothing: the other stages must get their turn

    async def _send_all(self) -> None:
        backlog, deliveries = Backlog(self.partition), list[Delivery]()
        called_at = -QUIET_S
        while True:
            await self._gather(backlog, deliveries, called_at)
            called_at = time.monotonic()
            request, count = backlog.take()
            await self._for_ever(lambda request=request: self._tools.record(request))  # type: ignore[misc]
            self.moved_at = time.monotonic()
            await self._answered.put((deliveries[:count], backlog.done(count)))
            del deliveries[:count]

    async def _gather(self, backlog: Backlog, deliveries: list[Delivery], called_at: float) -> None:
        """Take what is there, and what comes until it is time for the next call or that would be full."""
        while len(deliveries) < QUEUE and not backlog.full:
            if not self._judged.empty():
                self._take(backlog, deliveries, self._judged.get_nowait())
                continue
            if not deliveries:
                self._take(backlog, deliveries, await self._judged.get())
                continue
            early = called_at + (QUIET_S if backlog.quiet else PACE_S) - time.monotonic()
            if early <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(early):
                    self._take(backlog, deliveries, await self._judged.get())

    @staticmethod
    def _take(backlog: Backlog, deliveries: list[Delivery], judged: tuple[Delivery, Observed]) -> None:
        deliveries.append(judged[0])
        backlog.add(judged[1])

    async def _store_all(self) -> None:
        while True:
            deliveries, records = await self._answered.get()
            await self._tools.models.update(self.partition, records)
            for delivery in deliveries:
                delivery.acknowledge()
            self._open -= len(deliveries)
            self.moved_at = time.monotonic()

    async def _for_ever(self, step: Callable[[], Awaitable[Any]]) -> Any:
        failures = Failures(0.1, 2.0)
        while True:
            try:
                return await step()
            except Exception as error:  # noqa: BLE001 - an exception would lose the record (protocols.md section 5)
                tried = failures.count + 1
                if tried in (1, 10) or tried % 100 == 0:
                    log.warning("partition %d, try %d: %s: %s", self.partition, tried, type(error).__name__, error)
                await failures.pause()

    async def _claimed(self, delivery: Delivery) -> Claim | Rejected:
        """Wait for the registry's word on the key, but not for ever."""
        until = time.monotonic() + KEY_WAIT_S
        while True:
            claim = claimed(delivery.headers, delivery.value, self._tools.topic, self.partition, self._tools.keys)
            if not (isinstance(claim, Rejected) and claim.wait) or time.monotonic() >= until:
                return claim
            await asyncio.sleep(KEY_POLL_S)

    @staticmethod
    async def _proven(claims: Sequence[Claim | Rejected]) -> list[bool]:
        """Of each, whether its signature holds."""
        size = sum(len(claim.value) for claim in claims if isinstance(claim, Claim))
        return _prove(claims) if size < ALONE else await asyncio.to_thread(_prove, claims)

    async def _judge(self, delivery: Delivery, claim: Claim | Rejected, proven: bool) -> Observed:  # noqa: FBT001
        verdict = read(claim, proven=proven, partitions=self._tools.partitions) if isinstance(claim, Claim) else claim
        if isinstance(verdict, VerifiedBatch):
            verdict = self._tools.guard.judge(verdict, delivery.position)
        if isinstance(verdict, Rejected):
            log.warning("rejected %d@%d: %s: %s", self.partition, delivery.position, verdict.reason, verdict.detail)
            await self._tools.reject(self.partition, delivery, verdict)
            return Observed(delivery.position)
        return observe(verdict, delivery.position, delivery.append_time_ms)


def _prove(claims: Sequence[Claim | Rejected]) -> list[bool]:
    return [isinstance(claim, Claim) and claim.holds() for claim in claims]
