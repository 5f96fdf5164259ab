"""How an endpoint does, told only when it changes; and the whole schedule on a clock that the test moves."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2
from groundswell.webhooks.v1 import webhooks_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.errors import InvalidArgumentError
from services.webhooks.catalogue import Filter
from services.webhooks.model import DISABLE_AFTER_MS, HEALTH_EVERY_MS, RecordDeliveries, shown
from services.webhooks.pump import DEGRADED_AFTER, Pump
from services.webhooks.rate import Bucket
from services.webhooks.render import WebhookEvent
from services.webhooks.schedule import STEPS_MS, THROTTLED_AT_LEAST_MS
from services.webhooks.transport import Outcome
from tests.unit.webhooks.support import NAME, PLACE, World, event, pump_of

GOOD = Outcome(204)
BAD = Outcome(500, "RESPONSE_STATUS: answered 500")
Image = pb.WebhookEndpoint


def record(world: World, pump: Pump) -> list[str]:
    """What other endpoints would be told."""
    moves, gone = pump.collect()
    if not moves and not gone and not pump.health_is_news:
        return []
    decision = world.do(RecordDeliveries(NAME, pump.image.uid, moves, gone, pump.health))
    pump.known_health = world.endpoint.health
    return [getattr(public.payload, "change", "") for each in decision.events for public in each.public]


def attempt(pump: Pump, now_ms: int, outcome: Outcome) -> None:
    item = pump.take(now_ms)
    assert item is not None
    if outcome.succeeded:
        pump.succeeded(item, outcome, now_ms)
    else:
        pump.failed(item, outcome, now_ms)


def test_t66_an_outage_of_many_failures_tells_of_its_few_changes() -> None:
    world = World()
    world.create()
    pump = pump_of(world)
    for position in range(10, 60):
        pump.offer(PLACE, position, event(position))
    told: list[str] = []
    for _ in range(DEGRADED_AFTER):
        world.now_ms += HEALTH_EVERY_MS
        attempt(pump, world.now_ms, BAD)
        told += record(world, pump)
    assert told == ["webhook.endpoint.degraded"]
    for _ in range(7):
        world.now_ms += HEALTH_EVERY_MS
        attempt(pump, world.now_ms, BAD)
        told += record(world, pump)
    assert told == ["webhook.endpoint.degraded", "webhook.endpoint.opened"]
    for _ in range(20):
        world.now_ms = max(world.now_ms, pump.breaker.probe_at_ms)
        attempt(pump, world.now_ms, BAD)
        told += record(world, pump)
    assert len(told) == 2, "an open breaker that stays open is no news"
    world.now_ms = pump.breaker.probe_at_ms
    attempt(pump, world.now_ms, GOOD)
    told += record(world, pump)
    assert told == ["webhook.endpoint.degraded", "webhook.endpoint.opened", "webhook.endpoint.recovered"]
    assert shown(world.endpoint).health == Image.HEALTH_WELL


def test_an_endpoint_that_flaps_tells_of_it_now_and_then_only() -> None:
    world = World()
    world.create()
    pump = pump_of(world)
    told = []
    for position in range(10, 110):
        pump.offer(PLACE, position, event(position))
        outcome = GOOD if position % 8 > 2 else BAD
        attempt(pump, world.now_ms, outcome)
        told += record(world, pump)
        world.now_ms += 100
    assert len(told) <= 2


def test_the_first_success_of_a_new_endpoint_is_no_recovery_and_costs_no_etag() -> None:
    world = World()
    made = world.create()
    pump = pump_of(world)
    pump.offer(PLACE, 10, event(10))
    attempt(pump, world.now_ms, GOOD)
    assert record(world, pump) == []
    for position in range(11, 15):
        pump.offer(PLACE, position, event(position))
        world.now_ms += HEALTH_EVERY_MS
        attempt(pump, world.now_ms, BAD)
        record(world, pump)
    assert world.endpoint.health == Image.HEALTH_DEGRADED
    assert shown(world.endpoint).etag == made.etag


# Filters.


def of(change: str, resource: str, payload: Any) -> WebhookEvent:
    return WebhookEvent(change, "e", "acme", resource, 1, payload)


P, Q = "organizations/acme/products/p", "organizations/acme/products/q"
CANARY, BETA = f"{P}/cohorts/canary", f"{P}/cohorts/beta"
IN_CANARY = of(
    "device.updated",
    f"{P}/devices/d",
    registry_events.DeviceChanged(
        device=registry_pb2.Device(cohort=CANARY, reported=registry_pb2.ReportedState(release=f"{BETA}/releases/1"))
    ),
)
CLAIM = of(
    "device.claimed_release",
    f"{P}/devices/d/attempts/a",
    rollout_events.AttemptChanged(attempt=rollout_pb2.Attempt(release=f"{BETA}/releases/1")),
)
ROLLOUT = of(
    "rollout.halted",
    f"{P}/rollouts/r",
    rollout_events.RolloutChanged(
        rollout=rollout_pb2.Rollout(stages=[rollout_pb2.Stage(cohort=CANARY), rollout_pb2.Stage(cohort=BETA)])
    ),
)
MEMBER = of("member.created", "organizations/acme/members/m", registry_events.MemberChanged())
EVERY = {"in canary": IN_CANARY, "claim": CLAIM, "rollout": ROLLOUT, "member": MEMBER}


@pytest.mark.parametrize(
    ("fields", "received"),
    [
        ({}, {"in canary", "claim", "rollout", "member"}),
        ({"products": [P]}, {"in canary", "claim", "rollout"}),
        ({"products": [Q]}, set()),
        ({"products": [P, Q], "event_types": ["rollout.*"]}, {"rollout"}),
        ({"cohorts": [CANARY]}, {"in canary", "rollout"}),
        ({"cohorts": [BETA]}, {"claim", "rollout"}),
        ({"cohorts": [BETA], "event_types": ["device.*"]}, {"claim"}),
        ({"cohorts": [f"{P}/cohorts/can"]}, set()),
        ({"event_types": ["member.created"], "products": [P]}, set()),
    ],
)
def test_filters_by_type_product_and_cohort_must_all_hold(fields: dict[str, Any], received: set[str]) -> None:
    wanted = Filter(Image(name=NAME, **fields))
    assert {name for name, each in EVERY.items() if wanted(each)} == received


@pytest.mark.parametrize(
    "fields",
    [
        {"products": ["organizations/other/products/p"]},
        {"products": [P, ""]},
        {"products": ["p"]},
        {"products": [CANARY]},
        {"cohorts": [P]},
        {"cohorts": ["organizations/acme/products//cohorts/c"]},
        {"cohorts": [CANARY], "products": [Q]},
        {"products": [f"{P}{number}" for number in range(101)]},
        {"payload_version": 99},
        {"max_per_second": 10_001},
        {"verification": 99},
        {"ordering": 99},
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any]) -> None:
    world = World()
    with pytest.raises(InvalidArgumentError) as refused:
        world.create_pending(**fields)
    assert refused.value.reason == "INVALID_FIELD"
    assert not world.state.endpoints


# The schedule.


@settings(max_examples=60, deadline=None)
@given(lose_at=st.sets(st.integers(0, 9)), throttled=st.booleans(), retry_after_s=st.none() | st.floats(0, 1e6))
def test_the_whole_schedule_with_jitter_clamp_and_penalty_over_restarts_at_any_point(
    lose_at: set[int], throttled: bool, retry_after_s: float | None
) -> None:
    world = World()
    world.create()
    pump = pump_of(world)
    outcome = Outcome(429, "RESPONSE_STATUS: answered 429", retry_after_s, throttled)
    identifiers, waits = set(), []
    now = world.now_ms
    pump.offer(PLACE, 10, event(10))
    for number in range(len(STEPS_MS)):
        if number in lose_at:
            pump = pump_of(world)
            pump.offer(PLACE, 10, event(10))
        item = pump.take(now)
        assert item is not None
        assert item.attempts_made == number
        identifiers.add(item.webhook_id)
        pump.failed(item, outcome, now)
        pump.breaker = type(pump.breaker)()  # what it adds is tested elsewhere
        record(world, pump)
        left = world.endpoint.streams[PLACE].exceptions.get(10)
        if left is None:
            break
        assert pump.take(left.next_at_ms - 1) is None
        waits.append(left.next_at_ms - now)
        now = left.next_at_ms
    assert len(waits) == len(STEPS_MS) - 1
    for wait, step in zip(waits, STEPS_MS[1:], strict=True):
        least, most = 0.8 * step, 1.2 * step
        if retry_after_s is not None:
            most *= 2
        floor = THROTTLED_AT_LEAST_MS if throttled else 0
        assert max(least, floor) - 1 <= wait <= max(most, floor) + 1
    assert set(world.endpoint.streams[PLACE].dead) == {10}
    assert len(identifiers) == 1


def test_five_days_of_nothing_but_failures_disable_by_what_the_pump_says() -> None:
    world = World()
    world.create()
    pump = pump_of(world)
    begun = world.now_ms
    position = 10
    while world.endpoint.active:
        pump.offer(PLACE, position, event(position))
        position += 1
        item = pump.take(world.now_ms)
        if item is not None:
            pump.failed(item, BAD, world.now_ms)
            record(world, pump)
        world.now_ms += 3_600_000
        assert world.now_ms < begun + 2 * DISABLE_AFTER_MS
    assert world.now_ms - begun >= DISABLE_AFTER_MS
    assert world.endpoint.image.state_reason == "FAILING_FOR_FIVE_DAYS"


@settings(max_examples=80, deadline=None)
@given(rate=st.integers(1, 50), gaps=st.lists(st.integers(0, 400), min_size=1, max_size=200))
def test_a_bucket_never_lets_more_through_than_a_burst_and_its_rate(rate: int, gaps: list[int]) -> None:
    bucket, now, taken = Bucket(rate), 0, 0
    for gap in gaps:
        now += gap
        while bucket.allows(now):
            bucket.take()
            taken += 1
        assert taken <= rate + now * rate / 1000 + 1
        assert copy(bucket).allows(bucket.free_at_ms(now) + 1)
    assert Bucket(0).free_at_ms(now) == now


@pytest.mark.parametrize("later_ms", [0, 1, 99, 100, 101, 5_000])
def test_what_a_rate_holds_back_is_woken_for_however_late_that_is_asked(later_ms: int) -> None:
    world = World()
    world.create(max_per_second=10)
    pump = pump_of(world)
    for position in range(10, 40):
        pump.offer(PLACE, position, event(position))
    while (item := pump.take(1_000)) is not None:
        pump.succeeded(item, GOOD, 1_000)
    at = pump.wake_at_ms(1_000 + later_ms)
    assert at is not None
    assert at <= max(1_101, 1_000 + later_ms)
    assert pump.take(at) is not None
