"""Maintenance windows: when a product's devices may be granted updates. Pure: the moment comes in.

A window opens once for each local date that its weekdays name, at the first moment that local clocks show its start
minute, and stays open for its length in real time. So the hour that a change of clocks repeats opens nothing twice, and
the hour that it skips opens at the moment at which it would have been. A window of 24 hours ends when the next one
opens, so that a day of 25 hours has no gap.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo

import msgspec
from groundswell.registry.v1 import registry_pb2

DAY_MS: Final = 86_400_000
UNKNOWN_ZONE_MS: Final = 60_000
"""A time zone that this installation does not know opens nothing: better late than at the wrong hour."""
_EVERY_DAY: Final = frozenset(range(1, 8))


class Window(msgspec.Struct, frozen=True, gc=False):
    """When grants are given, in local time."""

    time_zone: str
    start_minute: int
    length_ms: int
    weekdays: frozenset[int]


def window_of(policy: registry_pb2.ConfigurationPolicy) -> Window | None:
    """The window of a policy; None means always open."""
    if not policy.HasField("maintenance_window"):
        return None
    it = policy.maintenance_window
    length = it.length.seconds * 1000 + it.length.nanos // 1_000_000
    return Window(it.time_zone or "UTC", it.start_minute, length, frozenset(it.weekdays) or _EVERY_DAY)


def closed_for_ms(window: Window | None, now_ms: int) -> int:
    """Milliseconds until it opens; 0 while it is open."""
    if window is None or (window.length_ms >= DAY_MS and window.weekdays == _EVERY_DAY):
        return 0
    try:
        zone = ZoneInfo(window.time_zone)
    except (KeyError, OSError, ValueError):
        return UNKNOWN_ZONE_MS
    today = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(zone).date()
    opening = -1
    for offset in range(-2, 10):
        day = today + timedelta(days=offset)
        if day.isoweekday() not in window.weekdays:
            continue
        opens = _opens_ms(window, zone, day)
        if opens > now_ms:
            opening = opens
            break
        if now_ms < _closes_ms(window, zone, day, opens):
            return 0
    return opening - now_ms


def _opens_ms(window: Window, zone: ZoneInfo, day: date) -> int:
    at = datetime.combine(day, time(window.start_minute // 60, window.start_minute % 60), zone)
    return round(at.timestamp() * 1000)


def _closes_ms(window: Window, zone: ZoneInfo, day: date, opens: int) -> int:
    closes = opens + window.length_ms
    following = day + timedelta(days=1)
    if window.length_ms >= DAY_MS and following.isoweekday() in window.weekdays:
        closes = max(closes, _opens_ms(window, zone, following))
    return closes
