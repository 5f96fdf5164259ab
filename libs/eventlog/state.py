"""The committed state of one partition: a fold over its log, and nothing else.

`PartitionState.apply` is the only way in, on leaders and followers alike. What readers hold (`domain`, `versions`,
`tasks`, `parked`) are roots of persistent maps, so they never move under them; bookkeeping that only the fold and the
leader look at is kept in plain dicts. A record that contradicts the fold raises `CorruptLogError`: it is never skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import immutables
import msgspec
from google.protobuf.message import Message
from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.errors import FailedPreconditionError, InvalidArgumentError
from libs.eventlog.codec import CorruptLogError, read_headers, record_hash, types_by_name
from libs.eventlog.config import public_topic
from libs.eventlog.model import Domain, Event, Task, Timer
from libs.eventlog.ports import Record

S = TypeVar("S")

HOUR_MS = 3_600_000
RESULT_KEPT_MS = 24 * HOUR_MS
"""How long (event time) a repeated request id is answered with the stored result."""
ID_KEPT_MS = RESULT_KEPT_MS + 48 * HOUR_MS
"""How long the id is remembered after that, so that a late retry gets an error and not a second execution."""
_SLOT_MS = HOUR_MS // 6

RequestKey = tuple[str, str, str]
"""(organization, principal, request id)."""


class RequestEntry(NamedTuple):
    """What a request id was used for."""

    digest: bytes
    at_ms: int
    result_type: str
    result: bytes


class Watermark(NamedTuple):
    """How far a foreign public partition has been taken in."""

    position: int
    public_seq: int
    log_id: str


class Parked(NamedTuple):
    """A foreign record that is not understood."""

    partition: int
    position: int
    public_seq: int
    event_type: str


class Claim(NamedTuple):
    """The current leadership as the log has it."""

    node: str
    address: str
    epoch: int
    position: int
    timestamp_ms: int


class Stamp(msgspec.Struct, frozen=True, gc=False):
    """What applying a record reads of its envelope; the fields are the envelope's own."""

    event_id: str
    occurred_at_ms: int
    epoch: int
    organization: str
    resource: str
    aggregate_version: int
    principal: str
    prev_hash: bytes
    public_seq: int
    request_digest: bytes = b""
    request_id: str = ""
    result_type: str = ""
    result: bytes = b""


def stamp_of(envelope: pb.Envelope) -> Stamp:
    """As it is read from a log."""
    return Stamp(*(getattr(envelope, name) for name in Stamp.__struct_fields__))


class Foreseen(NamedTuple):
    """What a leader's own record will do to the state it was decided on. Holds only for these very bytes."""

    envelope: bytes
    value: bytes
    stamp: Stamp
    """What these bytes of the envelope say, so that nobody has to parse them again."""
    head: bytes
    """Link of the audit chain after it."""
    before: object
    after: object


class FoldDifferenceError(Exception):
    """A fold gave another state than the one foreseen: `evolve` is not a function of state and event."""


@dataclass(frozen=True, slots=True)
class Schema(Generic[S]):
    """What of a domain and an installation the fold needs to know, prepared once."""

    domain: Domain[S]
    partitions: int
    types: Mapping[str, type[Message]]
    kinds: frozenset[type[Message]]
    source_types: Mapping[str, Mapping[str, type[Message]]]
    """Public topic -> record types understood."""
    source_services: Mapping[str, str]
    """Public topic -> service."""
    verify: bool = False
    """Fold what was foreseen again and compare; see `RuntimeConfig.verify_folds`."""

    @classmethod
    def of(cls, domain: Domain[S], env: str, partitions: int, *, verify: bool = False) -> Schema[S]:
        return cls(
            domain,
            partitions,
            types_by_name(domain.event_types),
            frozenset(domain.event_types),
            {public_topic(env, service): types_by_name(types) for service, types in domain.sources.items()},
            {public_topic(env, service): service for service in domain.sources},
            verify,
        )


