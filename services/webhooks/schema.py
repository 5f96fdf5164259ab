"""JSON Schemas (2020-12) of bodies, made from the contracts of the records that bodies are made from. Pure.

A schema describes the whole body of one event type in one payload version. It follows proto JSON as ``render`` writes
it: names in camelCase, 64-bit numbers as strings, enums by name, default values left out. It is open: a later release
may add members, so a receiver that validates keeps working. Examples are not written by hand: they are rendered.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.rollout.v1 import events_pb2 as rollout_events

from services.webhooks.catalogue import TEST_FIRE, description_of
from services.webhooks.render import PAYLOAD_VERSIONS, SECRET_FIELDS, TYPES, WebhookEvent, encode, render, timestamp

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_EXAMPLE_MS: Final = 1_767_225_600_123
_NOUNS: Final[dict[str, tuple[str, ...]]] = {
    "AttemptChanged": ("device",),
    "CaCertificateChanged": ("ca_certificate", "ca"),
    "DeviceCertificateChanged": ("device_certificate", "certificate"),
    "DeviceReported": ("device", "identity"),
    "GraphChanged": ("release",),
    "WebhookEndpointChanged": ("webhook",),
}
"""Record types whose types begin with something else than their own name."""
_ATTEMPT: Final = re.compile(r"device\.(claimed_release|update_.*|rolled_back)\Z")
_F: Final = FieldDescriptor
_STRINGS: Final[dict[str, dict[str, Any]]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?s$"},
    "google.protobuf.FieldMask": {"type": "string"},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Value": {},
    "google.protobuf.ListValue": {"type": "array"},
    "google.protobuf.Any": {"type": "object"},
    "google.protobuf.Empty": {"type": "object"},
}
_NUMBER: Final = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
_INTEGER: Final = {"type": "integer"}
_NATURAL: Final = {"type": "integer", "minimum": 0}
_LONG: Final = {"type": "string", "pattern": "^-?[0-9]+$"}
_NATURAL_LONG: Final = {"type": "string", "pattern": "^[0-9]+$"}
_SCALARS: Final[dict[int, dict[str, Any]]] = {
    _F.TYPE_STRING: {"type": "string"},
    _F.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    _F.TYPE_BOOL: {"type": "boolean"},
    _F.TYPE_DOUBLE: _NUMBER,
    _F.TYPE_FLOAT: _NUMBER,
    _F.TYPE_INT32: _INTEGER,
    _F.TYPE_SINT32: _INTEGER,
    _F.TYPE_SFIXED32: _INTEGER,
    _F.TYPE_UINT32: _NATURAL,
    _F.TYPE_FIXED32: _NATURAL,
    _F.TYPE_INT64: _LONG,
    _F.TYPE_SINT64: _LONG,
    _F.TYPE_SFIXED64: _LONG,
    _F.TYPE_UINT64: _NATURAL_LONG,
    _F.TYPE_FIXED64: _NATURAL_LONG,
}


def records_of(event_type: str) -> tuple[type[Message], ...]:
    """Record types that may carry the event type, by their names; none when the type is of no kind we know."""
    if _ATTEMPT.match(event_type):
        return (rollout_events.AttemptChanged,)
    noun = event_type.partition(".")[0]
    found = []
    for kind in TYPES.values():
        name = kind.DESCRIPTOR.name
        own = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removesuffix("Changed")).lower()
        if noun in _NOUNS.get(name, (own,)):
            found.append(kind)
    if event_type == "device.created":
        found = [registry_events.DeviceChanged]
    return tuple(found)


@functools.lru_cache(maxsize=1_000)
def schema_text(event_type: str, version: int) -> str:
    """The schema as it is served."""
    return json.dumps(schema_of(event_type, version), sort_keys=True, indent=1)


def schema_of(event_type: str, version: int) -> dict[str, Any]:
    """The schema of a type's body. A type nobody knows has a general one: its ``data`` is some object."""
    if version not in PAYLOAD_VERSIONS:
        raise ValueError(f"there is no payload version {version}")
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {
        "type": {"const": event_type},
        "timestamp": {"type": "string", "format": "date-time", "description": "When it happened."},
        "event_id": {"type": "string", "description": "The same at every endpoint; `webhook-id` is per endpoint."},
        "organization": {"type": "string"},
        "resource": {"type": "string", "description": "Full name of the resource that it happened to."},
        "data": _data(event_type, definitions),
        "data_omitted": {"const": True, "description": "The body would be too large: read the resource."},
    }
    required = ["type", "timestamp", "event_id", "organization", "resource"]
    if version >= 2 and event_type != TEST_FIRE:
        properties |= {
            "version": {"const": version},
            "product": {"type": "string", "description": "Full name, empty when it is about no product."},
            "cohorts": {"type": "array", "items": {"type": "string"}, "maxItems": 100},
        }
        required += ["version", "product", "cohorts"]
    schema: dict[str, Any] = {
        "$schema": DIALECT,
        "$id": f"urn:groundswell:webhook:{event_type}:{version}",
        "title": event_type,
        "description": description_of(event_type),
        "type": "object",
        "properties": properties,
        "required": required,
        "oneOf": [{"required": ["data"]}, {"required": ["data_omitted"]}],
    }
    if definitions:
        schema["$defs"] = definitions
    return schema


