"""Publishes what devices said and what was decided: one signed ``CheckInBatch`` record per organization and moment.

Rules (protocols.md section 5): one organization per record; up to 500 items, 256 KiB or 50 ms; the producer is
idempotent; a report counts as accepted only when Kafka has acknowledged its record. Once a second a heartbeat goes to
every partition: stream time, and with it every soak and deadline, moves by these heartbeats alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from groundswell.device.v1 import device_pb2

from libs.checkins import CheckInSigner
from libs.eventlog import partition_of

log = logging.getLogger(__name__)

MAX_ITEMS: Final = 500
MAX_BYTES: Final = 192 * 1024
"""Below the contract's 256 KiB, so that headers and one last item always fit."""
LINGER_S: Final = 0.05
HEARTBEAT_S: Final = 1.0
ACKNOWLEDGEMENT_S: Final = 5.0
"""A device waits no longer than this for its reports to be accepted; it resends them at the next poll."""


class CheckInProducer(Protocol):
    """What the publisher needs of Kafka: an idempotent, acknowledged send to one partition."""

    async def send(self, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        """Return when the record is in the log; raise when that is not known."""


@dataclass(slots=True)
class _Pending:
    organization: str
    items: list[device_pb2.CheckInItem] = field(default_factory=list)
    size: int = 0
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class CheckInPublisher:
    """Batches items per organization and sends heartbeats. Order per partition is the order of signing."""

    def __init__(
        self,
        producer: CheckInProducer,
        make_signer: Callable[[], CheckInSigner],
        gateway: str,
        partitions: int,
    ) -> None:
        self._producer = producer
        self._signer = make_signer()
        self._gateway = gateway
        self._partitions = partitions
        self._open: dict[str, _Pending] = {}
        self._locks = [asyncio.Lock() for _ in range(partitions)]
        self._sending: set[asyncio.Task[None]] = set()
        self.failures = 0
        """Records that Kafka did not acknowledge in time."""

    async def publish(self, organization: str, item: device_pb2.CheckInItem) -> bool:
        """Append an item to the organization's open batch; True when Kafka has it, False when that is not known."""
        return await self.confirm(self.enqueue(organization, item))

    async def confirm(self, done: asyncio.Future[bool]) -> bool:
        """Wait for what ``enqueue`` returned, but not for ever."""
        try:
            return await asyncio.wait_for(asyncio.shield(done), ACKNOWLEDGEMENT_S)
        except TimeoutError:
            return False

    def enqueue(self, organization: str, item: device_pb2.CheckInItem) -> asyncio.Future[bool]:
        """Append without waiting."""
        batch = self._open.get(organization)
        size = item.ByteSize() + 8
        if batch is not None and (len(batch.items) >= MAX_ITEMS or batch.size + size > MAX_BYTES):
            self._close(batch)
            batch = None
        if batch is None:
            batch = self._open[organization] = _Pending(organization)
            asyncio.get_running_loop().call_later(LINGER_S, self._close, batch)
        batch.items.append(item)
        batch.size += size
        return batch.done

    def _close(self, batch: _Pending) -> None:
        if self._open.get(batch.organization) is not batch:
            return
        del self._open[batch.organization]
        task = asyncio.get_running_loop().create_task(self._send_items(batch))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_items(self, batch: _Pending) -> None:
        message = device_pb2.CheckInBatch(gateway=self._gateway, organization=batch.organization, items=batch.items)
        partition = partition_of(batch.organization, self._partitions)
        sent = await self._send(partition, batch.organization, message)
        if not batch.done.done():
            batch.done.set_result(sent)

    async def _send(self, partition: int, key: str, message: device_pb2.CheckInBatch) -> bool:
        value = message.SerializeToString()
        try:
            # Signing order must be log order: a lower sequence after a higher one would be dropped as a replay.
            async with self._locks[partition]:
                headers = self._signer.headers(partition, value)
                await self._producer.send(partition, key.encode(), value, headers)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the outcome is unknown and the device resends
            self.failures += 1
            log.warning("check-in record not acknowledged: partition=%d %s: %s", partition, type(error).__name__, error)
            return False
        return True

    async def heartbeats(self) -> None:
        """Send one heartbeat per partition and second, for ever. A partition that hangs delays no other."""
        running: dict[int, asyncio.Task[bool]] = {}
        message = device_pb2.CheckInBatch(gateway=self._gateway, heartbeat=True)
        while True:
            for partition in range(self._partitions):
                task = running.get(partition)
                if task is None or task.done():
                    running[partition] = asyncio.create_task(self._send(partition, "", message))
            await asyncio.sleep(HEARTBEAT_S)

    async def drain(self) -> None:
        """Send what is open and wait for it: the last step of a graceful stop."""
        for batch in list(self._open.values()):
            self._close(batch)
        if self._sending:
            await asyncio.wait(self._sending, timeout=ACKNOWLEDGEMENT_S)
