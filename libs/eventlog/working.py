"""The working state of one batch: the committed roots plus overlays, never visible outside the batch.

`Working` turns decisions into records. Each command is taken in whole or leaves no trace: everything that may fail
(decide, evolve, size checks) happens before the overlays are touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, NamedTuple, TypeVar

import msgspec
from google.protobuf.message import Message
from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import GroundswellError
from libs.eventlog.codec import ENVELOPE, EVENT_TYPE, LOG_ID, new_id, record_hash, type_header
from libs.eventlog.config import partition_of
from libs.eventlog.model import Command, Decision, Event, NewEvent, Task, Timer
from libs.eventlog.ports import NewRecord
from libs.eventlog.state import Foreseen, Parked, PartitionState, RequestEntry, RequestKey, Schema, Stamp, Watermark

S = TypeVar("S")

Encoded = tuple[int, bytes, list[bytes], object]
"""An event ready to be written: (version, value, values of its public records, the state after it)."""

_EMPTY_DIGEST = sha256(b"").digest()


class InternalError(GroundswellError):
    """A defect in the service: this command failed, others are not affected."""

    status = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes a batch: constant for one leadership."""

    address: str
    epoch: int
    partition: int
    events_topic: str
    public_topic: str
    max_record_bytes: int


class Origin(NamedTuple):
    """For whom records are written, when that is not a caller's `Command`."""

    organization: str
    principal: str
    request_id: str = ""
    request_digest: bytes = b""
    trace_parent: str = ""


Asker = Origin | Command


class Overlay:
    """What one batch changes, beside the domain's own state. None is a removal."""

    __slots__ = ("heads", "parked", "requests", "tasks", "timers", "versions", "watermarks")

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        self.heads: dict[str, bytes] = {}
        self.requests: dict[RequestKey, RequestEntry] = {}
        self.watermarks: dict[tuple[str, int], Watermark] = {}
        self.parked: dict[tuple[str, str], Parked | None] = {}
        self.tasks: dict[str, Task | None] = {}
        self.timers: dict[str, Timer | None] = {}


def uuid_of(digest: bytes) -> str:
    """A version 4 UUID (RFC 9562) of the first sixteen bytes; `uuid.UUID` takes five times as long."""
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{'89ab'[digest[8] >> 4 & 3]}{text[17:20]}-{text[20:32]}"


class DecisionContext:
    """`Context` of one command."""

    __slots__ = ("_command_id", "_now_ms", "_origin", "_working")

    def __init__(self, working: Working[S], origin: Asker, now_ms: int) -> None:
        self._working = working
        self._origin = origin
        self._now_ms = now_ms
        self._command_id = ""

    @property
    def now_ms(self) -> int:
        return self._now_ms

    @property
    def organization(self) -> str:
        return self._origin.organization

    @property
    def principal(self) -> str:
        return self._origin.principal

    def new_uuid(self, purpose: str = "") -> str:
        if not self._command_id:
            self._command_id = new_id()
        return uuid_of(sha256(f"{self._command_id}/{purpose}".encode()).digest())

    def version(self, resource: str) -> int:
        return self._working.version(resource)

    def parked(self, resource: str) -> bool:
        return self._working.is_parked(resource)


