"""One endpoint's deliveries: order, retries, probes, and that every loss of memory is harmless."""

from __future__ import annotations

from groundswell.webhooks.v1 import webhooks_pb2 as pb

from services.webhooks.breaker import Phase
from services.webhooks.lane import LAZY_CURSOR, Item
from services.webhooks.model import MAX_EXCEPTIONS, RecordDeliveries, UpdateEndpoint
from services.webhooks.pump import CONCURRENCY, MAX_FRESH, Pump
from services.webhooks.schedule import STEPS_MS
from services.webhooks.transport import Outcome
from tests.unit.webhooks.support import NAME, OTHER, PLACE, World, event, pump_of

GOOD = Outcome(204)
BAD = Outcome(500, "RESPONSE_STATUS: answered 500")


def record(world: World, pump: Pump) -> None:
    moves, gone = pump.collect()
    if moves or gone:
        world.do(RecordDeliveries(NAME, pump.image.uid, moves, gone))


def take(pump: Pump, now_ms: int = 0) -> Item:
    item = pump.take(now_ms)
    assert item is not None
    return item


def fresh_world() -> tuple[World, Pump]:
    world = World()
    world.create()
    return world, pump_of(world)


def test_the_cursor_waits_for_the_oldest_delivery() -> None:
    world, pump = fresh_world()
    for position in (10, 12, 15):
        assert pump.offer(PLACE, position, event(position))
    items = [take(pump) for _ in range(3)]
    pump.succeeded(items[2], GOOD, 0)
    pump.succeeded(items[1], GOOD, 0)
    record(world, pump)
    assert world.endpoint.streams[PLACE].cursor == 9
    pump.succeeded(items[0], GOOD, 0)
    record(world, pump)
    assert world.endpoint.streams[PLACE].cursor == 15
    assert world.endpoint.delivered == 3


def test_ids_and_work_are_the_same_after_memory_is_lost_at_any_point() -> None:
    world, pump = fresh_world()
    for position in (10, 11, 12):
        pump.offer(PLACE, position, event(position))
    first = [take(pump) for _ in range(3)]
    pump.failed(first[0], BAD, 1_000)
    pump.succeeded(first[2], GOOD, 1_000)
    record(world, pump)
    again = pump_of(world)
    for position in (10, 11, 12):
        again.offer(PLACE, position, event(position))
    retried = []
    for _ in range(3):
        retried.append(take(again, 10_000_000))
        again.succeeded(retried[-1], GOOD, 10_000_000)
    assert {item.position: item.webhook_id for item in retried} == {item.position: item.webhook_id for item in first}
    assert {item.position: item.attempts_made for item in retried} == {10: 1, 11: 0, 12: 0}


def test_what_is_recorded_as_delivered_is_not_sent_again() -> None:
    world, pump = fresh_world()
    pump.offer(PLACE, 10, event(10))
    pump.succeeded(take(pump), GOOD, 0)
    record(world, pump)
    again = pump_of(world)
    assert again.offer(PLACE, 10, event(10))
    assert again.take(0) is None


def test_a_delivery_runs_through_the_whole_schedule_and_dies() -> None:
    world, pump = fresh_world()
    pump.offer(PLACE, 10, event(10))
    now, waits = 0, []
    for attempt in range(len(STEPS_MS)):
        item = take(pump, now)
        assert item.attempts_made == attempt
        pump.failed(item, BAD, now)
        record(world, pump)
        exception = world.endpoint.streams[PLACE].exceptions.get(10)
        if exception is not None:
            waits.append(exception.next_at_ms - now)
            assert pump.take(exception.next_at_ms - 1) is None
            now = exception.next_at_ms
    assert [0.8 * step <= wait <= 1.2 * step for wait, step in zip(waits, STEPS_MS[1:], strict=True)] == [True] * 9
    assert world.endpoint.streams[PLACE].dead[10].attempt_count == 10
    assert pump.take(now * 10) is None
    assert pump.wake_at_ms(now) is None or pump.breaker.phase is not Phase.CLOSED


def test_filtered_records_move_the_cursor_but_are_recorded_only_now_and_then() -> None:
    world = World()
    world.create(event_types=["rollout.*"])
    pump = pump_of(world)
    pump.offer(PLACE, 10, event(10, "device.created"))
    assert pump.take(0) is None
    assert pump.collect() == ((), False)
    pump.offer(PLACE, 10 + LAZY_CURSOR, event(11, "device.created"))
    record(world, pump)
    assert world.endpoint.streams[PLACE].cursor == 10 + LAZY_CURSOR


def test_new_filters_do_not_judge_old_records_again() -> None:
    world = World()
    world.create(event_types=["rollout.*"])
    pump = pump_of(world)
    pump.offer(PLACE, 12, event(12, "device.created"))
    world.do(UpdateEndpoint(pb.WebhookEndpoint(name=NAME), ("event_types",)))
    pump.update(world.endpoint, pump.keys)
    record(world, pump)
    again = pump_of(world)
    again.offer(PLACE, 12, event(12, "device.created"))
    assert again.take(0) is None


