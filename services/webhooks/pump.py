"""One endpoint's deliveries in memory: what is new, what is due again, what is on its way. No I/O; time is told.

The pump is given every record of its organization and hands out at most a few deliveries at a time. Between two
recordings it collects what became of them. All of it can be lost: a new pump starts from the endpoint's recorded
cursor and exceptions, and makes the same deliveries under the same ids again.

Under strict order only the head of each order key's queue is handed out. Behind a head that failed, later deliveries
of its key become exceptions that are *held*: recorded, so that the cursor moves on, and capped, so that one device
cannot fill the endpoint; what is beyond the cap is a dead letter at once and can be replayed.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import replace
from typing import Final

from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from services.webhooks import scope
from services.webhooks.breaker import Breaker, Phase
from services.webhooks.catalogue import Filter
from services.webhooks.lane import Item, Key, Lane, attempt_of, made_of, with_attempt
from services.webhooks.model import (
    MAX_EXCEPTIONS,
    MAX_HELD,
    MAX_HELD_PER_KEY,
    Endpoint,
    Move,
    Place,
)
from services.webhooks.ordering import KeyQueues
from services.webhooks.rate import Bucket
from services.webhooks.render import WebhookEvent
from services.webhooks.replay_feed import ReplayFeed
from services.webhooks.schedule import next_delay_ms
from services.webhooks.signing import KeyRing, webhook_id
from services.webhooks.transport import Outcome

MAX_FRESH: Final = 500
"""Deliveries that wait in memory; a pump that has more is detached from the stream and reads again later."""
CONCURRENCY: Final = 8
DEGRADED_AFTER: Final = 3
"""Failures in a row."""
Image = pb.WebhookEndpoint


class Pump:
    """See the module."""

    def __init__(self, endpoint: Endpoint, keys: KeyRing, places: tuple[Place, ...]) -> None:
        self.image = endpoint.image
        self.keys = keys
        self.breaker = Breaker()
        self.known_health = endpoint.health
        """As the log has it."""
        self.attached = False
        """Whether the partition's reader feeds it."""
        self.busy: dict[tuple[str, Place, int], Item] = {}
        self.gone = False
        self.lanes: dict[Place, Lane] = {}
        self.feeds: dict[str, ReplayFeed] = {}
        self._filter = Filter(endpoint.image)
        self._queues = KeyQueues() if endpoint.strict else None
        self._numbers: Counter[tuple[Place, str]] = Counter()
        self._bucket = Bucket(endpoint.image.max_per_second)
        self._well = False
        self._fresh: deque[Item] = deque()
        self._behind: dict[Key, Item] = {}
        """Strict order: accepted, and waiting for a head that is not done."""
        self._open: dict[Key, events.DeliveryException] = {}
        self._held = 0
        self._dead: set[Key] = set()
        self._due: list[tuple[int, Key]] = []
        self._early: deque[Key] = deque()
        self._tried_early: dict[Key, int] = {}
        self._turn = 0
        for place in places:
            self._take_over(endpoint, place)
        if self._queues is not None:
            self._line_up(self._queues)
        # By its record it was failing: gently until it answers, and then what it missed at once.
        self.breaker.in_a_row = 1 if self._open else 0

    def _take_over(self, endpoint: Endpoint, place: Place) -> None:
        stream = endpoint.streams.get(place)
        if stream is None:
            self.lanes[place] = Lane(-1, -1, -1)
            return
        # Numbers are counted, not stored: a strict endpoint reads from where they began.
        seen = min(stream.cursor, stream.numbered_from) if self._queues is not None else stream.cursor
        self.lanes[place] = Lane(seen, stream.cursor, stream.cursor, stream.numbered_from)
        for position, exception in stream.exceptions.items():
            self._open[place, position] = exception
            if not exception.held:
                heapq.heappush(self._due, (exception.next_at_ms, (place, position)))
        self._dead.update((place, position) for position in stream.dead)

    def _line_up(self, queues: KeyQueues) -> None:
        """Open exceptions in the order of their events; a head that was held is due at once."""
        for key in sorted(self._open, key=lambda key: (self._open[key].occurred_at_ms, key)):
            exception = self._open[key]
            if queues.add(exception.order_key, key) is None and exception.held:
                self._let_go(key, 0)
        self._held = sum(1 for exception in self._open.values() if exception.held)

    # What comes in.

    def update(self, endpoint: Endpoint, keys: KeyRing) -> None:
        """The endpoint changed. What was judged by old filters is recorded, so that it is not judged again."""
        image = endpoint.image
        if any(
            list(getattr(image, each)) != list(getattr(self.image, each))
            for each in ("event_types", "products", "cohorts")
        ):
            self._filter = Filter(image)
            for lane in self.lanes.values():
                lane.urgent = True
        if image.state != self.image.state or image.url != self.image.url:
            self.breaker = Breaker()
            self.gone = self._well = False
        if image.max_per_second != self.image.max_per_second:
            self._bucket = Bucket(image.max_per_second)
        self.image, self.keys = image, keys

    @property
    def active(self) -> bool:
        """Whether anything may be sent."""
        return self.image.state == Image.STATE_ACTIVE and not self.gone

    @property
    def strict(self) -> bool:
        """Whether it keeps strict order."""
        return self._queues is not None

    @property
    def has_room(self) -> bool:
        """Whether reading on is worth while."""
        return len(self._fresh) + len(self._behind) <= MAX_FRESH // 2

    @property
    def failed_keys(self) -> frozenset[Key]:
        """Deliveries that are dead or due again."""
        return frozenset(self._open) | frozenset(self._dead)

    def offer(self, place: Place, position: int, event: WebhookEvent | None) -> bool:
        """Take note of a record. False when the pump is full: then nothing changed, and it wants the record again."""
        lane = self.lanes[place]
        if position <= lane.seen:
            return True
        key = (place, position)
        if event is None or not self._filter(event):
            lane.advance(position)
            return True
        known = position <= lane.cursor or key in self._open or key in self._dead
        if not known and len(self._fresh) + len(self._behind) >= MAX_FRESH:
            return False
        order_key, sequence = "", 0
        if self._queues is not None:
            order_key = scope.order_key(event.resource, event.payload)
            if position > lane.numbered_from:
                self._numbers[place, order_key] += 1
                sequence = self._numbers[place, order_key]
        if known:
            lane.advance(position)
            return True
        identifier = webhook_id(self.image.uid, event.event_id)
        item = Item(place, position, identifier, event.event_type, event, order_key=order_key, sequence=sequence)
        lane.accept(position)
        head = None if self._queues is None else self._queues.add(order_key, key)
        if head is None:
            self._fresh.append(item)
        elif head in self._open:
            self._hold(item)
        else:
            self._behind[key] = item
        return True

    # Strict order.

    def _hold(self, item: Item) -> None:
        """It waits for a head that failed: as an exception, or beyond the cap as a dead letter."""
        if self._queues is None:
            raise RuntimeError("only a strict endpoint holds deliveries")
        full = (
            self._held >= MAX_HELD
            or self._queues.length(item.order_key) > MAX_HELD_PER_KEY
            or len(self._open) + len(self.busy) >= MAX_EXCEPTIONS
        )
        exception = events.DeliveryException(
            position=item.position,
            webhook_id=item.webhook_id,
            event_type=item.event_type,
            last_error="KEY_QUEUE_FULL: too many wait behind one that failed" if full else "",
            dead=full,
            held=not full,
            order_key=item.order_key,
            sequence=item.sequence,
            occurred_at_ms=item.event.occurred_at_ms if item.event is not None else 0,
        )
        lane = self.lanes[item.place]
        lane.changed[item.position] = exception
        lane.finish(item.position)
        if full:
            self._dead.add(item.key)
            self._queues.leave(item.order_key, item.key)
        else:
            self._open[item.key] = exception
            self._held += 1

    def _let_go(self, key: Key, now_ms: int) -> None:
        """A held one is the head now: due at once."""
        freed = events.DeliveryException()
        freed.CopyFrom(self._open[key])
        freed.held, freed.next_at_ms = False, now_ms
        self._open[key] = freed
        self.lanes[key[0]].changed[key[1]] = freed
        heapq.heappush(self._due, (now_ms, key))

    def _move_on(self, order_key: str, key: Key, now_ms: int) -> None:
        """A delivery is done: the next of its order key may go."""
        following = None if self._queues is None else self._queues.leave(order_key, key)
        if following is None:
            return
        item = self._behind.pop(following, None)
        if item is not None:
            self._fresh.append(item)  # behind those of other keys: a busy one must not starve them
        elif following in self._open:
            self._held -= 1
            self._let_go(following, now_ms)

    # What goes out.

    def take(self, now_ms: int) -> Item | None:
        """The next delivery to attempt now; the caller ends it with one of succeeded, failed and release."""
        if not self.active or self.breaker.phase is Phase.PROBING or not self._bucket.allows(now_ms):
            return None
        if self.breaker.phase is Phase.OPEN:
            item = self._probe(now_ms) if not self.busy and self.breaker.may_probe(now_ms) else None
        else:
            # After a failure one at a time: an endpoint that hangs must not hold many of the shared slots.
            limit = 1 if self.breaker.in_a_row else CONCURRENCY
            item = self._next(now_ms) if len(self.busy) < limit else None
        if item is not None:
            self._bucket.take()
            self.busy[item.identity] = item
        return item

    def _next(self, now_ms: int) -> Item | None:
        """Due, new and repeated ones in turn, so that none of them starves the others."""
        sources = (self._take_due, self._take_fresh, self._take_replayed)
        self._turn += 1
        for step in range(3):
            item = sources[(self._turn + step) % 3](now_ms)
            if item is not None:
                return item
        return self._take_early()

    def _take_due(self, now_ms: int) -> Item | None:
        while self._due and self._due[0][0] <= now_ms:
            at_ms, key = heapq.heappop(self._due)
            exception = self._open.get(key)
            if (
                exception is not None
                and not exception.held
                and exception.next_at_ms == at_ms
                and ("", *key) not in self.busy
            ):
                return self._again(key, exception)
        return None

    def _take_fresh(self, now_ms: int) -> Item | None:  # noqa: ARG002 - one signature for all sources
        if not self._fresh or len(self._open) + len(self.busy) >= MAX_EXCEPTIONS:
            return None
        return self._fresh.popleft()

    def _take_replayed(self, now_ms: int) -> Item | None:
        for feed in self.feeds.values():
            item = feed.take(now_ms)
            if item is not None:
                return item
        return None

    def _take_early(self) -> Item | None:
        while self._early:
            key = self._early.popleft()
            exception = self._open.get(key)
            if exception is None or exception.held or ("", *key) in self.busy:
                continue
            if self._tried_early.get(key) == exception.attempt_count:
                continue
            self._tried_early[key] = exception.attempt_count
            return self._again(key, exception, early=True)
        return None

    def _probe(self, now_ms: int) -> Item | None:
        """The oldest delivery; every second time a new one, so that one poisonous delivery blocks nobody for long."""
        oldest = min(
            (key for key, each in self._open.items() if not each.held),
            key=lambda key: (self._open[key].next_at_ms, key),
            default=None,
        )
        if oldest is None or (self.breaker.probes % 2 and self._fresh):
            item = self._take_fresh(now_ms) or self._take_replayed(now_ms)
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
            order_key=exception.order_key,
            sequence=exception.sequence,
        )

    def wake_at_ms(self, now_ms: int) -> int | None:
        """When to ask again although nothing happened; None when only news can change anything."""
        if not self.active:
            return None
        waiting = bool(self._fresh) or any(feed.waiting for feed in self.feeds.values())
        times = [at for at in (feed.wake_at_ms() for feed in self.feeds.values()) if at is not None]
        if self._due:
            times.append(self._due[0][0])
        if self.breaker.phase is Phase.OPEN:
            return self.breaker.probe_at_ms if self._open or waiting or times else None
        limit = 1 if self.breaker.in_a_row else CONCURRENCY
        if waiting and self.image.max_per_second and len(self.busy) < limit:
            # It may be the rate that held them back, and nothing tells when that has passed.
            times.append(now_ms)
        return max(min(times), self._bucket.free_at_ms(now_ms)) if times else None

    # What became of it.

    def succeeded(self, item: Item, outcome: Outcome, now_ms: int) -> None:
        """Answered with 2xx."""
        del self.busy[item.identity]
        back = self.breaker.in_a_row > 0
        self.breaker.succeeded(now_ms)
        self._well = True
        lane = self.lanes[item.place]
        lane.delivered += 1
        exception = self._open.pop(item.key, None)
        if exception is not None:
            self._tried_early.pop(item.key, None)
            lane.changed.pop(item.position, None)
            lane.resolved.append(item.position)
            lane.made.append(made_of(item, outcome, now_ms, exception))
            self._held -= exception.held
        elif item.replay:
            lane.made.append(made_of(item, outcome, now_ms))
            if item.key in self._dead:
                self._dead.discard(item.key)
                lane.changed.pop(item.position, None)
                lane.resolved.append(item.position)
        else:
            lane.made.append((item, outcome, now_ms))
            lane.finish(item.position)
        if not item.replay or exception is not None:
            self._move_on(item.order_key, item.key, now_ms)
        if item.replay in self.feeds:
            self.feeds[item.replay].succeeded(item)
        if back:
            # The endpoint answers again: what it missed need not wait for its schedule.
            self._early.extend(sorted(self._open, key=lambda key: (self._open[key].next_at_ms, key)))

    def failed(self, item: Item, outcome: Outcome, now_ms: int) -> None:
        """Not answered with 2xx: due again, or dead."""
        del self.busy[item.identity]
        self.breaker.failed(now_ms, probe=item.probe)
        self.gone = self.gone or outcome.gone
        if item.replay:
            if item.replay in self.feeds:
                self.feeds[item.replay].failed(item, outcome, now_ms)
            return
        if item.early:
            # Its own time has not come, but it may have come while the attempt ran.
            if item.key in self._open:
                heapq.heappush(self._due, (self._open[item.key].next_at_ms, item.key))
            return
        before = self._open.get(item.key)
        if before is None and item.attempts_made:
            return  # a replay delivered it meanwhile
        exception = self._exception(item, outcome, before, now_ms)
        lane = self.lanes[item.place]
        lane.changed[item.position] = exception
        if before is None:
            lane.finish(item.position)
        if exception.dead:
            self._open.pop(item.key, None)
            self._tried_early.pop(item.key, None)
            self._dead.add(item.key)
            self._move_on(item.order_key, item.key, now_ms)
            return
        self._open[item.key] = exception
        heapq.heappush(self._due, (exception.next_at_ms, item.key))
        for key in () if self._queues is None else self._queues.behind(item.order_key):
            if key in self._behind:
                self._hold(self._behind.pop(key))

    def _exception(
        self, item: Item, outcome: Outcome, before: events.DeliveryException | None, now_ms: int
    ) -> events.DeliveryException:
        made = item.attempts_made + 1
        delay = next_delay_ms(item.webhook_id, made, retry_after_s=outcome.retry_after_s, throttled=outcome.throttled)
        happened = before.occurred_at_ms if before is not None else item.event.occurred_at_ms if item.event else 0
        return events.DeliveryException(
            position=item.position,
            webhook_id=item.webhook_id,
            event_type=item.event_type,
            attempt_count=made,
            next_at_ms=0 if delay is None else now_ms + delay,
            last_status=outcome.status,
            last_error=outcome.error[:300],
            dead=delay is None,
            attempts=with_attempt([] if before is None else list(before.attempts), attempt_of(outcome, now_ms)),
            order_key=item.order_key,
            sequence=item.sequence,
            occurred_at_ms=happened,
        )

    def release(self, item: Item, now_ms: int) -> None:
        """The attempt was not made, by no fault of the endpoint."""
        del self.busy[item.identity]
        if item.probe:
            self.breaker.phase, self.breaker.probe_at_ms = Phase.OPEN, now_ms + 1_000
        if item.replay:
            if item.replay in self.feeds:
                self.feeds[item.replay].release(item)
            return
        exception = self._open.get(item.key)
        if exception is None:
            self._fresh.appendleft(replace(item, probe=False))
        else:
            heapq.heappush(self._due, (exception.next_at_ms, item.key))

    # What to tell the log.

    @property
    def health(self) -> Image.Health.ValueType:
        """How deliveries go, as far as this pump has seen."""
        if self.breaker.phase is not Phase.CLOSED:
            return Image.HEALTH_OPEN
        if self.breaker.in_a_row >= DEGRADED_AFTER:
            return Image.HEALTH_DEGRADED
        return Image.HEALTH_WELL if self._well and not self.breaker.in_a_row else Image.HEALTH_UNSPECIFIED

    @property
    def health_is_news(self) -> bool:
        """Whether the log should know."""
        now = self.health
        if now in {Image.HEALTH_UNSPECIFIED, self.known_health}:
            return False
        return now != Image.HEALTH_WELL or self.known_health != Image.HEALTH_UNSPECIFIED

    def collect(self) -> tuple[tuple[Move, ...], bool]:
        """What to record since the last time, and whether the receiver is gone."""
        moves = tuple(lane.collect(place) for place, lane in self.lanes.items() if lane.worth_recording)
        return moves, self.gone

    def unrecorded_made(self) -> list[events.DeliveryMade]:
        """Successes that are not in the log yet."""
        return [
            each if isinstance(each, events.DeliveryMade) else made_of(*each)
            for lane in self.lanes.values()
            for each in lane.made
        ]
