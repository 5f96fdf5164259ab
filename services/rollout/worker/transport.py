"""Faust's Kafka transport with one setting that it does not offer: how long a fetch may wait for records.

aiokafka has one fetch under way for each broker. When the records of one partition wait to be taken, it asks for the
others in the meantime, and if those are quiet the busy one stands still for as long as that fetch may wait.
"""

from __future__ import annotations

from typing import Any, Final

from faust.transport.drivers import aiokafka

FETCH_WAIT_MS: Final = 50


class _Thread(aiokafka.AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS  # noqa: SLF001 - Faust passes a constant of its own
        return consumer


class _Consumer(aiokafka.Consumer):
    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)


class Transport(aiokafka.Transport):
    """For ``app.transport``."""

    Consumer = _Consumer
