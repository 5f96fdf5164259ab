"""A small service, a log whose steps can be held or broken, and a world to run them in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import immutables
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue
from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import FailedPreconditionError, UnavailableError
from libs.eventlog import (
    Command,
    Committed,
    Context,
    Deadline,
    Decision,
    Event,
    Foreign,
    NewEvent,
    Public,
    Runtime,
    RuntimeConfig,
    Task,
    Timer,
    TimerFired,
    partition_of,
)
from libs.eventlog.codec import read_envelope
from libs.eventlog.config import TaskHandler, events_topic
from libs.eventlog.ports import Appender, Election, EventLog, NewRecord, Record, SnapshotStore, Tail, TopicPartition

ORGANIZATION = "acme"
PARTITIONS = 4
HOME = partition_of(ORGANIZATION, PARTITIONS)
State = immutables.Map[str, str]


@dataclass(frozen=True, slots=True)
class Put:
    """Set a value; each put is one event and, unless silent, one public record."""

    name: str
    value: str
    public: Message | None = None
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Refuse:
    """Is always refused."""


@dataclass(frozen=True, slots=True)
class Stumble:
    """Meets a bug in decide."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Writes nothing."""

    name: str


@dataclass(frozen=True, slots=True)
class OpenTask:
    task_id: str


@dataclass(frozen=True, slots=True)
class CloseTask:
    task_id: str


@dataclass(frozen=True, slots=True)
class SetTimer:
    timer_id: str
    in_ms: int


class KeyValue:
    """`registry`: remembers values."""

    service = "registry"
    event_types: Sequence[type[Message]] = (StringValue,)
    sources: Mapping[str, Sequence[type[Message]]] = {}

    def initial_state(self, partition: int) -> State:
        del partition
        return immutables.Map()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        match command:
            case Put(name, value, public, silent):
                payload = StringValue(value=value)
                published = () if silent else (Public(name, public or payload),)
                event = NewEvent(ctx.organization, name, payload, published)
                return Decision(events=(event,), result=Int64Value(value=ctx.version(name) + 1))
            case Ask(name):
                return Decision(result=StringValue(value=state.get(name, "")))
            case Refuse():
                raise FailedPreconditionError("REFUSED", "always")
            case Stumble():
                raise ZeroDivisionError
            case OpenTask(task_id):
                return Decision(open_tasks=(Task(task_id, "work", b"x"),))
            case CloseTask(task_id):
                event = NewEvent(ctx.organization, task_id, StringValue(value="done"))
                return Decision(events=(event,), close_tasks=(task_id,))
            case SetTimer(timer_id, in_ms):
                return Decision(set_timers=(Timer(timer_id, "alarm", ctx.now_ms + in_ms),))
            case TimerFired(timer_id, _, _):
                return Decision(events=(NewEvent(ctx.organization, timer_id, StringValue(value="fired")),))
        raise TypeError(command)

    def evolve(self, state: State, event: Event) -> State:
        payload = event.payload
        assert isinstance(payload, StringValue)
        if payload.value == "poison":
            raise ValueError("cannot be applied")
        return state.set(event.resource, payload.value)


class Taker(KeyValue):
    """`pki`: writes one event for each public record of `registry` that it takes in."""

    service = "pki"
    sources: Mapping[str, Sequence[type[Message]]] = {"registry": (StringValue,)}

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        if isinstance(command, Foreign):
            payload = command.payload
            if isinstance(payload, BytesValue):
                payload = StringValue(value=payload.value.decode())
            assert isinstance(payload, StringValue)
            if payload.value == "refuse me":
                raise FailedPreconditionError("BUG", "a foreign record must not be refused")
            return Decision(events=(NewEvent(command.organization, command.resource, payload),))
        if isinstance(command, Ask):
            return Decision(result=StringValue(value="parked" if ctx.parked(command.name) else "clear"))
        return super().decide(state, command, ctx)


