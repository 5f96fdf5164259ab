"""The event log on Kafka. All use of aiokafka for event sourcing is in this module.

What it relies on, measured on the shipped broker: InitProducerId under one transactional id fences and settles the
predecessor; `read_committed` tails never pass an open transaction; `position()` skips markers; a dynamic group member
leaves at once when stopped. What it distrusts: record metadata of produce results (a duplicate has no offset), and any
producer that has raised (discarded).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaPlace
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import InvalidProducerEpoch, KafkaError, OffsetOutOfRangeError, ProducerFenced

from libs.eventlog.ending import end, is_cancelled
from libs.eventlog.ports import FencedError, LogError, NewRecord, Record, TopicPartition, UnknownOutcomeError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaSecurity:
    """How to reach a protected broker; the default is the plain listener of the local stack."""

    ssl_context: ssl.SSLContext | None = None
    sasl_mechanism: str = ""
    sasl_username: str = ""
    sasl_password: str = field(default="", repr=False)

    def options(self) -> dict[str, Any]:
        """Arguments that every aiokafka client takes."""
        if self.ssl_context is None and not self.sasl_mechanism:
            return {}
        protocol = ("SASL_" if self.sasl_mechanism else "") + ("SSL" if self.ssl_context else "PLAINTEXT")
        options: dict[str, Any] = {"security_protocol": protocol, "ssl_context": self.ssl_context}
        if self.sasl_mechanism:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
            }
        return options


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaTimes:
    """Milliseconds."""

    transaction_ms: int = 10_000
    session_ms: int = 3_000
    heartbeat_ms: int = 500
    poll_ms: int = 10_000
    """An event loop that is stuck for this long loses its leases."""
    request_ms: int = 10_000
    fetch_wait_ms: int = 500


FAILURES: Final = (KafkaError, OSError, AssertionError)
"""What aiokafka raises when the log cannot do what it was asked. It asserts that it knows a broker, and one that was
away for a while answers at first that its cluster has none."""
_MAX_BATCH_BYTES = 900_000
_CLOSE_WITHIN_S = 2.0
_background: set[asyncio.Task[None]] = set()
"""Clients being stopped, and steps that took too long being cancelled until they end."""


class KafkaLog:
    """`EventLog` on a cluster."""

    def __init__(
        self, bootstrap: str, *, security: KafkaSecurity | None = None, times: KafkaTimes | None = None
    ) -> None:
        self.bootstrap = bootstrap
        self.times = times or KafkaTimes()
        self._common = {"bootstrap_servers": bootstrap, **(security or KafkaSecurity()).options()}
        self._ends: AIOKafkaConsumer | None = None
        self._ends_lock = asyncio.Lock()

    async def open_appender(self, transactional_id: str) -> KafkaAppender:
        producer = AIOKafkaProducer(
            **self._common,
            transactional_id=transactional_id,
            acks="all",
            transaction_timeout_ms=self.times.transaction_ms,
            request_timeout_ms=self.times.request_ms,
            max_batch_size=_MAX_BATCH_BYTES,
        )
        try:
            await within(self.times.request_ms / 1000, producer.start(), partial(discard, producer))
        except FAILURES as error:  # a TimeoutError is an OSError
            raise LogError(f"{transactional_id}: {error!r}") from error
        return KafkaAppender(producer, transactional_id, self.times)

    async def open_tail(self, positions: Mapping[TopicPartition, int]) -> KafkaTail:
        consumer = self._consumer(fetch_max_wait_ms=self.times.fetch_wait_ms, max_poll_records=2000)
        places = {KafkaPlace(*place): position for place, position in positions.items()}
        consumer.assign(list(places))
        try:
            await consumer.start()
            for place, position in places.items():
                consumer.seek(place, position)
        except FAILURES as error:
            await close(stopped(consumer))
            raise LogError(repr(error)) from error
        except asyncio.CancelledError:
            await close(stopped(consumer))
            raise
        return KafkaTail(consumer, positions)

    async def end_positions(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        # A consumer of its own: on a tail's connection the question would queue behind a long poll.
        async with self._ends_lock:
            if self._ends is None:
                consumer = self._consumer()
                try:
                    await consumer.start()
                except FAILURES as error:
                    await close(stopped(consumer))
                    raise LogError(repr(error)) from error
                self._ends = consumer
        places = [KafkaPlace(*place) for place in partitions]
        try:
            ends = await self._ends.end_offsets(places)
        except FAILURES as error:
            raise LogError(repr(error)) from error
        return {TopicPartition(place.topic, place.partition): end for place, end in ends.items()}

    async def partition_count(self, topic: str) -> int:
        admin = AIOKafkaAdminClient(**self._common)
        try:
            await admin.start()
            for row in await admin.describe_topics([topic]):
                if row["topic"] == topic and row["error_code"] == 0:
                    return len(row["partitions"])
        except FAILURES as error:
            raise LogError(repr(error)) from error
        finally:
            await close(admin.close())
        return 0

    async def open_election(self, group: str, topic: str) -> KafkaElection:
        election = KafkaElection()
        consumer = self._consumer(
            group_id=group,
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
            session_timeout_ms=self.times.session_ms,
            heartbeat_interval_ms=self.times.heartbeat_ms,
            max_poll_interval_ms=self.times.poll_ms,
            rebalance_timeout_ms=self.times.session_ms,
            auto_offset_reset="earliest",
        )
        consumer.subscribe([topic], listener=election.listener(consumer))
        try:
            await consumer.start()
        except FAILURES as error:
            await close(stopped(consumer))
            raise LogError(repr(error)) from error
        except asyncio.CancelledError:
            await close(stopped(consumer))
            raise
        election.begin(consumer)
        return election

    async def close(self) -> None:
        if self._ends is not None:
            ends, self._ends = self._ends, None
            await close(stopped(ends))

    def _consumer(self, **options: Any) -> AIOKafkaConsumer:
        defaults = {
            "isolation_level": "read_committed",
            "enable_auto_commit": False,
            # A position that the log no longer has is an error to look at, never a reason to jump.
            "auto_offset_reset": "none",
            "request_timeout_ms": self.times.request_ms,
        }
        return AIOKafkaConsumer(**(self._common | defaults | options))


async def nothing() -> None:
    """Nothing is to be cleaned up."""


async def within(
    seconds: float, step: Coroutine[Any, Any, T], clean_up: Callable[[], Coroutine[Any, Any, None]] = nothing
) -> T:
    """What the step returns, or `TimeoutError`; without a result, `clean_up` once the step has really ended.

    In a task of its own: aiokafka may lose the cancellation of a time-out, and whoever waits must go on all the same.
    The step may then even succeed, and nobody knows of what it made.
    """
    task = asyncio.create_task(step)
    returned = False
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError(f"not done within {seconds:g} s")
        result = task.result()
        returned = True
        return result
    finally:
        if not returned:
            _in_background(_give_up(task, clean_up))


async def _give_up(task: asyncio.Task[Any], clean_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await end(task)
    await clean_up()


def _in_background(body: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(body)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


async def close(stopping: Coroutine[Any, Any, None]) -> None:
    """Stop a client whose broker may be gone: bounded, no reason to fail, and not given up when the caller is."""
    await asyncio.wait({_in_background(_bounded(stopping))})


async def discard(producer: AIOKafkaProducer) -> None:
    """Stop a producer whole. Its own `stop`, given up halfway, leaves what sends and what is connected as they are."""
    await close(producer.stop())
    _in_background(_abandon(producer))


async def _abandon(producer: AIOKafkaProducer) -> None:
    sending = producer._sender.sender_task  # noqa: SLF001
    if sending is not None:
        await end(sending)
    await close(producer.client.close())


async def _bounded(stopping: Coroutine[Any, Any, None]) -> None:
    try:
        await within(_CLOSE_WITHIN_S, stopping)
    except Exception as error:  # noqa: BLE001 - it is being thrown away
        logger.debug("closing a Kafka client: %r", error)


async def stopped(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer whole.

    When a fetch waits to be tried again, as after a lost broker, aiokafka cancels it and lets that cancellation out of
    its own `stop`, halfway. It would end whoever closes, in silence, and leave connections open.
    """
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        await consumer._client.close()  # noqa: SLF001 - what `stop` had still to do


