"""Idempotent, acknowledged sends to the check-in topic.

This topic is not transactional: records are plain, ordered per partition, and acknowledged by all in-sync replicas.
"""

from __future__ import annotations

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
            request_timeout_ms=10_000,
            max_request_size=300 * 1024,
        )

    async def start(self) -> None:
        """Connect; raises when Kafka cannot be reached."""
        await self._producer.start()

    async def stop(self) -> None:
        """Flush and disconnect."""
        await self._producer.stop()

    async def send(self, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        """Return when the record is in the log."""
        await self._producer.send_and_wait(self.topic, value, key=key or None, partition=partition, headers=headers)