def closed(schema: Any) -> Any:
    """The same with no member allowed that is not described: what is sent must be in the schema."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: closed(value) for key, value in schema.items()}
    if isinstance(copy.get("properties"), dict) and copy.get("type") == "object":
        copy.setdefault("additionalProperties", False)
    return copy


def _data(event_type: str, definitions: dict[str, Any]) -> dict[str, Any]:
    if event_type == TEST_FIRE:
        return {
            "type": "object",
            "properties": {
                "challenge": {"type": "string", "description": "Answer 2xx with JSON that repeats it as `challenge`."},
                "webhookEndpoint": {"type": "string"},
            },
            "required": ["challenge", "webhookEndpoint"],
        }
    kinds = records_of(event_type)
    if not kinds:
        return {"type": "object"}
    found = [_object(kind.DESCRIPTOR, definitions, without=frozenset({"change"})) for kind in kinds]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _object(kind: Any, definitions: dict[str, Any], without: frozenset[str] = frozenset()) -> dict[str, Any]:
    properties = {
        field.json_name: _field(field, definitions)
        for field in kind.fields
        if field.name not in without and field.json_name not in SECRET_FIELDS
    }
    return {"type": "object", "properties": properties}


def _field(field: FieldDescriptor, definitions: dict[str, Any]) -> dict[str, Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _single(kind.fields_by_name["value"], definitions)}
    single = _single(field, definitions)
    return {"type": "array", "items": single} if field.is_repeated else single


def _single(field: FieldDescriptor, definitions: dict[str, Any]) -> dict[str, Any]:
    if field.enum_type is not None:
        names = [value.name for value in field.enum_type.values]
        # A value that a later release adds is written as its number by this one.
        return {"anyOf": [{"enum": names}, {"type": "integer"}]}
    kind = field.message_type
    if kind is None:
        return dict(_SCALARS[field.type])
    known = _STRINGS.get(kind.full_name)
    if known is not None:
        return dict(known)
    if kind.full_name not in definitions:
        definitions[kind.full_name] = {}  # it may hold itself
        definitions[kind.full_name] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{kind.full_name}"}


@functools.lru_cache(maxsize=1_000)
def example_text(event_type: str, version: int) -> str:
    """A body of the type, rendered from a record with sample values."""
    if event_type == TEST_FIRE:
        return fire_body("organizations/acme/webhookEndpoints/ops", "acme", "e-1", _EXAMPLE_MS, "a-nonce").decode()
    kinds = records_of(event_type)
    payload: Any = (kinds or (registry_events.OrganizationChanged,))[0]()
    if kinds:
        _fill(payload, 3)
        payload.change = event_type
    resource = "organizations/acme/products/thermostat/devices/d-1"
    return render(WebhookEvent(event_type, "e-1", "acme", resource, _EXAMPLE_MS, payload), version).decode()


def fire_body(endpoint: str, organization: str, event_id: str, at_ms: int, nonce: str) -> bytes:
    """What verifies an endpoint: the same in every payload version, because it comes before any choice."""
    return encode(
        {
            "type": TEST_FIRE,
            "timestamp": timestamp(at_ms),
            "event_id": event_id,
            "organization": organization,
            "resource": endpoint,
            "data": {"challenge": nonce, "webhookEndpoint": endpoint},
        }
    )


_SAMPLES: Final[dict[int, Any]] = {_F.TYPE_STRING: "text", _F.TYPE_BYTES: b"bytes", _F.TYPE_BOOL: True}


def _fill(message: Any, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            continue
        if kind is not None:
            if not depth or not kind.full_name.startswith(("groundswell.", "google.protobuf.Timestamp")):
                continue
            target = getattr(message, field.name)
            inner = target.add() if field.is_repeated else target
            inner.SetInParent()
            if kind.full_name == "google.protobuf.Timestamp":
                inner.FromMilliseconds(_EXAMPLE_MS)
            else:
                _fill(inner, depth - 1)
            continue
        enum = field.enum_type
        value = _SAMPLES.get(field.type, 1) if enum is None else enum.values[-1].number
        if field.is_repeated:
            getattr(message, field.name).append(value)
        elif field.containing_oneof is None or field.containing_oneof.fields[0].name == field.name:
            setattr(message, field.name, value)
