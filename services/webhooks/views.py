"""Deliveries, replays and event types as callers see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import InvalidArgumentError
from services.webhooks.catalogue import EVENT_TYPES, OWN_PREFIX, description_of, since
from services.webhooks.model import Endpoint, Place
from services.webhooks.render import PAYLOAD_VERSIONS
from services.webhooks.schema import example_text, schema_text


def delivery_name(endpoint: str, identifier: str) -> str:
    """Resource name of a delivery."""
    return f"{endpoint}/deliveries/{identifier}"


def source_text(place: Place, position: int) -> str:
    """Source of an event as people read it."""
    return f"{place[0]}/{place[1]}/{position}"


def exception_as_delivery(endpoint: str, place: Place, exception: events.DeliveryException) -> pb.Delivery:
    """A recorded exception as callers see it."""
    next_time = None
    if not exception.dead and not exception.held:
        next_time = Timestamp()
        next_time.FromMilliseconds(exception.next_at_ms)
    return pb.Delivery(
        name=delivery_name(endpoint, exception.webhook_id),
        event_type=exception.event_type,
        state=pb.Delivery.STATE_DEAD if exception.dead else pb.Delivery.STATE_PENDING,
        attempt_count=exception.attempt_count,
        last_status=exception.last_status,
        last_error=exception.last_error,
        next_time=next_time,
        source=source_text(place, exception.position),
        attempts=exception.attempts,
        order_key=exception.order_key,
        sequence=exception.sequence,
        held=exception.held,
        last_attempt_time=exception.attempts[-1].time if exception.attempts else None,
    )


def made_as_delivery(endpoint: str, place: Place, made: events.DeliveryMade) -> pb.Delivery:
    """A delivery that succeeded as callers see it."""
    return pb.Delivery(
        name=delivery_name(endpoint, made.webhook_id),
        event_type=made.event_type,
        state=pb.Delivery.STATE_SUCCEEDED,
        attempt_count=made.attempt_count,
        last_status=made.attempts[-1].status if made.attempts else 0,
        source=source_text(place, made.position),
        attempts=made.attempts,
        order_key=made.order_key,
        sequence=made.sequence,
        last_attempt_time=made.attempts[-1].time if made.attempts else None,
    )


def deliveries(name: str, endpoint: Endpoint) -> dict[str, pb.Delivery]:
    """All that is kept, by name: waiting, dead, and the latest that were made. A waiting one wins over its past."""
    found: dict[str, pb.Delivery] = {}
    for place, stream in endpoint.streams.items():
        every: Iterable[pb.Delivery] = (
            *(made_as_delivery(name, place, made) for made in stream.made),
            *(exception_as_delivery(name, place, each) for each in stream.dead.values()),
            *(exception_as_delivery(name, place, each) for each in stream.exceptions.values()),
        )
        found.update((each.name, each) for each in every)
    return found


def without_attempts(delivery: pb.Delivery) -> pb.Delivery:
    """For lists: what receivers answered is read one by one."""
    delivery.ClearField("attempts")
    return delivery


def check_version(version: int) -> int:
    """A payload version, the latest for 0. Raises INVALID_FIELD."""
    if version and version not in PAYLOAD_VERSIONS:
        known = ", ".join(map(str, PAYLOAD_VERSIONS))
        raise InvalidArgumentError("INVALID_FIELD", f"payload_version must be one of {known}", field="payload_version")
    return version or max(PAYLOAD_VERSIONS)


def event_type(name: str, version: int, *, whole: bool) -> pb.EventType:
    """An entry of the catalogue; ``whole`` with schema and example."""
    return pb.EventType(
        name=name,
        description=description_of(name),
        since=since(name),
        payload_versions=sorted(PAYLOAD_VERSIONS),
        opt_in=name.startswith(OWN_PREFIX),
        schema=schema_text(name, version) if whole else "",
        example=example_text(name, version) if whole else "",
    )


def catalogue(version: int, *, whole: bool) -> Iterator[tuple[str, pb.EventType]]:
    """Every type that is described."""
    return ((name, event_type(name, version, whole=whole)) for name in EVENT_TYPES)