def test_one_at_a_time_after_a_failure_and_more_after_a_success() -> None:
    _, pump = fresh_world()
    for position in range(10, 40):
        pump.offer(PLACE, position, event(position))
    items = [take(pump) for _ in range(CONCURRENCY)]
    assert pump.take(0) is None
    for item in items:
        pump.failed(item, BAD, 0)
    only = take(pump)
    assert pump.take(0) is None
    pump.succeeded(only, GOOD, 0)
    assert pump.take(0) is not None
    assert pump.take(0) is not None


def test_an_open_breaker_burns_no_attempt_and_recovery_sends_what_was_missed_at_once() -> None:
    world, pump = fresh_world()
    for position in range(10, 30):
        pump.offer(PLACE, position, event(position))
    while pump.breaker.phase is Phase.CLOSED:
        pump.failed(take(pump), BAD, 0)
    record(world, pump)
    counts = {position: each.attempt_count for position, each in world.endpoint.streams[PLACE].exceptions.items()}
    assert pump.take(pump.breaker.probe_at_ms - 1) is None
    now = pump.breaker.probe_at_ms
    probe = take(pump, now)
    assert probe.probe
    assert probe.position == min(counts, key=lambda position: (pump_next(world, position), position))
    assert pump.take(now) is None
    pump.succeeded(probe, GOOD, now)
    sent = set()
    while (item := pump.take(now)) is not None:
        sent.add(item.position)
        pump.succeeded(item, GOOD, now)
    assert sent | {probe.position} == set(range(10, 30))
    record(world, pump)
    assert not world.endpoint.streams[PLACE].exceptions
    assert world.endpoint.streams[PLACE].cursor == 29


def pump_next(world: World, position: int) -> int:
    at: int = world.endpoint.streams[PLACE].exceptions[position].next_at_ms
    return at


def test_a_probe_ahead_of_its_schedule_costs_no_attempt() -> None:
    world, pump = fresh_world()
    for position in range(10, 20):
        pump.offer(PLACE, position, event(position))
    while pump.breaker.phase is Phase.CLOSED:
        # Ten failures with a time-out: all are due a minute later, after the first probe.
        pump.failed(take(pump), Outcome(0, "TIMEOUT: none", throttled=True), 0)
    probe = take(pump, pump.breaker.probe_at_ms)
    assert probe.early
    pump.failed(probe, BAD, pump.breaker.probe_at_ms)
    record(world, pump)
    assert {each.attempt_count for each in world.endpoint.streams[PLACE].exceptions.values()} == {1}


def test_exceptions_are_capped_and_then_only_they_are_tried() -> None:
    _, pump = fresh_world()
    for position in range(10, 10 + MAX_EXCEPTIONS + 50):
        if not pump.has_room:
            drain_failing(pump)
        assert pump.offer(PLACE, position, event(position))
    drain_failing(pump)
    moves, _ = pump.collect()
    assert sum(len(move.exceptions) for move in moves) == MAX_EXCEPTIONS
    assert moves[0].cursor == 10 + MAX_EXCEPTIONS - 1


def drain_failing(pump: Pump) -> None:
    while (item := pump.take(0)) is not None:
        pump.failed(item, BAD, 0)
        pump.breaker = type(pump.breaker)()


def test_a_full_pump_refuses_and_takes_the_record_later() -> None:
    _, pump = fresh_world()
    for position in range(10, 10 + MAX_FRESH):
        assert pump.offer(PLACE, position, event(position))
    assert not pump.has_room
    assert not pump.offer(PLACE, 5_000, event(5_000))
    for _ in range(MAX_FRESH):
        pump.succeeded(take(pump), GOOD, 0)
    assert pump.offer(PLACE, 5_000, event(5_000))
    assert take(pump).position == 5_000


def test_a_disabled_or_gone_endpoint_is_sent_nothing() -> None:
    world, pump = fresh_world()
    pump.offer(PLACE, 10, event(10))
    pump.offer(OTHER, 20, event(11))
    pump.failed(take(pump), Outcome(410, "RESPONSE_STATUS: answered 410"), 0)
    assert pump.take(10_000_000) is None
    record(world, pump)
    assert not world.endpoint.active
    pump.update(world.endpoint, pump.keys)
    assert pump.take(10_000_000) is None
    world.do(UpdateEndpoint(pb.WebhookEndpoint(name=NAME, state=pb.WebhookEndpoint.STATE_ACTIVE), ("state",)))
    pump.update(world.endpoint, pump.keys)
    assert {take(pump, 10_000_000).position for _ in range(2)} == {10, 20}


def test_a_released_delivery_is_due_again() -> None:
    _, pump = fresh_world()
    pump.offer(PLACE, 10, event(10))
    pump.release(take(pump), 0)
    item = take(pump)
    pump.failed(item, BAD, 0)
    retry = take(pump, 10_000)
    pump.release(retry, 10_000)
    assert take(pump, 10_000).position == 10
