"""What a service author sees of the event log: commands in, decisions out, events folded.

A service is a :class:`Domain`: a pure triple of ``initial_state``, ``decide`` and ``evolve`` over one partition's
state. The runtime owns everything else: leadership, group commit, read-back, ``request_id`` replay, the inbox of
foreign public records, tasks, timers and the audit chain. Invariants a service may rely on:

* ``decide`` sees a state that is the fold of the committed log plus the events decided earlier in the same batch;
* an answer is given only after its events have been read back and folded (or replayed from the log);
* a decision's events, public records, tasks, timers and inbox watermark are one transaction, or nothing;
* ``now_ms`` never falls within a partition.

What is made for every event is a msgspec struct: as frozen as a dataclass, and made in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
from google.protobuf.message import Message

S = TypeVar("S")


class Public(msgspec.Struct, frozen=True, gc=False):
    """A public record: a complete after-image that other services fold."""

    resource: str
    """Resource name the record speaks of."""
    payload: Message


class NewEvent(msgspec.Struct, frozen=True, gc=False):
    """One private event that a decision appends, with the public records it causes."""

    organization: str
    """Routing key; must map to the partition of the command."""
    resource: str
    """Name of the aggregate; its version grows by one with each event."""
    payload: Message
    public: tuple[Public, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """Outgoing work. ``task_id`` is unique in the partition, so opening it twice is a no-op."""

    task_id: str
    kind: str
    payload: bytes = b""
    organization: str = ""


@dataclass(frozen=True, slots=True)
class Timer:
    """Not before ``at_ms``: fires ``TimerFired(kind, timer_id, payload)`` as a command. Setting it again moves it."""

    timer_id: str
    kind: str
    at_ms: int
    payload: bytes = b""
    organization: str = ""


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What ``decide`` returns. Empty events and a result is an answer without a write."""

    events: tuple[NewEvent, ...] = ()
    result: Message | None = None
    """Answer to the caller; stored with the last event when the command has a request id."""
    open_tasks: tuple[Task, ...] = ()
    close_tasks: tuple[str, ...] = ()
    set_timers: tuple[Timer, ...] = ()
    clear_timers: tuple[str, ...] = ()
    folded: tuple[object, ...] = ()
    """The state after each of ``events``, from a ``decide`` that has folded them itself: they are not folded again."""

    def replace(self, **changes: Any) -> Decision:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)


class Event(msgspec.Struct, frozen=True, gc=False):
    """A private event as ``evolve`` sees it.

    Nothing in it is known only after the decision, so the fold ahead of the commit is the fold of the log.
    """

    organization: str
    resource: str
    version: int
    """Aggregate version after this event."""
    payload: Message
    occurred_at_ms: int
    principal: str


class Foreign(msgspec.Struct, frozen=True, gc=False):
    """A public record of another service, understood by the runtime (its type is one the domain named)."""

    service: str
    topic: str
    partition: int
    position: int
    public_seq: int
    organization: str
    resource: str
    payload: Message
    occurred_at_ms: int


class TimerFired(msgspec.Struct, frozen=True, gc=False):
    """Command payload made by the leader's clock. The runtime clears the timer in the same transaction."""

    timer_id: str
    kind: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Command:
    """A command on its way to the leader of ``organization``'s partition."""

    organization: str
    payload: object
    """Service-defined frozen value; ``decide`` dispatches on its type."""
    principal: str = ""
    request_id: str = ""
    """Client's idempotency key (UUID); empty for commands with natural keys."""
    request_digest: bytes = b""
    """SHA-256 of the request; the same id with another digest is refused."""
    trace_parent: str = ""


class Context(Protocol):
    """Inputs of a decision that are neither state nor command."""

    @property
    def now_ms(self) -> int:
        """max(wall clock, occurred-at of the last event), milliseconds."""

    @property
    def organization(self) -> str: ...

    @property
    def principal(self) -> str: ...

    def new_uuid(self, purpose: str = "") -> str:
        """A server-made UUID, fresh per command and purpose (derived from the command's own random id)."""

    def version(self, resource: str) -> int:
        """Current version of an aggregate, 0 when it has no event; counts this batch's events, not this decision's."""

    def parked(self, resource: str) -> bool:
        """True while a foreign record of the resource is not understood."""


class Domain(Protocol[S]):
    """A service's pure core. All methods are synchronous and deterministic."""

    service: str
    """Service name as in topics: ``<env>.<service>.events.v1``."""

    event_types: Sequence[type[Message]]
    """All private event types this build understands. An unknown one on the own log stops the partition."""

    sources: Mapping[str, Sequence[type[Message]]]
    """Inbox: foreign service name -> public record types understood. Same partition index feeds same index."""

    def initial_state(self, partition: int) -> S: ...

    def decide(self, state: S, command: object, ctx: Context) -> Decision:
        """Raises ``libs.errors.DomainError`` to refuse. Receives service commands, ``Foreign`` and ``TimerFired``."""

    def evolve(self, state: S, event: Event) -> S:
        """Returns the state after the event; never mutates, never fails on an event that ``decide`` made."""


@dataclass(frozen=True, slots=True)
class Token:
    """Where a partition's log stood: proof for read-your-writes, opaque to clients (``str`` form in metadata)."""

    service: str
    partition: int
    log_id: str
    position: int
    public_seq: int

    def __str__(self) -> str:
        return f"{self.service}/{self.partition}/{self.log_id}/{self.position}/{self.public_seq}"


@dataclass(frozen=True, slots=True)
class Committed:
    """Answer of ``submit`` after read-back."""

    result: Message | None
    token: Token
    replayed: bool = False
    """True when the answer came from the log (a repeated request id)."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A consistent committed view of one partition: the root does not move under the reader."""

    state: object
    token: Token
    versions: Mapping[str, int] = field(default_factory=dict)
    """Aggregate versions (etags)."""
    open_tasks: Mapping[str, Task] = field(default_factory=dict)
    """Outgoing work that is not done yet, by task id; for diagnostics."""
    parked: frozenset[str] = frozenset()
    """Foreign resources whose last record is not understood."""