class Working(Generic[S]):
    """One batch on its way to the log.

    It may be opened while the batch before it is still being written. What it then reads of that batch is as
    uncommitted as itself, and both share one fate: the leader writes it only after the other has been read back.
    """

    def __init__(
        self,
        schema: Schema[S],
        base: PartitionState[S],
        writer: Writer,
        wall_ms: int,
        previous: Working[S] | None = None,
    ) -> None:
        self.base = base
        self.depth: int = 0 if previous is None else previous.depth + 1
        """Batches since the working state was last taken from the committed one."""
        self.domain: S = base.domain if previous is None else previous.domain
        self.records: list[NewRecord] = []
        self.foreseen: list[Foreseen] = []
        """What the domain's own records will do when they are read back."""
        self.events = 0
        """Size of the batch as the limit counts it: records other than watermarks."""
        self.last_event_id = ""
        self.public_seq: int = base.public_seq if previous is None else previous.public_seq
        self.now_ms: int = base.last_ms if previous is None else previous.now_ms
        self._schema = schema
        self._writer = writer
        self._private = pb.Envelope(origin=writer.address, epoch=writer.epoch)
        self._public = pb.Envelope(origin=writer.address, epoch=writer.epoch)
        self._private_origin: Asker | None = None
        self._public_origin: Asker | None = None
        """Who the envelopes already speak of."""
        self._log_id = (LOG_ID, base.log_id.encode())
        self._id_prefix = new_id()[:22]
        self._id_count = 0
        self._own: Overlay = Overlay()
        self._before: Overlay = Overlay() if previous is None else previous._own  # noqa: SLF001 - same class
        self.tick(wall_ms)

    def tick(self, wall_ms: int) -> None:
        """Time goes on while a batch is open; it never goes back."""
        self.now_ms = max(self.now_ms, wall_ms, self.base.last_ms)
        self._private.occurred_at_ms = self.now_ms
        self._public.occurred_at_ms = self.now_ms

    # What decisions and the runtime read: this batch, else the one before it, else what is committed.

    def version(self, resource: str) -> int:
        return self._own.versions.get(resource) or self._before.versions.get(resource) or self.base.version(resource)

    def request(self, key: RequestKey) -> RequestEntry | None:
        return self._own.requests.get(key) or self._before.requests.get(key) or self.base.requests.get(key)

    def timer(self, timer_id: str) -> Timer | None:
        for overlay in (self._own, self._before):
            if timer_id in overlay.timers:
                return overlay.timers[timer_id]
        return self.base.timers.get(timer_id)

    def task(self, task_id: str) -> Task | None:
        for overlay in (self._own, self._before):
            if task_id in overlay.tasks:
                return overlay.tasks[task_id]
        return self.base.tasks.get(task_id)

    def watermark(self, source: tuple[str, int]) -> Watermark | None:
        return self._own.watermarks.get(source) or self._before.watermarks.get(source) or self.base.inbox.get(source)

    def parked_record(self, key: tuple[str, str]) -> Parked | None:
        for overlay in (self._own, self._before):
            if key in overlay.parked:
                return overlay.parked[key]
        return self.base.parked.get(key)

    def is_parked(self, resource: str) -> bool:
        """Whatever topic the record came by: resource names are unique in an installation."""
        return any(self.parked_record((topic, resource)) is not None for topic in self._schema.source_types)

    # What a batch takes in.

    def take(self, decision: Decision, origin: Asker) -> None:
        """Add a command's decision."""
        encoded = self._evolve(decision, origin)
        answering = self._answering(decision.events, origin)
        if origin.request_id and decision.result is not None:
            # The answer travels with that event. Too large a record would be refused by the broker, for ever.
            size = decision.result.ByteSize() + (len(encoded[answering][1]) if answering >= 0 else 0)
            if size > self._writer.max_record_bytes:
                raise InternalError("RECORD_TOO_LARGE", f"an event with its answer has {size} bytes")
        planned = self._runtime_events(decision, origin)
        for index, (event, (version, value, public_values, after)) in enumerate(
            zip(decision.events, encoded, strict=True)
        ):
            self._own.versions[event.resource] = version
            if public_values:
                self._publish(event, version, public_values, origin)
            before = self._head(event.organization)
            envelope = self._append(
                type_header(event.payload),
                value,
                origin,
                event.organization,
                event.resource,
                version,
                decision if index == answering else None,
            )
            head = self._own.heads.get(event.organization, b"")
            stamp = self._stamp(origin, event, version, before, decision if index == answering else None)
            self.foreseen.append(Foreseen(envelope, value, stamp, head, self.domain, after))
            self.domain = after  # type: ignore[assignment]
        self.events += len(decision.events) + len(planned)
        for payload, organization in planned:
            self._append_message(payload, origin, organization)
        if (encoded or planned) and origin.request_id and answering < 0:
            # No event under the command's own organization: the answer needs a record to be remembered by.
            self._append_message(pb.LogBeat(), origin, origin.organization, decision)

    def _evolve(self, decision: Decision, origin: Asker) -> list[Encoded]:
        """Fold the events tentatively and encode them: whatever can fail fails here, before anything is changed."""
        events, folded = decision.events, decision.folded
        if folded and len(folded) != len(events):
            raise InternalError("FOLD_INCOMPLETE", f"{len(folded)} states for {len(events)} events")
        domain: object = self.domain
        versions: dict[str, int] = {}
        encoded: list[Encoded] = []
        most = self._writer.max_record_bytes
        for index, new in enumerate(events):
            payload = new.payload
            resource = new.resource
            if new.organization != origin.organization and (
                partition_of(new.organization, self._schema.partitions) != self._writer.partition
            ):
                raise InternalError("WRONG_PARTITION", f"{new.organization} belongs to another partition")
            if type(payload) not in self._schema.kinds:
                raise InternalError("EVENT_TYPE_UNKNOWN", f"{type(payload).__name__} is not among event_types")
            value = payload.SerializeToString()
            largest = len(value)
            public_values = []
            for public in new.public:
                public_values.append(public.payload.SerializeToString())
                largest = max(largest, len(public_values[-1]))
            if largest > most:
                raise InternalError("RECORD_TOO_LARGE", f"a record of {resource} has over {most} bytes")
            version = (versions.get(resource) or self.version(resource)) + 1
            versions[resource] = version
            if folded:
                domain = folded[index]
            else:
                event = Event(new.organization, resource, version, payload, self.now_ms, origin.principal)
                domain = self._schema.domain.evolve(domain, event)  # type: ignore[arg-type]
            encoded.append((version, value, public_values, domain))
        return encoded

    @staticmethod
    def _answering(events: Sequence[NewEvent], origin: Asker) -> int:
        """Index of the event that carries the answer: the last one of the command's own organization."""
        if origin.request_id:
            for index in range(len(events) - 1, -1, -1):
                if events[index].organization == origin.organization:
                    return index
        return -1

    def _runtime_events(self, decision: Decision, origin: Asker) -> list[tuple[Message, str]]:
        """Task and timer events of a decision; what would change nothing is left out."""
        if not (decision.open_tasks or decision.close_tasks or decision.set_timers or decision.clear_timers):
            return []
        out: list[tuple[Message, str]] = []
        for task_id in decision.close_tasks:
            task = self.task(task_id)
            if task is not None:
                out.append((pb.TaskClosed(task_id=task_id), task.organization))
                self._own.tasks[task_id] = None
        for task in decision.open_tasks:
            if self.task(task.task_id) is None:
                organization = task.organization or origin.organization
                out.append((pb.TaskOpened(task_id=task.task_id, kind=task.kind, payload=task.payload), organization))
                self._own.tasks[task.task_id] = Task(task.task_id, task.kind, task.payload, organization)
        for timer_id in decision.clear_timers:
            timer = self.timer(timer_id)
            if timer is not None:
                out.append((pb.TimerCleared(timer_id=timer_id), timer.organization))
                self._own.timers[timer_id] = None
        for timer in decision.set_timers:
            organization = timer.organization or origin.organization
            known = Timer(timer.timer_id, timer.kind, timer.at_ms, timer.payload, organization)
            if self.timer(timer.timer_id) != known:
                out.append(
                    (
                        pb.TimerSet(timer_id=timer.timer_id, kind=timer.kind, payload=timer.payload, at_ms=timer.at_ms),
                        organization,
                    )
                )
                self._own.timers[timer.timer_id] = known
        return out

    def advance(self, topic: str, partition: int, mark: Watermark) -> None:
        """Move an inbox watermark; written once per batch by `finish`."""
        self._own.watermarks[(topic, partition)] = mark

    def park(self, topic: str, resource: str, organization: str, parked: Parked) -> None:
        """Keep a foreign record that is not understood."""
        self._own.parked[(topic, resource)] = parked
        self._append_message(
            pb.InboxParked(
                topic=topic,
                partition=parked.partition,
                position=parked.position,
                public_seq=parked.public_seq,
                resource=resource,
                event_type=parked.event_type,
            ),
            Origin(organization, "inbox"),
            organization,
        )

    def unpark(self, topic: str, resource: str, organization: str) -> None:
        """A later record of the resource is understood."""
        if self.parked_record((topic, resource)) is not None:
            self._own.parked[(topic, resource)] = None
            self._append_message(
                pb.InboxUnparked(topic=topic, resource=resource),
                Origin(organization, "inbox"),
                organization,
            )

    def beat(self) -> None:
        """A record that changes nothing."""
        self._append_message(pb.LogBeat(), Origin("", ""))

    def finish(self) -> None:
        """Write the watermarks: one record for each source, whatever the number of records taken in."""
        for (topic, partition), mark in self._own.watermarks.items():
            self._append_message(
                pb.InboxAdvanced(
                    topic=topic,
                    partition=partition,
                    position=mark.position,
                    public_seq=mark.public_seq,
                    log_id=mark.log_id,
                ),
                Origin("", "inbox"),
            )

    # Bytes.

    def _event_id(self) -> str:
        self._id_count += 1
        return f"{self._id_prefix}{self._id_count:010x}"

    def _publish(self, event: NewEvent, version: int, values: list[bytes], origin: Asker) -> None:
        envelope = self._public
        if origin is not self._public_origin:
            self._public_origin = origin
            envelope.principal = origin.principal
            envelope.trace_parent = origin.trace_parent
        envelope.organization = event.organization
        envelope.aggregate_version = version
        key = event.organization.encode()
        for public, value in zip(event.public, values, strict=True):
            self.public_seq += 1
            envelope.event_id = self._event_id()
            envelope.resource = public.resource
            envelope.public_seq = self.public_seq
            self.records.append(
                NewRecord(
                    self._writer.public_topic,
                    self._writer.partition,
                    key,
                    value,
                    [
                        (ENVELOPE, envelope.SerializeToString()),
                        (EVENT_TYPE, type_header(public.payload)),
                        self._log_id,
                    ],
                )
            )

    def _stamp(self, origin: Asker, event: NewEvent, version: int, prev_hash: bytes, answer: Decision | None) -> Stamp:
        """What the envelope of the record appended last says."""
        said = Stamp(
            self.last_event_id,
            self.now_ms,
            self._writer.epoch,
            event.organization,
            event.resource,
            version,
            origin.principal,
            prev_hash,
            self.public_seq,
            request_id=origin.request_id,
        )
        if answer is None:
            return said
        entry = self._own.requests[(origin.organization, origin.principal, origin.request_id)]
        return msgspec.structs.replace(
            said, request_digest=entry.digest, result_type=entry.result_type, result=entry.result
        )

    def _append_message(
        self, payload: Message, origin: Asker, organization: str = "", answer: Decision | None = None
    ) -> None:
        """A record of the runtime's own."""
        self._append(type_header(payload), payload.SerializeToString(), origin, organization, "", 0, answer)

    def _append(
        self,
        kind: bytes,
        value: bytes,
        origin: Asker,
        organization: str,
        resource: str,
        version: int,
        answer: Decision | None,
    ) -> bytes:
        """Add a private record; its envelope as written."""
        # One message, filled again for each record: building a new one costs several times as much.
        envelope = self._private
        envelope.event_id = self.last_event_id = self._event_id()
        if origin is not self._private_origin:
            self._private_origin = origin
            envelope.request_id = origin.request_id
            envelope.principal = origin.principal
            envelope.trace_parent = origin.trace_parent
        envelope.organization = organization
        envelope.resource = resource
        envelope.aggregate_version = version
        envelope.prev_hash = self._head(organization)
        envelope.public_seq = self.public_seq
        if answer is not None:
            self._remember(envelope, answer, origin)
            envelope_bytes = envelope.SerializeToString()
            for name in ("request_digest", "result_type", "result"):
                envelope.ClearField(name)
        else:
            envelope_bytes = envelope.SerializeToString()
        if organization:
            self._own.heads[organization] = record_hash(envelope_bytes, value)
        self.records.append(
            NewRecord(
                self._writer.events_topic,
                self._writer.partition,
                organization.encode(),
                value,
                [(ENVELOPE, envelope_bytes), (EVENT_TYPE, kind)],
            )
        )
        return envelope_bytes

    def _head(self, organization: str) -> bytes:
        if not organization:
            return b""
        return (
            self._own.heads.get(organization)
            or self._before.heads.get(organization)
            or self.base.heads.get(organization, b"")
        )

    def _remember(self, envelope: pb.Envelope, answer: Decision, origin: Asker) -> None:
        envelope.request_digest = origin.request_digest or _EMPTY_DIGEST
        if answer.result is not None:
            envelope.result_type = answer.result.DESCRIPTOR.full_name
            envelope.result = answer.result.SerializeToString()
        self._own.requests[(origin.organization, origin.principal, origin.request_id)] = RequestEntry(
            envelope.request_digest, self.now_ms, envelope.result_type, envelope.result
        )


def digest_of(request_digest: bytes) -> bytes:
    """The digest as remembered: never empty."""
    return request_digest or _EMPTY_DIGEST
