"""An event log in memory with the semantics of a broker, for unit tests and simulations.

It is exact where the runtime depends on it: producer epochs and fencing, open transactions that hold back the last
stable offset, commit and abort markers that take positions, aborted records that are never delivered, transactions
that time out, elections that rebalance. Several runtimes may share one log in one event loop. All waiting uses the
loop's clock, so a simulated loop simulates it too.

Faults are injected by `before`: an async hook called with the name of a step (`open`, `stage`, `staged`, `commit`,
`committed`, `fetch`) and the transactional id (or topic). It may wait, or raise. Raising `UnknownOutcomeError` at
`committed` is a commit whose answer was lost; at `commit` one that never arrived. `loses_markers` is asked about each
transaction that is decided: if it says so, no marker of it reaches its places, although everybody believes so
(KAFKA-20734). Later readers are held back there until another transaction of the same producer ends: its marker ends
both, its own way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from libs.eventlog.config import wall_clock_ms
from libs.eventlog.deadline import monotonic
from libs.eventlog.ports import FencedError, LogError, NewRecord, Record, TopicPartition

Hook = Callable[[str, str], Awaitable[None]]

_OPEN, _COMMITTED, _ABORTED = range(3)


@dataclass(eq=False, slots=True)
class _Transaction:
    opened_at: float
    producer_id: int
    state: int = _OPEN
    places: set[TopicPartition] = field(default_factory=set)
    undecided: set[TopicPartition] = field(default_factory=set)
    """Places whose marker is not written yet."""


@dataclass(eq=False, slots=True)
class _Producer:
    producer_id: int
    epoch: int = -1
    open: _Transaction | None = None


@dataclass(slots=True)
class _Partition:
    entries: list[tuple[Record, _Transaction] | None] = field(default_factory=list)
    """None is a marker; an index is a position."""
    holding: dict[_Transaction, int] = field(default_factory=dict)
    """Transactions whose marker is not written here -> their first position."""
    ended_as: dict[_Transaction, int] = field(default_factory=dict)
    """Those ended by the marker of a later transaction."""

    def is_committed(self, transaction: _Transaction) -> bool:
        return self.ended_as.get(transaction, transaction.state) == _COMMITTED

    def stable_end(self) -> int:
        return min(self.holding.values(), default=len(self.entries))


class MemoryLog:
    """`EventLog` in memory. Topics come into being when first used."""

    def __init__(
        self,
        *,
        partitions: int = 4,
        transaction_timeout_s: float = 10.0,
        session_timeout_s: float = 3.0,
        clock_ms: Callable[[], int] = wall_clock_ms,
        before: Hook | None = None,
        marker_delay_s: Callable[[TopicPartition], float] | None = None,
        loses_markers: Callable[[], bool] | None = None,
    ) -> None:
        self.partitions = partitions
        self.before = before
        self.clock_ms = clock_ms
        self.session_timeout_s = session_timeout_s
        self.marker_delay_s = marker_delay_s
        self.loses_markers = loses_markers
        self.max_records = 500
        self._transaction_timeout_s = transaction_timeout_s
        self._topics: dict[TopicPartition, _Partition] = {}
        self._producers: dict[str, _Producer] = {}
        self._groups: dict[str, _Group] = {}
        # A dict, because a set of futures would wake them in an order that no seed reproduces.
        self._waiters: dict[asyncio.Future[None], None] = {}

    # The port.

    async def open_appender(self, transactional_id: str) -> MemoryAppender:
        await self.step("open", transactional_id)
        producer = self._producers.setdefault(transactional_id, _Producer(1000 + len(self._producers)))
        producer.epoch += 1
        epoch = producer.epoch
        left = producer.open
        if left is not None:
            producer.open = None
            if left.state == _OPEN:
                self._decide(left, _ABORTED)
            while left.undecided:
                await self.changed(0.05)
        if producer.epoch != epoch:
            raise FencedError(transactional_id)
        return MemoryAppender(self, transactional_id, producer)

    async def open_tail(self, positions: Mapping[TopicPartition, int]) -> MemoryTail:
        await self.step("tail", "")
        return MemoryTail(self, positions)

    async def end_positions(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        await self.step("ends", "")
        self._expire()
        return {place: self.partition(place).stable_end() for place in partitions}

    async def partition_count(self, topic: str) -> int:
        del topic
        return self.partitions

    async def open_election(self, group: str, topic: str) -> MemoryElection:
        del topic
        return MemoryElection(self._groups.setdefault(group, _Group(self.partitions)))

    async def close(self) -> None:
        """Keeps everything: another runtime may go on with it."""

    # For tests.

    def records(self, topic: str, partition: int) -> list[Record]:
        """Every committed record, as an auditor would read them."""
        log = self.partition(TopicPartition(topic, partition))
        return [entry[0] for entry in log.entries if entry is not None and log.is_committed(entry[1])]

    def drop_topic(self, topic: str) -> None:
        """Lose a topic, as a careless operator would."""
        for place in [place for place in self._topics if place.topic == topic]:
            del self._topics[place]

    def expire_member(self, election: MemoryElection) -> None:
        """The group gives up on a member whose process died."""
        election.group.leave(election)

    # Inside.

    async def step(self, name: str, who: str) -> None:
        if self.before is not None:
            await self.before(name, who)

    def partition(self, place: TopicPartition) -> _Partition:
        found = self._topics.get(place)
        if found is None:
            if not 0 <= place.partition < self.partitions:
                raise LogError(f"there is no {place}")
            found = self._topics[place] = _Partition()
        return found

    def write(self, transaction: _Transaction, record: NewRecord) -> None:
        place = TopicPartition(record.topic, record.partition)
        log = self.partition(place)
        position = len(log.entries)
        if transaction not in log.holding:
            log.holding[transaction] = position
            transaction.places.add(place)
        stored = Record(
            record.topic, record.partition, position, self.clock_ms(), record.key, record.value, tuple(record.headers)
        )
        log.entries.append((stored, transaction))

    def _decide(self, transaction: _Transaction, state: int) -> None:
        """The coordinator's decision is final; markers reach the partitions one by one, perhaps later."""
        transaction.state = state
        if self.loses_markers is not None and self.loses_markers():
            return
        transaction.undecided = set(transaction.places)
        for place in sorted(transaction.places):
            delay = self.marker_delay_s(place) if self.marker_delay_s is not None else 0.0
            if delay > 0:
                asyncio.get_running_loop().call_later(delay, self._mark, transaction, place)
            else:
                self._mark(transaction, place)

    def _mark(self, transaction: _Transaction, place: TopicPartition) -> None:
        log = self.partition(place)
        log.entries.append(None)
        log.holding.pop(transaction, None)
        for left in [left for left in log.holding if left.producer_id == transaction.producer_id]:
            if left.state != _OPEN and place not in left.undecided:
                del log.holding[left]
                log.ended_as[left] = transaction.state
        transaction.undecided.discard(place)
        self.notify()

    def commit(self, producer: _Producer) -> None:
        transaction = producer.open
        if transaction is not None:
            producer.open = None
            self._decide(transaction, _COMMITTED)

    def _expire(self) -> None:
        """Abort what was left open too long, and fence whoever left it."""
        limit = monotonic() - self._transaction_timeout_s
        for producer in self._producers.values():
            if producer.open is not None and producer.open.opened_at < limit:
                transaction, producer.open = producer.open, None
                producer.epoch += 1
                self._decide(transaction, _ABORTED)

    def notify(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self, timeout_s: float) -> None:
        """Wait for anything to happen in the log."""
        self._expire()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await asyncio.wait((waiter,), timeout=min(timeout_s, self._transaction_timeout_s / 4))
        finally:
            self._waiters.pop(waiter, None)
        self._expire()