def recall(entry: RequestEntry | None, digest: bytes, now_ms: int) -> RequestEntry | None:
    """The entry to answer a repeated request from; None when the id is new. Raises when it must be refused."""
    if entry is None or now_ms - entry.at_ms >= ID_KEPT_MS:
        return None
    if entry.digest != digest:
        raise InvalidArgumentError(
            "REQUEST_ID_REUSED",
            "request_id was already used for a different request: make a new id for each request",
            field="request_id",
        )
    if now_ms - entry.at_ms >= RESULT_KEPT_MS:
        raise FailedPreconditionError(
            "REQUEST_ID_EXPIRED",
            "the request was carried out more than 24 hours ago and its answer is no longer kept: read the resource",
        )
    return entry


class RequestTable:
    """Request ids of the last 72 hours of event time, results of the last 24."""

    __slots__ = ("_entries", "_full", "_stripped")

    def __init__(self) -> None:
        self._entries: dict[RequestKey, RequestEntry] = {}
        self._full: deque[tuple[int, list[RequestKey]]] = deque()
        self._stripped: deque[tuple[int, list[RequestKey]]] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: RequestKey) -> RequestEntry | None:
        return self._entries.get(key)

    def put(self, key: RequestKey, entry: RequestEntry) -> None:
        slot = entry.at_ms // _SLOT_MS
        if not self._full or self._full[-1][0] != slot:
            self._expire(entry.at_ms)
            self._full.append((slot, []))
        self._full[-1][1].append(key)
        self._entries[key] = entry

    def entries(self) -> dict[RequestKey, RequestEntry]:
        """All of it, as it is now."""
        return dict(self._entries)

    def restore(self, entries: Mapping[RequestKey, RequestEntry]) -> None:
        """Be what `entries` told. What has been stripped of its result is stripped again: that changes nothing."""
        self._entries = dict(entries)
        self._full.clear()
        self._stripped.clear()
        for key, entry in sorted(entries.items(), key=lambda item: item[1].at_ms):
            slot = entry.at_ms // _SLOT_MS
            if not self._full or self._full[-1][0] != slot:
                self._full.append((slot, []))
            self._full[-1][1].append(key)

    def _expire(self, now_ms: int) -> None:
        """Whole slots at a time; `recall` judges the exact age."""
        while self._full and now_ms - (self._full[0][0] + 1) * _SLOT_MS >= RESULT_KEPT_MS:
            slot, keys = self._full.popleft()
            for key in keys:
                old = self._entries.get(key)
                if old is not None and old.at_ms // _SLOT_MS == slot:
                    self._entries[key] = old._replace(result_type="", result=b"")
            self._stripped.append((slot, keys))
        while self._stripped and now_ms - (self._stripped[0][0] + 1) * _SLOT_MS >= ID_KEPT_MS:
            slot, keys = self._stripped.popleft()
            for key in keys:
                old = self._entries.get(key)
                if old is not None and old.at_ms // _SLOT_MS == slot:
                    del self._entries[key]


