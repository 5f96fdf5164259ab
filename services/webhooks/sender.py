"""Sends what is due, for the partitions that this process leads.

For each led partition: the source feeds pumps, the dispatcher takes deliveries from them in turn, one at a time, and
a recorder tells the log what became of them, many at once. Everything in memory is disposable: whenever recording
fails, or the log does, the partition starts anew from what is recorded, and repeats deliveries under the same ids.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Protocol

from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import GroundswellError
from libs.eventlog import Command, Deadline
from libs.eventlog.config import Health
from libs.eventlog.model import Committed, Snapshot
from libs.eventlog.ports import EventLog, LogError
from libs.names import organization_of
from services.webhooks.lane import Item
from services.webhooks.model import Endpoint, RecordDeliveries, RecordReplay, State
from services.webhooks.pump import Pump
from services.webhooks.render import WebhookEvent, render
from services.webhooks.replay_feed import ReplayFeed
from services.webhooks.signing import Signer
from services.webhooks.source import EventSource, places_of
from services.webhooks.transport import Outcome, Target, Transport

logger = logging.getLogger(__name__)

SLOTS: Final = 256
"""Attempts under way at a time, per partition."""
RECORD_EVERY_S: Final = 0.3
RECORD_AT: Final = 200
"""Deliveries after which recording does not wait for its time."""
WATCH_EVERY_S: Final = 0.05
SETTLE_EVERY_S: Final = 30.0
DRAIN_S: Final = 2.0
RESTART_S: Final = 0.5
SUBMIT_S: Final = 10.0


class Leader(Protocol):
    """What the sender needs of the runtime."""

    async def submit(self, command: Command, deadline: Deadline, /) -> Committed: ...

    def snapshot_of_partition(self, partition: int, /) -> Snapshot: ...

    def health(self) -> Health: ...


class PartitionSender:
    """One partition, for as long as it is led. Not started twice."""

    def __init__(
        self,
        partition: int,
        leader: Leader,
        log: EventLog,
        env: str,
        transport: Transport,
        signer: Signer,
        wall_clock_ms: Callable[[], int],
    ) -> None:
        self.pumps: dict[str, Pump] = {}
        self._partition = partition
        self._leader = leader
        self._transport = transport
        self._signer = signer
        self._now_ms = wall_clock_ms
        self._places = places_of(env, partition)
        self.source = EventSource(log, self._places, self._poke)
        self._known: object = None
        self._ready: deque[Pump] = deque()
        self._queued: set[Pump] = set()
        self._timers: dict[Pump, asyncio.TimerHandle] = {}
        self._replays: dict[str, asyncio.Task[None]] = {}
        self._work = asyncio.Event()
        self._attempts: set[asyncio.Task[None]] = set()
        self._dirty: set[Pump] = set()
        self._unrecorded = 0
        self._something = asyncio.Event()
        self._plenty = asyncio.Event()
        self._draining = False

    async def run(self) -> None:
        """Until cancelled, or until something fails."""
        self._synchronize()
        try:
            async with asyncio.TaskGroup() as group:
                for part in (self.source.run, self._watch, self._dispatch, self._keep_recording, self._settle):
                    group.create_task(part())
        finally:
            for timer in self._timers.values():
                timer.cancel()
            under_way = [*self._attempts, *self._replays.values()]
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def drain(self) -> None:
        """Begin nothing new, let attempts end that soon will, and record what they came to."""
        self._draining = True
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=DRAIN_S)
        await self._record()

    # Endpoints.

    async def _watch(self) -> None:
        while True:
            self._synchronize()
            await asyncio.sleep(WATCH_EVERY_S)

    def _synchronize(self) -> None:
        """Take over endpoints that were created, changed or deleted."""
        state: Any = self._leader.snapshot_of_partition(self._partition).state
        if not isinstance(state, State) or state.endpoints is self._known:
            return
        self._known = state.endpoints
        for name, endpoint in state.endpoints.items():
            pump = self.pumps.get(name)
            if pump is not None and (pump.image.uid != endpoint.image.uid or _numbered_anew(pump, endpoint)):
                self._forget(pump)
                pump = None
            if pump is None:
                pump = self.pumps[name] = Pump(endpoint, self._signer.ring(endpoint.image), self._places)
                self.source.add(pump)
                self._poke(pump)
            elif pump.image is not endpoint.image:
                pump.update(endpoint, self._signer.ring(endpoint.image))
                self._touch(pump)
                self._poke(pump)
            pump.known_health = endpoint.health
            if endpoint.replays or pump.feeds:
                self._synchronize_replays(pump, endpoint)
        for name in [name for name in self.pumps if name not in state.endpoints]:
            self._forget(self.pumps[name])

    def _synchronize_replays(self, pump: Pump, endpoint: Endpoint) -> None:
        running = {each.name for each in endpoint.replays.values() if each.state == pb.Replay.STATE_RUNNING}
        for name in pump.feeds.keys() - running:
            del pump.feeds[name]
        for name in sorted(running - pump.feeds.keys()):
            feed = pump.feeds[name] = ReplayFeed(endpoint, endpoint.replays[name])
            reading = asyncio.create_task(self._replay(pump, feed))
            self._replays[name] = reading
            reading.add_done_callback(self._replay_ended)

    async def _replay(self, pump: Pump, feed: ReplayFeed) -> None:
        """Read a replay's range, as fast as its deliveries go out, until it ends or is cancelled."""
        while pump.feeds.get(feed.name) is feed and self.pumps.get(pump.image.name) is pump:
            if not feed.unread():
                self._touch(pump)  # perhaps nothing was found: then nobody else says that it has ended
                return
            if pump.active and feed.has_room:
                try:
                    await self.source.read_replay(pump, feed)
                except LogError as error:
                    logger.warning("%s cannot be read now: %s", feed.name, error)
                    await asyncio.sleep(RESTART_S)
                self._touch(pump)
                self._poke(pump)
            await asyncio.sleep(WATCH_EVERY_S)

    def _replay_ended(self, reading: asyncio.Task[None]) -> None:
        for name in [name for name, task in self._replays.items() if task is reading]:
            del self._replays[name]
        if not reading.cancelled() and reading.exception() is not None:
            logger.error("a replay died", exc_info=reading.exception())

    def _forget(self, pump: Pump) -> None:
        self.source.remove(pump)
        del self.pumps[pump.image.name]
        self._dirty.discard(pump)
        timer = self._timers.pop(pump, None)
        if timer is not None:
            timer.cancel()

    async def _settle(self) -> None:
        while True:
            await asyncio.sleep(SETTLE_EVERY_S)
            self.source.settle()
            for pump in self.pumps.values():
                self._touch(pump)

    # Sending.

    def _poke(self, pump: Pump) -> None:
        """The pump may have something to send."""
        if pump not in self._queued:
            self._queued.add(pump)
            self._ready.append(pump)
            self._work.set()

    async def _dispatch(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._ready and len(self._attempts) < SLOTS and not self._draining:
                # Once disabling or deleting is answered no attempt begins: look before each one, it costs little.
                self._synchronize()
                pump = self._ready.popleft()
                self._queued.discard(pump)
                if self.pumps.get(pump.image.name) is not pump:
                    continue
                item = pump.take(self._now_ms())
                if item is None:
                    self._wake_later(pump)
                    continue
                attempt = asyncio.create_task(self._attempt(pump, item))
                self._attempts.add(attempt)
                attempt.add_done_callback(self._ended)
                self._poke(pump)

    def _ended(self, attempt: asyncio.Task[None]) -> None:
        self._attempts.discard(attempt)
        if not attempt.cancelled() and attempt.exception() is not None:
            logger.error("an attempt died", exc_info=attempt.exception())
        self._work.set()

    def _wake_later(self, pump: Pump) -> None:
        timer = self._timers.pop(pump, None)
        if timer is not None:
            timer.cancel()
        at_ms = pump.wake_at_ms(self._now_ms())
        if at_ms is not None:
            # Bounded, because the wall clock may be set while the loop's clock runs on.
            wait_s = min(max(0.005, (at_ms - self._now_ms()) / 1000), 60.0)
            self._timers[pump] = asyncio.get_running_loop().call_later(wait_s, self._poke, pump)

    async def _attempt(self, pump: Pump, item: Item) -> None:
        try:
            event = item.event or await self.source.event_at(item.place, item.position)
        except LogError as error:
            logger.warning("record %s@%d cannot be read now: %s", item.place[0], item.position, error)
            await asyncio.sleep(1.0)
            pump.release(item, self._now_ms())
            self._poke(pump)
            return
        if event is None:
            outcome = Outcome(error="SOURCE_RECORD_MISSING: the record of this event is not in the log any more")
        else:
            outcome = await self._post(pump, item, event)
            if not outcome.succeeded:
                self.source.remember(item.place, item.position, event)
        now_ms = self._now_ms()
        if outcome.succeeded:
            pump.succeeded(item, outcome, now_ms)
        else:
            pump.failed(item, outcome, now_ms)
        self._unrecorded += 1
        self._touch(pump)
        if self._unrecorded >= RECORD_AT:
            self._plenty.set()
        self._poke(pump)

    async def _post(self, pump: Pump, item: Item, event: WebhookEvent) -> Outcome:
        began = time.perf_counter()
        try:
            outcome = await self._send(pump, item, render(event, pump.image.payload_version))
        except Exception:
            # A bug of ours that one event or endpoint meets must hold up neither the others nor the cursor for ever.
            logger.exception("delivery %s of %s failed inside", item.webhook_id, pump.image.name)
            outcome = Outcome(error="INTERNAL_ERROR: the delivery could not be made; the server's log says why")
        return replace(outcome, duration_ms=round((time.perf_counter() - began) * 1000))

    async def _send(self, pump: Pump, item: Item, body: bytes) -> Outcome:
        now_ms = self._now_ms()
        headers = {
            "content-type": "application/json",
            "webhook-id": item.webhook_id,
            "webhook-timestamp": str(now_ms // 1000),
            "webhook-signature": pump.keys.signature(item.webhook_id, now_ms, body),
        }
        if item.sequence:
            headers["webhook-sequence"] = str(item.sequence)
            headers["webhook-sequence-key"] = f"{item.place[0]}:{item.order_key}"
        if item.replay:
            headers["webhook-replay"] = item.replay
        return await self._transport.post(Target(pump.image.url, pump.image.ca_pem), headers, body)

    # Recording.

    def _touch(self, pump: Pump) -> None:
        self._dirty.add(pump)
        self._something.set()

    async def _keep_recording(self) -> None:
        while True:
            await self._something.wait()
            try:
                async with asyncio.timeout(RECORD_EVERY_S):
                    await self._plenty.wait()
            except TimeoutError:
                pass
            self._something.clear()
            self._plenty.clear()
            await self._record()

    async def _record(self) -> None:
        """Commit what became of deliveries, all endpoints side by side. Raises when that is refused or unknown."""
        self._unrecorded = 0
        commands: list[Command] = []
        for pump in self._dirty:
            name = pump.image.name
            moves, gone = pump.collect()
            if moves or (gone and pump.image.state == pb.WebhookEndpoint.STATE_ACTIVE) or pump.health_is_news:
                payload: object = RecordDeliveries(name, pump.image.uid, moves, gone, pump.health)
                commands.append(Command(organization_of(name), payload, principal="webhooks"))
            moved = filter(None, [feed.collect() for feed in pump.feeds.values()])
            commands.extend(Command(organization_of(name), RecordReplay(each), principal="webhooks") for each in moved)
        self._dirty.clear()
        deadline = Deadline.after(SUBMIT_S)
        async with asyncio.TaskGroup() as group:
            for command in commands:
                group.create_task(self._leader.submit(command, deadline))


def _numbered_anew(pump: Pump, endpoint: Endpoint) -> bool:
    """Strict order was chosen, or what it counts changed: a pump counts from one beginning only."""
    if endpoint.strict != pump.strict:
        return True
    return endpoint.strict and any(
        stream.numbered_from != pump.lanes[place].numbered_from
        for place, stream in endpoint.streams.items()
        if place in pump.lanes
    )


class Sender:
    """Runs a :class:`PartitionSender` for each partition while this process leads it."""

    def __init__(
        self,
        leader: Leader,
        log: EventLog,
        env: str,
        transport: Transport,
        signer: Signer,
        wall_clock_ms: Callable[[], int],
    ) -> None:
        self._leader = leader
        self._parts = (log, env, transport, signer, wall_clock_ms)
        self._senders: dict[int, tuple[PartitionSender, asyncio.Task[None]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look for partitions to serve."""
        self._task = asyncio.create_task(self._supervise(), name="webhook-sender")

    @property
    def live(self) -> bool:
        """False when nothing would be sent any more."""
        return self._task is not None and not self._task.done()

    async def stop(self) -> None:
        """Record what has been delivered, while the runtime still takes commands."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        senders = [sender for sender, task in self._senders.values() if not task.done()]
        for problem in await asyncio.gather(*(sender.drain() for sender in senders), return_exceptions=True):
            if isinstance(problem, BaseException):
                logger.warning("the last deliveries were not recorded and will be repeated: %r", problem)
        for task in [task for _, task in self._senders.values()]:
            task.cancel()
        await asyncio.gather(*(task for _, task in self._senders.values()), return_exceptions=True)

    async def _supervise(self) -> None:
        while True:
            leading = {row.partition for row in self._leader.health().partitions if row.role == "leading"}
            for partition in [partition for partition in self._senders if partition not in leading]:
                await self._end(partition)
            for partition in leading - self._senders.keys():
                sender = PartitionSender(partition, self._leader, *self._parts)
                task = asyncio.create_task(self._run(partition, sender), name=f"webhook-sender-{partition}")
                self._senders[partition] = (sender, task)
            for partition in [partition for partition, (_, task) in self._senders.items() if task.done()]:
                del self._senders[partition]
            await asyncio.sleep(WATCH_EVERY_S)

    async def _end(self, partition: int) -> None:
        _, task = self._senders.pop(partition)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _run(self, partition: int, sender: PartitionSender) -> None:
        """Ends when something failed; the supervisor then begins anew, from what is recorded."""
        try:
            await sender.run()
        except* (GroundswellError, LogError) as problems:
            logger.warning("sending of partition %d starts anew: %s", partition, problems.exceptions)
            await asyncio.sleep(RESTART_S)
        except* Exception as problems:
            logger.exception("sending of partition %d failed and starts anew", partition, exc_info=problems)
            await asyncio.sleep(RESTART_S)
