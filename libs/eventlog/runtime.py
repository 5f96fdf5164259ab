"""The runtime of a service: one tail for all partitions, one election, one leadership per assigned partition.

Background tasks are supervised: the unexpected end of any of them makes `health().live` false, because a process that
has silently stopped electing or tailing looks healthy and is not.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from libs.errors import UnavailableError
from libs.eventlog.chores import Failures, TaskRunner, TimerRunner
from libs.eventlog.config import (
    Health,
    PartitionHealth,
    RuntimeConfig,
    TaskHandler,
    events_topic,
    partition_of,
    public_topic,
)
from libs.eventlog.deadline import Deadline, monotonic
from libs.eventlog.ending import end, is_cancelled
from libs.eventlog.freshness import Freshness
from libs.eventlog.inbox import Inbox
from libs.eventlog.leader import RESIGNATIONS, ClaimFailedError, Leadership, NotLeaderError, outcome_unknown
from libs.eventlog.model import Command, Committed, Domain, Snapshot, Token
from libs.eventlog.ports import EventLog, LogError, SnapshotStore, TopicPartition
from libs.eventlog.replica import Replica, not_caught_up
from libs.eventlog.snapshots import Snapshots
from libs.eventlog.state import Schema
from libs.eventlog.tailing import OwnTail
from libs.eventlog.waiting import TokenWaits
from libs.eventlog.work import BeatWork, CommandWork, Outcome, Work

logger = logging.getLogger(__name__)

S = TypeVar("S")

_SWEEP_S = 0.02
"""Precision of callers' deadlines."""


class ConfigurationError(Exception):
    """The installation does not fit this process; starting would split histories."""


class Forwarder(Protocol):
    """Passes a command that is no request of its own (a task's, say) on to the leader, at most one hop.

    Raises `NotLeaderError` for commands that it does not pass on: calls are forwarded whole, by `libs.rpc`.
    """

    async def __call__(self, address: str, command: Command, deadline: Deadline, /) -> Committed: ...


class Seat(Generic[S]):
    """One partition while the group assigns it to this process."""

    __slots__ = ("assigned", "inbox", "leadership", "problem", "task")

    def __init__(self) -> None:
        self.assigned = True
        self.leadership: Leadership[S] | None = None
        self.inbox: Inbox[S] | None = None
        self.problem = ""
        self.task: asyncio.Task[None] | None = None