class WiserTaker(Taker):
    """A later build, which understands one type more."""

    sources: Mapping[str, Sequence[type[Message]]] = {"registry": (StringValue, BytesValue)}


Step = Callable[[str], Awaitable[None]]


@dataclass
class Gate:
    """Holds whoever arrives at a step, until opened."""

    step: str
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, step: str) -> None:
        if step == self.step and not self.opened.is_set():
            self.arrived.set()
            await self.opened.wait()


@dataclass
class FailOnce:
    """Raises at the first arrival at a step after being armed."""

    step: str
    error: BaseException
    armed: bool = True

    async def __call__(self, step: str) -> None:
        if self.armed and step == self.step:
            self.armed = False
            raise self.error


class SteeredElection:
    """An election that the test decides, to place leaders where the story needs them."""

    def __init__(self) -> None:
        self._assigned: frozenset[int] = frozenset()
        self._told: frozenset[int] | None = None
        self._wake = asyncio.Event()

    def assign(self, *partitions: int) -> None:
        self._assigned = frozenset(partitions)
        self._wake.set()

    async def changed(self) -> frozenset[int]:
        while self._told == self._assigned:
            self._wake.clear()
            await self._wake.wait()
        self._told = self._assigned
        return self._assigned

    async def close(self) -> None: ...


