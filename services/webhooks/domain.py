"""Webhook endpoints and how far their deliveries have come: pure.

For each endpoint and source partition there is a cursor — what is not above it is delivered, filtered out or an
exception — and a capped set of exceptions: deliveries that failed and are due again. Successes are recorded many at a
time, by moving the cursor; nothing is written per attempt. Rules:

* A new endpoint begins where the source logs stood when its creation was asked for; it hears of everything later.
* A disabled endpoint keeps its cursor. Enabled again it goes on from there: nothing is lost, whatever it missed.
* At most 1,000 exceptions of an endpoint are open; then its cursor stops. Dead letters do not count, and the latest
  1,000 of them are kept to be looked at.
* A 410 answer disables at once; so do five days without a single success.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import immutables
from cryptography import x509
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    check_etag,
)
from libs.eventlog import Context, Decision, Event, NewEvent, Public
from libs.names import organization_of
from services.webhooks.catalogue import check_filters

MAX_EXCEPTIONS: Final = 1_000
MAX_DEAD: Final = 1_000
MAX_ENDPOINTS: Final = 100
"""Of one organization."""
DISABLE_AFTER_MS: Final = 5 * 24 * 3_600_000
UPDATABLE: Final = frozenset({"event_types", "ca_pem", "state"})
OPERATOR: Final = "DISABLED_BY_OPERATOR"
GONE: Final = "RECEIVER_GONE"
FAILING: Final = "FAILING_FOR_FIVE_DAYS"

Place = tuple[str, int]
"""Source topic and partition."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One endpoint's progress in one source partition."""

    cursor: int
    """Inclusive: positions up to here are dealt with."""
    exceptions: immutables.Map[int, events.DeliveryException] = field(default_factory=immutables.Map)
    """Open ones by position."""
    dead: immutables.Map[int, events.DeliveryException] = field(default_factory=immutables.Map)
    """The latest that were given up, by position."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint with its progress."""

    image: pb.WebhookEndpoint
    """Without ``delivered_count``, which moves without an event of the endpoint."""
    streams: immutables.Map[Place, Stream]
    delivered: int = 0
    failing_since_ms: int = 0
    """First failure after the last success; 0 while there is none."""

    @property
    def active(self) -> bool:
        """Whether anything may be sent to it."""
        return self.image.state == pb.WebhookEndpoint.STATE_ACTIVE

    @property
    def open_exceptions(self) -> int:
        """Deliveries that failed and are due again."""
        return sum(len(stream.exceptions) for stream in self.streams.values())


@dataclass(frozen=True, slots=True)
class State:
    """One partition's endpoints by name."""

    endpoints: immutables.Map[str, Endpoint] = field(default_factory=immutables.Map)


@dataclass(frozen=True, slots=True)
class CreateEndpoint:
    """The URL is in its normal form; ``starts`` are the ends of the source logs."""

    endpoint: pb.WebhookEndpoint
    starts: tuple[tuple[Place, int], ...]


