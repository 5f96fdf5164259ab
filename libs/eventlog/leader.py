"""One leadership of one partition: from the claim to the resignation.

A `Leadership` is made for one assignment and never reused. It claims (fence, append `LeaderClaimed`, wait until the own
tail has applied it), then serves batch after batch: decide, stage, commit, wait for the read-back, answer. Whatever is
raised while a batch is on its way means that the outcome is unknown: callers are told so, and the leadership ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import GroundswellError, UnavailableError
from libs.eventlog import failpoints
from libs.eventlog.codec import ENVELOPE, EVENT_TYPE, new_id
from libs.eventlog.config import RuntimeConfig, events_topic, public_topic
from libs.eventlog.ports import Appender, EventLog, FencedError, LogError, NewRecord
from libs.eventlog.replica import HaltedError, Replica
from libs.eventlog.work import Outcome, Work
from libs.eventlog.working import InternalError, Working, Writer

logger = logging.getLogger(__name__)

S = TypeVar("S")


class ClaimFailedError(Exception):
    """This process must not serve the partition now."""


def outcome_unknown() -> UnavailableError:
    """The answer that obliges the caller to repeat the request, not to make a new one."""
    return UnavailableError(
        "OUTCOME_UNKNOWN",
        "it is not known whether the request was carried out: repeat it with the same request_id",
    )


def not_leading() -> UnavailableError:
    """Nothing was done."""
    return UnavailableError("NOT_LEADER", "this replica stopped leading the partition")


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
        """Holding the claim is holding all before it: every predecessor was fenced before it was written."""
        await read_back

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
        beat_every = self.config.beat_every_s
        while not self._stopping:
            if not self._queue:
                self._wake.clear()
                try:
                    async with asyncio.timeout(beat_every):
                        await self._wake.wait()
                except TimeoutError:
                    await self._batch(beat=True)
                continue
            await self._batch()

    # One batch.

    async def _batch(self, *, beat: bool = False) -> None:
        self.replica.check()
        assert self._writer is not None  # noqa: S101 - set by the claim
        working = Working(self.replica.schema, self.replica.state, self._writer, self.config.wall_clock_ms())
        if beat:
            working.beat()
        waiting: list[tuple[Work[S], Outcome | GroundswellError]] = []
        self._decide(working, waiting)
        working.finish()
        if not working.records:
            self._answer(waiting, self.replica.state.applied)
            return
        try:
            position = await self._write(working)
        except BaseException:
            for work, _ in waiting:
                if not work.done.done():
                    work.done.set_exception(outcome_unknown())
                    work.done.exception()
            raise
        failpoints.hit(failpoints.AFTER_READBACK)
        self._answer(waiting, position)

    def _decide(self, working: Working[S], waiting: list[tuple[Work[S], Outcome | GroundswellError]]) -> None:
        schema = self.replica.schema
        until = asyncio.get_running_loop().time() + self.config.max_batch_s
        clock = asyncio.get_running_loop().time
        while self._queue and len(working.records) < self.config.max_batch_events:
            work = self._queue.popleft()
            if work.done.done():
                continue
            outcome: Outcome | GroundswellError
            try:
                outcome = work.enter(schema, working)
                outcome.public_seq = working.public_seq
            except GroundswellError as error:
                outcome = error
            except Exception as error:
                logger.exception("unexpected failure while deciding")
                outcome = InternalError("INTERNAL", f"the service failed on this command ({type(error).__name__})")
            # Even a refusal may rest on what this batch is about to write, so it waits for the batch too.
            waiting.append((work, outcome))
            if clock() >= until:
                break

    async def _write(self, working: Working[S]) -> int:
        """Commit the batch and wait until the own tail has applied its last event; return that one's position."""
        appender = self._appender
        assert appender is not None  # noqa: S101 - set by the claim
        read_back = self.replica.watch(working.last_event_id)
        failpoints.hit(failpoints.BEFORE_SEND)
        try:
            await appender.stage(working.records)
            failpoints.hit(failpoints.AFTER_SEND)
            await self._commit(appender)
            failpoints.hit(failpoints.AFTER_COMMIT_BEFORE_ANSWER)
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

    @staticmethod
    def _answer(waiting: list[tuple[Work[S], Outcome | GroundswellError]], position: int) -> None:
        for work, outcome in waiting:
            if work.done.done():
                continue
            if isinstance(outcome, GroundswellError):
                work.done.set_exception(outcome)
                work.done.exception()
            else:
                work.done.set_result((outcome, position))


RESIGNATIONS = (FencedError, LogError, ClaimFailedError, HaltedError, TimeoutError)
"""Ordinary ends of a leadership."""
