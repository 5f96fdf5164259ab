"""What a stage looked like, in a bounded space: durations, failure codes, metrics, the pace of grants.

Folded with the events of attempts, so that every reader of the log has the same numbers. Histograms of two stages merge
by adding them up.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
from google.protobuf.duration_pb2 import Duration
from groundswell.rollout.v1 import rollout_pb2
from immutables import Map
from msgspec.structs import replace

STEPS: Final = 40
"""Steps of the histogram: the square roots of two from one second to eight days; the last takes all beyond."""
BOUNDS_MS: Final[tuple[int, ...]] = tuple(round(1000 * 2 ** (step / 2)) for step in range(STEPS))
MAX_CODES: Final = 32
TOP_CODES: Final = 10
MAX_METRICS: Final = 16
MAX_METRIC_NAME: Final = 64
OTHER: Final = "OTHER"
MINUTE_MS: Final = 60_000


class Metric(msgspec.Struct, frozen=True, gc=False):
    """One metric over all reports."""

    count: int
    low: float
    high: float
    total: float


class Summary(msgspec.Struct, frozen=True, gc=False):
    """Beside the counters of a stage; no rule reads it."""

    durations: tuple[int, ...] = (0,) * STEPS
    codes: Map[str, int] = msgspec.field(default_factory=Map)
    metrics: Map[str, Metric] = msgspec.field(default_factory=Map)


def took(summary: Summary, duration_ms: int) -> Summary:
    """A confirmation, and how long after its grant."""
    step = next((index for index, bound in enumerate(BOUNDS_MS) if duration_ms <= bound), STEPS - 1)
    durations = summary.durations
    return replace(summary, durations=(*durations[:step], durations[step] + 1, *durations[step + 1 :]))


def ended_with(summary: Summary, code: str) -> Summary:
    """A failure and its code."""
    if code not in summary.codes and len(summary.codes) >= MAX_CODES:
        code = OTHER
    return replace(summary, codes=summary.codes.set(code, summary.codes.get(code, 0) + 1))


def measured(summary: Summary, values: dict[str, float]) -> Summary:
    """Metrics of one check-in; the first 16 names of a stage are kept."""
    metrics = summary.metrics
    for name, value in sorted(values.items()):
        known = metrics.get(name)
        if known is None:
            if len(metrics) < MAX_METRICS:
                metrics = metrics.set(name, Metric(1, value, value, value))
            continue
        metrics = metrics.set(
            name, Metric(known.count + 1, min(known.low, value), max(known.high, value), known.total + value)
        )
    return replace(summary, metrics=metrics)


def worth_keeping(values: dict[str, float]) -> dict[str, float]:
    """Metrics of a check-in that a summary can take: finite numbers, short names, at most 16."""
    fit = {name: value for name, value in values.items() if len(name) <= MAX_METRIC_NAME and abs(value) < 1e300}
    return {name: fit[name] for name in sorted(fit)[:MAX_METRICS] if math.isfinite(fit[name])}


def percentile_ms(durations: tuple[int, ...], per_cent: int) -> int:
    """Upper bound of the step that holds the percentile; 0 when nothing was measured."""
    wanted = -(-sum(durations) * per_cent // 100)
    seen = 0
    for bound, count in zip(BOUNDS_MS, durations, strict=True):
        seen += count
        if count and seen >= wanted:
            return bound
    return 0


def describe(summary: Summary, status: rollout_pb2.StageStatus) -> None:
    """Write it into what people read."""
    count = sum(summary.durations)
    if count:
        status.grant_to_confirmed.count = count
        status.grant_to_confirmed.p50.CopyFrom(_duration(percentile_ms(summary.durations, 50)))
        status.grant_to_confirmed.p95.CopyFrom(_duration(percentile_ms(summary.durations, 95)))
    top = sorted(summary.codes.items(), key=lambda item: (-item[1], item[0]))[:TOP_CODES]
    for code, amount in top:
        status.failure_codes.add(code=code, count=amount)
    for name, metric in sorted(summary.metrics.items()):
        mean = metric.total / metric.count
        status.metrics.add(name=name, count=metric.count, min=metric.low, mean=mean, max=metric.high)


def _duration(ms: int) -> Duration:
    return Duration(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)


class Pace(msgspec.Struct, frozen=True, gc=False):
    """How fast a stage grants: a bucket of tokens for its rate, and the count of the last minute.

    The bucket is kept as the moment at which it is full again: a grant moves it on by one interval, and there is a
    token as long as it lies less than the bucket's size ahead. Integers in microseconds: no rate drifts.
    """

    full_at_us: int = 0
    minute: int = 0
    now: int = 0
    before: int = 0


NO_PACE: Final = Pace()


def burst_of(per_minute: int) -> int:
    """Grants at once, at most: a tenth of a minute's, so that no minute sees much more than its rate."""
    return max(1, per_minute // 10)


def granted(pace: Pace, now_ms: int, per_minute: int) -> Pace:
    """One grant more."""
    minute = now_ms // MINUTE_MS
    now, before = pace.now, pace.before
    if minute != pace.minute:
        now, before = 0, now if minute == pace.minute + 1 else 0
    full_at = pace.full_at_us
    if per_minute:
        full_at = max(full_at, now_ms * 1000) + MINUTE_MS * 1000 // per_minute
    return Pace(full_at, minute, now + 1, before)


def wait_ms(pace: Pace, now_ms: int, per_minute: int) -> int:
    """Milliseconds until the next token; 0 when there is one."""
    if not per_minute:
        return 0
    interval = MINUTE_MS * 1000 // per_minute
    ahead = pace.full_at_us - now_ms * 1000 - (burst_of(per_minute) - 1) * interval
    return max(0, -(-ahead // 1000))


def per_minute_now(pace: Pace, now_ms: int) -> float:
    """Grants of the last minute, from this minute's and the rest of the one before."""
    minute = now_ms // MINUTE_MS
    if minute == pace.minute:
        return pace.now + pace.before * (1 - now_ms % MINUTE_MS / MINUTE_MS)
    if minute == pace.minute + 1:
        return pace.now * (1 - now_ms % MINUTE_MS / MINUTE_MS)
    return 0.0
