"""A simulated installation: processes that die and come back, a log that delays and loses answers, clients that repeat.

Everything is decided by one random generator, so a seed is a story that can be read again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import UnavailableError
from libs.eventlog import Command, Committed, Deadline, Runtime, RuntimeConfig, Task, TaskContext, partition_of
from libs.eventlog.codec import read_envelope
from libs.eventlog.config import events_topic, public_topic
from libs.eventlog.memory import MemoryElection, MemoryLog, MemorySnapshotStore
from libs.eventlog.ports import Appender, LogError, Record, Tail, TopicPartition, UnknownOutcomeError
from libs.eventlog.state import PartitionState, Schema
from tests.contract.eventlog.support import (
    CloseTask,
    KeyValue,
    OpenTask,
    Put,
    SetTimer,
    State,
    SteeredAppender,
    SteeredTail,
    Taker,
)
from tests.simulation.eventlog.virtual import VirtualLoop

PARTITIONS = 2
ENV = "sim"
ORGANIZATIONS = ("acme", "globex", "wonka", "tyrell", "cyberdyne", "soylent")
_HEALED_WITHIN_S = 120.0


class ProcessLog:
    """The log as one process sees it; each step may be where the process dies."""

    def __init__(self, world: Simulation, process: Process, inner: MemoryLog) -> None:
        self._world = world
        self._process = process
        self._inner = inner
        self.election: MemoryElection | None = None

    async def step(self, name: str) -> None:
        await self._world.disturb(self._process, name)

    async def open_appender(self, transactional_id: str) -> Appender:
        await self.step("open")
        return SteeredAppender(self, await self._inner.open_appender(transactional_id))  # type: ignore[arg-type]

    async def open_tail(self, positions: Mapping[TopicPartition, int]) -> Tail:
        return SteeredTail(self, await self._inner.open_tail(positions))  # type: ignore[arg-type]

    async def end_positions(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self._inner.end_positions(partitions)

    async def partition_count(self, topic: str) -> int:
        return await self._inner.partition_count(topic)

    async def open_election(self, group: str, topic: str) -> MemoryElection:
        self.election = await self._inner.open_election(group, topic)
        return self.election

    async def close(self) -> None: ...


async def close_task(task: Task, ctx: TaskContext) -> Command:
    del ctx
    return Command(task.organization, CloseTask(task.task_id))


@dataclass
class Process:
    """One replica of a service, through its lives."""

    name: str
    make_domain: Callable[[], KeyValue]
    runtime: Runtime[State] | None = None
    log: ProcessLog | None = None
    lives: int = 0


@dataclass
class Simulation:
    """The installation and its misfortunes."""

    loop: VirtualLoop
    seed: int
    trouble: float = 0.01
    """Chance of a fault at each step."""
    random: random.Random = field(init=False)
    log: MemoryLog = field(init=False)
    processes: list[Process] = field(init=False)
    acknowledged: dict[str, list[Committed]] = field(default_factory=dict)
    troubled: bool = True
    kills: int = 0
    faults: int = 0
    lost_markers: int = 0
    forwarded: int = 0
    snapshots: MemorySnapshotStore = field(default_factory=MemorySnapshotStore)
    _background: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        random.seed(self.seed)  # the back-off of the runtimes
        self.random = random.Random(self.seed)
        self.log = MemoryLog(
            partitions=PARTITIONS,
            clock_ms=self.wall_ms,
            marker_delay_s=lambda _: self.random.choice((0.0, 0.0, 0.001, 0.02)) if self.troubled else 0.0,
            loses_markers=self.lose_markers,
        )
        self.log.max_records = 7  # transactions reach readers in pieces
        self.processes = [
            Process("registry-1", KeyValue),
            Process("registry-2", KeyValue),
            Process("pki-1", Taker),
            Process("pki-2", Taker),
        ]

    def lose_markers(self) -> bool:
        lost = self.troubled and self.random.random() < self.trouble / 4
        self.lost_markers += lost
        return lost

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + int(self.loop.time() * 1000)

    # Processes.

    async def start(self, process: Process) -> None:
        process.lives += 1
        log = ProcessLog(self, process, self.log)
        config = RuntimeConfig(
            env=ENV,
            partitions=PARTITIONS,
            address=f"{process.name}/{process.lives}",
            wall_clock_ms=self.wall_ms,
            retry_first_s=0.02,
            retry_most_s=1.0,
            snapshot_every_events=40,
            verify_folds=True,
        )
        process.log = log
        process.runtime = Runtime(
            process.make_domain(), log, config, {"work": close_task}, forward=self.forward, snapshots=self.snapshots
        )
        await process.runtime.start()

    async def forward(self, address: str, command: Command, deadline: Deadline) -> Committed:
        """One hop to whoever has that address now; the way there and the way back lose things."""
        await asyncio.sleep(self.random.uniform(0, 0.05))
        found = [each for each in self.processes if f"{each.name}/{each.lives}" == address]
        runtime = found[0].runtime if found else None
        if runtime is None or (self.troubled and self.random.random() < self.trouble):
            raise UnavailableError("LEADER_UNREACHABLE", "simulated")
        if runtime.leader_elsewhere(command.organization):
            raise UnavailableError("NOT_LEADER", "a forwarded command is never forwarded again")
        done = await runtime.submit(command, deadline)
        self.forwarded += 1
        if self.troubled and self.random.random() < self.trouble:
            raise UnavailableError("LEADER_UNREACHABLE", "the answer was lost")
        return done

    def spawn(self, body: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(body)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def kill(self, process: Process) -> None:
        """The process dies; the group notices later; it comes back under the same name."""
        runtime, log = process.runtime, process.log
        if runtime is None or log is None:
            return
        self.kills += 1
        process.runtime = process.log = None
        await runtime.kill()
        await asyncio.sleep(self.log.session_timeout_s)
        if log.election is not None:
            self.log.expire_member(log.election)
        await asyncio.sleep(self.random.uniform(0, 2))
        await self.start(process)

    async def disturb(self, process: Process, step: str) -> None:
        if not self.troubled:
            return
        chance = self.random.random()
        if chance < self.trouble / 2:
            self.spawn(self.kill(process))
            await asyncio.Event().wait()  # the process goes no further than this
        elif chance < self.trouble and not step.startswith("fetched"):
            self.faults += 1
            if step == "open":
                raise LogError("simulated")
            raise UnknownOutcomeError("simulated")
        elif chance < 0.2:
            await asyncio.sleep(self.random.uniform(0, 0.05))

    # Clients.

    async def client(self, name: str, count: int) -> None:
        for number in range(count):
            organization = self.random.choice(ORGANIZATIONS)
            key = f"{organization}/{self.random.randrange(4)}"
            request = f"{name}-{number}"
            payload: object = self.random.choice(
                (
                    Put(key, request),
                    Put(key, request),
                    Put(key, request),
                    OpenTask(f"task/{request}"),
                    SetTimer(f"timer/{request}", self.random.randrange(2000)),
                )
            )
            copies = self.random.choice((1, 1, 2))
            await asyncio.gather(*(self.insist(organization, payload, request) for _ in range(copies)))
            if self.random.random() < 0.3:
                # A copy that was delayed on its way arrives after the answer.
                self.spawn(self.insist(organization, payload, request))

    async def insist(self, organization: str, payload: object, request: str) -> None:
        """Repeat the same request anywhere until it is answered."""
        command = Command(
            organization,
            payload,
            principal="client",
            request_id=request,
            request_digest=sha256(request.encode()).digest(),
        )
        while True:
            await asyncio.sleep(self.random.uniform(0, 0.2))
            process = self.random.choice(self.processes[:2])
            runtime = process.runtime
            if runtime is None:
                continue
            try:
                done = await asyncio.wait_for(runtime.submit(command, Deadline.after(2)), 5)
            except (UnavailableError, TimeoutError):
                continue
            self.acknowledged.setdefault(request, []).append(done)
            if process.runtime is runtime and not runtime.leader_elsewhere(organization):
                view = runtime.snapshot(organization)
                assert view.token.position >= done.token.position, "an answer outran the view"
            return

    # The end of the story.

    async def heal(self) -> None:
        """No more trouble: everything must come to rest."""
        self.troubled = False
        limit = Deadline.after(_HEALED_WITHIN_S)
        while self._background or not self._at_rest():
            assert not limit.expired, "the installation did not come to rest"
            await asyncio.sleep(0.25)

    def _at_rest(self) -> bool:
        runtimes = [process.runtime for process in self.processes]
        healths = [runtime.health() for runtime in runtimes if runtime is not None]
        if len(healths) < len(runtimes) or not all(health.ready and health.leading for health in healths):
            return False
        assert all(health.live for health in healths), [health.problems for health in healths]
        led = sum(row.role == "leading" for health in healths for row in health.partitions)
        waiting = sum(row.open_tasks for health in healths for row in health.partitions)
        timers = any(self.fold(service, index).timers for service in ("registry", "pki") for index in range(PARTITIONS))
        return led == 2 * PARTITIONS and waiting == 0 and not timers and self._inboxes_empty()

    def _inboxes_empty(self) -> bool:
        for index in range(PARTITIONS):
            topic = public_topic(ENV, "registry")
            published = self.log.records(topic, index)
            mark = self.fold("pki", index).inbox.get((topic, index))
            if published and (mark is None or mark.position != published[-1].position):
                return False
        return True

    def records(self, service: str, partition: int) -> list[Record]:
        return self.log.records(events_topic(ENV, service), partition)

    def fold(self, service: str, partition: int, until: int | None = None) -> PartitionState[State]:
        """What the log says, by a reader that was never disturbed. Checks versions, chain and epochs on its way."""
        domain = KeyValue() if service == "registry" else Taker()
        state = PartitionState(Schema.of(domain, ENV, PARTITIONS), partition)
        for record in self.records(service, partition):
            if until is None or record.position <= until:
                state.apply(record)
        state.publish_versions()
        return state

    def verify(self) -> None:
        """The invariants of the event log."""
        for service in ("registry", "pki"):
            for partition in range(PARTITIONS):
                self._one_writer_between_claims(service, partition)
                self._views_are_folds(service, partition)
        self._acknowledged_is_once()
        self._timers_fired_once()
        self._inbox_took_each_once()

    def _one_writer_between_claims(self, service: str, partition: int) -> None:
        leader = ""
        for record in self.records(service, partition):
            envelope, _, kind = read_envelope(record)
            if kind == pb.LeaderClaimed.DESCRIPTOR.full_name:
                leader = envelope.origin
            assert envelope.origin == leader, f"{envelope.origin} wrote into the leadership of {leader}"

    def _views_are_folds(self, service: str, partition: int) -> None:
        for process in self.processes:
            if process.name.startswith(service):
                assert process.runtime is not None
                view = process.runtime.snapshot_of_partition(partition)
                expected = self.fold(service, partition, until=view.token.position)
                assert view.state == expected.domain
                assert dict(view.versions) == dict(expected.versions)
                assert view.token.position == expected.applied

    def _acknowledged_is_once(self) -> None:
        seen: dict[str, int] = {}
        for partition in range(PARTITIONS):
            for record in self.records("registry", partition):
                envelope, _, _ = read_envelope(record)
                if envelope.request_digest:
                    seen[envelope.request_id] = seen.get(envelope.request_id, 0) + 1
        assert seen == dict.fromkeys(self.acknowledged, 1)
        for request, answers in self.acknowledged.items():
            results = {answer.result.SerializeToString() if answer.result else b"" for answer in answers}
            assert len(results) == 1, f"{request} was answered in different ways"

    def _timers_fired_once(self) -> None:
        for partition in range(PARTITIONS):
            fired = [
                read_envelope(record)[0].resource
                for record in self.records("registry", partition)
                if read_envelope(record)[0].resource.startswith("timer/")
            ]
            assert len(fired) == len(set(fired))

    def _inbox_took_each_once(self) -> None:
        for partition in range(PARTITIONS):
            published = [
                (read_envelope(record)[0].resource, record.value)
                for record in self.log.records(public_topic(ENV, "registry"), partition)
            ]
            taken = [
                (read_envelope(record)[0].resource, record.value)
                for record in self.records("pki", partition)
                if read_envelope(record)[2] == "google.protobuf.StringValue"
            ]
            assert taken == published, "each public record causes its event once, in order"

    async def close(self) -> None:
        await asyncio.gather(*(process.runtime.stop() for process in self.processes if process.runtime is not None))


def partitions_used(organizations: Sequence[str] = ORGANIZATIONS) -> set[int]:
    return {partition_of(organization, PARTITIONS) for organization in organizations}
