"""Strict order: one device's failure holds back that device alone, in order, with numbers without gaps."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2
from groundswell.webhooks.v1 import webhooks_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from services.webhooks import scope
from services.webhooks.lane import Item
from services.webhooks.model import MAX_HELD, MAX_HELD_PER_KEY, RecordDeliveries, UpdateEndpoint
from services.webhooks.pump import Pump
from services.webhooks.render import WebhookEvent
from services.webhooks.schedule import STEPS_MS
from services.webhooks.transport import Outcome
from tests.unit.webhooks.support import NAME, PLACE, World, pump_of

GOOD = Outcome(204)
BAD = Outcome(500, "RESPONSE_STATUS: answered 500")
STRICT = pb.WebhookEndpoint.ORDERING_STRICT
BEST_EFFORT = pb.WebhookEndpoint.ORDERING_BEST_EFFORT
DEVICES = "organizations/acme/products/p/devices"


def of_device(number: int, device: str) -> WebhookEvent:
    name = f"{DEVICES}/{device}"
    payload = registry_events.DeviceChanged(device=registry_pb2.Device(name=name), change="device.updated")
    return WebhookEvent("device.updated", f"e{number}", "acme", name, number, payload)


@dataclass
class Run:
    """A strict endpoint, its pump, and a receiver that remembers in what order it was asked."""

    world: World = field(default_factory=World)
    records: list[tuple[int, WebhookEvent]] = field(default_factory=list)
    delivered: list[tuple[str, int, int]] = field(default_factory=list)
    """(device, position, sequence)."""

    def __post_init__(self) -> None:
        self.world.create(ordering=STRICT)
        self.pump = pump_of(self.world)

    def say(self, *devices: str) -> None:
        for device in devices:
            position = 10 + len(self.records)
            self.records.append((position, of_device(position, device)))
            assert self.pump.offer(PLACE, *self.records[-1])

    def take(self, now_ms: int) -> Item | None:
        return self.pump.take(now_ms)

    def good(self, item: Item, now_ms: int = 0) -> None:
        self.pump.succeeded(item, GOOD, now_ms)
        self.delivered.append((item.order_key.rpartition("/")[2], item.position, item.sequence))

    def record(self) -> None:
        moves, gone = self.pump.collect()
        if moves or gone:
            self.world.do(RecordDeliveries(NAME, self.pump.image.uid, moves, gone))

    def lose_memory(self) -> None:
        self.pump = pump_of(self.world)
        for record in self.records:
            assert self.pump.offer(PLACE, *record)

    def drain(self, now_ms: int, *bad: str) -> None:
        """Attempt what may be attempted; deliveries of some devices fail."""
        while (item := self.take(now_ms)) is not None:
            if item.order_key.rpartition("/")[2] in bad:
                self.pump.failed(item, BAD, now_ms)
            else:
                self.good(item, now_ms)


def test_only_one_of_a_device_is_under_way_and_others_are_not_held_up() -> None:
    run = Run()
    run.say("a", "a", "b", "a", "c")
    under_way = [run.take(0) for _ in range(4)]
    assert [item.position for item in under_way if item is not None] == [10, 12, 14]
    run.good(under_way[0])  # type: ignore[arg-type]
    following = run.take(0)
    assert following is not None
    assert following.position == 11


def test_a_failure_holds_back_its_device_alone_and_the_cursor_moves_on() -> None:
    run = Run()
    run.say("a", "a", "b")
    first = run.take(0)
    assert first is not None
    run.pump.failed(first, BAD, 0)
    run.say("a", "b")
    run.drain(0, "a")
    assert [device for device, _, _ in run.delivered] == ["b", "b"]
    run.record()
    stream = run.world.endpoint.streams[PLACE]
    assert stream.cursor == 14
    assert {position: each.held for position, each in stream.exceptions.items()} == {10: False, 11: True, 13: True}
    run.drain(10_000_000)
    assert [position for device, position, _ in run.delivered if device == "a"] == [10, 11, 13]
    run.record()
    assert not run.world.endpoint.streams[PLACE].exceptions


def test_after_the_whole_schedule_the_delivery_is_dead_and_the_device_moves_on() -> None:
    run = Run()
    run.say("a", "a", "b")
    now = 0
    for _ in STEPS_MS:
        while (item := run.take(now)) is not None and item.position != 10:
            run.good(item, now)
        assert item is not None
        assert not item.early
        run.pump.failed(item, BAD, now)
        run.record()
        exception = run.world.endpoint.streams[PLACE].exceptions.get(10)
        now = exception.next_at_ms if exception is not None else now
    assert set(run.world.endpoint.streams[PLACE].dead) == {10}
    run.drain(now)
    assert [(device, number) for device, _, number in run.delivered] == [("b", 1), ("a", 2)]


def test_what_is_beyond_the_caps_is_a_dead_letter_at_once_and_says_why() -> None:
    run = Run()
    run.say("a")
    item = run.take(0)
    assert item is not None
    run.pump.failed(item, BAD, 0)
    run.say(*["a"] * (MAX_HELD_PER_KEY + 5))
    run.record()
    stream = run.world.endpoint.streams[PLACE]
    assert len(stream.exceptions) == MAX_HELD_PER_KEY
    assert {each.last_error.partition(":")[0] for each in stream.dead.values()} == {"KEY_QUEUE_FULL"}
    assert len(stream.dead) == 6
    run.say("b")
    run.drain(0)
    assert ("b", run.records[-1][0], 1) in run.delivered


def test_many_devices_that_fail_do_not_stop_the_endpoint() -> None:
    run = Run()
    devices = [f"d{number}" for number in range(12)]
    for device in devices:
        run.say(device)
        item = run.take(0)
        assert item is not None
        run.pump.failed(item, BAD, 0)
        run.pump.breaker = type(run.pump.breaker)()
        run.say(*[device] * MAX_HELD_PER_KEY)
    run.record()
    assert sum(each.held for each in run.world.endpoint.streams[PLACE].exceptions.values()) == MAX_HELD
    run.say("well")
    taken = run.take(0)
    assert taken is not None
    assert taken.order_key.endswith("/well")


def test_numbers_are_the_same_after_memory_is_lost_and_begin_anew_with_other_filters() -> None:
    run = Run()
    run.say("a", "b", "a")
    run.drain(0)
    run.record()
    run.lose_memory()
    run.say("a", "b")
    run.drain(0)
    assert run.delivered == [("a", 10, 1), ("b", 11, 1), ("a", 12, 2), ("a", 13, 3), ("b", 14, 2)]
    run.record()
    wanted = pb.WebhookEndpoint(name=NAME, event_types=["device.*"])
    run.world.do(UpdateEndpoint(wanted, ("event_types",)))
    run.lose_memory()
    run.say("a")
    run.drain(0)
    assert run.delivered[-1] == ("a", 15, 1)


def test_choosing_strict_order_later_numbers_from_there() -> None:
    world = World()
    world.create()
    pump = pump_of(world)
    pump.offer(PLACE, 10, of_device(10, "a"))
    item = pump.take(0)
    assert item is not None
    assert item.sequence == 0
    pump.succeeded(item, GOOD, 0)
    moves, _ = pump.collect()
    world.do(RecordDeliveries(NAME, pump.image.uid, moves))
    world.do(UpdateEndpoint(pb.WebhookEndpoint(name=NAME, ordering=STRICT), ("ordering",)))
    again = pump_of(world)
    for position in (10, 11):
        again.offer(PLACE, position, of_device(position, "a"))
    item = again.take(0)
    assert item is not None
    assert (item.position, item.sequence) == (11, 1)


@pytest.mark.parametrize(
    ("resource", "payload", "key"),
    [
        (f"{DEVICES}/d/attempts/a", rollout_events.AttemptChanged(), f"{DEVICES}/d"),
        (
            "organizations/acme/deviceCertificates/f",
            rollout_events.AttemptChanged(attempt=rollout_pb2.Attempt(device=f"{DEVICES}/d")),
            f"{DEVICES}/d",
        ),
        ("organizations/acme/products/p", registry_events.ProductChanged(), "organizations/acme/products/p"),
        (f"{DEVICES}/d", registry_events.DeviceChanged(), f"{DEVICES}/d"),
    ],
)
def test_what_is_ordered_by(resource: str, payload: Any, key: str) -> None:
    assert scope.order_key(resource, payload) == key


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 60), fail_share=st.floats(0, 0.6))
def test_property_order_per_device_at_least_once_same_id_over_failures_and_lost_memory(
    seed: int, length: int, fail_share: float
) -> None:
    chance = random.Random(seed)
    run = Run()
    now, under_way, ids = 0, [], defaultdict(set)

    def step() -> None:
        nonlocal now
        action = chance.random()
        if action < 0.3 and len(run.records) < length:
            run.say(chance.choice("abc"))
        elif action < 0.6:
            item = run.take(now)
            if item is not None:
                under_way.append(item)
                ids[item.position].add(item.webhook_id)
        elif action < 0.8 and under_way:
            item = under_way.pop(chance.randrange(len(under_way)))
            if chance.random() < fail_share:
                run.pump.failed(item, BAD, now)
            else:
                run.good(item, now)
        elif action < 0.9:
            run.record()
        elif action < 0.93:
            under_way.clear()
            run.lose_memory()
        else:
            now += chance.choice([10, 10_000, 1_000_000])

    for _ in range(12 * length):
        step()
    run.say(*"abc"[: 1 + seed % 3])
    for item in under_way:
        run.good(item, now)
    for _ in range(100):
        # To the end: the receiver is well, and time goes on.
        now += 3_600_000
        run.drain(now)
        run.record()
    stream = run.world.endpoint.streams[PLACE]
    assert not stream.exceptions
    assert {position for _, position, _ in run.delivered} | set(stream.dead) == {at for at, _ in run.records}
    assert all(len(found) == 1 for found in ids.values())
    for device in "abc":
        # Repeats come after lost memory; the first time of each is in order, and no number is missing.
        firsts = list(dict.fromkeys((at, number) for name, at, number in run.delivered if name == device))
        assert [at for at, _ in firsts] == sorted(at for at, _ in firsts)
        numbers = {number for _, number in firsts} | {
            each.sequence for each in stream.dead.values() if each.order_key.endswith(f"/{device}")
        }
        assert numbers == set(range(1, len(numbers) + 1))


def test_one_dead_device_delays_no_other_beyond_its_own() -> None:
    run = Run()
    run.say(*["bad", "good"] * 20)
    run.drain(0, "bad")
    assert len(run.delivered) == 20


def test_best_effort_has_no_numbers() -> None:
    world = World()
    world.create(ordering=BEST_EFFORT)
    pump: Pump = pump_of(world)
    pump.offer(PLACE, 10, of_device(10, "a"))
    item = pump.take(0)
    assert item is not None
    assert (item.sequence, item.order_key) == (0, "")
