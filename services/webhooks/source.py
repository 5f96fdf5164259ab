"""Reads the public topics of one partition and gives every record to the pumps of its organization.

One reader feeds all endpoints that keep up. A pump that is full is detached and reads on later by itself (a
catch-up), up to where the reader stands; so an endpoint that is down, slow or far behind costs the others nothing.
Whoever is attached has been offered everything below the reader's positions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from libs.eventlog.config import public_topic
from libs.eventlog.ports import EventLog, Record, Tail, TopicPartition
from libs.names import organization_of
from services.webhooks.model import Place
from services.webhooks.pump import Pump
from services.webhooks.render import SOURCES, WebhookEvent, read_event
from services.webhooks.replay_feed import ReplayFeed

logger = logging.getLogger(__name__)

NEAR: Final = 30_000
"""Positions that the shared reader goes back for an endpoint when it starts: more than idle cursors stay behind."""
CATCH_UPS: Final = 2
LOOK_EVERY_S: Final = 0.1
CACHED_EVENTS: Final = 2_000


def places_of(env: str, partition: int) -> tuple[Place, ...]:
    """Source partitions that feed a partition of ours: the same index everywhere."""
    return tuple((public_topic(env, service), partition) for service in SOURCES)


class EventSource:
    """The records of one partition. ``on_news(pump)`` is called when a pump may have something to send."""

    def __init__(self, log: EventLog, places: tuple[Place, ...], on_news: Callable[[Pump], None]) -> None:
        self.unknown: Counter[str] = Counter()
        """Records that this build cannot read, by topic: skipped, so that they block nothing."""
        self._log = log
        self._places = tuple(TopicPartition(*place) for place in places)
        self._on_news = on_news
        self._at: dict[TopicPartition, int] = {}
        """Where the reader stands: all below has been offered to whoever is attached."""
        self._pumps: dict[str, dict[str, Pump]] = defaultdict(dict)
        self._catching_up: set[Pump] = set()
        self._look = asyncio.Event()
        self._cache: OrderedDict[tuple[Place, int], WebhookEvent] = OrderedDict()
        self._reading_again = asyncio.Semaphore(2)

    def add(self, pump: Pump) -> None:
        """Feed a pump from now on."""
        self._pumps[organization_of(pump.image.name)][pump.image.name] = pump
        self._look.set()

    def remove(self, pump: Pump) -> None:
        """The endpoint was deleted."""
        pump.attached = False
        of_organization = self._pumps[organization_of(pump.image.name)]
        if of_organization.get(pump.image.name) is pump:
            del of_organization[pump.image.name]

    def settle(self) -> None:
        """Let pumps that were offered everything know how far that is, although little of it concerned them."""
        for pump in self._all():
            if pump.attached:
                for place, position in self._at.items():
                    pump.lanes[place].advance(position - 1)

    def remember(self, place: Place, position: int, event: WebhookEvent) -> None:
        """Keep an event that will be wanted again."""
        self._cache[place, position] = event
        if len(self._cache) > CACHED_EVENTS:
            self._cache.popitem(last=False)

    async def event_at(self, place: Place, position: int) -> WebhookEvent | None:
        """The event of a delivery that failed before; None when its record is not there."""
        known = self._cache.get((place, position))
        if known is not None:
            return known
        async with self._reading_again:
            at = TopicPartition(*place)
            tail = await self._log.open_tail({at: position})
            try:
                while tail.position(at) <= position:
                    for record in await tail.fetch(1.0):
                        event = read_event(record) if record.position == position else None
                        if event is not None:
                            self.remember(place, position, event)
                            return event
                return None
            finally:
                await tail.close()

    async def read_replay(self, pump: Pump, feed: ReplayFeed) -> None:
        """The next piece of a replay: until it has enough to send. Few read at a time, and none for long."""
        async with self._reading_again:
            positions = feed.unread()
            tail = await self._log.open_tail({TopicPartition(*place): at for place, at in positions.items()})
            try:
                while feed.has_room and feed.unread():
                    wanted = pump.failed_keys if feed.replay.only_failed else None
                    for record in await tail.fetch(1.0):
                        event = read_event(record)
                        if event is None or event.organization == organization_of(feed.name):
                            feed.offer((record.topic, record.partition), record.position, event, wanted)
                    for place in positions:
                        feed.advance(place, tail.position(TopicPartition(*place)) - 1)
            finally:
                await tail.close()

    async def run(self) -> None:
        """Read until cancelled. Errors of the log end it; whoever runs it starts anew from recorded cursors."""
        ends = await self._log.end_positions(self._places)
        near = [pump for pump in self._all() if self._behind(pump, ends) <= NEAR]
        self._at = {
            place: min([ends[place], *(max(pump.lanes[place].seen, 0) for pump in near)]) for place in self._places
        }
        for pump in near:
            pump.attached = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            group.create_task(self._keep_looking(group))

    async def _read(self) -> None:
        tail = await self._log.open_tail(self._at)
        try:
            while True:
                for record in await tail.fetch(1.0):
                    self._give(record, None)
                for place in self._places:
                    self._at[place] = tail.position(place)
        finally:
            await tail.close()

    def _give(self, record: Record, only: set[Pump] | None) -> None:
        """Offer a record to attached pumps, or to the ones of a catch-up; those that are full fall out."""
        event = read_event(record)
        if event is None:
            self.unknown[record.topic] += 1
            if self.unknown[record.topic] == 1:
                logger.warning("%s@%d is not understood: skipped, and later ones too", record.topic, record.position)
            return
        place = (record.topic, record.partition)
        for pump in tuple(self._pumps[event.organization].values() if event.organization in self._pumps else ()):
            if pump not in only if only is not None else not pump.attached:
                continue
            if pump.offer(place, record.position, event):
                self._on_news(pump)
            elif only is not None:
                only.discard(pump)
            else:
                self._detach(pump)

    def _detach(self, pump: Pump) -> None:
        for place, position in self._at.items():
            pump.lanes[place].advance(position - 1)
        pump.attached = False

    # Catching up.

    async def _keep_looking(self, group: asyncio.TaskGroup) -> None:
        running: set[asyncio.Task[None]] = set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._look.wait()
            self._look.clear()
            if len(running) >= CATCH_UPS:
                await asyncio.sleep(LOOK_EVERY_S)
                continue
            chosen = self._choose()
            if chosen:
                self._catching_up |= chosen
                task = group.create_task(self._catch_up(chosen))
                running.add(task)
                task.add_done_callback(running.discard)

    def _choose(self) -> set[Pump]:
        """Pumps for the next catch-up: the nearest one, and those not much farther away, so that they share it."""
        waiting: list[tuple[int, Pump]] = []
        for pump in self._all():
            if pump.attached or pump in self._catching_up or not pump.has_room:
                continue
            behind = self._behind(pump, self._at)
            if behind <= 0:
                pump.attached = True
            else:
                waiting.append((behind, pump))
        nearest = min((behind for behind, _ in waiting), default=0)
        return {pump for behind, pump in waiting if behind <= 2 * nearest + 1_000}

    def _behind(self, pump: Pump, ends: Mapping[TopicPartition, int]) -> int:
        """Positions up to the ends that the pump was not offered."""
        return sum(max(0, ends[place] - 1 - pump.lanes[place].seen) for place in self._places)

    async def _catch_up(self, pumps: set[Pump]) -> None:
        started = frozenset(pumps)
        tail: Tail | None = None
        try:
            tail = await self._log.open_tail(
                {place: max(0, min(pump.lanes[place].seen for pump in pumps)) for place in self._places}
            )
            while pumps:
                for record in await tail.fetch(0.05):
                    self._give(record, pumps)
                # No await from here to the end: the reader must not move between the comparison and attaching.
                for pump in pumps:
                    for place in self._places:
                        pump.lanes[place].advance(tail.position(place) - 1)
                if all(tail.position(place) >= self._at[place] for place in self._places):
                    for pump in pumps:
                        pump.attached = True
                    break
        finally:
            self._catching_up -= started
            if tail is not None:
                await tail.close()

    def _all(self) -> Iterable[Pump]:
        return [pump for pumps in self._pumps.values() for pump in pumps.values()]