@dataclass(frozen=True, slots=True)
class UpdateEndpoint:
    """New values for named fields."""

    endpoint: pb.WebhookEndpoint
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteEndpoint:
    """Stop for good; secrets and progress are forgotten."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class Move:
    """What became of deliveries from one source partition."""

    place: Place
    cursor: int
    exceptions: tuple[events.DeliveryException, ...] = ()
    resolved: tuple[int, ...] = ()
    delivered: int = 0


@dataclass(frozen=True, slots=True)
class RecordDeliveries:
    """From the sender. It names the uid: progress of a deleted endpoint is not that of its successor."""

    name: str
    uid: str
    moves: tuple[Move, ...]
    gone: bool = False
    """The receiver answered 410."""


class Webhooks:
    """The domain; see the module for its rules."""

    service = "webhooks"
    event_types: Sequence[type[Message]] = (events.WebhookEndpointSaved, events.DeliveriesRecorded)
    sources: Mapping[str, Sequence[type[Message]]] = {}

    def __init__(self, public_key_of: Callable[[str, str], str]) -> None:
        """``public_key_of(name, uid)`` is deterministic: the key is derived, not made."""
        self._public_key_of = public_key_of

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - all partitions begin empty
        """Nothing."""
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        """See :class:`libs.eventlog.Domain`."""
        match command:
            case CreateEndpoint():
                return self._create(state, command, ctx)
            case UpdateEndpoint():
                return _update(state, command, ctx)
            case DeleteEndpoint():
                return _delete(state, command, ctx)
            case RecordDeliveries():
                return _record(state, command, ctx)
        raise TypeError(f"no such command: {type(command).__name__}")

    def evolve(self, state: State, event: Event) -> State:
        """After-images replace; recorded deliveries move cursors."""
        payload = event.payload
        if isinstance(payload, events.WebhookEndpointSaved):
            return _evolve_saved(state, payload)
        if isinstance(payload, events.DeliveriesRecorded):
            return _evolve_recorded(state, payload, event.occurred_at_ms)
        return state

    def _create(self, state: State, command: CreateEndpoint, ctx: Context) -> Decision:
        wanted = command.endpoint
        if wanted.name in state.endpoints:
            raise AlreadyExistsError("ALREADY_EXISTS", f"{wanted.name} exists", resource=wanted.name)
        check_filters(wanted.event_types)
        check_ca(wanted.ca_pem)
        count = sum(1 for name in state.endpoints if organization_of(name) == ctx.organization)
        if count >= MAX_ENDPOINTS:
            raise ResourceExhaustedError(
                "QUOTA_EXCEEDED",
                f"{ctx.organization} has {count} webhook endpoints and may have {MAX_ENDPOINTS}",
                quota="webhook_endpoints",
                limit=MAX_ENDPOINTS,
            )
        uid = ctx.new_uuid("webhook-endpoint")
        image = pb.WebhookEndpoint(
            name=wanted.name,
            uid=uid,
            url=wanted.url,
            event_types=sorted(set(wanted.event_types)),
            ca_pem=wanted.ca_pem,
            state=pb.WebhookEndpoint.STATE_ACTIVE,
            public_key=self._public_key_of(wanted.name, uid),
            etag=str(ctx.version(wanted.name) + 1),
        )
        image.create_time.FromMilliseconds(ctx.now_ms)
        starts = [
            events.SourceStart(topic=topic, partition=partition, position=position)
            for (topic, partition), position in command.starts
        ]
        saved = events.WebhookEndpointSaved(webhook_endpoint=image, starts=starts)
        # The secret is added by the servicer: no answer that is stored holds one.
        result = pb.CreateWebhookEndpointResponse(webhook_endpoint=image)
        return Decision(events=(_saved_event(saved, "webhook.endpoint.created", ctx),), result=result)


def check_ca(pem: str) -> None:
    """A private CA must be one or more certificates, and nothing else than certificates. Raises INVALID_FIELD."""
    if not pem:
        return
    problem = "holds a private key: send certificates only" if "PRIVATE KEY" in pem else ""
    if not problem:
        try:
            x509.load_pem_x509_certificates(pem.encode())
        except ValueError:
            problem = "must hold PEM certificates"
    if problem:
        raise InvalidArgumentError("INVALID_FIELD", f"ca_pem {problem}", field="webhook_endpoint.ca_pem")


def shown(endpoint: Endpoint) -> pb.WebhookEndpoint:
    """The resource as callers see it."""
    image = pb.WebhookEndpoint()
    image.CopyFrom(endpoint.image)
    image.delivered_count = endpoint.delivered
    return image


def find(state: State, name: str) -> Endpoint:
    """The endpoint of that name. Raises RESOURCE_NOT_FOUND."""
    found = state.endpoints.get(name)
    if found is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return found


def _update(state: State, command: UpdateEndpoint, ctx: Context) -> Decision:
    wanted, paths = command.endpoint, command.paths
    current = find(state, wanted.name)
    check_etag(wanted.etag, current.image.etag, wanted.name)
    unknown = sorted(set(paths) - UPDATABLE)
    if unknown or not paths:
        raise InvalidArgumentError(
            "INVALID_FIELD",
            f"update_mask takes {', '.join(sorted(UPDATABLE))}; another URL is another endpoint",
            field="update_mask",
            value=",".join(unknown)[:200],
        )
    image = pb.WebhookEndpoint()
    image.CopyFrom(current.image)
    if "event_types" in paths:
        check_filters(wanted.event_types)
        del image.event_types[:]
        image.event_types.extend(sorted(set(wanted.event_types)))
    if "ca_pem" in paths:
        check_ca(wanted.ca_pem)
        image.ca_pem = wanted.ca_pem
    change = "webhook.endpoint.updated"
    if "state" in paths and wanted.state != image.state:
        if wanted.state not in {pb.WebhookEndpoint.STATE_ACTIVE, pb.WebhookEndpoint.STATE_DISABLED}:
            raise InvalidArgumentError(
                "INVALID_FIELD", "state takes ACTIVE and DISABLED", field="webhook_endpoint.state"
            )
        image.state = wanted.state
        image.state_reason = "" if wanted.state == pb.WebhookEndpoint.STATE_ACTIVE else OPERATOR
        if wanted.state == pb.WebhookEndpoint.STATE_DISABLED:
            change = "webhook.endpoint.disabled"
    if image == current.image:
        return Decision(result=shown(current))
    image.etag = str(ctx.version(image.name) + 1)
    event = _saved_event(events.WebhookEndpointSaved(webhook_endpoint=image), change, ctx)
    return Decision(events=(event,), result=shown(replace(current, image=image)))


def _delete(state: State, command: DeleteEndpoint, ctx: Context) -> Decision:
    current = find(state, command.name)
    check_etag(command.etag, current.image.etag, command.name)
    image = pb.WebhookEndpoint()
    image.CopyFrom(current.image)
    image.etag = str(ctx.version(image.name) + 1)
    saved = events.WebhookEndpointSaved(webhook_endpoint=image, deleted=True)
    return Decision(events=(_saved_event(saved, "webhook.endpoint.deleted", ctx),), result=Empty())


def _record(state: State, command: RecordDeliveries, ctx: Context) -> Decision:
    current = state.endpoints.get(command.name)
    if current is None or current.image.uid != command.uid:
        return Decision()  # deleted while deliveries were under way
    new: list[NewEvent] = []
    after = current
    for move in command.moves:
        stream = current.streams.get(move.place, Stream(-1))
        recorded = events.DeliveriesRecorded(
            webhook_endpoint=command.name,
            topic=move.place[0],
            partition=move.place[1],
            cursor=max(move.cursor, stream.cursor),
            exceptions=move.exceptions,
            resolved=[position for position in move.resolved if position in stream.exceptions],
            delivered=move.delivered,
        )
        after = _apply(after, recorded, ctx.now_ms)
        # An aggregate of its own: the etag of an endpoint moves only when the endpoint itself changes.
        new.append(NewEvent(ctx.organization, f"{command.name}/deliveries", recorded))
    if after.open_exceptions > MAX_EXCEPTIONS:
        raise FailedPreconditionError(
            "TOO_MANY_EXCEPTIONS",
            f"{command.name} may have {MAX_EXCEPTIONS} deliveries that wait for another attempt",
            resource=command.name,
            limit=MAX_EXCEPTIONS,
        )
    reason = _reason_to_disable(after, command, ctx.now_ms)
    if reason and current.active:
        image = pb.WebhookEndpoint()
        image.CopyFrom(current.image)
        image.state, image.state_reason = pb.WebhookEndpoint.STATE_DISABLED, reason
        image.etag = str(ctx.version(image.name) + 1)
        saved = events.WebhookEndpointSaved(webhook_endpoint=image)
        new.append(_saved_event(saved, "webhook.endpoint.disabled", ctx))
    return Decision(events=tuple(new))


def _reason_to_disable(endpoint: Endpoint, command: RecordDeliveries, now_ms: int) -> str:
    if command.gone:
        return GONE
    since = endpoint.failing_since_ms
    failed_now = any(move.exceptions for move in command.moves)
    return FAILING if failed_now and since and now_ms - since >= DISABLE_AFTER_MS else ""


def _saved_event(saved: events.WebhookEndpointSaved, change: str, ctx: Context) -> NewEvent:
    image = saved.webhook_endpoint
    public = Public(image.name, events.WebhookEndpointChanged(webhook_endpoint=image, change=change))
    return NewEvent(ctx.organization, image.name, saved, (public,))


def _evolve_saved(state: State, saved: events.WebhookEndpointSaved) -> State:
    image = saved.webhook_endpoint
    if saved.deleted:
        return replace(state, endpoints=state.endpoints.delete(image.name))
    current = state.endpoints.get(image.name)
    if current is None or current.image.uid != image.uid:
        # The cursor is inclusive, the start is the first that counts.
        streams = {(start.topic, start.partition): Stream(start.position - 1) for start in saved.starts}
        endpoint = Endpoint(image, immutables.Map(streams))
    else:
        again = image.state == pb.WebhookEndpoint.STATE_ACTIVE and not current.active
        endpoint = replace(current, image=image, failing_since_ms=0 if again else current.failing_since_ms)
    return replace(state, endpoints=state.endpoints.set(image.name, endpoint))


def _evolve_recorded(state: State, recorded: events.DeliveriesRecorded, at_ms: int) -> State:
    current = state.endpoints.get(recorded.webhook_endpoint)
    if current is None:
        return state
    return replace(state, endpoints=state.endpoints.set(current.image.name, _apply(current, recorded, at_ms)))


def _apply(endpoint: Endpoint, recorded: events.DeliveriesRecorded, at_ms: int) -> Endpoint:
    place = (recorded.topic, recorded.partition)
    stream = endpoint.streams.get(place, Stream(-1))
    with stream.exceptions.mutate() as open_ones:
        for position in recorded.resolved:
            open_ones.pop(position, None)
        for each in recorded.exceptions:
            if each.dead:
                open_ones.pop(each.position, None)
            else:
                open_ones[each.position] = each
        exceptions = open_ones.finish()
    dead = _keep_latest(stream.dead, (each for each in recorded.exceptions if each.dead))
    failing_since = endpoint.failing_since_ms
    if recorded.delivered:
        failing_since = 0
    elif recorded.exceptions and not failing_since:
        failing_since = at_ms
    return replace(
        endpoint,
        streams=endpoint.streams.set(place, Stream(recorded.cursor, exceptions, dead)),
        delivered=endpoint.delivered + recorded.delivered,
        failing_since_ms=failing_since,
    )


def _keep_latest(
    dead: immutables.Map[int, events.DeliveryException], more: Iterable[events.DeliveryException]
) -> immutables.Map[int, events.DeliveryException]:
    for each in more:
        dead = dead.set(each.position, each)
    surplus: Any = sorted(dead)[: max(0, len(dead) - MAX_DEAD)]
    for position in surplus:
        dead = dead.delete(position)
    return dead
