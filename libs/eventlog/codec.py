"""Records to and from bytes. Envelope bytes are built once and hashed once, on both sides of the log.

Header `envelope` holds the serialized `Envelope`, header `event-type` the full proto name of the value. A public
record also names the log it came from in `log-id`, so that a reader can tell a recreated log from the old one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from hashlib import sha256

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from groundswell.eventlog.v1 import eventlog_pb2 as pb

from libs.eventlog.ports import Record

ENVELOPE = "envelope"
EVENT_TYPE = "event-type"
LOG_ID = "log-id"

RUNTIME_TYPES: Mapping[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        pb.LeaderClaimed,
        pb.LogBeat,
        pb.InboxAdvanced,
        pb.InboxParked,
        pb.InboxUnparked,
        pb.TaskOpened,
        pb.TaskClosed,
        pb.TimerSet,
        pb.TimerCleared,
    )
}


class CorruptLogError(Exception):
    """The own log says something that cannot be: the partition must stop, never skip."""


def types_by_name(types: Iterable[type[Message]]) -> dict[str, type[Message]]:
    """Message classes by the full name that `event-type` carries."""
    return {kind.DESCRIPTOR.full_name: kind for kind in types}


_type_headers: dict[type[Message], bytes] = {}


def type_header(payload: Message) -> bytes:
    """Value of `event-type`."""
    kind = type(payload)
    found = _type_headers.get(kind)
    if found is None:
        found = _type_headers[kind] = kind.DESCRIPTOR.full_name.encode()
    return found


def new_id() -> str:
    """A random id, 32 hexadecimal digits."""
    return secrets.token_hex(16)


def record_hash(envelope: bytes, value: bytes) -> bytes:
    """Link of the audit chain."""
    return sha256(envelope + value).digest()


def header(record: Record, name: str) -> bytes:
    """First header of that name, empty when there is none."""
    for key, value in record.headers:
        if key == name:
            return value
    return b""


def read_headers(record: Record) -> tuple[bytes, str]:
    """(bytes of the envelope, event type). Raises `DecodeError`."""
    envelope_bytes = b""
    event_type = b""
    for key, value in record.headers:
        if key == ENVELOPE:
            envelope_bytes = value
        elif key == EVENT_TYPE:
            event_type = value
    if not envelope_bytes or not event_type:
        raise DecodeError("record has no envelope or no event-type header")
    return envelope_bytes, event_type.decode("utf-8", "replace")


def read_envelope(record: Record) -> tuple[pb.Envelope, bytes, str]:
    """(envelope, its bytes, event type). Raises `DecodeError`."""
    envelope_bytes, event_type = read_headers(record)
    return pb.Envelope.FromString(envelope_bytes), envelope_bytes, event_type


def decode_result(type_name: str, data: bytes) -> Message | None:
    """The stored answer of a request; its type is known to whoever answers that request."""
    if not type_name:
        return None
    descriptor = descriptor_pool.Default().FindMessageTypeByName(type_name)
    result: Message = message_factory.GetMessageClass(descriptor)()
    result.ParseFromString(data)
    return result
