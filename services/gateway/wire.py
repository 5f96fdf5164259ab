"""Protobuf written by hand, where a message object for a few fields of every check-in would cost more than the rest.

Fields of one message may be written in parts, one after the other (the encoding guide of Protocol Buffers).
"""

from __future__ import annotations

from typing import Final

from groundswell.device.v1 import device_pb2

_LENGTH_DELIMITED: Final = 2
_Item = device_pb2.CheckInItem


def varint(number: int) -> bytes:
    """Base 128, lowest group first; for numbers below 2^64."""
    if number < 0x80:
        return bytes((number,))
    groups = []
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def tag(field: int, wire_type: int = _LENGTH_DELIMITED) -> bytes:
    """What stands before a field's value."""
    return varint(field << 3 | wire_type)


_INSTANCE: Final = tag(_Item.INSTANCE_FIELD_NUMBER)
_BOOT_ID: Final = tag(_Item.BOOT_ID_FIELD_NUMBER)
_COUNTER: Final = tag(_Item.COUNTER_FIELD_NUMBER, 0)
_BODY_SHA256: Final = tag(_Item.BODY_SHA256_FIELD_NUMBER)
IDLE: Final = tag(_Item.IDLE_FIELD_NUMBER, 0) + b"\x01"
"""The field `idle`, set."""


def agent_said(instance: str, boot_id: str, counter: int, body_sha256: bytes) -> bytes:
    """The fields of a CheckInItem that differ from one check-in to the next; texts of at most 127 ASCII characters."""
    return b"%b%c%b%b%c%b%b%b%b%c%b" % (
        _INSTANCE,
        len(instance),
        instance.encode(),
        _BOOT_ID,
        len(boot_id),
        boot_id.encode(),
        _COUNTER,
        varint(counter),
        _BODY_SHA256,
        len(body_sha256),
        body_sha256,
    )
