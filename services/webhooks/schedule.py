"""When a delivery that failed is due again. Pure.

An attempt that fails for the n-th time is followed by the n-th step; after the last there is none and the delivery is
dead. Jitter is derived from the delivery's id, so that a restart computes the same times and tests need no random
source, and yet deliveries that failed together do not come back together.
"""

from __future__ import annotations

import email.utils
import hashlib
from typing import Final

SECOND: Final = 1_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
STEPS_MS: Final = (
    0,
    5 * SECOND,
    5 * MINUTE,
    30 * MINUTE,
    2 * HOUR,
    5 * HOUR,
    10 * HOUR,
    14 * HOUR,
    20 * HOUR,
    24 * HOUR,
)
"""Wait before each attempt. Their number is the number of attempts."""
JITTER: Final = 0.2
THROTTLED_AT_LEAST_MS: Final = MINUTE
"""After 429 or a time-out the receiver is overloaded: a quick retry makes it worse."""


def jittered_step(webhook_id: str, attempts_made: int) -> int:
    """Milliseconds to the next attempt: the step ±20 %, always the same for a delivery and attempt."""
    digest = hashlib.sha256(f"{webhook_id}/{attempts_made}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return round(STEPS_MS[attempts_made] * (1 - JITTER + 2 * JITTER * share))


def next_delay_ms(
    webhook_id: str, attempts_made: int, *, retry_after_s: float | None = None, throttled: bool = False
) -> int | None:
    """Milliseconds from the failure to the next attempt, or None when the schedule is used up.

    A receiver's Retry-After moves the attempt within [step, 2 steps], where step is the jittered one: it may ask for
    patience, not for a hammer and not for ever.
    """
    if attempts_made >= len(STEPS_MS):
        return None
    step = jittered_step(webhook_id, attempts_made)
    delay = step if retry_after_s is None else round(min(max(retry_after_s * SECOND, step), 2 * step))
    return max(delay, THROTTLED_AT_LEAST_MS) if throttled else delay


def parse_retry_after(value: str, now_ms: int) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its two forms; None when it says nothing usable."""
    value = value.strip()
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, at.timestamp() - now_ms / SECOND)