class MemoryAppender:
    """`Appender` of `MemoryLog`."""

    def __init__(self, log: MemoryLog, transactional_id: str, producer: _Producer) -> None:
        self._log = log
        self._id = transactional_id
        self._producer = producer
        self._epoch = producer.epoch

    @property
    def producer_id(self) -> int:
        return self._producer.producer_id

    @property
    def epoch(self) -> int:
        return self._epoch

    def _check(self) -> None:
        if self._producer.epoch != self._epoch:
            raise FencedError(f"{self._id}: epoch {self._epoch} was succeeded by {self._producer.epoch}")

    async def stage(self, records: Sequence[NewRecord]) -> None:
        await self._log.step("stage", self._id)
        self._check()
        transaction = _Transaction(monotonic(), self.producer_id)
        self._producer.open = transaction
        for record in records:
            self._log.write(transaction, record)
        await self._log.step("staged", self._id)

    async def commit(self) -> None:
        await self._log.step("commit", self._id)
        self._check()
        self._log.commit(self._producer)
        await self._log.step("committed", self._id)

    async def close(self) -> None:
        """Nothing to release; an open transaction stays, as it would at a broker."""


class MemoryTail:
    """`Tail` of `MemoryLog`."""

    def __init__(self, log: MemoryLog, positions: Mapping[TopicPartition, int]) -> None:
        self._log = log
        self._positions = dict(positions)

    async def fetch(self, max_wait: float) -> Sequence[Record]:
        until = monotonic() + max_wait
        while True:
            await self._log.step("fetch", next(iter(self._positions)).topic if self._positions else "")
            found = self._read()
            left = until - monotonic()
            if found or left <= 0:
                return found
            await self._log.changed(left)

    def _read(self) -> list[Record]:
        found: list[Record] = []
        for place, start in self._positions.items():
            log = self._log.partition(place)
            end = log.stable_end()
            position = start
            while position < end and len(found) < self._log.max_records:
                entry = log.entries[position]
                if entry is not None and log.is_committed(entry[1]):
                    found.append(entry[0])
                position += 1
            self._positions[place] = max(position, start)
        return found

    def position(self, at: TopicPartition) -> int:
        return self._positions[at]

    async def close(self) -> None:
        """Nothing to release."""


