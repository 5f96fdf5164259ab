"""Composition root of the worker: Faust is a thin shell around the pumps.

Measured rules of Faust (protocols.md section 5): never on a transactional topic; ``noack()`` and acknowledgement only
after the leader has the record; no exception may leave the agent; session time-out at most 6 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Final

import faust
import uvloop
from aiohttp import web
from aiokafka import AIOKafkaConsumer, TopicPartition
from faust.types import TP
from groundswell.rollout.v1 import rollout_pb2_grpc
from redis.asyncio import Redis

from libs.checkins import SequenceGuard
from libs.checkins.producer import checkin_topic
from libs.eventlog.collector import tune_collector
from libs.eventlog.kafka import KafkaLog, close, stopped
from libs.rpc import channel, configure_logging
from libs.scheduling import prefer_throughput
from libs.settings import Settings
from services.rollout.worker.dead import DeadLetters
from services.rollout.worker.keys import FollowedGatewayKeys
from services.rollout.worker.pump import Delivery, Pump, Tools
from services.rollout.worker.readmodels import ReadModels
from services.rollout.worker.transport import Transport

log = logging.getLogger(__name__)

STUCK_S: Final = 10.0
"""A partition with open records that has not moved for this long is not healthy."""
KILL_S: Final = 120.0
"""Faust's consumer is known to stop slowly and silently: then the process ends, to be started anew."""
CALL_S: Final = 10.0
SWITCH_S: Final = 0.0005
"""Faust reads in a thread of its own, which must not wait long for its turn after each piece of what it fetches."""
FETCH_BYTES: Final = 8 * 1024 * 1024
"""Of one partition at a time: a worker that is behind reads dozens of records at once."""


def faust_app(settings: Settings) -> faust.App:
    """The settings of section 10 of the event log's reference."""
    app = faust.App(
        f"{settings.env}.rollout.worker",
        broker=f"kafka://{settings.kafka}",
        store="memory://",
        datadir=Path(gettempdir()) / f"groundswell-worker-{os.getpid()}",
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        stream_wait_empty=False,
        broker_max_poll_records=500,
        consumer_max_fetch_size=FETCH_BYTES,
        broker_session_timeout=6.0,
        broker_heartbeat_interval=1.0,
        broker_rebalance_timeout=10.0,
        broker_commit_interval=0.5,
        consumer_auto_offset_reset="earliest",
        value_serializer="raw",
        key_serializer="raw",
        logging_config=None,
    )
    app.transport = Transport(app.conf.broker_consumer, app)
    return app


