"""One endpoint's deliveries in memory: what is new, what is due again, what is on its way. No I/O; time is told.

The pump is given every record of its organization and hands out at most a few deliveries at a time. Between two
recordings it collects what became of them. All of it can be lost: a new pump starts from the endpoint's recorded cursor
and exceptions, and makes the same deliveries under the same ids again.

A lane's cursor moves over a position once that is delivered, filtered out, or an exception recorded along with it.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from services.webhooks.breaker import Breaker, Phase
from services.webhooks.catalogue import matches
from services.webhooks.domain import MAX_EXCEPTIONS, Endpoint, Move, Place
from services.webhooks.render import WebhookEvent
from services.webhooks.schedule import next_delay_ms
from services.webhooks.signing import EndpointKeys, webhook_id
from services.webhooks.transport import Outcome

MAX_FRESH: Final = 500
"""Deliveries that wait in memory; a pump that has more is detached from the stream and reads again later."""
CONCURRENCY: Final = 8
LAZY_CURSOR: Final = 5_000
"""A cursor that moved only over records of no interest is recorded once it moved this far."""
RECENT: Final = 100
Key = tuple[Place, int]


@dataclass(frozen=True, slots=True)
class Item:
    """A delivery to be attempted now."""

    place: Place
    position: int
    webhook_id: str
    event_type: str
    event: WebhookEvent | None = None
    """None for a delivery that failed before: its record is read again."""
    attempts_made: int = 0
    probe: bool = False
    """The one attempt that an open breaker lets through."""
    early: bool = False
    """Ahead of its schedule, because the endpoint seems to be back; a failure does not use up an attempt."""

    @property
    def key(self) -> Key:
        """Identity within the endpoint."""
        return self.place, self.position


@dataclass(slots=True)
class Lane:
    """Progress in one source partition."""

    seen: int
    """Inclusive: records up to here were given to the pump."""
    cursor: int
    recorded: int
    """The cursor in the log."""
    waiting: deque[int] = field(default_factory=deque)
    """Positions between cursor and seen that were accepted, in order."""
    done: set[int] = field(default_factory=set)
    """Those of them that need not be waited for."""
    changed: dict[int, events.DeliveryException] = field(default_factory=dict)
    resolved: list[int] = field(default_factory=list)
    delivered: int = 0
    urgent: bool = False
    """Record the cursor although nothing was delivered."""

    def finish(self, position: int) -> None:
        """The position needs no more waiting."""
        self.done.add(position)
        while self.waiting and self.waiting[0] in self.done:
            self.cursor = self.waiting.popleft()
            self.done.discard(self.cursor)
        if not self.waiting:
            self.cursor = self.seen

    def advance(self, seen: int) -> None:
        """Everything up to here has been given out."""
        self.seen = max(self.seen, seen)
        if not self.waiting:
            self.cursor = self.seen

    @property
    def worth_recording(self) -> bool:
        """Whether there is something to tell the log."""
        if self.delivered or self.changed or self.resolved or (self.urgent and self.cursor > self.recorded):
            return True
        return self.cursor - self.recorded >= LAZY_CURSOR


class Pump:
    """See the module."""

    def __init__(self, endpoint: Endpoint, keys: EndpointKeys, places: tuple[Place, ...]) -> None:
        self.image = endpoint.image
        self.keys = keys
        self.breaker = Breaker()
        self.attached = False
        """Whether the partition's reader feeds it."""
        self.busy: dict[Key, Item] = {}
        self.recent: deque[pb.Delivery] = deque(maxlen=RECENT)
        self.gone = False
        self.lanes: dict[Place, Lane] = {}
        self._fresh: deque[Item] = deque()
        self._open: dict[Key, events.DeliveryException] = {}
        self._dead: set[Key] = set()
        self._due: list[tuple[int, Key]] = []
        self._early: deque[Key] = deque()
        self._tried_early: dict[Key, int] = {}
        self._retry_next = True
        for place in places:
            stream = endpoint.streams.get(place)
            cursor = -1 if stream is None else stream.cursor
            self.lanes[place] = Lane(cursor, cursor, cursor)
            for position, exception in () if stream is None else stream.exceptions.items():
                self._open[place, position] = exception
                heapq.heappush(self._due, (exception.next_at_ms, (place, position)))
            self._dead.update((place, position) for position in (() if stream is None else stream.dead))
        # By its record it was failing: gently until it answers, and then what it missed at once.
        self.breaker.in_a_row = 1 if self._open else 0

    # What comes in.

    def update(self, image: pb.WebhookEndpoint) -> None:
        """The endpoint changed. What was judged by old filters is recorded, so that it is not judged again."""
        if list(image.event_types) != list(self.image.event_types):
            for lane in self.lanes.values():
                lane.urgent = True
        if image.state != self.image.state:
            self.breaker = Breaker()
            self.gone = False
        self.image = image

    @property
    def active(self) -> bool:
        """Whether anything may be sent."""
        return self.image.state == pb.WebhookEndpoint.STATE_ACTIVE and not self.gone

    @property
    def has_room(self) -> bool:
        """Whether reading on is worth while."""
        return len(self._fresh) <= MAX_FRESH // 2

    def offer(self, place: Place, position: int, event: WebhookEvent | None) -> bool:
        """Take note of a record. False when the pump is full: then nothing changed, and it wants the record again."""
        lane = self.lanes[place]
        if position <= lane.seen:
            return True
        key = (place, position)
        if (
            event is None
            or not matches(self.image.event_types, event.event_type)
            or key in self._open
            or key in self._dead
        ):
            lane.advance(position)
            return True
        if len(self._fresh) >= MAX_FRESH:
            return False
        identifier = webhook_id(self.image.uid, event.event_id)
        self._fresh.append(Item(place, position, identifier, event.event_type, event))
        lane.waiting.append(position)
        lane.seen = position
        return True

    # What goes out.

    def take(self, now_ms: int) -> Item | None:
        """The next delivery to attempt now; the caller ends it with one of succeeded, failed and release."""
        if not self.active or self.breaker.phase is Phase.PROBING:
            return None
        if self.breaker.phase is Phase.OPEN:
            item = self._probe(now_ms) if not self.busy and self.breaker.may_probe(now_ms) else None
        else:
            # After a failure one at a time: an endpoint that hangs must not hold many of the shared slots.
            limit = 1 if self.breaker.in_a_row else CONCURRENCY
            item = self._next(now_ms) if len(self.busy) < limit else None
        if item is not None:
            self.busy[item.key] = item
        return item

    def _next(self, now_ms: int) -> Item | None:
        sources = (self._take_due, self._take_fresh) if self._retry_next else (self._take_fresh, self._take_due)
        self._retry_next = not self._retry_next
        for source in (*sources, self._take_early):
            item = source(now_ms)
            if item is not None:
                return item
        return None

    def _take_due(self, now_ms: int) -> Item | None:
        while self._due and self._due[0][0] <= now_ms:
            at_ms, key = heapq.heappop(self._due)
            exception = self._open.get(key)
            if exception is not None and exception.next_at_ms == at_ms and key not in self.busy:
                return self._again(key, exception)
        return None

    def _take_fresh(self, now_ms: int) -> Item | None:  # noqa: ARG002 - one signature for all sources
        if not self._fresh or len(self._open) + len(self.busy) >= MAX_EXCEPTIONS:
            return None
        return self._fresh.popleft()

    def _take_early(self, now_ms: int) -> Item | None:  # noqa: ARG002 - one signature for all sources
        while self._early:
            key = self._early.popleft()
            exception = self._open.get(key)
            if exception is None or key in self.busy or self._tried_early.get(key) == exception.attempt_count:
                continue
            self._tried_early[key] = exception.attempt_count
            return self._again(key, exception, early=True)
        return None

    def _probe(self, now_ms: int) -> Item | None:
        """The oldest delivery; every second time a new one, so that one poisonous delivery blocks nobody for long."""
        oldest = min(self._open, key=lambda key: (self._open[key].next_at_ms, key), default=None)
        if oldest is None or (self.breaker.probes % 2 and self._fresh):
            item = self._take_fresh(now_ms)
            if item is not None:
                self.breaker.probing()
                return replace(item, probe=True)
        if oldest is None:
            return None
        self.breaker.probing()
        exception = self._open[oldest]
        return self._again(oldest, exception, probe=True, early=exception.next_at_ms > now_ms)

    def _again(
        self, key: Key, exception: events.DeliveryException, *, probe: bool = False, early: bool = False
    ) -> Item:
        place, position = key
        return Item(
            place,
            position,
            exception.webhook_id,
            exception.event_type,
            attempts_made=exception.attempt_count,
            probe=probe,
            early=early,
        )

    def wake_at_ms(self) -> int | None:
        """When to ask again although nothing happened; None when only news can change anything."""
        if not self.active:
            return None
        if self.breaker.phase is Phase.OPEN:
            return self.breaker.probe_at_ms if self._open or self._fresh else None
        return self._due[0][0] if self._due else None

    # What became of it.

    def succeeded(self, item: Item, outcome: Outcome, now_ms: int) -> None:
        """Answered with 2xx."""
        del self.busy[item.key]
        back = self.breaker.in_a_row > 0
        self.breaker.succeeded(now_ms)
        lane = self.lanes[item.place]
        lane.delivered += 1
        if self._open.pop(item.key, None) is not None:
            self._tried_early.pop(item.key, None)
            lane.changed.pop(item.position, None)
            lane.resolved.append(item.position)
        else:
            lane.finish(item.position)
        if back:
            # The endpoint answers again: what it missed need not wait for its schedule.
            self._early.extend(sorted(self._open, key=lambda key: (self._open[key].next_at_ms, key)))
        self.recent.append(
            pb.Delivery(
                name=delivery_name(self.image.name, item.webhook_id),
                event_type=item.event_type,
                state=pb.Delivery.STATE_SUCCEEDED,
                attempt_count=item.attempts_made + 1,
                last_status=outcome.status,
                source=source_text(item.place, item.position),
            )
        )

    def failed(self, item: Item, outcome: Outcome, now_ms: int) -> None:
        """Not answered with 2xx: due again, or dead."""
        del self.busy[item.key]
        self.breaker.failed(now_ms, probe=item.probe)
        self.gone = self.gone or outcome.gone
        if item.early:
            # Its own time has not come, but it may have come while the attempt ran.
            heapq.heappush(self._due, (self._open[item.key].next_at_ms, item.key))
            return
        attempts = item.attempts_made + 1
        delay = next_delay_ms(
            item.webhook_id, attempts, retry_after_s=outcome.retry_after_s, throttled=outcome.throttled
        )
        exception = events.DeliveryException(
            position=item.position,
            webhook_id=item.webhook_id,
            event_type=item.event_type,
            attempt_count=attempts,
            next_at_ms=0 if delay is None else now_ms + delay,
            last_status=outcome.status,
            last_error=outcome.error[:300],
            dead=delay is None,
        )
        lane = self.lanes[item.place]
        lane.changed[item.position] = exception
        if item.key not in self._open:
            lane.finish(item.position)
        if exception.dead:
            self._open.pop(item.key, None)
            self._tried_early.pop(item.key, None)
            self._dead.add(item.key)
        else:
            self._open[item.key] = exception
            heapq.heappush(self._due, (exception.next_at_ms, item.key))

    def release(self, item: Item, now_ms: int) -> None:
        """The attempt was not made, by no fault of the endpoint."""
        del self.busy[item.key]
        if item.probe:
            self.breaker.phase, self.breaker.probe_at_ms = Phase.OPEN, now_ms + 1_000
        exception = self._open.get(item.key)
        if exception is None:
            self._fresh.appendleft(replace(item, probe=False))
        else:
            heapq.heappush(self._due, (exception.next_at_ms, item.key))

    def collect(self) -> tuple[tuple[Move, ...], bool]:
        """What to record since the last time, and whether the receiver is gone."""
        moves = []
        for place, lane in self.lanes.items():
            if not lane.worth_recording:
                continue
            moves.append(Move(place, lane.cursor, tuple(lane.changed.values()), tuple(lane.resolved), lane.delivered))
            lane.recorded, lane.urgent = lane.cursor, False
            lane.changed, lane.resolved, lane.delivered = {}, [], 0
        return tuple(moves), self.gone


def delivery_name(endpoint: str, identifier: str) -> str:
    """Resource name of a delivery."""
    return f"{endpoint}/deliveries/{identifier}"


def source_text(place: Place, position: int) -> str:
    """Source of an event as people read it."""
    return f"{place[0]}/{place[1]}/{position}"


def exception_as_delivery(endpoint: str, place: Place, exception: events.DeliveryException) -> pb.Delivery:
    """A recorded exception as callers see it."""
    next_time = None
    if not exception.dead:
        next_time = Timestamp()
        next_time.FromMilliseconds(exception.next_at_ms)
    return pb.Delivery(
        name=delivery_name(endpoint, exception.webhook_id),
        event_type=exception.event_type,
        state=pb.Delivery.STATE_DEAD if exception.dead else pb.Delivery.STATE_PENDING,
        attempt_count=exception.attempt_count,
        last_status=exception.last_status,
        last_error=exception.last_error,
        next_time=next_time,
        source=source_text(place, exception.position),
    )
