"""From a public record to an event type and a body. Pure; the same record gives the same bytes for ever.

A delivery is stored as a position and rendered anew at every attempt, so what is said here under a renderer version
must never change; another rendering gets another number. A record of a type that this build does not know gives None.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.pki.v1 import events_pb2 as pki_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.webhooks.v1 import events_pb2 as webhooks_events

from libs.eventlog.codec import read_envelope
from libs.eventlog.ports import Record
from services.webhooks import scope

MAX_BODY: Final = 64 * 1024
SOURCES: Final = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
SECRET_FIELDS: Final = frozenset({"secretSha256", "previousSecretSha256"})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_EVENTS: Final = (
    registry_events,
    pki_events,
    artifacts_events,
    releases_events,
    rollout_events,
    webhooks_events,
)


def _public_types() -> dict[str, type[Message]]:
    """Record types with a ``change``, found in the contracts themselves: a new one needs no entry here."""
    found: dict[str, type[Message]] = {}
    for module in _EVENTS:
        for name, descriptor in module.DESCRIPTOR.message_types_by_name.items():
            if "change" in descriptor.fields_by_name and not name.endswith("Saved"):
                found[descriptor.full_name] = getattr(module, name)
    return found


TYPES: Final = _public_types()


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """What a record means to endpoints. The body is rendered only for those that want it."""

    event_type: str
    event_id: str
    organization: str
    resource: str
    occurred_at_ms: int
    payload: Message
    bodies: dict[int, bytes] = field(default_factory=dict, compare=False, repr=False)
    """By version: endpoints that get the same event share the work of rendering it."""


def read_event(record: Record) -> WebhookEvent | None:
    """The event of a record (``event_type`` empty: nothing to tell), or None when this build cannot read it."""
    try:
        envelope, _, type_name = read_envelope(record)
        kind = TYPES.get(type_name)
        if kind is None:
            return None
        payload: Any = kind.FromString(record.value)
    except DecodeError:
        return None
    return WebhookEvent(
        payload.change,
        envelope.event_id,
        envelope.organization,
        envelope.resource,
        envelope.occurred_at_ms,
        payload,
    )


def render(event: WebhookEvent, version: int = 0) -> bytes:
    """The body in a version; 0 means that of endpoints from before there were several."""
    body = event.bodies.get(version or 1)
    if body is None:
        body = event.bodies[version or 1] = PAYLOAD_VERSIONS[version or 1](event)
    return body


def _version_1(event: WebhookEvent) -> bytes:
    """Compact JSON, sorted keys. Above the size limit without ``data``: then read the resource."""
    return _bounded(_document(event), event)


def _version_2(event: WebhookEvent) -> bytes:
    """As version 1, and says what it is about without the need to take names apart."""
    more = {
        "version": 2,
        "product": scope.product(event.resource),
        "cohorts": sorted(scope.cohorts(event.resource, event.payload))[:100],
    }
    return _bounded(_document(event) | more, event)


PAYLOAD_VERSIONS: Final[dict[int, Callable[[WebhookEvent], bytes]]] = {1: _version_1, 2: _version_2}
"""Each is pinned by endpoints and never changes; another rendering gets another number."""


def _document(event: WebhookEvent) -> dict[str, Any]:
    return {
        "type": event.event_type,
        "timestamp": timestamp(event.occurred_at_ms),
        "event_id": event.event_id,
        "organization": event.organization,
        "resource": event.resource,
    }


def _bounded(document: dict[str, Any], event: WebhookEvent) -> bytes:
    body = encode(document | {"data": _data(event.payload)})
    return body if len(body) <= MAX_BODY else encode(document | {"data_omitted": True})


def timestamp(at_ms: int) -> str:
    """RFC 3339 in UTC with milliseconds. By addition: floating point would round some of them."""
    seconds, milliseconds = divmod(at_ms, 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=1024)
def _second(at_s: int) -> str:
    return (_EPOCH + timedelta(seconds=at_s)).isoformat(timespec="seconds").removesuffix("+00:00")


def _data(payload: Message) -> Any:
    image = MessageToDict(payload)
    image.pop("change", None)
    return _without_secrets(image)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if key not in SECRET_FIELDS}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return value


def encode(document: dict[str, Any]) -> bytes:
    """Compact JSON, sorted keys."""
    return _ENCODER.encode(document).encode()
