"""Replays: ranges, what is refused, and a feed that makes the deliveries of the first time again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import DomainError
from services.webhooks.lane import Item
from services.webhooks.model import (
    MAX_REPLAYS,
    MAX_RUNNING_REPLAYS,
    CancelReplay,
    DeleteEndpoint,
    Move,
    RecordDeliveries,
    RecordReplay,
    ResendOne,
    StartReplay,
    UpdateEndpoint,
)
from services.webhooks.pump import Pump
from services.webhooks.render import render
from services.webhooks.replay_feed import ATTEMPTS, ReplayFeed
from services.webhooks.signing import webhook_id
from services.webhooks.transport import Outcome
from services.webhooks.views import deliveries
from tests.unit.webhooks.support import NAME, OTHER, PLACE, World, event, pump_of

GOOD = Outcome(204)
BAD = Outcome(500, "RESPONSE_STATUS: answered 500")
ENDS = ((PLACE, 20), (OTHER, 30))
STRICT = pb.WebhookEndpoint.ORDERING_STRICT


def wanted(name: str = "r", **fields: Any) -> pb.Replay:
    return pb.Replay(name=f"{NAME}/replays/{name}", **fields)


def started(world: World, name: str = "r", **fields: Any) -> pb.Replay:
    result: Any = world.do(StartReplay(wanted(name, **fields), ENDS)).result
    found: pb.Replay = result
    return found


def piece(first: int, end: int = 0, place: Any = PLACE) -> pb.PositionRange:
    return pb.PositionRange(topic=place[0], partition=place[1], from_position=first, to_position=end)


def feed_of(world: World, name: str = "r") -> ReplayFeed:
    return ReplayFeed(world.endpoint, world.endpoint.replays[f"{NAME}/replays/{name}"])


def read(feed: ReplayFeed, records: dict[int, Any], failed: frozenset[Any] | None = None) -> None:
    for position, record in sorted(records.items()):
        feed.offer(PLACE, position, record, failed)
    for place in (PLACE, OTHER):
        if place in feed.lanes:
            feed.advance(place, 10**6)


def drain(pump: Pump, now_ms: int = 0) -> list[Item]:
    found = []
    while (item := pump.take(now_ms)) is not None:
        found.append(item)
        pump.succeeded(item, GOOD, now_ms)
    return found


def with_feed(world: World, feed: ReplayFeed) -> Pump:
    pump = pump_of(world)
    pump.feeds[feed.name] = feed
    return pump


def test_without_positions_everything_up_to_now_is_meant() -> None:
    world = World()
    world.create()
    ranges = {each.topic: (each.from_position, each.to_position) for each in started(world).ranges}
    assert ranges == {PLACE[0]: (0, 20), OTHER[0]: (0, 30)}


def test_positions_end_where_the_log_ends() -> None:
    world = World()
    world.create()
    replay = started(world, ranges=[piece(5, 500)])
    assert [(each.from_position, each.to_position) for each in replay.ranges] == [(5, 20)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ranges": [piece(20)]}, "INVALID_FIELD"),
        ({"ranges": [piece(7, 7)]}, "INVALID_FIELD"),
        ({"ranges": [piece(0), piece(1)]}, "INVALID_FIELD"),
        ({"ranges": [piece(0, 5, ("t.secret.events.v1", 0))]}, "INVALID_FIELD"),
        ({"ranges": [piece(0, 5, (PLACE[0], 3))]}, "INVALID_FIELD"),
        ({"event_types": ["nothing.known"]}, "INVALID_FIELD"),
    ],
)
def test_ranges_that_are_refused(fields: dict[str, Any], reason: str) -> None:
    world = World()
    world.create()
    before = world.state
    with pytest.raises(DomainError) as refused:
        started(world, **fields)
    assert refused.value.reason == reason
    assert world.state is before


def test_times_that_are_refused_and_names_that_are_taken() -> None:
    world = World()
    world.create()
    backwards = wanted()
    backwards.start_time.FromMilliseconds(2_000)
    backwards.end_time.FromMilliseconds(2_000)
    with pytest.raises(DomainError) as refused:
        world.do(StartReplay(backwards, ENDS))
    assert refused.value.reason == "INVALID_FIELD"
    started(world)
    with pytest.raises(DomainError) as refused:
        started(world)
    assert refused.value.reason == "ALREADY_EXISTS"
    unnamed: Any = world.do(StartReplay(wanted(""), ENDS)).result
    assert unnamed.name.startswith(f"{NAME}/replays/uuid-")


def test_only_an_active_endpoint_has_replays_and_only_some_at_a_time() -> None:
    world = World()
    with pytest.raises(DomainError) as refused:
        started(world)
    assert refused.value.reason == "RESOURCE_NOT_FOUND"
    world.create_pending()
    with pytest.raises(DomainError) as refused:
        started(world)
    assert refused.value.reason == "WRONG_STATE"
    world.do(DeleteEndpoint(NAME, ""))
    world.create()
    for number in range(MAX_RUNNING_REPLAYS):
        started(world, f"r{number}")
    with pytest.raises(DomainError) as refused:
        started(world, "more")
    assert refused.value.reason == "QUOTA_EXCEEDED"
    world.do(CancelReplay(f"{NAME}/replays/r0"))
    started(world, "more")


def test_cancelling_ends_it_once_and_progress_cannot_wake_it() -> None:
    world = World()
    world.create()
    running = started(world)
    world.do(CancelReplay(running.name))
    with pytest.raises(DomainError) as refused:
        world.do(CancelReplay(running.name))
    assert refused.value.reason == "WRONG_STATE"
    with pytest.raises(DomainError) as refused:
        world.do(CancelReplay(f"{NAME}/replays/none"))
    assert refused.value.reason == "RESOURCE_NOT_FOUND"
    assert not world.do(RecordReplay(running)).events
    assert world.endpoint.replays[running.name].state == pb.Replay.STATE_CANCELLED


def test_ended_replays_are_kept_to_a_number() -> None:
    world = World()
    world.create()
    for number in range(MAX_REPLAYS + 5):
        world.now_ms += 1_000
        world.do(CancelReplay(started(world, f"r{number}").name))
    kept = world.endpoint.replays
    assert len(kept) == MAX_REPLAYS
    assert f"{NAME}/replays/r0" not in kept
    assert f"{NAME}/replays/r{MAX_REPLAYS + 4}" in kept


def test_n16_a_replay_has_the_ids_bodies_and_numbers_of_the_first_time() -> None:
    world = World()
    world.create(ordering=STRICT)
    records = {position: event(position % 3) for position in range(10, 19)}
    for position, record in records.items():
        record.payload.change = "device.created"  # type: ignore[attr-defined]
        records[position] = type(record)(
            "device.created", f"e{position}", "acme", record.resource, position, record.payload
        )
    pump = pump_of(world)
    for position, record in records.items():
        pump.offer(PLACE, position, record)
    first = drain(pump)
    moves, _ = pump.collect()
    world.do(RecordDeliveries(NAME, pump.image.uid, moves))
    started(world, ranges=[piece(13)])
    feed = feed_of(world)
    assert feed.unread() == {PLACE: 10}, "numbers are counted from where they began"
    again_pump = with_feed(world, feed)
    read(feed, records)
    again = drain(again_pump)
    facts = {item.position: (item.webhook_id, item.sequence, item.order_key) for item in first}
    assert {item.position: (item.webhook_id, item.sequence, item.order_key) for item in again} == {
        position: facts[position] for position in range(13, 19)
    }
    assert [item.position for item in again] == list(range(13, 19)), "in the order of the log"
    bodies = {item.position: render(item.event, 2) for item in first if item.event is not None}
    assert all(item.event is not None and render(item.event, 2) == bodies[item.position] for item in again)
    assert {item.replay for item in again} == {feed.name}
    progress = feed.collect()
    assert progress is not None
    assert (progress.state, progress.matched_count, progress.delivered_count) == (pb.Replay.STATE_SUCCEEDED, 6, 6)
    for key in {item.order_key for item in first}:
        numbers = [item.sequence for item in first if item.order_key == key]
        assert numbers == list(range(1, len(numbers) + 1))


def test_memory_lost_in_the_middle_repeats_only_what_is_not_recorded() -> None:
    world = World()
    world.create()
    records = {position: event(position) for position in range(10, 20)}
    started(world, ranges=[piece(0)])
    feed = feed_of(world)
    pump = with_feed(world, feed)
    read(feed, records)
    for _ in range(4):
        item = pump.take(0)
        assert item is not None
        pump.succeeded(item, GOOD, 0)
    progress = feed.collect()
    assert progress is not None
    world.do(RecordReplay(progress))
    again = feed_of(world)
    pump = with_feed(world, again)
    read(again, records)
    assert [item.position for item in drain(pump)] == list(range(14, 20))
    end = again.collect()
    assert end is not None
    assert (end.state, end.matched_count, end.delivered_count) == (pb.Replay.STATE_SUCCEEDED, 10, 10)
    world.do(RecordReplay(end))
    assert world.endpoint.replays[feed.name].HasField("finish_time")


def test_times_and_types_narrow_it() -> None:
    world = World()
    world.create(event_types=["device.*"])
    replay = wanted(event_types=["device.updated"])
    replay.start_time.FromMilliseconds(1_012)
    replay.end_time.FromMilliseconds(1_017)
    world.do(StartReplay(replay, ENDS))
    feed = feed_of(world)
    records = {}
    for position in range(10, 19):
        kind = "device.updated" if position % 2 else "device.created"
        made = event(position, kind)
        records[position] = type(made)(kind, made.event_id, "acme", made.resource, 1_000 + position, made.payload)
    records[13] = event(13, "rollout.halted")
    read(feed, records)
    assert [item.position for item in drain(with_feed(world, feed))] == [15]


def test_only_failed_takes_the_dead_and_the_waiting_and_they_are_so_no_longer() -> None:
    world = World()
    made = world.create()
    failing = {
        11: events.DeliveryException(position=11, webhook_id=webhook_id(made.uid, "e11"), attempt_count=10, dead=True),
        12: events.DeliveryException(
            position=12, webhook_id=webhook_id(made.uid, "e12"), attempt_count=3, next_at_ms=9
        ),
    }
    world.do(RecordDeliveries(NAME, made.uid, (Move(PLACE, 19, tuple(failing.values())),)))
    started(world, only_failed=True)
    feed = feed_of(world)
    pump = with_feed(world, feed)
    read(feed, {position: event(position) for position in range(10, 20)}, pump.failed_keys)
    assert sorted(item.position for item in drain(pump, 0)) == [11, 12]
    moves, _ = pump.collect()
    world.do(RecordDeliveries(NAME, made.uid, moves))
    stream = world.endpoint.streams[PLACE]
    assert not stream.exceptions
    assert not stream.dead
    states = {each.source: each.state for each in deliveries(NAME, world.endpoint).values()}
    assert set(states.values()) == {pb.Delivery.STATE_SUCCEEDED}


def test_a_failing_repetition_gets_three_attempts_and_the_delivery_stays_what_it_was() -> None:
    world = World()
    world.create()
    started(world, ranges=[piece(10, 11)])
    feed = feed_of(world)
    pump = with_feed(world, feed)
    read(feed, {10: event(10)})
    now, attempts = 0, 0
    while (item := pump.take(now)) is not None:
        attempts += 1
        pump.failed(item, BAD, now)
        now += 10_000_000
    assert attempts == ATTEMPTS
    end = feed.collect()
    assert end is not None
    assert (end.state, end.failed_count, end.delivered_count) == (pb.Replay.STATE_SUCCEEDED, 1, 0)
    assert pump.collect() == ((), False)


def test_an_empty_range_ends_at_once() -> None:
    world = World()
    world.create()
    started(world)
    feed = feed_of(world)
    read(feed, {})
    end = feed.collect()
    assert end is not None
    assert (end.state, end.matched_count) == (pb.Replay.STATE_SUCCEEDED, 0)


def test_new_deliveries_do_not_wait_for_a_replay() -> None:
    world = World()
    world.create()
    started(world, ranges=[piece(0)])
    feed = feed_of(world)
    pump = with_feed(world, feed)
    read(feed, {position: event(position) for position in range(10, 20)})
    for position in range(20, 24):
        pump.offer(PLACE, position, event(position))
    first = drain(pump)[:8]
    assert sum(1 for item in first if not item.replay) >= 3


def test_resending_finds_a_delivery_by_its_id_while_it_is_kept() -> None:
    world = World()
    world.create()
    pump = pump_of(world)
    pump.offer(PLACE, 10, event(10))
    item = drain(pump)[0]
    moves, _ = pump.collect()
    world.do(RecordDeliveries(NAME, pump.image.uid, moves))
    result: Any = world.do(ResendOne(f"{NAME}/deliveries/{item.webhook_id}")).result
    assert [(each.from_position, each.to_position) for each in result.ranges] == [(10, 11)]
    with pytest.raises(DomainError) as refused:
        world.do(ResendOne(f"{NAME}/deliveries/msg_{'0' * 40}"))
    assert refused.value.reason == "RESOURCE_NOT_FOUND"


def test_the_delivery_log_shows_attempts_cut_to_size() -> None:
    world = World()
    world.create()
    pump = pump_of(world)
    pump.offer(PLACE, 10, event(10))
    item = pump.take(0)
    assert item is not None
    loud = Outcome(500, "RESPONSE_STATUS: answered 500", body="ä".encode() * 10_000, duration_ms=12)
    pump.failed(item, loud, 1_000)
    moves, _ = pump.collect()
    world.do(RecordDeliveries(NAME, pump.image.uid, moves))
    found = deliveries(NAME, world.endpoint)[f"{NAME}/deliveries/{item.webhook_id}"]
    assert found.state == pb.Delivery.STATE_PENDING
    assert [(each.status, each.duration_ms) for each in found.attempts] == [(500, 12)]
    assert 0 < len(found.attempts[0].response.encode()) <= 1_024
    again = pump.take(100_000)
    assert again is not None
    pump.succeeded(again, Outcome(200, body=json.dumps({"ok": True}).encode(), duration_ms=3), 100_000)
    moves, _ = pump.collect()
    world.do(RecordDeliveries(NAME, pump.image.uid, moves))
    found = deliveries(NAME, world.endpoint)[f"{NAME}/deliveries/{item.webhook_id}"]
    assert (found.state, found.attempt_count) == (pb.Delivery.STATE_SUCCEEDED, 2)
    assert [each.response for each in found.attempts] == ["", '{"ok": true}']


def test_other_filters_of_the_endpoint_hold_for_replays_too() -> None:
    world = World()
    world.create()
    world.do(UpdateEndpoint(pb.WebhookEndpoint(name=NAME, event_types=["rollout.*"]), ("event_types",)))
    started(world, ranges=[piece(10, 12)])
    feed = feed_of(world)
    read(feed, {10: event(10), 11: event(11, "rollout.halted")})
    assert [item.position for item in drain(with_feed(world, feed))] == [11]
