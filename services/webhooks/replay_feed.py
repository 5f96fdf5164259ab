"""One replay in memory: what is read, what is ready, what is due again. No I/O; time is told.

All of it can be lost: a new feed starts from the recorded positions and makes the same deliveries again. Strict order
is kept by having one delivery under way at a time; numbers are counted from where the endpoint's numbers began, so a
delivery has the number of its first time.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import replace
from typing import Final

from groundswell.webhooks.v1 import webhooks_pb2 as pb

from services.webhooks import scope
from services.webhooks.catalogue import Filter, matches
from services.webhooks.lane import Item, Key, Lane
from services.webhooks.model import Endpoint, Place
from services.webhooks.render import WebhookEvent
from services.webhooks.schedule import next_delay_ms
from services.webhooks.signing import webhook_id
from services.webhooks.transport import Outcome

ROOM: Final = 128
ATTEMPTS: Final = 3
CONCURRENCY: Final = 4


class ReplayFeed:
    """See the module."""

    def __init__(self, endpoint: Endpoint, replay: pb.Replay) -> None:
        self.replay = pb.Replay()
        self.replay.CopyFrom(replay)
        self.name = replay.name
        # What was under way when memory was lost is found again.
        self.replay.matched_count = replay.delivered_count + replay.failed_count
        self._uid = endpoint.image.uid
        self._filter = Filter(endpoint.image)
        self._strict = endpoint.strict
        self._start_ms = replay.start_time.ToMilliseconds() if replay.HasField("start_time") else 0
        self._end_ms = replay.end_time.ToMilliseconds() if replay.HasField("end_time") else None
        self._numbers: Counter[tuple[Place, str]] = Counter()
        self._ready: deque[Item] = deque()
        self._due: list[tuple[int, int, Item]] = []
        self._order = 0
        self._busy = 0
        self._changed = False
        self._first: dict[Place, int] = {}
        self._last: dict[Place, int] = {}
        self.lanes: dict[Place, Lane] = {}
        for each in replay.ranges:
            place = (each.topic, each.partition)
            stream = endpoint.streams.get(place)
            numbered = stream.numbered_from if stream is not None and self._strict else each.to_position
            done = max(each.next_position, each.from_position) - 1
            self._first[place], self._last[place] = done + 1, each.to_position - 1
            self.lanes[place] = Lane(min(done, numbered), done, done, numbered)

    @property
    def has_room(self) -> bool:
        """Whether reading on is worth while."""
        return len(self._ready) + len(self._due) + self._busy <= ROOM // 2

    def unread(self) -> dict[Place, int]:
        """Where reading goes on, of partitions that are not read to the end of the range."""
        return {place: lane.seen + 1 for place, lane in self.lanes.items() if lane.seen < self._last[place]}

    def offer(self, place: Place, position: int, event: WebhookEvent | None, wanted: frozenset[Key] | None) -> None:
        """Take note of a record. ``wanted``: the deliveries that failed, when only those are repeated."""
        lane = self.lanes[place]
        if position <= lane.seen or position > self._last[place]:
            return
        if event is not None and self._end_ms is not None and event.occurred_at_ms >= self._end_ms:
            lane.advance(self._last[place])  # time never falls in a partition: nothing later is in the range
            return
        if event is None or not self._filter(event):
            lane.advance(position)
            return
        order_key = scope.order_key(event.resource, event.payload) if self._strict else ""
        sequence = 0
        if position > lane.numbered_from:
            self._numbers[place, order_key] += 1
            sequence = self._numbers[place, order_key]
        types = self.replay.event_types
        if (
            position < self._first[place]
            or event.occurred_at_ms < self._start_ms
            or (types and not matches(types, event.event_type))
            or (wanted is not None and (place, position) not in wanted)
        ):
            lane.advance(position)
            return
        lane.accept(position)
        self.replay.matched_count += 1
        identifier = webhook_id(self._uid, event.event_id)
        self._ready.append(
            Item(
                place,
                position,
                identifier,
                event.event_type,
                event,
                order_key=order_key,
                sequence=sequence,
                replay=self.name,
            )
        )
        self._changed = True

    def advance(self, place: Place, seen: int) -> None:
        """All up to here was read."""
        self.lanes[place].advance(min(seen, self._last[place]))

    def take(self, now_ms: int) -> Item | None:
        """The next delivery to repeat now."""
        if self._busy >= (1 if self._strict else CONCURRENCY):
            return None
        if self._due and self._due[0][0] <= now_ms:
            self._busy += 1
            return heapq.heappop(self._due)[2]
        if not self._ready or (self._strict and self._due):
            return None
        self._busy += 1
        return self._ready.popleft()

    def wake_at_ms(self) -> int | None:
        """When something is due again."""
        return self._due[0][0] if self._due else None

    @property
    def waiting(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._ready)

    def succeeded(self, item: Item) -> None:
        """Answered with 2xx."""
        self.replay.delivered_count += 1
        self._finish(item)

    def failed(self, item: Item, outcome: Outcome, now_ms: int) -> None:
        """Due again, or given up: the delivery itself stays what it was."""
        made = item.attempts_made + 1
        delay = next_delay_ms(item.webhook_id, made, retry_after_s=outcome.retry_after_s, throttled=outcome.throttled)
        if made >= ATTEMPTS or delay is None:
            self.replay.failed_count += 1
            self._finish(item)
            return
        self._busy -= 1
        self._order += 1
        heapq.heappush(self._due, (now_ms + delay, self._order, replace(item, attempts_made=made, probe=False)))

    def release(self, item: Item) -> None:
        """The attempt was not made."""
        self._busy -= 1
        self._ready.appendleft(replace(item, probe=False))

    def _finish(self, item: Item) -> None:
        self._busy -= 1
        self.lanes[item.place].finish(item.position)
        self._changed = True

    def collect(self) -> pb.Replay | None:
        """Its progress, if there is any since the last time."""
        finished = not self._busy and not self._ready and not self._due and not self.unread()
        if not self._changed and not finished:
            return None
        self._changed = False
        for each in self.replay.ranges:
            each.next_position = self.lanes[each.topic, each.partition].cursor + 1
        if finished:
            self.replay.state = pb.Replay.STATE_SUCCEEDED
        copy = pb.Replay()
        copy.CopyFrom(self.replay)
        return copy