class PartitionState(Generic[S]):
    """Fold of one partition's own log up to `applied`."""

    __slots__ = (
        "_foreseen",
        "_handlers",
        "_partition",
        "_schema",
        "_versions",
        "applied",
        "claim",
        "domain",
        "heads",
        "inbox",
        "last_event_id",
        "last_ms",
        "log_id",
        "on_task_opened",
        "on_timer_set",
        "parked",
        "public_seq",
        "requests",
        "tasks",
        "timers",
        "versions",
    )

    def __init__(self, schema: Schema[S], partition: int) -> None:
        self._schema = schema
        self._partition = partition
        self.domain: S = schema.domain.initial_state(partition)
        self.versions: immutables.Map[str, int] = immutables.Map()
        self._versions = self.versions.mutate()
        self.tasks: immutables.Map[str, Task] = immutables.Map()
        self.parked: immutables.Map[tuple[str, str], Parked] = immutables.Map()
        self.timers: dict[str, Timer] = {}
        self.inbox: dict[tuple[str, int], Watermark] = {}
        self.heads: dict[str, bytes] = {}
        self.requests = RequestTable()
        self.public_seq = 0
        self.last_ms = 0
        self.log_id = ""
        self.last_event_id = ""
        self.applied = -1
        self.claim: Claim | None = None
        self.on_task_opened: Callable[[str], None] | None = None
        self.on_timer_set: Callable[[Timer], None] | None = None
        self._foreseen: deque[Foreseen] = deque()
        self._handlers: dict[str, Callable[[Record, Stamp | pb.Envelope], None]] = {
            "groundswell.eventlog.v1.LeaderClaimed": self._leader_claimed,
            "groundswell.eventlog.v1.LogBeat": self._log_beat,
            "groundswell.eventlog.v1.InboxAdvanced": self._inbox_advanced,
            "groundswell.eventlog.v1.InboxParked": self._inbox_parked,
            "groundswell.eventlog.v1.InboxUnparked": self._inbox_unparked,
            "groundswell.eventlog.v1.TaskOpened": self._task_opened,
            "groundswell.eventlog.v1.TaskClosed": self._task_closed,
            "groundswell.eventlog.v1.TimerSet": self._timer_set,
            "groundswell.eventlog.v1.TimerCleared": self._timer_cleared,
        }

    def parked_resources(self) -> frozenset[str]:
        return frozenset(resource for _, resource in self.parked) if self.parked else frozenset()

    def version(self, resource: str) -> int:
        """Committed version of an aggregate."""
        return self.versions.get(resource, 0) or 0

    def publish_versions(self) -> None:
        """Let readers see the versions of what was applied; done once for all records of a fetch."""
        self.versions = self._versions.finish()
        self._versions = self.versions.mutate()

    def foresee(self, records: Iterable[Foreseen]) -> None:
        """What a leader is about to write, in that order. Followed while the log holds it byte for byte."""
        self._foreseen.extend(records)

    def _next_foreseen(self, envelope: bytes, value: bytes) -> Foreseen | None:
        """The foreseen record, if this is the one."""
        if not self._foreseen:
            return None
        foreseen = self._foreseen[0]
        if foreseen.envelope == envelope and foreseen.value == value and foreseen.before is self.domain:
            return self._foreseen.popleft()
        return None

    def apply(self, record: Record) -> str:
        """Fold one record; return its event id."""
        envelope_bytes, event_type = read_headers(record)
        foreseen = self._next_foreseen(envelope_bytes, record.value)
        envelope = foreseen.stamp if foreseen is not None else pb.Envelope.FromString(envelope_bytes)
        if record.position <= self.applied:
            raise CorruptLogError(f"position {record.position} after {self.applied}")
        handler = self._handlers.get(event_type)
        if handler is None or event_type != "groundswell.eventlog.v1.LeaderClaimed":
            claim = self.claim
            if claim is None or claim.epoch != envelope.epoch:
                raise CorruptLogError(
                    f"record {record.position} was written under epoch {envelope.epoch}, "
                    f"but the log is claimed for {claim.epoch if claim else 'nobody'}"
                )
        if foreseen is None and (handler is None or event_type == "groundswell.eventlog.v1.LeaderClaimed"):
            # Another record than the next one foreseen ends all foresight.
            self._foreseen.clear()
        elif (
            foreseen is not None
            and self._schema.verify
            and stamp_of(pb.Envelope.FromString(envelope_bytes)) != envelope
        ):
            raise FoldDifferenceError(f"the envelope of {event_type} at {record.position}")
        organization = envelope.organization
        if organization:
            if self.heads.get(organization, b"") != envelope.prev_hash:
                raise CorruptLogError(f"audit chain of {organization} is broken at {record.position}")
            head = record_hash(envelope_bytes, record.value) if foreseen is None else foreseen.head
            self.heads[organization] = head
        if not self.log_id:
            self.log_id = envelope.event_id
        if handler is not None:
            handler(record, envelope)
        else:
            self._domain_event(record, envelope, event_type, foreseen)
        self.last_ms = max(self.last_ms, envelope.occurred_at_ms)
        self.public_seq = max(self.public_seq, envelope.public_seq)
        if envelope.request_digest:
            self.requests.put(
                (organization, envelope.principal, envelope.request_id),
                RequestEntry(envelope.request_digest, envelope.occurred_at_ms, envelope.result_type, envelope.result),
            )
        self.applied = record.position
        self.last_event_id = envelope.event_id
        return envelope.event_id

    def image(self) -> list[Any]:
        """All of it as values that do not move any more; what `restore` takes."""
        return [
            (self.applied, self.last_event_id, self.log_id, self.public_seq, self.last_ms, self.claim),
            self.domain,
            self.versions,
            self.tasks,
            self.parked,
            dict(self.timers),
            dict(self.inbox),
            dict(self.heads),
            self.requests.entries(),
        ]

    def restore(self, image: Sequence[Any]) -> None:
        """Be the fold that an image was taken of. Raises before anything has changed."""
        scalars, domain, versions, tasks, parked, timers, inbox, heads, requests = image
        applied, last_event_id, log_id, public_seq, last_ms, claim = scalars
        if type(domain) is not type(self.domain):
            raise TypeError(f"a state of type {type(domain).__name__}")
        self.applied, self.last_event_id, self.log_id = applied, last_event_id, log_id
        self.public_seq, self.last_ms, self.claim = public_seq, last_ms, claim
        self.domain, self.tasks, self.parked = domain, tasks, parked
        self.versions = versions
        self._versions = versions.mutate()
        self.timers, self.inbox, self.heads = timers, inbox, heads
        self.requests.restore(requests)

    def _domain_event(
        self, record: Record, envelope: Stamp | pb.Envelope, event_type: str, foreseen: Foreseen | None
    ) -> None:
        kind = self._schema.types.get(event_type)
        if kind is None:
            raise CorruptLogError(f"this build does not know {event_type} at {record.position}")
        resource = envelope.resource
        version = envelope.aggregate_version
        versions = self._versions
        before = versions.get(resource, 0)
        if version != before + 1:
            raise CorruptLogError(f"{resource} goes from version {before} to {version} at {record.position}")
        versions[resource] = version
        if foreseen is not None and not self._schema.verify:
            self.domain = foreseen.after  # type: ignore[assignment]
            return
        event = Event(
            envelope.organization,
            resource,
            version,
            kind.FromString(record.value),
            envelope.occurred_at_ms,
            envelope.principal,
        )
        domain = self._schema.domain.evolve(self.domain, event)
        if foreseen is not None:
            if domain != foreseen.after:
                raise FoldDifferenceError(f"{event_type} of {resource} at {record.position}")
            domain = foreseen.after
        self.domain = domain

    def _leader_claimed(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        claimed = pb.LeaderClaimed.FromString(record.value)
        if claimed.partition_count != self._schema.partitions:
            raise CorruptLogError(
                f"the log was written for {claimed.partition_count} partitions, this process is set to "
                f"{self._schema.partitions}"
            )
        self.claim = Claim(claimed.node, claimed.address, envelope.epoch, record.position, record.timestamp_ms)

    def _log_beat(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        """Changes nothing; it may carry a request's result."""

    def _inbox_advanced(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        del envelope
        data = pb.InboxAdvanced.FromString(record.value)
        self.inbox[(data.topic, data.partition)] = Watermark(data.position, data.public_seq, data.log_id)

    def _inbox_parked(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        del envelope
        data = pb.InboxParked.FromString(record.value)
        parked = Parked(data.partition, data.position, data.public_seq, data.event_type)
        self.parked = self.parked.set((data.topic, data.resource), parked)

    def _inbox_unparked(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        del envelope
        data = pb.InboxUnparked.FromString(record.value)
        if (data.topic, data.resource) in self.parked:
            self.parked = self.parked.delete((data.topic, data.resource))

    def _task_opened(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        data = pb.TaskOpened.FromString(record.value)
        self.tasks = self.tasks.set(data.task_id, Task(data.task_id, data.kind, data.payload, envelope.organization))
        if self.on_task_opened is not None:
            self.on_task_opened(data.task_id)

    def _task_closed(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        del envelope
        data = pb.TaskClosed.FromString(record.value)
        if data.task_id in self.tasks:
            self.tasks = self.tasks.delete(data.task_id)

    def _timer_set(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        data = pb.TimerSet.FromString(record.value)
        timer = Timer(data.timer_id, data.kind, data.at_ms, data.payload, envelope.organization)
        self.timers[data.timer_id] = timer
        if self.on_timer_set is not None:
            self.on_timer_set(timer)

    def _timer_cleared(self, record: Record, envelope: Stamp | pb.Envelope) -> None:
        del envelope
        self.timers.pop(pb.TimerCleared.FromString(record.value).timer_id, None)