class KafkaAppender:
    """`Appender` on a transactional producer."""

    def __init__(self, producer: AIOKafkaProducer, transactional_id: str, times: KafkaTimes) -> None:
        self._producer = producer
        self._id = transactional_id
        self._timeout_s = times.transaction_ms / 1000
        # There is no public way to ask for them; they name the leadership in the claim record.
        manager = producer._txn_manager  # noqa: SLF001
        self._producer_id = int(manager.producer_id)
        self._epoch = int(manager.producer_epoch)

    @property
    def producer_id(self) -> int:
        return self._producer_id

    @property
    def epoch(self) -> int:
        return self._epoch

    async def stage(self, records: Sequence[NewRecord]) -> None:
        await self._settle(self._stage(records))

    async def commit(self) -> None:
        await self._settle(self._producer.commit_transaction())

    async def _settle(self, step: Awaitable[None]) -> None:
        # aiokafka repeats requests for ever when connections fail, so the limit is ours.
        try:
            async with asyncio.timeout(self._timeout_s):
                await step
        except (ProducerFenced, InvalidProducerEpoch) as error:
            raise FencedError(self._id) from error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise UnknownOutcomeError(f"{self._id}: {error!r}") from error

    async def _stage(self, records: Sequence[NewRecord]) -> None:
        """Whole batches, built here: one future per batch instead of one per record."""
        producer = self._producer
        await producer.begin_transaction()
        batches: dict[tuple[str, int], list[Any]] = {}
        for topic, partition, key, value, headers in records:
            place = (topic, partition)
            found = batches.get(place)
            if found is None:
                found = batches[place] = [producer.create_batch()]
            if found[-1].append(timestamp=None, key=key, value=value, headers=headers) is None:
                found.append(producer.create_batch())
                if found[-1].append(timestamp=None, key=key, value=value, headers=headers) is None:
                    raise UnknownOutcomeError(f"a record of {topic} does not fit into an empty batch")
        # Nothing yields between the first batches of two topics, so one request adds both to the transaction.
        waiting = []
        rounds = max((len(found) for found in batches.values()), default=0)
        for index in range(rounds):
            for (topic, partition), found in batches.items():
                if index < len(found):
                    waiting.append(await producer.send_batch(found[index], topic, partition=partition))
        # A commit would go through even if a batch had failed, so each one is looked at.
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def close(self) -> None:
        await discard(self._producer)