class SteeredLog:
    """A log seen by one process: every step passes the hooks, and the election is steered (or not)."""

    def __init__(self, inner: EventLog, *, real_election: bool = False) -> None:
        self._inner = inner
        self._real_election = real_election
        self.hooks: list[Step] = []
        self.steps: list[str] = []
        self.election = SteeredElection()

    async def step(self, name: str) -> None:
        self.steps.append(name)
        for hook in self.hooks:
            await hook(name)

    async def open_appender(self, transactional_id: str) -> Appender:
        await self.step("open")
        return SteeredAppender(self, await self._inner.open_appender(transactional_id))

    async def open_tail(self, positions: Mapping[TopicPartition, int]) -> Tail:
        return SteeredTail(self, await self._inner.open_tail(positions))

    async def end_positions(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self._inner.end_positions(partitions)

    async def partition_count(self, topic: str) -> int:
        return await self._inner.partition_count(topic)

    async def open_election(self, group: str, topic: str) -> Election:
        return await self._inner.open_election(group, topic) if self._real_election else self.election

    async def close(self) -> None: ...


class SteeredAppender:
    def __init__(self, log: SteeredLog, inner: Appender) -> None:
        self._log = log
        self._inner = inner

    @property
    def producer_id(self) -> int:
        return self._inner.producer_id

    @property
    def epoch(self) -> int:
        return self._inner.epoch

    async def stage(self, records: Sequence[NewRecord]) -> None:
        await self._log.step("stage")
        await self._inner.stage(records)
        await self._log.step("staged")

    async def commit(self) -> None:
        await self._log.step("commit")
        await self._inner.commit()
        await self._log.step("committed")

    async def close(self) -> None:
        await self._inner.close()


class SteeredTail:
    def __init__(self, log: SteeredLog, inner: Tail) -> None:
        self._log = log
        self._inner = inner

    async def fetch(self, max_wait: float) -> Sequence[Record]:
        records = await self._inner.fetch(max_wait)
        if records:
            await self._log.step(f"fetched {records[0].topic.split('.')[1]}")
        return records

    def position(self, at: TopicPartition) -> int:
        return self._inner.position(at)

    async def close(self) -> None:
        await self._inner.close()


@dataclass
class Replica:
    """One process of a service."""

    runtime: Runtime[State]
    log: SteeredLog

    async def lead(self, *partitions: int) -> None:
        """Be assigned the partitions (default: that of the organization) and wait for the claims."""
        wanted = partitions or (HOME,)
        self.log.election.assign(*wanted)
        await self.runtime.wait_leading(soon(), wanted)

    def retire(self) -> None:
        self.log.election.assign()

    async def put(self, name: str, value: str, **kwargs: Any) -> Committed:
        return await self.submit(Put(name, value), **kwargs)

    async def submit(self, payload: object, **kwargs: Any) -> Committed:
        return await self.runtime.submit(Command(ORGANIZATION, payload, **kwargs), soon())

    def values(self) -> State:
        state = self.runtime.snapshot(ORGANIZATION).state
        assert isinstance(state, immutables.Map)
        return state


def soon(seconds: float = 15.0) -> Deadline:
    return Deadline.after(seconds)


@dataclass
class World:
    """One installation on one kind of log."""

    env: str
    make_log: Callable[[], EventLog]
    runtime_type: type[Runtime[State]] = Runtime
    _replicas: list[Replica] = field(default_factory=list)
    _logs: list[EventLog] = field(default_factory=list)

    def log(self) -> EventLog:
        log = self.make_log()
        self._logs.append(log)
        return log

    async def start(
        self,
        domain: KeyValue | None = None,
        *,
        handlers: Mapping[str, TaskHandler] | None = None,
        real_election: bool = False,
        env: str = "",
        hooks: Sequence[Step] = (),
        snapshots: SnapshotStore | None = None,
        **config: Any,
    ) -> Replica:
        """Start a process; it leads nothing until told to (or elected)."""
        log = SteeredLog(self.log(), real_election=real_election)
        log.hooks.extend(hooks)
        number = len(self._replicas) + 1
        settings: dict[str, Any] = {"address": f"replica-{number}", "partitions": PARTITIONS, "retry_first_s": 0.02}
        settings["verify_folds"] = True
        settings |= config
        runtime = self.runtime_type(
            domain or KeyValue(),
            log,
            RuntimeConfig(env=env or self.env, **settings),
            handlers,
            snapshots=snapshots,
        )
        replica = Replica(runtime, log)
        self._replicas.append(replica)
        await runtime.start()
        if not hooks:
            await runtime.wait_ready(soon())
        return replica

    async def records(self, service: str = "registry", partition: int = HOME, *, topic: str = "") -> list[Record]:
        """All committed records of a private log, as an auditor reads them."""
        place = TopicPartition(topic or events_topic(self.env, service), partition)
        log = self.log()
        end = (await log.end_positions([place]))[place]
        tail = await log.open_tail({place: 0})
        found: list[Record] = []
        try:
            while tail.position(place) < end:
                found.extend(await tail.fetch(0.2))
        finally:
            await tail.close()
        return found

    async def events(self, service: str = "registry") -> list[tuple[str, str, str, int]]:
        """(type, origin, resource, version) of each record."""
        rows = []
        for record in await self.records(service):
            envelope, _, kind = read_envelope(record)
            rows.append((kind.rsplit(".", 1)[1], envelope.origin, envelope.resource, envelope.aggregate_version))
        return rows

    async def close(self) -> None:
        for replica in self._replicas:
            for hook in replica.log.hooks:
                if isinstance(hook, Gate):
                    hook.opened.set()
        await asyncio.gather(*(replica.runtime.stop() for replica in self._replicas))
        for log in self._logs:
            await log.close()


async def eventually(condition: Callable[[], bool], deadline: Deadline | None = None) -> None:
    """Wait until a condition over in-process state holds."""
    limit = deadline or soon()
    while not condition():
        assert not limit.expired, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def retried(replica: Replica, payload: object, **kwargs: Any) -> Committed:
    """Do what a client does: repeat the same request while the service is unavailable."""
    limit = soon()
    while True:
        try:
            return await replica.submit(payload, **kwargs)
        except UnavailableError:
            assert not limit.expired, "unavailable for too long"
            await asyncio.sleep(0.01)


def claims(rows: Sequence[tuple[str, str, str, int]]) -> list[str]:
    """Origins of the leaderships, in order."""
    return [origin for kind, origin, _, _ in rows if kind == pb.LeaderClaimed.DESCRIPTOR.name]
