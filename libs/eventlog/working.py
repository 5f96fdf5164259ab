"""The working state of one batch: the committed roots plus overlays, thrown away when the batch has been read back.

`Working` turns decisions into records. Each command is taken in whole or leaves no trace: everything that may fail
(decide, evolve, size checks) happens before the overlays are touched. Nothing here is ever visible outside the batch.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, TypeVar

from google.protobuf.message import Message
from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import GroundswellError
from libs.eventlog.codec import ENVELOPE, EVENT_TYPE, LOG_ID, new_id, record_hash
from libs.eventlog.config import partition_of
from libs.eventlog.model import Decision, Event, NewEvent, Task, Timer
from libs.eventlog.ports import NewRecord
from libs.eventlog.state import Parked, PartitionState, RequestEntry, RequestKey, Schema, Watermark

S = TypeVar("S")

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


@dataclass(slots=True)
class Origin:
    """For whom records are written."""

    organization: str
    principal: str
    request_id: str = ""
    request_digest: bytes = b""
    trace_parent: str = ""


class DecisionContext:
    """`Context` of one command."""

    __slots__ = ("_command_id", "_now_ms", "_origin", "_working")

    def __init__(self, working: Working[S], origin: Origin, now_ms: int) -> None:
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
        digest = sha256(f"{self._command_id}/{purpose}".encode()).digest()
        return str(uuid.UUID(bytes=digest[:16], version=4))

    def version(self, resource: str) -> int:
        return self._working.version(resource)

    def parked(self, resource: str) -> bool:
        return self._working.is_parked(resource)


class Working(Generic[S]):
    """One batch on its way to the log."""

    def __init__(self, schema: Schema[S], base: PartitionState[S], writer: Writer, wall_ms: int) -> None:
        self.base = base
        self.domain = base.domain
        self.now_ms = max(wall_ms, base.last_ms)
        self.records: list[NewRecord] = []
        self.last_event_id = ""
        self.public_seq = base.public_seq
        self._schema = schema
        self._writer = writer
        self._versions: dict[str, int] = {}
        self._heads: dict[str, bytes] = {}
        self._requests: dict[RequestKey, RequestEntry] = {}
        self._watermarks: dict[tuple[str, int], Watermark] = {}
        self._parked: dict[tuple[str, str], Parked | None] = {}
        self._tasks: dict[str, Task | None] = {}
        self._timers: dict[str, Timer | None] = {}
        self._id_prefix = new_id()[:22]
        self._id_count = 0

    # What decisions and the runtime read.

    def version(self, resource: str) -> int:
        found = self._versions.get(resource)
        return self.base.versions.get(resource, 0) if found is None else found

    def request(self, key: RequestKey) -> RequestEntry | None:
        return self._requests.get(key) or self.base.requests.get(key)

    def timer(self, timer_id: str) -> Timer | None:
        return self._timers[timer_id] if timer_id in self._timers else self.base.timers.get(timer_id)

    def task(self, task_id: str) -> Task | None:
        return self._tasks[task_id] if task_id in self._tasks else self.base.tasks.get(task_id)

    def watermark(self, source: tuple[str, int]) -> Watermark | None:
        return self._watermarks.get(source) or self.base.inbox.get(source)

    def parked_record(self, key: tuple[str, str]) -> Parked | None:
        return self._parked[key] if key in self._parked else self.base.parked.get(key)

    def is_parked(self, resource: str) -> bool:
        """Whatever topic the record came by: resource names are unique in an installation."""
        return any(self.parked_record((topic, resource)) is not None for topic in self._schema.source_types)

    # What a batch takes in.

    def take(self, decision: Decision, origin: Origin) -> None:
        """Add a command's decision."""
        domain, versions = self._evolve(decision.events, origin)
        planned = self._runtime_events(decision, origin)
        self.domain = domain
        self._versions.update(versions)
        answering = self._answering(decision.events, origin)
        for index, (event, version) in enumerate(zip(decision.events, self._versions_of(decision.events), strict=True)):
            self._publish(event, version, origin)
            self._append(
                event.payload,
                origin,
                organization=event.organization,
                resource=event.resource,
                version=version,
                answer=decision if index == answering else None,
            )
        wrote = bool(decision.events)
        for payload, organization in planned:
            self._append(payload, origin, organization=organization)
            wrote = True
        if wrote and origin.request_id and answering < 0:
            # No event under the command's own organization: the answer needs a record to be remembered by.
            self._append(pb.LogBeat(), origin, organization=origin.organization, answer=decision)

    def _versions_of(self, events: Sequence[NewEvent]) -> list[int]:
        """Versions of just-taken events, counted back from the aggregates' current ones."""
        left: dict[str, int] = {}
        for event in events:
            left[event.resource] = left.get(event.resource, 0) + 1
        out: list[int] = []
        for event in events:
            left[event.resource] -= 1
            out.append(self._versions[event.resource] - left[event.resource])
        return out

    def _evolve(self, events: Sequence[NewEvent], origin: Origin) -> tuple[S, dict[str, int]]:
        domain = self.domain
        versions: dict[str, int] = {}
        for new in events:
            if new.organization != origin.organization and (
                partition_of(new.organization, self._schema.partitions) != self._writer.partition
            ):
                raise InternalError("WRONG_PARTITION", f"{new.organization} belongs to another partition")
            size = new.payload.ByteSize()
            if size > self._writer.max_record_bytes:
                raise InternalError("RECORD_TOO_LARGE", f"event of {new.resource} has {size} bytes")
            if type(new.payload).DESCRIPTOR.full_name not in self._schema.types:
                raise InternalError("EVENT_TYPE_UNKNOWN", f"{type(new.payload).__name__} is not among event_types")
            version = versions.get(new.resource)
            version = (self.version(new.resource) if version is None else version) + 1
            versions[new.resource] = version
            for public in new.public:
                size = public.payload.ByteSize()
                if size > self._writer.max_record_bytes:
                    raise InternalError("RECORD_TOO_LARGE", f"public record of {public.resource} has {size} bytes")
            event = Event(new.organization, new.resource, version, new.payload, self.now_ms, origin.principal, "")
            domain = self._schema.domain.evolve(domain, event)
        return domain, versions

    @staticmethod
    def _answering(events: Sequence[NewEvent], origin: Origin) -> int:
        """Index of the event that carries the answer: the last one of the command's own organization."""
        if origin.request_id:
            for index in range(len(events) - 1, -1, -1):
                if events[index].organization == origin.organization:
                    return index
        return -1

    def _runtime_events(self, decision: Decision, origin: Origin) -> list[tuple[Message, str]]:
        """Task and timer events of a decision; what would change nothing is left out."""
        if not (decision.open_tasks or decision.close_tasks or decision.set_timers or decision.clear_timers):
            return []
        out: list[tuple[Message, str]] = []
        for task_id in decision.close_tasks:
            task = self.task(task_id)
            if task is not None:
                out.append((pb.TaskClosed(task_id=task_id), task.organization))
                self._tasks[task_id] = None
        for task in decision.open_tasks:
            if self.task(task.task_id) is None:
                organization = task.organization or origin.organization
                out.append((pb.TaskOpened(task_id=task.task_id, kind=task.kind, payload=task.payload), organization))
                self._tasks[task.task_id] = Task(task.task_id, task.kind, task.payload, organization)
        for timer_id in decision.clear_timers:
            timer = self.timer(timer_id)
            if timer is not None:
                out.append((pb.TimerCleared(timer_id=timer_id), timer.organization))
                self._timers[timer_id] = None
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
                self._timers[timer.timer_id] = known
        return out

    def advance(self, topic: str, partition: int, mark: Watermark) -> None:
        """Move an inbox watermark; written once per batch by `finish`."""
        self._watermarks[(topic, partition)] = mark

    def park(self, topic: str, resource: str, organization: str, parked: Parked) -> None:
        """Keep a foreign record that is not understood."""
        self._parked[(topic, resource)] = parked
        self._append(
            pb.InboxParked(
                topic=topic,
                partition=parked.partition,
                position=parked.position,
                public_seq=parked.public_seq,
                resource=resource,
                event_type=parked.event_type,
            ),
            Origin(organization, "inbox"),
            organization=organization,
        )

    def unpark(self, topic: str, resource: str, organization: str) -> None:
        """A later record of the resource is understood."""
        if self.parked_record((topic, resource)) is not None:
            self._parked[(topic, resource)] = None
            self._append(
                pb.InboxUnparked(topic=topic, resource=resource),
                Origin(organization, "inbox"),
                organization=organization,
            )

    def beat(self) -> None:
        """A record that changes nothing."""
        self._append(pb.LogBeat(), Origin("", ""))

    def finish(self) -> None:
        """Write the watermarks: one record for each source, whatever the number of records taken in."""
        for (topic, partition), mark in self._watermarks.items():
            self._append(
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

    def _publish(self, event: NewEvent, version: int, origin: Origin) -> None:
        for public in event.public:
            self.public_seq += 1
            envelope = pb.Envelope(
                event_id=self._event_id(),
                organization=event.organization,
                resource=public.resource,
                aggregate_version=version,
                occurred_at_ms=self.now_ms,
                principal=origin.principal,
                origin=self._writer.address,
                epoch=self._writer.epoch,
                trace_parent=origin.trace_parent,
                public_seq=self.public_seq,
            ).SerializeToString()
            self.records.append(
                NewRecord(
                    self._writer.public_topic,
                    self._writer.partition,
                    event.organization.encode(),
                    public.payload.SerializeToString(),
                    [
                        (ENVELOPE, envelope),
                        (EVENT_TYPE, type(public.payload).DESCRIPTOR.full_name.encode()),
                        (LOG_ID, self.base.log_id.encode()),
                    ],
                )
            )

    def _append(
        self,
        payload: Message,
        origin: Origin,
        *,
        organization: str = "",
        resource: str = "",
        version: int = 0,
        answer: Decision | None = None,
    ) -> None:
        envelope = pb.Envelope(
            event_id=self._event_id(),
            organization=organization,
            resource=resource,
            aggregate_version=version,
            occurred_at_ms=self.now_ms,
            request_id=origin.request_id,
            principal=origin.principal,
            origin=self._writer.address,
            epoch=self._writer.epoch,
            trace_parent=origin.trace_parent,
            prev_hash=self._head(organization),
            public_seq=self.public_seq,
        )
        if answer is not None:
            self._remember(envelope, answer, origin)
        envelope_bytes = envelope.SerializeToString()
        value = payload.SerializeToString()
        if organization:
            self._heads[organization] = record_hash(envelope_bytes, value)
        self.last_event_id = envelope.event_id
        self.records.append(
            NewRecord(
                self._writer.events_topic,
                self._writer.partition,
                organization.encode(),
                value,
                [(ENVELOPE, envelope_bytes), (EVENT_TYPE, type(payload).DESCRIPTOR.full_name.encode())],
            )
        )

    def _head(self, organization: str) -> bytes:
        if not organization:
            return b""
        found = self._heads.get(organization)
        return self.base.heads.get(organization, b"") if found is None else found

    def _remember(self, envelope: pb.Envelope, answer: Decision, origin: Origin) -> None:
        envelope.request_digest = origin.request_digest or _EMPTY_DIGEST
        if answer.result is not None:
            envelope.result_type = answer.result.DESCRIPTOR.full_name
            envelope.result = answer.result.SerializeToString()
        self._requests[(origin.organization, origin.principal, origin.request_id)] = RequestEntry(
            envelope.request_digest, self.now_ms, envelope.result_type, envelope.result
        )


def digest_of(request_digest: bytes) -> bytes:
    """The digest as remembered: never empty."""
    return request_digest or _EMPTY_DIGEST