class KafkaTail:
    """`Tail` on a consumer without a group."""

    def __init__(self, consumer: AIOKafkaConsumer, positions: Mapping[TopicPartition, int]) -> None:
        self._consumer = consumer
        self._places = {place: KafkaPlace(*place) for place in positions}
        self._positions = dict(positions)

    async def fetch(self, max_wait: float) -> Sequence[Record]:
        try:
            fetched = await self._consumer.getmany(timeout_ms=int(max_wait * 1000))
            for place, kafka_place in self._places.items():
                self._positions[place] = await self._consumer.position(kafka_place)
        except OffsetOutOfRangeError as error:
            raise LogError(f"the log does not have the position that was read last: {error!r}") from error
        except FAILURES as error:
            raise LogError(repr(error)) from error
        return [
            Record(
                message.topic,
                message.partition,
                message.offset,
                message.timestamp,
                message.key or b"",
                message.value or b"",
                message.headers,
            )
            for messages in fetched.values()
            for message in messages
        ]

    def position(self, at: TopicPartition) -> int:
        return self._positions[at]

    async def close(self) -> None:
        await close(stopped(self._consumer))


class _Stoppable(Protocol):
    async def stop(self) -> None: ...


class KafkaElection:
    """`Election` on a consumer group whose partitions are never read.

    Every join revokes everything for a moment (the protocol is eager), so revocation means nothing: leaders go on until
    an assignment leaves a partition out, or the broker fences them.
    """

    def __init__(self) -> None:
        self._assigned: frozenset[int] | None = None
        self._told: frozenset[int] | None = None
        self._wake = asyncio.Event()
        self._consumer: _Stoppable | None = None
        self._polling: asyncio.Task[None] | None = None

    def listener(self, consumer: AIOKafkaConsumer) -> ConsumerRebalanceListener:
        """Reports assignments here."""
        election = self

        class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
            def on_partitions_revoked(self, revoked: Iterable[KafkaPlace]) -> None:
                """Eager rebalances revoke what they are about to give back."""

            def on_partitions_assigned(self, assigned: Iterable[KafkaPlace]) -> None:
                places = list(assigned)
                if places:
                    consumer.pause(*places)
                election.assign(frozenset(place.partition for place in places))

        return Listener()

    def assign(self, partitions: frozenset[int]) -> None:
        self._assigned = partitions
        self._wake.set()

    def begin(self, consumer: AIOKafkaConsumer) -> None:
        """Keep polling: time outside a fetch counts as idleness and would cost the membership."""

        async def poll() -> None:
            while True:
                await consumer.getmany(timeout_ms=1000)

        self._consumer = consumer
        self._polling = asyncio.create_task(poll())
        self._polling.add_done_callback(lambda _: self._wake.set())

    async def changed(self) -> frozenset[int]:
        while self._assigned is None or self._told == self._assigned:
            if self._polling is not None and self._polling.done():
                error = None if self._polling.cancelled() else self._polling.exception()
                raise LogError(f"the election consumer stopped: {error!r}")
            self._wake.clear()
            await self._wake.wait()
        self._told = self._assigned
        return self._assigned

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError, KafkaError, OSError):
                await self._polling
        if self._consumer is not None:
            await close(stopped(self._consumer))
