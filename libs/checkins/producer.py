"""Idempotent, acknowledged sends to the check-in topic.

This topic is not transactional: records are plain, ordered per partition, and acknowledged by all in-sync replicas.
"""

from __future__ import annotations

from collections.abc import Awaitable

from aiokafka import AIOKafkaProducer


def checkin_topic(env: str) -> str:
    """Name of the check-in topic of an installation."""
    return f"{env}.device.checkins.v1"


class KafkaCheckInProducer:
    """Sends signed records; ``start`` before use, ``stop`` flushes."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.topic = topic
        self._producer = AIOKafkaProducer(
            bootstrap_servers=bootstrap,
            enable_idempotence=True,
            acks="all",
            linger_ms=0,
            max_batch_size=768 * 1024,  # what waits for an acknowledgement goes together in the next request
            request_timeout_ms=10_000,
            max_request_size=300 * 1024,
        )

    async def start(self) -> None:
        """Connect; raises when Kafka cannot be reached."""
        await self._producer.start()

    async def stop(self) -> None:
        """Flush and disconnect."""
        await self._producer.stop()

    async def post(
        self, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]
    ) -> Awaitable[object]:
        """Hand a record over, in order, and return what ends when it is in the log: several may be under way."""
        acknowledged: Awaitable[object] = await self._producer.send(
            self.topic, value, key=key or None, partition=partition, headers=headers
        )
        return acknowledged

    async def send(self, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        """Return when the record is in the log."""
        await (await self.post(partition, key, value, headers))
