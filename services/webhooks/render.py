"""From a public record to an event type and a body. Pure; the same record gives the same bytes for ever.

A delivery is stored as a position and rendered anew at every attempt, so what is said here under a renderer version
must never change; another rendering gets another number. A record of a type that this build does not know gives None.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.pki.v1 import events_pb2 as pki_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.rollout.v1 import events_pb2 as rollout_events

from libs.eventlog.codec import read_envelope, types_by_name
from libs.eventlog.ports import Record

VERSION: Final = 1
MAX_BODY: Final = 64 * 1024
SOURCES: Final = ("registry", "pki", "artifacts", "releases", "rollout")
_SECRET_FIELDS: Final = frozenset({"secretSha256", "previousSecretSha256"})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

TYPES: Final[dict[str, type[Message]]] = types_by_name(
    (
        registry_events.OrganizationChanged,
        registry_events.ProductChanged,
        registry_events.CohortChanged,
        registry_events.DeviceChanged,
        registry_events.MemberChanged,
        registry_events.ApiKeyChanged,
        registry_events.GatewayChanged,
        registry_events.RoleChanged,
        pki_events.CaCertificateChanged,
        pki_events.DeviceCertificateChanged,
        pki_events.IssuingCaChanged,
        artifacts_events.SigningKeyChanged,
        artifacts_events.BundleChanged,
        releases_events.GraphChanged,
        releases_events.BundleOverrideChanged,
        rollout_events.RolloutChanged,
        rollout_events.AttemptChanged,
        rollout_events.DeviceReported,
    )
)


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """What a record means to endpoints. The body is rendered only for those that want it."""

    event_type: str
    event_id: str
    organization: str
    resource: str
    occurred_at_ms: int
    payload: Message


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


def render(event: WebhookEvent) -> bytes:
    """Version 1: compact JSON, sorted keys. Above the size limit without ``data``: then read the resource."""
    document = {
        "type": event.event_type,
        "timestamp": timestamp(event.occurred_at_ms),
        "event_id": event.event_id,
        "organization": event.organization,
        "resource": event.resource,
        "data": _data(event.payload),
    }
    body = _encode(document)
    if len(body) <= MAX_BODY:
        return body
    del document["data"]
    return _encode(document | {"data_omitted": True})


def timestamp(at_ms: int) -> str:
    """RFC 3339 in UTC with milliseconds. By addition: floating point would round some of them."""
    return (_EPOCH + timedelta(milliseconds=at_ms)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _data(payload: Message) -> Any:
    image = MessageToDict(payload)
    image.pop("change", None)
    return _without_secrets(image)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if key not in _SECRET_FIELDS}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return value


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