class _Group:
    """Members of an election; partitions are dealt round-robin in the order of joining."""

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self._members: list[MemoryElection] = []

    def join(self, member: MemoryElection) -> None:
        self._members.append(member)
        self._deal()

    def leave(self, member: MemoryElection) -> None:
        if member in self._members:
            self._members.remove(member)
            self._deal()

    def _deal(self) -> None:
        count = len(self._members)
        for index, member in enumerate(self._members):
            member.assign(frozenset(range(index, self._partitions, count)))


class MemoryElection:
    """`Election` of `MemoryLog`. A killed process stays a member until `MemoryLog.expire_member`."""

    def __init__(self, group: _Group) -> None:
        self.group = group
        self._assigned: frozenset[int] = frozenset()
        self._told: frozenset[int] | None = None
        self._wake = asyncio.Event()
        group.join(self)

    def assign(self, partitions: frozenset[int]) -> None:
        self._assigned = partitions
        self._wake.set()

    async def changed(self) -> frozenset[int]:
        while self._told == self._assigned:
            self._wake.clear()
            await self._wake.wait()
        self._told = self._assigned
        return self._assigned

    async def close(self) -> None:
        self.group.leave(self)


class MemorySnapshotStore:
    """`SnapshotStore` of one process, for tests; they may look into it and damage it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def names(self, prefix: str) -> Sequence[str]:
        return [name for name in self.objects if name.startswith(prefix)]

    async def read(self, name: str) -> bytes:
        return self.objects[name]

    async def write(self, name: str, data: bytes) -> None:
        self.objects.setdefault(name, data)

    async def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    async def close(self) -> None:
        """Nothing to release."""