class Worker:
    """Everything the worker runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = checkin_topic(settings.env)
        self._channel = channel(settings, "rollout", identity="worker")
        self._leader = rollout_pb2_grpc.RolloutInternalServiceStub(self._channel)
        self._log = KafkaLog(settings.kafka)
        self._keys = FollowedGatewayKeys(self._log, settings.env, settings.partitions)
        self._dead = DeadLetters(settings.kafka, settings.env)
        self._models = ReadModels(
            Redis.from_url(settings.redis, socket_timeout=2, socket_connect_timeout=2), settings.env
        )
        self._pumps: dict[int, Pump] = {}
        self._ends = AIOKafkaConsumer(bootstrap_servers=settings.kafka)
        self._web: web.AppRunner | None = None
        self._unwell_since: float | None = None
        self._tools = Tools(
            topic=self._topic,
            partitions=settings.partitions,
            keys=self._keys,
            guard=SequenceGuard(),
            record=self._record,
            reject=self._dead.reject,
            models=self._models,
        )
        self.app = faust_app(settings)
        source = self.app.topic(self._topic, value_serializer="raw", key_serializer="raw")
        self.app.agent(source, concurrency=1, name="checkins")(self._checkins)

    async def _record(self, request: Any) -> Any:
        return await self._leader.RecordObservations(request, timeout=CALL_S)

    async def _checkins(self, stream: Any) -> None:
        """The agent: nothing here can fail; the pumps do the work and acknowledge."""
        async for event in stream.noack().events():
            message = event.message
            delivery = Delivery(
                position=message.offset,
                append_time_ms=round(message.timestamp * 1000),
                headers=[(str(name), bytes(value)) for name, value in message.headers or ()],
                value=bytes(message.value or b""),
                acknowledge=event.ack,
            )
            await self._pump(message.partition).put(delivery)

    def _pump(self, partition: int) -> Pump:
        if partition not in self._pumps:
            self._pumps[partition] = Pump(partition, self._tools)
        return self._pumps[partition]

    # Life.

    async def start(self) -> None:
        """Keys first, then the stream, then health."""
        await self._keys.follower.start()
        await self._dead.start()
        await self._ends.start()
        await self.app.start()
        web_app = web.Application()
        web_app.router.add_get("/healthz", self._healthz)
        self._web = web.AppRunner(web_app, access_log=None)
        await self._web.setup()
        host, _, port = self._settings.worker_health.rpartition(":")
        await web.TCPSite(self._web, host, int(port)).start()
        log.info("worker runs: topic=%s health=%s", self._topic, self._settings.worker_health)

    async def stop(self) -> None:
        """Stop reading; what is open is not acknowledged and comes again."""
        if self._web is not None:
            await self._web.cleanup()
        await self.app.stop()
        for pump in self._pumps.values():
            await pump.stop()
        await close(stopped(self._ends))
        await self._dead.stop()
        await self._models.close()
        await self._keys.follower.stop()
        await self._log.close()
        await self._channel.close()

    # Health.

    async def problems(self) -> list[str]:
        """Why it is not healthy: it must move, or stand at the end of the topic."""
        if not self._keys.follower.live:
            return ["gateway keys are not followed"]
        assigned = sorted(tp.partition for tp in self.app.consumer.assignment() if tp.topic == self._topic)
        if not assigned:
            return ["no partition is assigned"]
        ends = await self._ends.end_offsets([TopicPartition(self._topic, partition) for partition in assigned])
        found: list[str] = []
        for partition in assigned:
            pump = self._pumps.get(partition)
            quiet = time.monotonic() - pump.moved_at if pump is not None else float("inf")
            if quiet < STUCK_S:
                continue
            position = await self.app.consumer.position(TP(self._topic, partition))
            behind = ends[TopicPartition(self._topic, partition)] - (position or 0)
            if behind > 0 or (pump is not None and not pump.idle):
                found.append(f"partition {partition} does not move, {behind} records behind")
        return found

    async def _healthz(self, _request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(3):
                problems = await self.problems()
        except Exception as error:  # noqa: BLE001 - whatever it is, this is not health
            problems = [f"{type(error).__name__}: {error}"]
        return web.json_response({"healthy": not problems, "problems": problems}, status=503 if problems else 200)

    async def must_end(self) -> bool:
        """Whether it has been unwell for so long that only a new process helps."""
        try:
            async with asyncio.timeout(3):
                problems = await self.problems()
        except Exception as error:  # noqa: BLE001 - Kafka away is no reason to end: it comes back
            log.warning("health unknown: %s", type(error).__name__)
            return False
        now = time.monotonic()
        if not problems:
            self._unwell_since = None
            return False
        self._unwell_since = self._unwell_since or now
        return now - self._unwell_since > KILL_S


async def run(settings: Settings) -> int:
    """Until SIGTERM or SIGINT; 1 when it has to be started anew."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    worker = Worker(settings)
    await worker.start()
    tune_collector()
    sys.setswitchinterval(SWITCH_S)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    status = 0
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), 5.0)
        if not stopping.is_set() and await worker.must_end():
            log.error("the worker does not move any more: ending, to be started anew")
            status = 1
            break
    log.info("worker stops")
    await worker.stop()
    return status


def main() -> None:
    """Entry of `python -m services.rollout.worker`."""
    configure_logging()
    prefer_throughput()
    sys.exit(uvloop.run(run(Settings())))
