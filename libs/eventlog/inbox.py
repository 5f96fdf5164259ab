"""Facts from elsewhere: foreign public records of one led partition, taken in through the own log.

Reading starts at the watermark in the committed state, so a new leader goes on exactly where the log says, and what is
delivered twice is recognised. A record is never dropped: what is not understood is parked, and read again at each
claim.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from libs.errors import GroundswellError
from libs.eventlog.chores import Failures
from libs.eventlog.codec import LOG_ID, header
from libs.eventlog.config import RuntimeConfig
from libs.eventlog.deadline import monotonic
from libs.eventlog.leader import Leadership
from libs.eventlog.ports import EventLog, LogError, Record, TopicPartition
from libs.eventlog.work import ForeignWork

logger = logging.getLogger(__name__)

S = TypeVar("S")


FETCH_SHARE = 0.25
"""A tail notices markers only when a fetch ends, so fetches are shorter than the interval of measuring."""


BUSY = 10
"""Records of one fetch that are a stream, and not what a person or a script did: that is taken in at once."""


DRAIN_S = 0.05
"""How long the broker has to say what else there is."""


LOG_PAUSE_S = 2.0
"""Most to wait between two tries of a log that does not answer."""


class SourceResetError(Exception):
    """A foreign log was made anew: what was taken from the old one cannot be reconciled by waiting."""


class LagMeter:
    """When a reader last held everything that was committed, by read-committed ends.

    One end per source is pursued at a time: a reader that is milliseconds behind a busy log reaches each end it was
    given, while comparing it with an ever newer end would call it stale for ever.
    """

    __slots__ = ("_pursued", "_reached_at")

    def __init__(self, sources: Sequence[TopicPartition]) -> None:
        self._pursued: dict[TopicPartition, tuple[float, int] | None] = dict.fromkeys(sources)
        self._reached_at: dict[TopicPartition, float] = dict.fromkeys(sources, -math.inf)

    def measured(self, at: float, ends: Mapping[TopicPartition, int]) -> None:
        """The ends as they were, at the earliest, at `at`."""
        for source, end in ends.items():
            if source in self._pursued and self._pursued[source] is None:
                self._pursued[source] = (at, end)

    def reached(self, source: TopicPartition, position: int) -> None:
        """Everything below `position` is taken in."""
        pursued = self._pursued[source]
        if pursued is not None and position >= pursued[1]:
            self._reached_at[source] = pursued[0]
            self._pursued[source] = None

    def lag(self, source: TopicPartition | None = None, now: float | None = None) -> float:
        """Seconds since one source (or the worst) was last known to be reached; infinite before the first time.

        ``now`` is for whoever asks of many: `monotonic`, read once.
        """
        if not self._reached_at:
            return 0.0
        oldest = min(self._reached_at.values()) if source is None else self._reached_at[source]
        return max(0.0, (monotonic() if now is None else now) - oldest)


class Inbox(Generic[S]):
    """Feeds one leadership's queue from all sources."""

    work_type: type[ForeignWork[S]] = ForeignWork

    def __init__(self, leadership: Leadership[S], log: EventLog, config: RuntimeConfig) -> None:
        self._leadership = leadership
        self._log = log
        self._config = config
        self._sources = [
            TopicPartition(topic, leadership.partition) for topic in leadership.replica.schema.source_types
        ]
        self.meter = LagMeter(self._sources)
        self.problem = ""
        self._failures = Failures(config.retry_first_s, config.retry_most_s)
        self._taken_in: dict[TopicPartition, int] = {}
        self._wanted = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled. A failure is retried from the watermark, which is in the log."""
        if not self._sources:
            return
        while True:
            most_s = self._config.retry_most_s
            try:
                await self._reread_parked()
                await self._follow()
            except SourceResetError as error:
                self.problem = str(error)
                logger.error("inbox of %s/%d: %s", self._service, self._leadership.partition, error)  # noqa: TRY400
            except GroundswellError as error:
                self.problem = str(error)
            except LogError as error:
                # It may be back at any moment, and people wait for what it holds.
                most_s = LOG_PAUSE_S
                self.problem = f"{type(error).__name__}: {error}"
                logger.warning("inbox of %s/%d: %s", self._service, self._leadership.partition, error)
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                logger.exception("inbox of %s/%d failed", self._service, self._leadership.partition)
            if not self._leadership.serving:
                return
            await self._failures.pause(most_s)

    def hurry(self) -> None:
        """Somebody waits for what comes next."""
        self._wanted.set()

    @property
    def _service(self) -> str:
        return self._leadership.replica.service

    def start_position(self, source: TopicPartition) -> int:
        """First position not taken in yet. Seeking into a gap is harmless; comparing with it would not be."""
        mark = self._leadership.replica.state.inbox.get((source.topic, source.partition))
        return 0 if mark is None else mark.position + 1

    async def _reread_parked(self) -> None:
        for (topic, _), parked in list(self._leadership.replica.state.parked.items()):
            if topic not in self._leadership.replica.schema.source_types:
                continue
            source = TopicPartition(topic, parked.partition)
            tail = await self._log.open_tail({source: parked.position})
            try:
                records: Sequence[Record] = ()
                while not records:
                    records = await tail.fetch(1.0)
            finally:
                await tail.close()
            if records[0].position == parked.position:
                await self._enter([records[0]], again=True)

    async def _follow(self) -> None:
        tail = await self._log.open_tail({source: self.start_position(source) for source in self._sources})
        measuring = asyncio.create_task(self._measure())
        rested = False
        try:
            while True:
                records = await tail.fetch(self._config.lag_every_s * FETCH_SHARE)
                began = monotonic()
                if rested and records:
                    # A tail asks ahead once, so these came right after the last fetch. The next answer has the rest.
                    records = [*records, *await tail.fetch(DRAIN_S)]
                for start in range(0, len(records), self._config.inbox_chunk):
                    await self._enter(records[start : start + self._config.inbox_chunk])
                self.problem = ""
                self._failures.end()
                for source in self._sources:
                    self._taken_in[source] = tail.position(source)
                    self.meter.reached(source, tail.position(source))
                if measuring.done():
                    measuring.result()
                rested = len(records) >= BUSY and await self._rest(began + self._config.inbox_pace_s - monotonic())
        finally:
            measuring.cancel()
            await tail.close()

    async def _rest(self, seconds: float) -> bool:
        """Let more records come, unless somebody waits for them; false without a pace."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wanted.wait()
        self._wanted.clear()
        return seconds > 0

    async def _enter(self, records: Sequence[Record], *, again: bool = False) -> None:
        works = []
        for record in records:
            self._check_log(record)
            work = self.work_type(record, again=again)
            self._leadership.enqueue(work)
            works.append(work)
        for work in works:
            await work.done

    def _check_log(self, record: Record) -> None:
        mark = self._leadership.replica.state.inbox.get((record.topic, record.partition))
        log_id = header(record, LOG_ID).decode("utf-8", "replace")
        if mark is not None and mark.log_id and log_id and mark.log_id != log_id:
            raise SourceResetError(
                f"{record.topic}/{record.partition} is now log {log_id}; this service has taken in {mark.log_id}: "
                "restore the old log, or rebuild this service"
            )

    async def _measure(self) -> None:
        while True:
            at = monotonic()
            self.meter.measured(at, await self._log.end_positions(self._sources))
            for source, position in self._taken_in.items():
                self.meter.reached(source, position)
            await asyncio.sleep(self._config.lag_every_s)
