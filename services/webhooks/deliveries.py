"""What became of deliveries: cursors, exceptions, dead letters, the delivery log, health. Pure.

Successes are recorded many at a time, by moving the cursor; nothing is written per attempt. Rules:

* At most 1,000 exceptions of an endpoint are open; then its cursor stops. Dead letters do not count, and the latest
  1,000 of each source are kept to be looked at and made again.
* A 410 answer disables at once; so do five days without a single success.
* ``webhook.endpoint.degraded``, ``.opened``, ``.recovered`` and ``.disabled`` tell *other* endpoints how this one
  does, each only when that changes: a failure causes no event that causes a failure that causes an event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final, cast

import immutables
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import FailedPreconditionError
from libs.eventlog import Context, Decision, NewEvent, Public
from services.webhooks.endpoints import saved_event
from services.webhooks.model import (
    DISABLE_AFTER_MS,
    FAILING,
    GONE,
    HEALTH_EVERY_MS,
    MAX_DEAD,
    MAX_EXCEPTIONS,
    MAX_MADE,
    Endpoint,
    RecordDeliveries,
    State,
    Stream,
)

Image = pb.WebhookEndpoint
_BAD: Final = frozenset({Image.HEALTH_DEGRADED, Image.HEALTH_OPEN})


def record(state: State, command: RecordDeliveries, ctx: Context) -> Decision:
    """From the sender, every few hundred milliseconds."""
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
            resolved=[each for each in move.resolved if each in stream.exceptions or each in stream.dead],
            delivered=move.delivered,
            made=move.made,
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
    health = _health_event(current, command.health, ctx)
    if health is not None:
        new.append(health)
    reason = _reason_to_disable(after, command, ctx.now_ms)
    if reason and current.active:
        image = Image()
        image.CopyFrom(current.image)
        image.state, image.state_reason = Image.STATE_DISABLED, reason
        image.etag = str(ctx.version(image.name) + 1)
        saved = events.WebhookEndpointSaved(webhook_endpoint=image)
        new.append(saved_event(saved, "webhook.endpoint.disabled", ctx))
    return Decision(events=tuple(new))


def _health_event(current: Endpoint, reported: int, ctx: Context) -> NewEvent | None:
    """Tells of a change that has come to stay; the first success of a new endpoint is none."""
    before, now = current.health, cast("Image.Health.ValueType", reported)
    if now in {before, Image.HEALTH_UNSPECIFIED} or (now == Image.HEALTH_WELL and before not in _BAD):
        return None
    if ctx.now_ms - current.health_since_ms < HEALTH_EVERY_MS:
        return None
    change = {
        Image.HEALTH_WELL: "webhook.endpoint.recovered",
        Image.HEALTH_DEGRADED: "webhook.endpoint.degraded",
        Image.HEALTH_OPEN: "webhook.endpoint.opened",
    }[now]
    if before == Image.HEALTH_OPEN and now == Image.HEALTH_DEGRADED:
        return None  # on its way back, but not there yet
    image = Image()
    image.CopyFrom(current.image)
    image.health = now
    changed = events.EndpointHealthChanged(webhook_endpoint=image.name, health=now)
    public = Public(image.name, events.WebhookEndpointChanged(webhook_endpoint=image, change=change))
    return NewEvent(ctx.organization, f"{image.name}/deliveries", changed, (public,))


def _reason_to_disable(endpoint: Endpoint, command: RecordDeliveries, now_ms: int) -> str:
    if command.gone:
        return GONE
    since = endpoint.failing_since_ms
    failed_now = any(move.exceptions for move in command.moves)
    return FAILING if failed_now and since and now_ms - since >= DISABLE_AFTER_MS else ""


def evolve_recorded(state: State, recorded: events.DeliveriesRecorded, at_ms: int) -> State:
    """Cursors move, exceptions come and go."""
    current = state.endpoints.get(recorded.webhook_endpoint)
    if current is None:
        return state
    return replace(state, endpoints=state.endpoints.set(current.image.name, _apply(current, recorded, at_ms)))


def evolve_health(state: State, changed: events.EndpointHealthChanged, at_ms: int) -> State:
    """How it does now."""
    current = state.endpoints.get(changed.webhook_endpoint)
    if current is None:
        return state
    endpoint = replace(current, health=changed.health, health_since_ms=at_ms)
    return replace(state, endpoints=state.endpoints.set(changed.webhook_endpoint, endpoint))


def _apply(endpoint: Endpoint, recorded: events.DeliveriesRecorded, at_ms: int) -> Endpoint:
    place = (recorded.topic, recorded.partition)
    stream = endpoint.streams.get(place, Stream(-1))
    dead = stream.dead
    with stream.exceptions.mutate() as open_ones:
        for position in recorded.resolved:
            open_ones.pop(position, None)
            dead = _without(dead, position)
        for each in recorded.exceptions:
            if each.dead:
                open_ones.pop(each.position, None)
            else:
                open_ones[each.position] = each
        exceptions = open_ones.finish()
    dead = _keep_latest(dead, (each for each in recorded.exceptions if each.dead))
    made = (*stream.made, *recorded.made)[-MAX_MADE:] if recorded.made else stream.made
    failing_since = endpoint.failing_since_ms
    if recorded.delivered:
        failing_since = 0
    elif any(not each.held for each in recorded.exceptions) and not failing_since:
        failing_since = at_ms
    moved = replace(stream, cursor=recorded.cursor, exceptions=exceptions, dead=dead, made=made)
    return replace(
        endpoint,
        streams=endpoint.streams.set(place, moved),
        delivered=endpoint.delivered + recorded.delivered,
        failing_since_ms=failing_since,
    )


def _without(
    dead: immutables.Map[int, events.DeliveryException], position: int
) -> immutables.Map[int, events.DeliveryException]:
    return dead.delete(position) if position in dead else dead


def _keep_latest(
    dead: immutables.Map[int, events.DeliveryException], more: Iterable[events.DeliveryException]
) -> immutables.Map[int, events.DeliveryException]:
    for each in more:
        dead = dead.set(each.position, each)
    surplus: Any = sorted(dead)[: max(0, len(dead) - MAX_DEAD)]
    for position in surplus:
        dead = dead.delete(position)
    return dead
