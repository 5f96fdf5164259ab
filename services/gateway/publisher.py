"""Publishes what devices said and what was decided: one signed ``CheckInBatch`` record per organization and moment.

Items come serialized, and a batch is their bytes one after the other. When Kafka takes nothing, what waits is bounded:
``takes`` says so before anything is decided, and items beyond the bound are dropped, which their devices are told.

Rules (protocols.md section 5): one organization per record; up to 500 items, 256 KiB or 50 ms; the producer is
idempotent; a report counts as accepted only when Kafka has acknowledged its record. Once a second a heartbeat goes to
every partition: stream time, and with it every soak and deadline, moves by these heartbeats alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from groundswell.device.v1 import device_pb2

from libs.checkins import CheckInSigner
from libs.eventlog import partition_of
from services.gateway.wire import tag, varint

log = logging.getLogger(__name__)

MAX_ITEMS: Final = 500
MAX_BYTES: Final = 192 * 1024
"""Below the contract's 256 KiB, so that headers and one last item always fit."""
LINGER_S: Final = 0.05
HEARTBEAT_S: Final = 1.0
ACKNOWLEDGEMENT_S: Final = 5.0
"""A device waits no longer than this for its reports to be accepted; it resends them at the next poll."""
SILENT_S: Final = 2.0
"""A record that Kafka has not acknowledged for so long: nothing is decided until it has."""
MOST_WAITING: Final = 32 * 1024 * 1024
"""Bytes that wait for Kafka at most."""
_ITEM_TAG: Final = tag(device_pb2.CheckInBatch.ITEMS_FIELD_NUMBER)


T = TypeVar("T")


class CheckInProducer(Protocol):
    """What the publisher needs of Kafka: an idempotent, acknowledged send to one partition."""

    async def post(
        self, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]
    ) -> Awaitable[object]:
        """Hand a record over in order; what is returned ends when it is in the log, or raises when that is unknown."""


@dataclass(slots=True)
class Batch:
    """Items of one organization that become one record."""

    organization: str
    items: list[bytes] = field(default_factory=list)
    """Tag, length and bytes of each item."""
    size: int = 0
    sent: bool | None = None
    """Whether Kafka has it; None as long as that is open."""
    waiting: list[Callable[[bool], None]] = field(default_factory=list)
    """Who wants to be told."""

    def settle(self, sent: bool) -> None:  # noqa: FBT001 - the one thing there is to say
        """Tell whoever waits; what is said first counts."""
        if self.sent is None:
            self.sent = sent
            waiting, self.waiting = self.waiting, []
            for tell in waiting:
                tell(sent)


class CheckInPublisher:
    """Batches items per organization and sends heartbeats. Order per partition is the order of signing."""

    def __init__(
        self,
        producer: CheckInProducer,
        make_signer: Callable[[], CheckInSigner],
        gateway: str,
        partitions: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._producer = producer
        self._clock = clock
        self._signer = make_signer()
        self._gateway = gateway
        self._partitions = partitions
        self._open: dict[str, Batch] = {}
        self._locks = [asyncio.Lock() for _ in range(partitions)]
        self._sending: set[asyncio.Task[None]] = set()
        self._sends = 0
        self._unacknowledged: list[dict[int, float]] = [{} for _ in range(partitions)]
        """When each record under way was handed over, by partition, oldest first."""
        self._waiting = 0
        self.failures = 0
        """Records that Kafka did not acknowledge in time."""
        self.dropped = 0
        """Items for which there was no room."""

    def takes(self, partition: int) -> bool:
        """Whether Kafka has been taking what was sent."""
        oldest = next(iter(self._unacknowledged[partition].values()), None)
        return self._waiting < MOST_WAITING and (oldest is None or self._clock() - oldest < SILENT_S)

    def confirm(self, batch: Batch, then: Callable[[bool], T]) -> asyncio.Future[T]:
        """What `then` makes of whether Kafka has the batch, once that is known or has taken too long."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def tell(sent: bool) -> None:  # noqa: FBT001 - the one thing there is to say
            if not future.done():
                future.set_result(then(sent))

        if batch.sent is None:
            batch.waiting.append(tell)
        else:
            tell(batch.sent)
        return future

    def enqueue(self, organization: str, item: bytes) -> Batch | None:
        """Append a serialized CheckInItem without waiting; None when there is no room for it."""
        batch = self._open.get(organization)
        size = len(item) + 8
        if batch is not None and (len(batch.items) >= MAX_ITEMS * 3 or batch.size + size > MAX_BYTES):
            self._close(batch)
            batch = None
        if batch is None:
            if self._waiting >= MOST_WAITING:
                self.dropped += 1
                return None
            batch = self._open[organization] = Batch(organization)
            asyncio.get_running_loop().call_later(LINGER_S, self._close, batch)
        batch.items += (_ITEM_TAG, varint(len(item)), item)
        batch.size += size
        return batch

    def _close(self, batch: Batch) -> None:
        if self._open.get(batch.organization) is not batch:
            return
        del self._open[batch.organization]
        task = asyncio.get_running_loop().create_task(self._send_items(batch))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_items(self, batch: Batch) -> None:
        head = device_pb2.CheckInBatch(gateway=self._gateway, organization=batch.organization).SerializeToString()
        partition = partition_of(batch.organization, self._partitions)
        self._waiting += batch.size
        late = asyncio.get_running_loop().call_later(ACKNOWLEDGEMENT_S, batch.settle, False)  # noqa: FBT003
        try:
            batch.settle(await self._send(partition, batch.organization, head + b"".join(batch.items)))
        finally:
            batch.settle(False)  # noqa: FBT003
            late.cancel()
            self._waiting -= batch.size

    async def _send(self, partition: int, key: str, value: bytes) -> bool:
        number = self._sends = self._sends + 1
        self._unacknowledged[partition][number] = self._clock()
        try:
            # Signing order must be log order: a lower sequence after a higher one would be dropped as a replay.
            async with self._locks[partition]:
                headers = self._signer.headers(partition, value)
                acknowledged = await self._producer.post(partition, key.encode(), value, headers)
            await acknowledged
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the outcome is unknown and the device resends
            self.failures += 1
            log.warning("check-in record not acknowledged: partition=%d %s: %s", partition, type(error).__name__, error)
            return False
        finally:
            del self._unacknowledged[partition][number]
        return True

    async def heartbeats(self) -> None:
        """Send one heartbeat per partition and second, for ever. A partition that hangs delays no other."""
        running: dict[int, asyncio.Task[bool]] = {}
        beat = device_pb2.CheckInBatch(gateway=self._gateway, heartbeat=True).SerializeToString()
        while True:
            for partition in range(self._partitions):
                task = running.get(partition)
                if task is None or task.done():
                    running[partition] = asyncio.create_task(self._send(partition, "", beat))
            await asyncio.sleep(HEARTBEAT_S)

    async def drain(self) -> None:
        """Send what is open and wait for it: the last step of a graceful stop."""
        for batch in list(self._open.values()):
            self._close(batch)
        if self._sending:
            await asyncio.wait(self._sending, timeout=ACKNOWLEDGEMENT_S)
