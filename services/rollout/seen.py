"""What Redis holds of a device: when it was last seen, and the receipt of that check-in, in one value.

Thirteen decimal digits of milliseconds, then the serialized receipt, which may be missing.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from google.protobuf.message import DecodeError
from groundswell.device.v1 import device_pb2

TIME_DIGITS: Final = 13


class Seen(NamedTuple):
    """``receipt`` is None when none was stored, or what was stored is none: gateways of others write them too."""

    at_ms: int
    receipt: device_pb2.Receipt | None


def written_time(at_ms: int) -> bytes:
    """The time as it is stored."""
    return b"%013d" % at_ms


def read(stored: bytes) -> Seen | None:
    """None when these bytes are nothing of ours."""
    time, receipt = stored[:TIME_DIGITS], stored[TIME_DIGITS:]
    if len(time) != TIME_DIGITS or not time.isdigit():
        return None
    try:
        return Seen(int(time), device_pb2.Receipt.FromString(receipt) if receipt else None)
    except DecodeError:
        return Seen(int(time), None)
