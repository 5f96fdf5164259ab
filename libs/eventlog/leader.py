"""One leadership of one partition: from the claim to the resignation.

A `Leadership` is made for one assignment and never reused. It claims (fence, append `LeaderClaimed`, wait until the own
tail has applied it), then serves batch after batch: decide, stage, commit, wait for the read-back, answer. Whatever is
raised while a batch is on its way means that the outcome is unknown: callers are told so, and the leadership ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import GroundswellError, UnavailableError
from libs.eventlog import failpoints
from libs.eventlog.codec import ENVELOPE, EVENT_TYPE, new_id
from libs.eventlog.config import RuntimeConfig, events_topic, public_topic
from libs.eventlog.model import Token
from libs.eventlog.ports import Appender, EventLog, FencedError, LogError, NewRecord
from libs.eventlog.replica import HaltedError, Replica
from libs.eventlog.work import NOTHING, BeatWork, CommandWork, Outcome, Work
from libs.eventlog.working import InternalError, Working, Writer

logger = logging.getLogger(__name__)

S = TypeVar("S")


_SLICE_S = 0.001
_MAX_DEPTH = 16


class ClaimFailedError(Exception):
    """This process must not serve the partition now."""


def outcome_unknown() -> UnavailableError:
    """The answer that obliges the caller to repeat the request, not to make a new one."""
    return UnavailableError(
        "OUTCOME_UNKNOWN",
        "it is not known whether the request was carried out: repeat it with the same request_id",
    )


class NotLeaderError(UnavailableError):
    """Nothing was done here. ``leader`` is where it can be done, as far as the log tells; empty when it does not."""

    def __init__(self, message: str, leader: str = "") -> None:
        super().__init__("NOT_LEADER", message, leader=leader)
        self.leader = leader


def not_leading() -> NotLeaderError:
    """Nothing was done."""
    return NotLeaderError("this replica stopped leading the partition")


class Leadership(Generic[S]):
    """The writer of one partition while the broker lets it."""

    def __init__(self, replica: Replica[S], log: EventLog, config: RuntimeConfig) -> None:
        self.replica = replica
        self.partition = replica.partition
        self.config = config
        self.serving = False
        self.has_served = False
        self.on_serving: Callable[[], None] | None = None
        self._log = log
        self._queue: deque[Work[S]] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._appender: Appender | None = None
        self._writer: Writer | None = None

    # Intake.

    def enqueue(self, work: Work[S]) -> None:
        if not self.serving or self._stopping:
            raise not_leading()
        if len(self._queue) >= self.config.max_queue:
            raise UnavailableError("OVERLOADED", "too many requests are waiting for this partition", retry_after_s=1.0)
        self._queue.append(work)
        self._wake.set()

    def stop(self) -> None:
        """Take nothing more; the batch on its way is finished and answered."""
        self._stopping = True
        self._wake.set()

    # Life.

    async def run(self) -> None:
        """Claim and serve until stopped (returns) or unseated (raises one of `RESIGNATIONS`)."""
        try:
            await self._claim()
            # Whoever holds its own claim has read all before it, though the tail may still stand before a marker.
            self.replica.mark_caught_up()
            self.serving = self.has_served = True
            if self.on_serving is not None:
                self.on_serving()
            logger.info("leading %s/%d", self.replica.service, self.partition)
            await self._serve()
        finally:
            self.serving = False
            while self._queue:
                work = self._queue.popleft()
                if not work.done.done():
                    work.done.set_exception(not_leading())
                    work.done.exception()
            if self._appender is not None:
                await self._appender.close()

    def transactional_id(self) -> str:
        """Shared by all replicas of the partition and by nobody else: it is what fences."""
        return f"{self.config.env}.{self.replica.service}.{self.partition}"

    async def _claim(self) -> None:
        appender = await self._log.open_appender(self.transactional_id())
        self._appender = appender
        topic = events_topic(self.config.env, self.replica.service)
        event_id = new_id()
        claimed_ms = self.config.wall_clock_ms()
        envelope = pb.Envelope(
            event_id=event_id,
            occurred_at_ms=max(claimed_ms, self.replica.state.last_ms),
            origin=self.config.address,
            epoch=appender.epoch,
        )
        claim = pb.LeaderClaimed(
            node=self.config.node,
            address=self.config.address,
            producer_id=appender.producer_id,
            epoch=appender.epoch,
            build=self.config.build,
            partition_count=self.config.partitions,
        )
        read_back = self.replica.watch(event_id)
        await appender.stage(
            [
                NewRecord(
                    topic,
                    self.partition,
                    b"",
                    claim.SerializeToString(),
                    [
                        (ENVELOPE, envelope.SerializeToString()),
                        (EVENT_TYPE, pb.LeaderClaimed.DESCRIPTOR.full_name.encode()),
                    ],
                )
            ]
        )
        await appender.commit()
        committed_ms = self.config.wall_clock_ms()
        await self.wait_claimed(read_back)
        self._writer = Writer(
            self.config.address,
            appender.epoch,
            self.partition,
            topic,
            public_topic(self.config.env, self.replica.service),
            self.config.max_record_bytes,
        )
        self._check_clock(claimed_ms, committed_ms)

    async def wait_claimed(self, read_back: asyncio.Future[int]) -> None:
        """Holding the claim is holding all before it: every predecessor was fenced before it was written.

        However long there is something to read. A tail that stands still at the end of the log, without the claim, is
        held back by a transaction whose marker was lost (docs/decisions/0010); that of the next claim ends both.
        """
        while True:
            before = self.replica.next_position
            await asyncio.wait({read_back}, timeout=self.config.claim_read_back_s)
            if read_back.done():
                read_back.result()
                return
            if self.replica.caught_up and self.replica.next_position == before:
                raise ClaimFailedError(
                    f"the claim was committed {self.config.claim_read_back_s:g} s ago and cannot be read: "
                    "a marker in the log is late or lost; claiming again"
                )

    def _check_clock(self, claimed_ms: int, committed_ms: int) -> None:
        claim = self.replica.state.claim
        if claim is None or self._appender is None or claim.node != self.config.node:
            raise ClaimFailedError("another leader claimed the partition meanwhile")
        tolerance = int(self.config.max_clock_difference_s * 1000)
        if not claimed_ms - tolerance <= claim.timestamp_ms <= committed_ms + tolerance:
            raise ClaimFailedError(
                f"the clock of this machine differs from the log's by about {claim.timestamp_ms - claimed_ms} ms: "
                "set the clock before it may lead"
            )

    async def _serve(self) -> None:
        """Decide into an open batch while the one before it is being written and read back; never two at a time."""
        writing: asyncio.Task[None] | None = None
        batch = self._open(None)
        try:
            while True:
                if not self._stopping:
                    self._decide(batch)
                if writing is not None:
                    if not writing.done():
                        await self._breathe(batch)
                        continue
                    writing.result()
                    writing = None
                    if not batch.waiting:
                        batch = self._open(None)
                if self._queue and batch.has_room(self.config) and not self._stopping:
                    await asyncio.sleep(0)
                elif batch.waiting:
                    batch.working.finish()
                    writing = asyncio.create_task(self._settle(batch))
                    writing.add_done_callback(self._wake_up)
                    # Every so often the working state is taken from the committed one again, to let the old one go.
                    batch = self._open(batch if batch.working.depth < _MAX_DEPTH else None, blocked=writing)
                elif self._stopping:
                    return
                elif not await self._woken():
                    batch.working.beat()
                    batch.waiting.append((BeatWork(), NOTHING))
        finally:
            fail(batch.waiting)
            if writing is not None and not writing.done():
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    async def _breathe(self, batch: Batch[S]) -> None:
        """While a batch is on its way: let the log's answers in, and sleep when there is nothing to decide."""
        if self._queue and not self._stopping and batch.open and batch.has_room(self.config):
            await asyncio.sleep(0)
        else:
            self._wake.clear()
            await self._wake.wait()

    def _wake_up(self, _: object) -> None:
        self._wake.set()

    async def _woken(self) -> bool:
        """Wait for work; false when the partition has been idle for so long that it must show life."""
        if self._queue:
            return True
        self._wake.clear()
        try:
            async with asyncio.timeout(self.config.beat_every_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    # One batch.

    def _open(self, previous: Batch[S] | None, *, blocked: asyncio.Task[None] | None = None) -> Batch[S]:
        assert self._writer is not None  # noqa: S101 - set by the claim
        before = None if previous is None else previous.working
        working = Working(self.replica.schema, self.replica.state, self._writer, self.config.wall_clock_ms(), before)
        batch = Batch(working, asyncio.get_running_loop().time())
        if previous is None and blocked is not None:
            # Its state would lack what is being written. It opens for good when that has been read back.
            batch.open = False
        return batch

    def _decide(self, batch: Batch[S]) -> None:
        """Take what is queued, for a short while: answers of the log must not wait for long."""
        if not batch.open or not self._queue:
            return
        self.replica.check()
        schema = self.replica.schema
        working = batch.working
        working.tick(self.config.wall_clock_ms())
        clock = asyncio.get_running_loop().time
        until = clock() + _SLICE_S
        while self._queue and working.events < self.config.max_batch_events:
            work = self._queue.popleft()
            if work.done.done():
                continue
            outcome: Outcome | GroundswellError
            try:
                outcome = work.enter(schema, working)
            except GroundswellError as error:
                outcome = error
            except Exception as error:
                logger.exception("unexpected failure while deciding")
                outcome = InternalError("INTERNAL", f"the service failed on this command ({type(error).__name__})")
            # Even a refusal may rest on what this batch is about to write, so it waits for the batch too.
            batch.waiting.append((work, outcome))
            if clock() >= until:
                break

    async def _settle(self, batch: Batch[S]) -> None:
        """Write the batch and answer everybody in it."""
        working = batch.working
        state = self.replica.state
        position = state.applied
        if working.records:
            try:
                position = await self._write(batch)
            except BaseException:
                fail(batch.waiting)
                raise
            failpoints.hit(failpoints.AFTER_READBACK)
        # One token for all: what a batch wrote becomes visible together anyway.
        answer(
            batch.waiting,
            Token(self.replica.service, self.partition, state.log_id, position, working.public_seq),
        )

    async def _write(self, batch: Batch[S]) -> int:
        """Commit the batch and wait until the own tail has applied its last event; return that one's position."""
        working = batch.working
        appender = self._appender
        assert appender is not None  # noqa: S101 - set by the claim
        read_back = self.replica.watch(working.last_event_id)
        failpoints.hit(failpoints.BEFORE_SEND)
        try:
            self.replica.state.foresee(working.foreseen)
            await appender.stage(working.records)
            failpoints.hit(failpoints.AFTER_SEND)
            await self._commit(appender)
            failpoints.hit(failpoints.AFTER_COMMIT_BEFORE_ANSWER)
            if batch.has_request():
                failpoints.hit(failpoints.AFTER_COMMIT_BEFORE_ANSWER_REQUEST, self.replica.service)
            return await self.wait_read_back(read_back, working)
        finally:
            self.replica.unwatch(working.last_event_id)

    @staticmethod
    async def _commit(appender: Appender) -> None:
        if failpoints.DURING_COMMIT in failpoints.armed:
            commit = asyncio.ensure_future(appender.commit())
            await asyncio.sleep(0.001)
            failpoints.hit(failpoints.DURING_COMMIT)
            await commit
            return
        await appender.commit()

    async def wait_read_back(self, read_back: asyncio.Future[int], working: Working[S]) -> int:
        """One apply path: what is answered is what the tail has applied."""
        del working
        async with asyncio.timeout(self.config.read_back_s):
            return await read_back


class Batch(Generic[S]):
    """Commands decided together, and what each is to be answered."""

    __slots__ = ("open", "opened_at", "waiting", "working")

    def __init__(self, working: Working[S], opened_at: float) -> None:
        self.working = working
        self.opened_at = opened_at
        self.open = True
        self.waiting: list[tuple[Work[S], Outcome | GroundswellError]] = []

    def has_request(self) -> bool:
        """Whether somebody in it may repeat what was asked under the same id."""
        return any(isinstance(work, CommandWork) and work.command.request_id for work, _ in self.waiting)

    def has_room(self, config: RuntimeConfig) -> bool:
        """Neither full nor open for so long that the first in it should not wait for the last."""
        return self.working.events < config.max_batch_events and (
            not self.waiting or asyncio.get_running_loop().time() < self.opened_at + config.max_batch_s
        )


def answer(waiting: Iterable[tuple[Work[S], Outcome | GroundswellError]], token: Token) -> None:
    """The batch has been read back."""
    for work, outcome in waiting:
        if work.done.done():
            continue
        if not isinstance(outcome, tuple):
            work.done.set_exception(outcome)
            work.done.exception()  # whoever gave up waiting is not to be told of it by the collector
        else:
            work.done.set_result((outcome, token))


def fail(waiting: Iterable[tuple[Work[S], Outcome | GroundswellError]]) -> None:
    """It is not known what became of the batch."""
    for work, _ in waiting:
        if not work.done.done():
            work.done.set_exception(outcome_unknown())
            work.done.exception()


RESIGNATIONS = (FencedError, LogError, ClaimFailedError, HaltedError, TimeoutError)
"""Ordinary ends of a leadership."""
