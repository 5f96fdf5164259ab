"""Units of work that a leader's queue holds, each knowing how to add itself to a batch.

`enter` runs synchronously against the working state. It may raise `GroundswellError` to refuse (only this item is
affected) and must leave no trace when it raises.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from libs.errors import GroundswellError
from libs.eventlog.codec import LOG_ID, decode_result, header, read_envelope
from libs.eventlog.model import Command, Decision, Foreign, TimerFired, Token
from libs.eventlog.ports import Record
from libs.eventlog.state import Parked, Schema, Watermark, recall
from libs.eventlog.working import DecisionContext, InternalError, Origin, Working, digest_of

logger = logging.getLogger(__name__)

S = TypeVar("S")


class Outcome(NamedTuple):
    """What an item will be answered with once its batch is read back."""

    result: Message | None
    replayed: bool = False


NOTHING = Outcome(None)


class Work(Generic[S]):
    """One item; `done` resolves when the batch it was in is read back, or fails."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[Outcome, Token]] = asyncio.get_running_loop().create_future()

    def enter(self, schema: Schema[S], working: Working[S]) -> Outcome:
        raise NotImplementedError


def decide(schema: Schema[S], working: Working[S], payload: object, origin: Origin | Command) -> Decision:
    """Run the domain; anything but a refusal is a defect and fails this command alone."""
    try:
        return schema.domain.decide(working.domain, payload, DecisionContext(working, origin, working.now_ms))
    except GroundswellError:
        raise
    except Exception as error:
        logger.exception("decide failed on %s", type(payload).__name__)
        raise InternalError("INTERNAL", "the service failed on this command") from error


def take(working: Working[S], decision: Decision, origin: Origin | Command, name: str) -> None:
    """Add the decision; a failing `evolve` is caught here, before anything is in the log."""
    try:
        working.take(decision, origin)
    except GroundswellError:
        raise
    except Exception as error:
        logger.exception("evolve failed on the events of %s", name)
        raise InternalError("INTERNAL", "the service failed on this command") from error


class CommandWork(Work[S]):
    """A caller's command."""

    __slots__ = ("command",)

    def __init__(self, command: Command) -> None:
        super().__init__()
        self.command = command

    def enter(self, schema: Schema[S], working: Working[S]) -> Outcome:
        command = self.command
        if command.request_id:
            key = (command.organization, command.principal, command.request_id)
            entry = recall(working.request(key), digest_of(command.request_digest), working.now_ms)
            if entry is not None:
                return Outcome(decode_result(entry.result_type, entry.result), replayed=True)
        decision = decide(schema, working, command.payload, command)
        take(working, decision, command, type(command.payload).__name__)
        return Outcome(decision.result)


class TimerWork(Work[S]):
    """A timer that is due. If it was moved or cleared meanwhile, nothing happens."""

    __slots__ = ("timer_id",)

    def __init__(self, timer_id: str) -> None:
        super().__init__()
        self.timer_id = timer_id

    def enter(self, schema: Schema[S], working: Working[S]) -> Outcome:
        timer = working.timer(self.timer_id)
        if timer is not None and timer.at_ms <= working.now_ms:
            origin = Origin(timer.organization, "timer")
            fired = TimerFired(timer.timer_id, timer.kind, timer.payload)
            decision = decide(schema, working, fired, origin)
            # The clearing comes first, so that the decision may set the same timer again.
            cleared = decision.replace(clear_timers=(timer.timer_id, *decision.clear_timers))
            take(working, cleared, origin, f"timer {timer.kind}")
        return NOTHING


class CloseTaskWork(Work[S]):
    """A task whose handler had nothing to record."""

    __slots__ = ("task_id",)

    def __init__(self, task_id: str) -> None:
        super().__init__()
        self.task_id = task_id

    def enter(self, schema: Schema[S], working: Working[S]) -> Outcome:
        del schema
        take(working, Decision(close_tasks=(self.task_id,)), Origin("", "task"), "task")
        return NOTHING


class BeatWork(Work[S]):
    """A no-op that is committed: keeps the transactional id alive, and makes a strong read."""

    __slots__ = ()

    def enter(self, schema: Schema[S], working: Working[S]) -> Outcome:
        del schema
        working.beat()
        return NOTHING


class ForeignWork(Work[S]):
    """A foreign public record. Enters without fail: what cannot be decided is parked, never dropped."""

    __slots__ = ("again", "record")

    def __init__(self, record: Record, *, again: bool = False) -> None:
        super().__init__()
        self.record = record
        self.again = again
        """A parked record is read once more; its watermark has long passed."""

    def enter(self, schema: Schema[S], working: Working[S]) -> Outcome:
        record = self.record
        source = (record.topic, record.partition)
        mark = working.watermark(source)
        if not self.again and self.seen(record, mark):
            return NOTHING
        sequence, log_id = self._take_in(schema, working)
        if not self.again:
            if mark is not None:
                sequence = max(sequence, mark.public_seq)
            working.advance(record.topic, record.partition, Watermark(record.position, sequence, log_id))
        return NOTHING

    @staticmethod
    def seen(record: Record, mark: Watermark | None) -> bool:
        """Redelivered records are known by their position."""
        return mark is not None and record.position <= mark.position

    def _take_in(self, schema: Schema[S], working: Working[S]) -> tuple[int, str]:
        record = self.record
        log_id = header(record, LOG_ID).decode("utf-8", "replace")
        try:
            envelope, _, event_type = read_envelope(record)
        except DecodeError:
            self._park(working, f"@{record.position}", "", 0, "")
            return 0, log_id
        resource = envelope.resource or f"@{record.position}"
        key = (record.topic, resource)
        if self.again:
            parked = working.parked_record(key)
            if parked is None or parked.position != record.position:
                return envelope.public_seq, log_id
        kind = schema.source_types[record.topic].get(event_type)
        try:
            if kind is None:
                raise DecodeError(f"{event_type} is not understood")
            foreign = Foreign(
                service=schema.source_services[record.topic],
                topic=record.topic,
                partition=record.partition,
                position=record.position,
                public_seq=envelope.public_seq,
                organization=envelope.organization,
                resource=resource,
                payload=kind.FromString(record.value),
                occurred_at_ms=envelope.occurred_at_ms,
            )
            origin = Origin(envelope.organization, "inbox", trace_parent=envelope.trace_parent)
            take(working, decide(schema, working, foreign, origin), origin, event_type)
        except (DecodeError, GroundswellError) as error:
            logger.error("parked %s of %s at %s/%d: %s", event_type, resource, *source_of(record), error)  # noqa: TRY400
            self._park(working, resource, envelope.organization, envelope.public_seq, event_type)
        else:
            working.unpark(record.topic, resource, envelope.organization)
        return envelope.public_seq, log_id

    def _park(self, working: Working[S], resource: str, organization: str, public_seq: int, event_type: str) -> None:
        if not self.again:
            parked = Parked(self.record.partition, self.record.position, public_seq, event_type)
            working.park(self.record.topic, resource, organization, parked)


def source_of(record: Record) -> tuple[str, int]:
    """For messages."""
    return record.topic, record.position