class Runtime(Generic[S]):
    """See the README of this package."""

    leadership_type: type[Leadership[S]] = Leadership
    inbox_type: type[Inbox[S]] = Inbox

    def __init__(
        self,
        domain: Domain[S],
        log: EventLog,
        config: RuntimeConfig,
        task_handlers: Mapping[str, TaskHandler] | None = None,
        *,
        forward: Forwarder | None = None,
        snapshots: SnapshotStore | None = None,
    ) -> None:
        self.domain = domain
        self.config = config
        self.service = domain.service
        self._log = log
        self._handlers: Mapping[str, TaskHandler] = task_handlers or {}
        self._forward = forward
        self._topic = events_topic(config.env, domain.service)
        self._schema: Schema[S] = Schema.of(domain, config.env, config.partitions, verify=config.verify_folds)
        self._replicas = [Replica(self._schema, domain.service, index) for index in range(config.partitions)]
        places = [TopicPartition(self._topic, index) for index in range(config.partitions)]
        self._freshness = Freshness(log, places, config.lag_every_s)
        self._snapshot_store = snapshots
        self._snapshots = None if snapshots is None else Snapshots(self._schema, domain.service, config, snapshots)
        self._tail = OwnTail(log, self._topic, self._replicas, self._freshness, self._snapshots)
        self._seats: dict[int, Seat[S]] = {}
        self._waits = TokenWaits(log, config, self._schema, self._replicas, self._source_lag, self._hurry)
        self._supervised: dict[str, asyncio.Task[None]] = {}
        self._dead: list[str] = []
        self._stopping = False
        self._electing = False
        self._killed = False
        self._waiting: list[tuple[float, asyncio.Future[tuple[Outcome, Token]]]] = []
        self._sweeping = False

    # Life.

    async def start(self) -> None:
        """Check the installation, then tail and stand for election in the background. Does not wait for either."""
        await self._check_installation()
        self._supervise("tail", self._tail.run)
        self._supervise("election", self._keep_electing)
        self._supervise("freshness", self._freshness.measure)

    async def step_down(self) -> None:
        """Stop intake, finish the batches on their way, leave the group: others lead at once. Reads go on."""
        self._stopping = True
        for seat in self._seats.values():
            seat.assigned = False
            if seat.leadership is not None:
                seat.leadership.stop()
        seats = [seat.task for seat in self._seats.values() if seat.task is not None]
        if seats:
            _, late = await asyncio.wait(seats, timeout=self.config.read_back_s)
            await end(*late)
        election = self._supervised.get("election")
        if election is not None:
            await end(election)

    async def stop(self) -> None:
        """Step down, and stop reading."""
        await self.step_down()
        await end(*self._supervised.values())
        if self._snapshot_store is not None:
            await self._snapshot_store.close()

    async def kill(self) -> None:
        """End as a crash would, finishing nothing and telling nobody; for simulations."""
        self._stopping = self._killed = True
        seats = [seat.task for seat in self._seats.values() if seat.task is not None]
        await end(*self._supervised.values(), *seats)

    async def wait_ready(self, deadline: Deadline) -> None:
        """Wait until every partition can be read."""
        for replica in self._replicas:
            while not replica.caught_up:
                await replica.wait_change(deadline)

    async def wait_leading(self, deadline: Deadline, partitions: Sequence[int] | None = None) -> None:
        """Wait until this process leads the partitions (default: all of them)."""
        wanted = range(self.config.partitions) if partitions is None else partitions
        for partition in wanted:
            while self._leader_of(partition) is None:
                if deadline.expired:
                    raise not_caught_up(self.service, partition)
                await asyncio.sleep(0.005)

    async def _check_installation(self) -> None:
        sources = [public_topic(self.config.env, service) for service in self.domain.sources]
        for topic in (self._topic, public_topic(self.config.env, self.service), *sources):
            count = await self._log.partition_count(topic)
            if count != self.config.partitions:
                raise ConfigurationError(
                    f"topic {topic} has {count} partitions, this process is set to {self.config.partitions}: "
                    "run the topics deploy step, or correct GROUNDSWELL_PARTITIONS"
                )

    def _supervise(self, name: str, body: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        async def run() -> None:
            await body()

        def ended(task: asyncio.Task[None]) -> None:
            if self._supervised.get(name) is task:
                del self._supervised[name]
            if task.cancelled() and task.cancelling():
                return  # as somebody asked for; a cancellation of a library's own making is a death like any other
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                logger.error("background task %s of %s died", name, self.service, exc_info=error)
                self._dead.append(f"{name} died: {type(error).__name__}: {error}")

        task = asyncio.create_task(run(), name=f"{self.service}-{name}")
        self._supervised[name] = task
        task.add_done_callback(ended)
        return task

    # Leading.

    async def _keep_electing(self) -> None:
        failures = Failures(0.1, 2.0)
        while True:
            try:
                await self._elect(failures)
            except LogError as error:
                logger.warning("election of %s failed: %s", self.service, error)
            self._assign(frozenset())
            await failures.pause()

    async def _elect(self, failures: Failures) -> None:
        election = await self._log.open_election(f"{self.config.env}.{self.service}.leaders", self._topic)
        try:
            while True:
                self._assign(await election.changed())
                failures.end()
        finally:
            if not self._killed:
                await election.close()

    def _assign(self, partitions: frozenset[int]) -> None:
        self._electing = True
        for partition, seat in self._seats.items():
            if partition not in partitions and seat.assigned:
                seat.assigned = False
                if seat.leadership is not None:
                    seat.leadership.stop()
        for partition in partitions:
            seat = self._seats.get(partition) or Seat()
            if partition not in self._seats:
                self._seats[partition] = seat
                seat.task = self._supervise(f"leader-{partition}", partial(self._lead, partition, seat))
            else:
                seat.assigned = True

    def _wanted(self, seat: Seat[S]) -> bool:
        return seat.assigned and not self._stopping

    async def _lead(self, partition: int, seat: Seat[S]) -> None:
        """Claim and serve for as long as the partition is assigned."""
        failures = Failures(0.02, self.config.claim_retry_most_s)
        try:
            while self._wanted(seat):
                if self._replicas[partition].halted:
                    # Whoever leads next meets the same record; an operator has to look.
                    await asyncio.sleep(1.0)
                    continue
                leadership = self.leadership_type(self._replicas[partition], self._log, self.config)
                seat.leadership = leadership
                try:
                    await self._reign(seat, leadership)
                except RESIGNATIONS as error:
                    seat.problem = str(error) if isinstance(error, ClaimFailedError) else ""
                    logger.warning("resigned %s/%d: %s: %s", self.service, partition, type(error).__name__, error)
                except (Exception, asyncio.CancelledError) as error:
                    if is_cancelled():
                        raise
                    # A partition without a leader is worse than whatever this is, a cancellation of a library's own
                    # making included: the next claim fences what is left.
                    seat.problem = f"{type(error).__name__}: {error}"
                    logger.exception("leading %s/%d failed", self.service, partition)
                if leadership.has_served:
                    failures.end()
                if self._wanted(seat):
                    await failures.pause()
        finally:
            self._seats.pop(partition, None)

    async def _reign(self, seat: Seat[S], leadership: Leadership[S]) -> None:
        tasks = TaskRunner(leadership, self._handlers, self.config)
        timers = TimerRunner(leadership, self.config)
        inbox = self.inbox_type(leadership, self._log, self.config)
        helpers: list[asyncio.Task[None]] = []

        def serving() -> None:
            seat.inbox = inbox
            seat.problem = ""
            tasks.start()
            bodies = {"timers": timers.run, "inbox": inbox.run}
            if self._snapshots is not None:
                bodies["snapshots"] = partial(self._snapshots.keep, leadership.replica)
            for name, body in bodies.items():
                helpers.append(self._supervise(f"{name}-{leadership.partition}", _until_unseated(leadership, body)))

        leadership.on_serving = serving
        try:
            await leadership.run()
        finally:
            seat.inbox = None
            seat.leadership = None
            await end(*helpers)
            await tasks.close()

    def _leader_of(self, partition: int) -> Leadership[S] | None:
        seat = self._seats.get(partition)
        if seat is None or seat.leadership is None or not seat.leadership.serving:
            return None
        return seat.leadership

    # Commands.

    async def submit(self, command: Command, deadline: Deadline) -> Committed:
        """Decide, commit, read back, answer. Raises `GroundswellError`s only."""
        partition = partition_of(command.organization, self.config.partitions)
        leadership = self._leader_of(partition)
        if leadership is None:
            address = self._foreign_leader(partition)
            if address and self._forward is not None:
                return await self._forward(address, command, deadline)
            raise self._not_leader(partition, address)
        work: CommandWork[S] = CommandWork(command)
        self._enqueue(leadership, work, deadline)
        outcome, token = await work.done
        return Committed(outcome.result, token, outcome.replayed)

    async def barrier(self, organization: str, deadline: Deadline) -> Token:
        """Strong read: when it returns, the committed view of this leader holds all that was acknowledged before."""
        partition = partition_of(organization, self.config.partitions)
        leadership = self._leader_of(partition)
        if leadership is None:
            raise self._not_leader(partition, self._foreign_leader(partition))
        work: BeatWork[S] = BeatWork()
        self._enqueue(leadership, work, deadline)
        return (await work.done)[1]

    def _enqueue(self, leadership: Leadership[S], work: Work[S], deadline: Deadline) -> None:
        if deadline.expired:
            raise UnavailableError("DEADLINE_EXCEEDED", "the deadline had passed before the request was taken up")
        leadership.enqueue(work)
        self._waiting.append((deadline.at, work.done))
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Keep all callers' deadlines with one timer: one for each would cost as much as deciding."""
        now = monotonic()
        waiting = [item for item in self._waiting if not item[1].done()]
        for at, done in waiting:
            if at <= now:
                done.set_exception(outcome_unknown())
        self._waiting = waiting
        self._sweeping = bool(waiting)
        if waiting:
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def leader_elsewhere(self, organization: str) -> str:
        """Where commands of an organization are decided, when that is another replica; empty when here, or unknown."""
        return self._foreign_leader(partition_of(organization, self.config.partitions))

    def require_leader(self, organization: str) -> None:
        """For reads of what only a leader remembers. Raises as `submit` does."""
        partition = partition_of(organization, self.config.partitions)
        if self._leader_of(partition) is None:
            raise self._not_leader(partition, self._foreign_leader(partition))

    def _foreign_leader(self, partition: int) -> str:
        """Address of the leader by the log, empty when that is unknown or was this process or its predecessor."""
        claim = self._replicas[partition].state.claim
        replica = self._replicas[partition]
        if claim is None or partition in self._seats or replica.halted or not replica.caught_up:
            return ""
        return "" if claim.node == self.config.node or claim.address == self.config.address else claim.address

    def _not_leader(self, partition: int, address: str) -> UnavailableError:
        if self._replicas[partition].halted:
            return UnavailableError(
                "NOT_SERVING", f"partition {partition} of {self.service} is halted", retry_after_s=5
            )
        if not address:
            return UnavailableError("NOT_READY", f"partition {partition} of {self.service} is not claimed yet")
        return NotLeaderError(f"partition {partition} of {self.service} is led by another replica", address)

    # Reads.

    def snapshot(self, organization: str) -> Snapshot:
        """Committed view of the partition of an organization."""
        return self.snapshot_of_partition(partition_of(organization, self.config.partitions))

    def snapshot_of_partition(self, partition: int) -> Snapshot:
        return self._replicas[partition].snapshot()

    async def wait_for(self, tokens: Sequence[Token], deadline: Deadline) -> None:
        """Wait until reads here reflect the tokens: own ones in the view, foreign ones in the Inbox."""
        await self._waits.wait_for(tokens, deadline)

    def _source_lag(self, partition: int, source: TopicPartition) -> float:
        seat = self._seats.get(partition)
        return math.inf if seat is None or seat.inbox is None else seat.inbox.meter.lag(source)

    def _hurry(self, partition: int) -> None:
        seat = self._seats.get(partition)
        if seat is not None and seat.inbox is not None:
            seat.inbox.hurry()

    async def catch_up(self, organization: str, deadline: Deadline) -> None:
        """Wait until reads here reflect all that was committed, by whatever leader, when this was asked."""
        partition = partition_of(organization, self.config.partitions)
        if not await self._freshness.catch_up(TopicPartition(self._topic, partition), deadline):
            raise not_caught_up(self.service, partition)

    def lag(self, organization: str) -> float:
        """Seconds by which reads here may be behind; 0 where this process leads."""
        partition = partition_of(organization, self.config.partitions)
        if self._leader_of(partition) is not None:
            return 0.0
        return self._freshness.lag(TopicPartition(self._topic, partition))

    async def changed(self, organization: str, deadline: Deadline) -> None:
        """Wait until the committed view of the organization's partition moves. Look first, then wait, in a loop."""
        await self._replicas[partition_of(organization, self.config.partitions)].wait_change(deadline)

    def inbox_lag(self, partition: int) -> float:
        """Seconds since the Inbox last held all that its sources had committed; infinite when not leading."""
        if not self.domain.sources:
            return 0.0
        seat = self._seats.get(partition)
        return math.inf if seat is None or seat.inbox is None else seat.inbox.meter.lag()

    async def write_snapshot(self, partition: int) -> int:
        """Store a snapshot now, whoever leads; its position. For tools and tests: leaders do it by themselves."""
        if self._snapshots is None:
            raise ConfigurationError("this process has no store of snapshots")
        return await self._snapshots.write(self._replicas[partition])

    # Health.

    def health(self) -> Health:
        rows = []
        problems = list(self._dead)
        for replica in self._replicas:
            seat = self._seats.get(replica.partition)
            detail = replica.halted
            if seat is not None and seat.inbox is not None and seat.inbox.problem:
                detail = detail or f"inbox: {seat.inbox.problem}"
            if seat is not None:
                detail = detail or seat.problem
            if detail:
                problems.append(f"partition {replica.partition}: {detail}")
            rows.append(
                PartitionHealth(
                    replica.partition,
                    self._role(replica),
                    replica.caught_up,
                    replica.state.applied,
                    len(replica.state.tasks),
                    len(replica.state.parked),
                    detail,
                )
            )
        halted = any(replica.halted for replica in self._replicas)
        caught_up = all(replica.caught_up for replica in self._replicas)
        leading = self._electing and all(self._leader_of(partition) is not None for partition in self._seats)
        alive = not self._dead and (self._stopping or {"tail", "election"} <= self._supervised.keys())
        return Health(alive, caught_up and not halted and not self._stopping, leading, tuple(rows), tuple(problems))

    def _role(self, replica: Replica[S]) -> str:
        if replica.halted:
            return "halted"
        if self._stopping:
            return "stopped"
        if self._leader_of(replica.partition) is not None:
            return "leading"
        return "claiming" if replica.partition in self._seats else "following"


def _until_unseated(leadership: Leadership[S], body: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """A helper that fails because its leadership is ending has not died."""

    async def run() -> None:
        try:
            await body()
        except UnavailableError:
            if leadership.serving:
                raise

    return run
