"""The sender with the real runtime on the in-memory log; only the network is played."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.webhooks.v1 import webhooks_pb2 as pb
from jsonschema import Draft202012Validator
from standardwebhooks import Webhook, WebhookVerificationError

from libs.eventlog import Command, Context, Deadline, Decision, Event, NewEvent, Public, Runtime, RuntimeConfig
from libs.eventlog.codec import new_id
from libs.eventlog.config import wall_clock_ms
from libs.eventlog.memory import MemoryLog
from libs.eventlog.ports import TopicPartition
from libs.keystore import MemoryKeyStore
from services.webhooks.domain import Webhooks
from services.webhooks.model import (
    VERIFY,
    CreateEndpoint,
    Endpoint,
    RecordVerification,
    ResendOne,
    RotateSecret,
    StartReplay,
    State,
    UpdateEndpoint,
)
from services.webhooks.pump import MAX_FRESH
from services.webhooks.schema import closed, schema_of
from services.webhooks.sender import Sender
from services.webhooks.signing import Signer
from services.webhooks.source import places_of
from services.webhooks.transport import Outcome, Target
from services.webhooks.verify import Verifier

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
    headers: dict[str, list[dict[str, str]]] = field(default_factory=lambda: defaultdict(list))
    tests: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wants: set[str] = field(default_factory=set)
    """Hosts that say that they are meant."""

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Outcome:
        host = target.url.split("/")[2]
        if json.loads(body)["type"] == "webhook.test_fire":
            self.tests[host] += 1
            said = {"challenge": json.loads(body)["data"]["challenge"]}
            return Outcome(200, body=json.dumps(said).encode()) if host in self.wants else Outcome(404, "NO: not me")
        self.now[host] += 1
        self.most[host] = max(self.most[host], self.now[host])
        try:
            answer = self.answers.get(host)
            outcome = Outcome(204) if answer is None else await answer()
            if outcome.succeeded:
                self.got[host].append((headers["webhook-id"], body))
                self.headers[host].append(dict(headers))
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
        name = await self.create_pending(endpoint, organization, **fields)
        image = self.endpoint(name).image
        verified = RecordVerification(name, image.uid, image.url, "")
        await self.webhooks.submit(Command(organization, verified), Deadline.after(10))
        return name

    async def create_pending(self, endpoint: str, organization: str = "acme", **fields: Any) -> str:
        name = f"organizations/{organization}/webhookEndpoints/{endpoint}"
        wanted = pb.WebhookEndpoint(name=name, **{"url": f"https://{endpoint}/x", **fields})
        places = [TopicPartition(*place) for place in places_of(ENV, 0)]
        ends = await self.log.end_positions(places)
        starts = tuple(((place.topic, place.partition), position) for place, position in ends.items())
        await self.webhooks.submit(Command(organization, CreateEndpoint(wanted, starts)), Deadline.after(10))
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
    registry: Runtime[None] = Runtime(Publisher(), log, RuntimeConfig(env=ENV, partitions=1))
    domain = Webhooks(lambda name, uid, generation: signer.keys(name, uid, generation).public_key)
    verifier = Verifier(network, signer, "test", wall_clock_ms)
    config = RuntimeConfig(env=ENV, partitions=1, node=new_id())
    webhooks: Runtime[State] = Runtime(domain, log, config, {VERIFY: verifier.task})
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
    recorded = [
        record
        for record in world.log.records("t.webhooks.events.v1", 0)
        if dict(record.headers)["event-type"] == b"groundswell.webhooks.v1.DeliveriesRecorded"
    ]
    assert 1 <= len(recorded) < 4


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


async def test_nothing_but_test_fires_reaches_an_endpoint_until_it_says_that_it_is_meant(world: World) -> None:
    name = await world.create_pending("ops")
    await world.create("witness")
    await world.say(0, 5)
    await until(lambda: len(world.network.got["witness"]) == 5 and world.network.tests["ops"] >= 1)
    assert world.network.got["ops"] == []
    await until(lambda: world.endpoint(name).verify_reason.startswith("NO"))
    world.network.wants.add("ops")
    # Asked again by itself; then it gets what came meanwhile.
    await until(lambda: world.endpoint(name).active and world.endpoint(name).delivered == 5)
    assert world.network.tests["ops"] >= 2


async def test_every_event_that_is_sent_obeys_the_schema_of_its_type(world: World) -> None:
    await world.create("first", payload_version=1)
    await world.create("second", payload_version=2)
    await world.create("watcher", event_types=["webhook.*"])
    for number, change in enumerate(("device.created", "device.updated", "device.dreamt_up", "device.retired")):
        await world.say(number, 2, change=change)
    await until(lambda: len(world.network.got["first"]) == len(world.network.got["second"]) == 8)
    off = pb.WebhookEndpoint(name="organizations/acme/webhookEndpoints/first", state=pb.WebhookEndpoint.STATE_DISABLED)
    await world.webhooks.submit(Command("acme", UpdateEndpoint(off, ("state",))), Deadline.after(10))
    await until(lambda: len(world.network.got["watcher"]) >= 1)
    versions = {"first": 1, "second": 2, "watcher": 2}
    for host, version in versions.items():
        for _, body in world.network.got[host]:
            document = json.loads(body)
            Draft202012Validator(closed(schema_of(document["type"], version))).validate(document)


async def test_t66_operational_events_reach_others_that_ask_and_never_the_one_they_speak_of(world: World) -> None:
    async def broken() -> Outcome:
        return Outcome(503, "RESPONSE_STATUS: answered 503")

    sick = await world.create("sick", event_types=["device.*", "webhook.*"])
    well = await world.create("well", event_types=["webhook.*"])
    plain = await world.create("plain")
    world.network.answers["sick"] = broken
    await world.say(0, 30)
    await until(lambda: world.endpoint(sick).health == pb.WebhookEndpoint.HEALTH_OPEN)

    def told() -> list[tuple[str, str]]:
        return [(json.loads(body)["type"], json.loads(body)["resource"]) for _, body in world.network.got["well"]]

    await until(lambda: ("webhook.endpoint.opened", sick) in told())
    await until(lambda: world.endpoint(plain).delivered == 30)
    assert all(json.loads(body)["type"] == "device.created" for _, body in world.network.got["plain"])
    world.network.answers.clear()
    await until(lambda: world.endpoint(sick).delivered >= 30, 40.0)
    about_itself = [body for _, body in world.network.got["sick"] if json.loads(body)["resource"] == sick]
    assert about_itself == []
    # It failed a hundred times and more; what was told of it are its few changes.
    assert [kind for kind, resource in told() if resource == sick].count("webhook.endpoint.opened") == 1
    assert world.endpoint(well).open_exceptions == 0


async def test_t65_a_secret_rolls_under_load_and_no_delivery_is_unverifiable(world: World) -> None:
    async def short() -> Outcome:
        await asyncio.sleep(0.001)
        return Outcome(204)

    world.network.answers["ops"] = short
    name = await world.create("ops")
    uid = world.endpoint(name).image.uid
    old, new = (Webhook(world.signer.keys(name, uid, generation).shown_secret) for generation in (1, 2))
    await world.say(0, 100)
    await until(lambda: len(world.network.got["ops"]) >= 50)
    await world.webhooks.submit(Command("acme", RotateSecret(name, 1_500, "")), Deadline.after(10))
    until_ms = world.endpoint(name).image.previous_secret_expire_time.ToMilliseconds()
    await world.say(100, 100)
    number = 200
    while wall_clock_ms() < until_ms + 300:
        await world.say(number, 10)
        number += 10
        await asyncio.sleep(0.02)
    await until(lambda: world.endpoint(name).delivered == number)
    before = after = both = 0
    for (_, body), headers in zip(world.network.got["ops"], world.network.headers["ops"], strict=True):
        good = [verifies(each, body, headers) for each in (old, new)]
        assert any(good), "a receiver with either secret must be able to read it"
        both += all(good)
        before += good == [True, False]
        after += good == [False, True]
    assert before
    assert both >= 100
    assert after
    last = world.network.got["ops"][-1][1], world.network.headers["ops"][-1]
    assert not verifies(old, *last)


def verifies(key: Webhook, body: bytes, headers: dict[str, str]) -> bool:
    try:
        key.verify(body.decode(), headers)
    except WebhookVerificationError:
        return False
    return True


async def test_n16_a_consumer_that_was_down_catches_up_and_rewinds_byte_for_byte_without_gaps(world: World) -> None:
    async def down() -> Outcome:
        return Outcome(0, "CONNECT_FAILED: nobody there")

    name = await world.create("ops", ordering=pb.WebhookEndpoint.ORDERING_STRICT, payload_version=2)
    await world.say(0, 50)
    await until(lambda: world.endpoint(name).delivered == 50)
    world.network.answers["ops"] = down
    for _ in range(6):
        await world.say(0, 50)
    await until(lambda: world.endpoint(name).health == pb.WebhookEndpoint.HEALTH_OPEN)
    await world.crash()
    world.network.answers.clear()
    await until(lambda: len(world.network.ids("ops")) == 350 and world.endpoint(name).delivered >= 350, 40.0)
    first = dict(world.network.got["ops"])
    sequences: dict[str, set[int]] = defaultdict(set)
    for headers in world.network.headers["ops"]:
        sequences[headers["webhook-sequence-key"]].add(int(headers["webhook-sequence"]))
    assert len(sequences) == 50
    assert all(found == set(range(1, 8)) for found in sequences.values()), "no gaps"
    numbers = {headers["webhook-id"]: headers["webhook-sequence"] for headers in world.network.headers["ops"]}

    world.network.got.clear()
    world.network.headers.clear()
    places = [TopicPartition(*place) for place in places_of(ENV, 0)]
    ends = tuple(
        ((place.topic, place.partition), end) for place, end in (await world.log.end_positions(places)).items()
    )
    replay = f"{name}/replays/rewind"
    command = StartReplay(pb.Replay(name=replay), ends)
    await world.webhooks.submit(Command("acme", command), Deadline.after(10))
    await until(lambda: len(world.network.ids("ops")) >= 100)
    await world.crash()
    await until(lambda: world.endpoint(name).replays[replay].state == pb.Replay.STATE_SUCCEEDED, 40.0)
    assert dict(world.network.got["ops"]) == first
    for headers in world.network.headers["ops"]:
        assert headers["webhook-replay"] == replay
        assert headers["webhook-sequence"] == numbers[headers["webhook-id"]]
    assert world.endpoint(name).replays[replay].matched_count >= 350
    assert world.endpoint(name).replays[replay].failed_count == 0


async def test_one_delivery_again_under_its_old_id(world: World) -> None:
    name = await world.create("ops")
    await world.say(0, 3)
    await until(lambda: world.endpoint(name).delivered == 3)
    identifier, body = world.network.got["ops"][1]
    resent: Any = await world.webhooks.submit(
        Command("acme", ResendOne(f"{name}/deliveries/{identifier}")), Deadline.after(10)
    )
    await until(lambda: world.endpoint(name).replays[resent.result.name].state == pb.Replay.STATE_SUCCEEDED)
    assert world.network.got["ops"][3:] == [(identifier, body)]
    assert "webhook-replay" not in world.network.headers["ops"][1]


async def test_a_rate_is_kept(world: World) -> None:
    name = await world.create("ops", max_per_second=20)
    began = wall_clock_ms()
    await world.say(0, 50)
    await until(lambda: world.endpoint(name).delivered == 50)
    # A burst of one second's worth, then twenty a second.
    assert wall_clock_ms() - began >= 1_400
