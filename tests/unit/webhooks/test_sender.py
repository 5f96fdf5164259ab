"""The sender with the real runtime on the in-memory log; only the network is played."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.eventlog import Command, Context, Deadline, Decision, Event, NewEvent, Public, Runtime, RuntimeConfig
from libs.eventlog.codec import new_id
from libs.eventlog.config import wall_clock_ms
from libs.eventlog.memory import MemoryLog
from libs.eventlog.ports import TopicPartition
from libs.keystore import MemoryKeyStore
from services.webhooks.domain import Webhooks
from services.webhooks.model import CreateEndpoint, Endpoint, RecordVerification, State, UpdateEndpoint
from services.webhooks.pump import MAX_FRESH
from services.webhooks.sender import Sender
from services.webhooks.signing import Signer
from services.webhooks.source import places_of
from services.webhooks.transport import Outcome, Target

ENV = "t"


@dataclass(frozen=True)
class Say:
    """Publish that many devices."""

    first: int
    count: int
    change: str = "device.created"
    unknown: bool = False


class Publisher:
    """Stands where the registry stands: its records are all that the sender sees of it."""

    service = "registry"
    event_types: Sequence[type[Message]] = (registry_events.DeviceSaved,)
    sources: Mapping[str, Sequence[type[Message]]] = {}

    def initial_state(self, partition: int) -> None:
        return None

    def decide(self, state: None, command: object, ctx: Context) -> Decision:
        assert isinstance(command, Say)
        events = []
        for number in range(command.first, command.first + command.count):
            device = registry_pb2.Device(name=f"organizations/{ctx.organization}/products/p/devices/{number}")
            saved = registry_events.DeviceSaved(device=device)
            image: Message = registry_events.DeviceChanged(device=device, change=command.change)
            if command.unknown:
                image = saved
            events.append(NewEvent(ctx.organization, device.name, saved, (Public(device.name, image),)))
        return Decision(tuple(events))

    def evolve(self, state: None, event: Event) -> None:
        return None


@dataclass
class Network:
    """Answers by host; remembers what it was sent."""

    answers: dict[str, Callable[[], Awaitable[Outcome]]] = field(default_factory=dict)
    got: dict[str, list[tuple[str, bytes]]] = field(default_factory=lambda: defaultdict(list))
    now: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    most: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Outcome:
        host = target.url.split("/")[2]
        self.now[host] += 1
        self.most[host] = max(self.most[host], self.now[host])
        try:
            answer = self.answers.get(host)
            outcome = Outcome(204) if answer is None else await answer()
            if outcome.succeeded:
                self.got[host].append((headers["webhook-id"], body))
            return outcome
        finally:
            self.now[host] -= 1

    async def options(self, target: Target, headers: Mapping[str, str]) -> Outcome:
        return Outcome(200, allowed_origin=headers["webhook-request-origin"])

    def ids(self, host: str) -> set[str]:
        return {identifier for identifier, _ in self.got[host]}


@dataclass
class World:
    log: MemoryLog
    registry: Runtime[None]
    webhooks: Runtime[State]
    network: Network
    signer: Signer
    sender: Sender

    async def say(self, first: int, count: int, organization: str = "acme", **options: Any) -> None:
        for at in range(first, first + count, 100):
            say = Say(at, min(100, first + count - at), **options)
            await self.registry.submit(Command(organization, say), Deadline.after(10))

    async def create(self, endpoint: str, organization: str = "acme", **fields: Any) -> str:
        name = f"organizations/{organization}/webhookEndpoints/{endpoint}"
        wanted = pb.WebhookEndpoint(name=name, **{"url": f"https://{endpoint}/x", **fields})
        places = [TopicPartition(*place) for place in places_of(ENV, 0)]
        ends = await self.log.end_positions(places)
        starts = tuple(((place.topic, place.partition), position) for place, position in ends.items())
        made: Any = await self.webhooks.submit(
            Command(organization, CreateEndpoint(wanted, starts)), Deadline.after(10)
        )
        image = made.result.webhook_endpoint
        verified = RecordVerification(name, image.uid, image.url, "")
        await self.webhooks.submit(Command(organization, verified), Deadline.after(10))
        return name

    def endpoint(self, name: str) -> Endpoint:
        state: Any = self.webhooks.snapshot_of_partition(0).state
        found: Endpoint = state.endpoints[name]
        return found

    def new_sender(self) -> Sender:
        return Sender(self.webhooks, self.log, ENV, self.network, self.signer, wall_clock_ms)

    async def crash(self) -> None:
        """Lose everything that the sender had in memory."""
        sender = self.sender
        assert sender._task is not None
        tasks = [sender._task, *(task for _, task in sender._senders.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.sender = self.new_sender()
        await self.sender.start()


async def until(condition: Callable[[], bool], within_s: float = 15.0) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    log, network, signer = MemoryLog(partitions=1), Network(), Signer(MemoryKeyStore())
    config = RuntimeConfig(env=ENV, partitions=1)
    registry: Runtime[None] = Runtime(Publisher(), log, config)
    domain = Webhooks(lambda name, uid, generation: signer.keys(name, uid, generation).public_key)
    webhooks: Runtime[State] = Runtime(domain, log, RuntimeConfig(env=ENV, partitions=1, node=new_id()))
    for runtime in (registry, webhooks):
        await runtime.start()
        await runtime.wait_ready(Deadline.after(5))
        await runtime.wait_leading(Deadline.after(5))
    sender = Sender(webhooks, log, ENV, network, signer, wall_clock_ms)
    made = World(log, registry, webhooks, network, signer, sender)
    await sender.start()
    yield made
    await made.sender.stop()
    await webhooks.stop()
    await registry.stop()


async def test_only_what_comes_after_creation_and_only_to_its_own_organization(world: World) -> None:
    await world.say(0, 3)
    name = await world.create("ops")
    await world.create("spy", "other")
    await world.say(3, 2)
    await world.say(5, 1, unknown=True)
    await world.say(6, 2)
    await until(lambda: world.endpoint(name).delivered == 4)
    assert len(world.network.ids("ops")) == len(world.network.got["ops"]) == 4
    assert world.network.got["spy"] == []
    # Four deliveries, few records: successes are committed together.
    assert len(world.log.records("t.webhooks.events.v1", 0)) < 10


async def test_an_endpoint_that_hangs_delays_no_other_and_gets_all_of_it_later(world: World) -> None:
    back = asyncio.Event()

    async def hang() -> Outcome:
        await back.wait()
        return Outcome(204)

    world.network.answers["slow"] = hang
    slow, quick = await world.create("slow"), await world.create("quick")
    total = MAX_FRESH + 700
    await world.say(0, total)
    await until(lambda: len(world.network.got["quick"]) == total)
    assert world.network.got["slow"] == []
    assert world.network.most["slow"] <= 8
    back.set()
    await until(lambda: world.endpoint(slow).delivered == total)
    assert len(world.network.ids("slow")) == len(world.network.got["slow"]) == total
    # Caught up, it is fed by the shared reader again.
    await world.say(total, 1)
    await until(lambda: world.endpoint(slow).delivered == world.endpoint(quick).delivered == total + 1)


async def test_at_least_once_under_one_id_over_crashes_of_the_sender(world: World) -> None:
    async def short() -> Outcome:
        await asyncio.sleep(0.002)
        return Outcome(204)

    world.network.answers["ops"] = short
    name = await world.create("ops")
    for first in range(0, 300, 100):
        await world.say(first, 100)
        await until(lambda first=first: len(world.network.ids("ops")) > first + 30)  # type: ignore[misc]
        await world.crash()
    await until(lambda: len(world.network.ids("ops")) == 300)
    bodies = defaultdict(set)
    for identifier, body in world.network.got["ops"]:
        bodies[identifier].add(body)
    assert {len(found) for found in bodies.values()} == {1}
    streams = world.endpoint(name).streams
    await until(lambda: not any(stream.exceptions for stream in streams.values()))


async def test_failures_are_in_the_log_and_outlive_the_sender(world: World) -> None:
    answer = [Outcome(503, "RESPONSE_STATUS: answered 503")]

    async def broken() -> Outcome:
        return answer[0]

    world.network.answers["ops"] = broken
    name = await world.create("ops")
    await world.say(0, 3)
    await until(lambda: world.endpoint(name).open_exceptions == 3)
    await world.crash()
    answer[0] = Outcome(204)
    # A new event finds the endpoint well; the old ones come at the time that the log says.
    await world.say(3, 1)
    await until(lambda: world.endpoint(name).delivered == 4)
    assert world.endpoint(name).open_exceptions == 0
    assert len(world.network.ids("ops")) == 4


async def test_a_sender_that_is_stopped_has_recorded_all_it_delivered(world: World) -> None:
    name = await world.create("ops")
    await world.say(0, 50)
    await until(lambda: len(world.network.got["ops"]) == 50)
    await world.sender.stop()
    assert world.endpoint(name).delivered == 50
    world.sender = world.new_sender()
    await world.sender.start()
    await world.say(50, 1)
    await until(lambda: world.endpoint(name).delivered == 51)
    assert len(world.network.got["ops"]) == 51
    assert world.sender.live


async def test_once_disabling_is_answered_nothing_more_is_sent(world: World) -> None:
    name = await world.create("ops")
    for number in range(0, 30, 3):
        await world.say(number, 1)
        off = pb.WebhookEndpoint(name=name, state=pb.WebhookEndpoint.STATE_DISABLED)
        await world.webhooks.submit(Command("acme", UpdateEndpoint(off, ("state",))), Deadline.after(10))
        known = len(world.network.got["ops"])
        await world.say(number + 1, 1)
        await world.create(f"witness{number}")
        await world.say(number + 2, 1)
        await until(lambda number=number: len(world.network.got[f"witness{number}"]) >= 1)  # type: ignore[misc]
        assert len(world.network.got["ops"]) == known
        on = pb.WebhookEndpoint(name=name, state=pb.WebhookEndpoint.STATE_ACTIVE)
        await world.webhooks.submit(Command("acme", UpdateEndpoint(on, ("state",))), Deadline.after(10))
        await until(lambda number=number: len(world.network.ids("ops")) == number + 3)  # type: ignore[misc]


async def test_a_bug_that_one_delivery_meets_is_a_failure_of_that_delivery(world: World) -> None:
    async def bug() -> Outcome:
        raise RuntimeError("bug")

    world.network.answers["odd"] = bug
    odd, good = await world.create("odd"), await world.create("good")
    await world.say(0, 2)
    await until(lambda: world.endpoint(odd).open_exceptions == 2 and world.endpoint(good).delivered == 2)
    errors = {each.last_error for stream in world.endpoint(odd).streams.values() for each in stream.exceptions.values()}
    assert {error.partition(":")[0] for error in errors} == {"INTERNAL_ERROR"}
