"""Follows all public partitions of a service without leading anything: for gateways and authorization caches.

Records reach a synchronous callback in the order of their partition, each one exactly once per follower. What is not
understood is counted and handed to `on_parked`, so that whoever caches by resource can refuse to trust that resource. A
callback that raises stops the follower for good: going on would mean having skipped a fact. Types to be ignored are
understood and of no interest: their records are counted as followed and not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError, Message
from groundswell.eventlog.v1.eventlog_pb2 import Envelope

from libs.errors import UnavailableError
from libs.eventlog.chores import Failures
from libs.eventlog.codec import LOG_ID, header, read_envelope, read_headers, types_by_name
from libs.eventlog.config import public_topic
from libs.eventlog.deadline import Deadline, monotonic
from libs.eventlog.ending import end, is_cancelled
from libs.eventlog.inbox import FETCH_SHARE, LagMeter
from libs.eventlog.model import Foreign, Token
from libs.eventlog.ports import EventLog, LogError, Record, Tail, TopicPartition
from libs.eventlog.waiting import log_reset

logger = logging.getLogger(__name__)

_LATE_MARKER_S = 2.0


@dataclass(frozen=True, slots=True)
class ParkedRecord:
    """A public record that this build does not understand."""

    service: str
    topic: str
    partition: int
    position: int
    public_seq: int
    organization: str
    resource: str
    """Empty when not even the envelope can be read: then nothing of the partition can be told apart."""
    event_type: str


@dataclass(slots=True)
class _Progress:
    """How far one partition has been followed."""

    log_id: str = ""
    public_seq: int = 0
    position: int = -1
    next_position: int = 0
    parked: int = 0
    passed: Record | None = None
    """The last record, when it was one to ignore: how far it leads is read once for all of a fetch."""


class PublicFollower:
    """A read-only consumer of one service's public topic."""

    def __init__(
        self,
        log: EventLog,
        service: str,
        partitions: int,
        on_record: Callable[[Foreign], None],
        *,
        env: str,
        types: Sequence[type[Message]],
        ignored: Sequence[type[Message]] = (),
        on_parked: Callable[[ParkedRecord], None] | None = None,
        lag_every_s: float = 1.0,
    ) -> None:
        self.service = service
        self.topic = public_topic(env, service)
        self.problem = ""
        """Why the follower stopped; empty while it lives."""
        self._log = log
        self._types = types_by_name(types)
        self._ignored = frozenset(types_by_name(ignored))
        self._on_record = on_record
        self._on_parked = on_parked
        self._lag_every_s = lag_every_s
        self._places = [TopicPartition(self.topic, index) for index in range(partitions)]
        self._progress = {place: _Progress() for place in self._places}
        self._meter = LagMeter(self._places)
        self._changed = asyncio.Event()
        self._failures = Failures(0.1, 2.0)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin following in the background."""
        self._task = asyncio.create_task(self._run(), name=f"follow-{self.service}")

    async def stop(self) -> None:
        if self._task is not None:
            await end(self._task)

    @property
    def live(self) -> bool:
        """False when the follower has ended and must not be waited for."""
        return self._task is not None and not self._task.done() and not self.problem

    @property
    def parked_count(self) -> int:
        """Records not understood since the start."""
        return sum(progress.parked for progress in self._progress.values())

    def public_seq(self, partition: int) -> int:
        """Last public number seen."""
        return self._progress[self._places[partition]].public_seq

    def token(self, partition: int) -> Token:
        """Where this follower stands, for passing on: `position` is unknown to it and left at -1."""
        progress = self._progress[self._places[partition]]
        return Token(self.service, partition, progress.log_id, -1, progress.public_seq)

    def lag_s(self, partition: int | None = None, now: float | None = None) -> float:
        """Seconds since the partition (or the worst one) was last known to be followed to its end."""
        return self._meter.lag(None if partition is None else self._places[partition], now)

    async def caught_up(self, deadline: Deadline) -> None:
        """Wait until every partition has been followed to an end measured after now."""
        asked = monotonic()
        while self.lag_s() > monotonic() - asked:
            await self._wait_change(deadline)

    async def wait_for(self, token: Token, deadline: Deadline) -> None:
        """Wait until the token's public records have been given to the callback."""
        if token.service != self.service or token.public_seq <= 0:
            return
        if not 0 <= token.partition < len(self._places):
            raise log_reset(token)
        place = self._places[token.partition]
        asked = monotonic()
        while True:
            progress = self._progress[place]
            if progress.log_id and progress.log_id != token.log_id:
                raise log_reset(token)
            if progress.public_seq >= token.public_seq:
                return
            if self._meter.lag(place) < monotonic() - asked - _LATE_MARKER_S:
                raise log_reset(token)
            await self._wait_change(deadline)

    async def _wait_change(self, deadline: Deadline) -> None:
        if not self.live:
            raise UnavailableError("NOT_SERVING", f"the view of {self.service} has stopped: {self.problem}")
        try:
            async with asyncio.timeout(deadline.remaining()):
                await self._changed.wait()
        except TimeoutError:
            raise UnavailableError(
                "NOT_CAUGHT_UP", f"public records of {self.service} have not been followed far enough yet"
            ) from None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except LogError as error:
                logger.warning("following %s failed: %s", self.topic, error)
            except asyncio.CancelledError:
                if not is_cancelled():
                    self.problem = "cancelled by nobody here"
                    logger.exception("following %s stopped", self.topic)
                    self._notify()
                raise
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                logger.exception("following %s stopped", self.topic)
                self._notify()
                return
            await self._failures.pause()

    async def _follow(self) -> None:
        tail = await self._log.open_tail({place: self._progress[place].next_position for place in self._places})
        measuring = asyncio.create_task(self._measure(tail))
        try:
            while True:
                for record in await tail.fetch(self._lag_every_s * FETCH_SHARE):
                    self._give(record)
                self._failures.end()
                self._reached(tail)
                if measuring.done():
                    measuring.result()
        finally:
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)
            await tail.close()

    def _reached(self, tail: Tail) -> None:
        for place, progress in self._progress.items():
            if progress.passed is not None:
                self._pass(progress, progress.passed)
            progress.next_position = tail.position(place)
            self._meter.reached(place, progress.next_position)
        self._notify()

    async def _measure(self, tail: Tail) -> None:
        while True:
            at = monotonic()
            self._meter.measured(at, await self._log.end_positions(self._places))
            # Between two fetches nothing is under way: what the tail stands at has been given out.
            for place, progress in self._progress.items():
                self._meter.reached(place, min(progress.next_position, tail.position(place)))
            self._notify()
            await asyncio.sleep(self._lag_every_s)

    def _give(self, record: Record) -> None:
        progress = self._progress[TopicPartition(record.topic, record.partition)]
        if record.position <= progress.position:
            return
        try:
            envelope_bytes, event_type = read_headers(record)
            if event_type in self._ignored:
                progress.position, progress.passed = record.position, record
                return
            envelope = Envelope.FromString(envelope_bytes)
        except DecodeError:
            self._park(
                progress, ParkedRecord(self.service, record.topic, record.partition, record.position, 0, "", "", "")
            )
        else:
            kind = self._types.get(event_type)
            payload: Message | None = None
            if kind is not None:
                try:
                    payload = kind.FromString(record.value)
                except DecodeError:
                    payload = None
            head = (self.service, record.topic, record.partition, record.position, envelope.public_seq)
            if payload is None:
                self._park(progress, ParkedRecord(*head, envelope.organization, envelope.resource, event_type))
            else:
                self._on_record(
                    Foreign(*head, envelope.organization, envelope.resource, payload, envelope.occurred_at_ms)
                )
            progress.public_seq = max(progress.public_seq, envelope.public_seq)
        progress.position, progress.passed = record.position, None
        progress.log_id = _log_id(record) or progress.log_id

    @staticmethod
    def _pass(progress: _Progress, record: Record) -> None:
        progress.passed = None
        progress.log_id = _log_id(record) or progress.log_id
        with contextlib.suppress(DecodeError):
            progress.public_seq = max(progress.public_seq, read_envelope(record)[0].public_seq)

    def _park(self, progress: _Progress, parked: ParkedRecord) -> None:
        progress.parked += 1
        if self._on_parked is not None:
            self._on_parked(parked)


def _log_id(record: Record) -> str:
    return header(record, LOG_ID).decode("utf-8", "replace")
