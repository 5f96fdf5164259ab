"""RecordObservations: the check-in stream, folded once, and the clock that it is.

* Positions up to the watermark change nothing.
* Stream time is the sum of min(gap, 2 s) between consecutive heartbeats by the broker's LogAppendTime. It stands
  still while any active gateway is silent for over 2 s; one silent for 10 s is lost by an event, which excuses the
  devices last seen through it, and then it holds nothing up. So an outage neither trips nor passes anything by the
  clock.
* Devices are folded before the deadlines that their check-ins move.
"""

from __future__ import annotations

from typing import Final

from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.errors import InvalidArgumentError
from services.rollout.domain import attempts, stages
from services.rollout.domain.commands import RecordObservations
from services.rollout.domain.draft import Draft
from services.rollout.domain.observe import fold_item
from services.rollout.domain.state import DUE_BUCKET_MS

MAX_GAP_MS: Final = 2_000
LOST_AFTER_MS: Final = 10_000
FLUSH_MS: Final = 1_000


class _Clock:
    """Stream time between two ObservationsRecorded events."""

    __slots__ = ("append_ms", "beats", "stream_ms")

    def __init__(self, draft: Draft) -> None:
        self.stream_ms = draft.state.stream_ms
        self.append_ms = draft.state.append_ms
        self.beats: dict[str, int] = {}


def record_observations(draft: Draft, command: RecordObservations) -> rollout_pb2.RecordObservationsResponse:
    """Fold what is beyond the watermark."""
    request = command.request
    partition = request.source_partition
    if partition != draft.state.partition:
        raise InvalidArgumentError("INVALID_FIELD", "not the partition of this leader", field="source_partition")
    through = draft.state.watermarks.get(partition, -1)
    clock = _Clock(draft)
    for record in request.records:
        if record.position <= through:
            continue
        if record.heartbeat:
            _beat(draft, clock, record, command.routing_key)
        if record.items and clock.stream_ms - draft.state.stream_ms >= FLUSH_MS:
            _flush(draft, clock, partition, max(through, record.position - 1), command.routing_key)
        for item in record.items:
            if item.device.split("/", 2)[:2] == ["organizations", record.organization]:
                fold_item(draft, item, record.gateway)
        stages.settle(draft)
    last = max((record.position for record in request.records), default=-1)
    reached = max(through, last, request.through_position)
    if reached > through:
        _flush(draft, clock, partition, reached, command.routing_key)
    return rollout_pb2.RecordObservationsResponse(through_position=reached)


def _beat(draft: Draft, clock: _Clock, record: rollout_pb2.ObservedRecord, routing_key: str) -> None:
    """One heartbeat: who is lost, and how far time moves."""
    now = record.append_time_ms
    state = draft.state
    silent = False
    for gateway, before in {**state.beats, **clock.beats}.items():
        quiet = now - before
        if quiet > LOST_AFTER_MS and gateway not in draft.state.lost:
            _presence(draft, gateway, routing_key, lost=True)
        elif quiet > MAX_GAP_MS and gateway not in draft.state.lost and gateway != record.gateway:
            silent = True
    if record.gateway in draft.state.lost:
        _presence(draft, record.gateway, routing_key, lost=False)
    if clock.append_ms and now > clock.append_ms and not silent:
        clock.stream_ms += min(now - clock.append_ms, MAX_GAP_MS)
    clock.append_ms = max(clock.append_ms, now)
    clock.beats[record.gateway] = max(now, clock.beats.get(record.gateway, 0))


def _presence(draft: Draft, gateway: str, routing_key: str, *, lost: bool) -> None:
    payload = events_pb2.GatewayPresenceChanged(gateway=gateway, lost=lost)
    draft.emit(gateway, payload, organization=routing_key)


def _flush(draft: Draft, clock: _Clock, partition: int, through: int, routing_key: str) -> None:
    """Move the watermark and the clock, then act on the deadlines that have come."""
    payload = events_pb2.ObservationsRecorded(
        source_partition=partition,
        through_position=through,
        stream_time_ms=clock.stream_ms,
        append_time_ms=clock.append_ms,
        beats=clock.beats,
    )
    draft.emit(f"stream/{partition}", payload, organization=routing_key)
    clock.beats = {}
    _deadlines(draft)
    stages.check_stalls(draft)
    stages.settle(draft)


def _deadlines(draft: Draft) -> None:
    """Those in the buckets up to now; what is too much for one decision is still there at the next tick."""
    now = draft.state.stream_ms
    for bucket in range(draft.state.due_floor, now // DUE_BUCKET_MS + 1):
        for name in draft.state.due.get(bucket, ()):
            attempt = draft.state.attempts[name]
            if attempt.due_ms < 0 or attempt.due_ms > now:
                continue
            if draft.full:
                return
            attempts.due(draft, attempt)
