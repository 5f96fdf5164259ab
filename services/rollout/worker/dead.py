"""The dead-letter topic: what is rejected is kept with its reason, never dropped in silence."""

from __future__ import annotations

from aiokafka import AIOKafkaProducer

from libs.checkins import Rejected
from services.rollout.worker.pump import Delivery


class DeadLetters:
    """Idempotent, acknowledged sends."""

    def __init__(self, bootstrap: str, env: str) -> None:
        self._topic = f"{env}.device.checkins.dead.v1"
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True, acks="all")

    async def start(self) -> None:
        await self._producer.start()

    async def stop(self) -> None:
        await self._producer.stop()

    async def reject(self, partition: int, delivery: Delivery, why: Rejected) -> None:
        """Return when the record is in the topic, at its own partition, with where it came from."""
        headers = [
            *delivery.headers,
            ("rejected-reason", why.reason.encode()),
            ("rejected-detail", why.detail.encode()),
            ("source-position", str(delivery.position).encode()),
        ]
        await self._producer.send_and_wait(self._topic, delivery.value, partition=partition, headers=headers)
