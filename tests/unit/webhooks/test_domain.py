"""Endpoints and their cursors: what is decided and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import AbortedError, DomainError, InvalidArgumentError, NotFoundError
from libs.eventlog.freeze import Codec, reachable
from services.webhooks.model import (
    DISABLE_AFTER_MS,
    MAX_DEAD,
    MAX_ENDPOINTS,
    MAX_EXCEPTIONS,
    CreateEndpoint,
    DeleteEndpoint,
    Move,
    RecordDeliveries,
    RotateSecret,
    StartReplay,
    State,
    UpdateEndpoint,
)
from tests.unit.webhooks.support import NAME, OTHER, PLACE, World


def failed(position: int, **fields: Any) -> events.DeliveryException:
    values = {"attempt_count": 1, "next_at_ms": 5, "webhook_id": f"msg_{position}", **fields}
    return events.DeliveryException(position=position, **values)


def record(world: World, *moves: Move, gone: bool = False) -> Any:
    return world.do(RecordDeliveries(NAME, world.endpoint.image.uid, moves, gone))


def changes(decision: Any) -> list[str]:
    return [public.payload.change for event in decision.events for public in event.public]


def test_a_new_endpoint_is_pending_and_begins_where_the_logs_stood() -> None:
    world = World()
    made = world.create_pending(event_types=["rollout.*", "device.created", "rollout.*"])
    assert made.state == pb.WebhookEndpoint.STATE_PENDING
    assert list(made.event_types) == ["device.created", "rollout.*"]
    assert made.public_key.startswith("whpk_")
    assert {place: stream.cursor for place, stream in world.endpoint.streams.items()} == {PLACE: 9, OTHER: 19}


def test_no_event_and_no_stored_answer_holds_a_secret() -> None:
    world = World()
    created: Any = world.do(CreateEndpoint(pb.WebhookEndpoint(name=NAME, url="https://hooks.example/"), ()))
    assert b"whsec_" not in created.result.SerializeToString()
    assert all(b"whsec_" not in event.payload.SerializeToString() for event in created.events)


def test_what_cannot_be_created() -> None:
    world = World()
    world.create()
    for reason, fields in (
        ("ALREADY_EXISTS", {}),
        ("INVALID_FIELD", {"name": NAME + "2", "event_types": ["nothing.known"]}),
        ("INVALID_FIELD", {"name": NAME + "2", "ca_pem": "no certificate"}),
        ("INVALID_FIELD", {"name": NAME + "2", "ca_pem": "-----BEGIN PRIVATE KEY-----"}),
    ):
        with pytest.raises(DomainError) as refused:
            world.create(**fields)
        assert refused.value.reason == reason
    for number in range(MAX_ENDPOINTS - 1):
        world.create(f"{NAME}-{number}")
    with pytest.raises(DomainError) as refused:
        world.create(NAME + "-more")
    assert refused.value.reason == "QUOTA_EXCEEDED"
    world.organization = "other"
    world.create("organizations/other/webhookEndpoints/ops")


def test_updates_change_named_fields_under_the_etag() -> None:
    world = World()
    made = world.create()
    wanted = pb.WebhookEndpoint(name=NAME, etag=made.etag, event_types=["rollout.halted"], ca_pem="x")
    updated: Any = world.do(UpdateEndpoint(wanted, ("event_types",))).result
    assert list(updated.event_types) == ["rollout.halted"]
    assert updated.ca_pem == ""
    with pytest.raises(AbortedError):
        world.do(UpdateEndpoint(wanted, ("event_types",)))
    cases: tuple[tuple[tuple[str, ...], Any], ...] = (
        (("uid",), {}),
        ((), {}),
        (("state",), {"state": pb.WebhookEndpoint.STATE_PENDING}),
    )
    for paths, fields in cases:
        with pytest.raises(InvalidArgumentError):
            world.do(UpdateEndpoint(pb.WebhookEndpoint(name=NAME, **fields), paths))
    with pytest.raises(NotFoundError):
        world.do(UpdateEndpoint(pb.WebhookEndpoint(name=NAME + "2"), ("state",)))


def test_an_update_that_changes_nothing_writes_nothing() -> None:
    world = World()
    world.create()
    wanted = pb.WebhookEndpoint(name=NAME, state=pb.WebhookEndpoint.STATE_ACTIVE)
    assert not world.do(UpdateEndpoint(wanted, ("state",))).events


def test_disabled_and_enabled_again_it_keeps_its_cursor() -> None:
    world = World()
    world.create()
    record(world, Move(PLACE, 30, (failed(25),)))
    off = pb.WebhookEndpoint(name=NAME, state=pb.WebhookEndpoint.STATE_DISABLED)
    decision = world.do(UpdateEndpoint(off, ("state",)))
    assert changes(decision) == ["webhook.endpoint.disabled"]
    assert world.endpoint.image.state_reason == "DISABLED_BY_OPERATOR"
    world.do(UpdateEndpoint(pb.WebhookEndpoint(name=NAME, state=pb.WebhookEndpoint.STATE_ACTIVE), ("state",)))
    stream = world.endpoint.streams[PLACE]
    assert (stream.cursor, set(stream.exceptions), world.endpoint.failing_since_ms) == (30, {25}, 0)


def test_deliveries_do_not_move_the_etag() -> None:
    world = World()
    made = world.create()
    record(world, Move(PLACE, 30, delivered=7))
    assert world.endpoint.delivered == 7
    world.do(DeleteEndpoint(NAME, made.etag))
    assert NAME not in world.state.endpoints


def test_progress_of_a_deleted_endpoint_is_not_that_of_its_successor() -> None:
    world = World()
    old = world.create()
    world.do(DeleteEndpoint(NAME, ""))
    new = world.create()
    assert new.uid != old.uid
    assert not world.do(RecordDeliveries(NAME, old.uid, (Move(PLACE, 99, delivered=3),))).events
    assert world.endpoint.streams[PLACE].cursor == 9


def test_a_cursor_never_goes_back_and_exceptions_come_and_go() -> None:
    world = World()
    world.create()
    record(world, Move(PLACE, 30, (failed(25), failed(26))))
    record(world, Move(PLACE, 20, (failed(26, attempt_count=2),), resolved=(25, 1_000)))
    stream = world.endpoint.streams[PLACE]
    assert stream.cursor == 30
    assert {position: each.attempt_count for position, each in stream.exceptions.items()} == {26: 2}
    record(world, Move(PLACE, 30, (failed(26, attempt_count=10, next_at_ms=0, dead=True),)))
    stream = world.endpoint.streams[PLACE]
    assert (set(stream.exceptions), set(stream.dead)) == (set(), {26})


def test_open_exceptions_are_capped_and_dead_letters_are_kept_to_a_number() -> None:
    world = World()
    world.create()
    record(world, Move(PLACE, 5_000, tuple(failed(position) for position in range(MAX_EXCEPTIONS))))
    before = world.state
    with pytest.raises(DomainError) as refused:
        record(world, Move(OTHER, 60, (failed(50),)))
    assert refused.value.reason == "TOO_MANY_EXCEPTIONS"
    assert world.state is before
    dead = tuple(failed(position, dead=True) for position in range(MAX_DEAD + 5))
    record(world, Move(OTHER, 2_000, dead))
    assert set(world.endpoint.streams[OTHER].dead) == set(range(5, MAX_DEAD + 5))


def test_410_disables_at_once() -> None:
    world = World()
    world.create()
    decision = record(world, Move(PLACE, 30, (failed(25, last_status=410),)), gone=True)
    assert changes(decision) == ["webhook.endpoint.disabled"]
    assert world.endpoint.image.state_reason == "RECEIVER_GONE"
    assert not record(world, gone=True).events


def test_five_days_of_nothing_but_failures_disable_and_one_success_starts_anew() -> None:
    world = World()
    world.create()
    record(world, Move(PLACE, 11, (failed(11),)))
    world.now_ms += DISABLE_AFTER_MS - 1
    record(world, Move(PLACE, 12, (failed(12),)))
    assert world.endpoint.active
    record(world, Move(PLACE, 13, delivered=1))
    world.now_ms += 1
    record(world, Move(PLACE, 14, (failed(14),)))
    assert world.endpoint.active
    world.now_ms += DISABLE_AFTER_MS
    record(world, Move(PLACE, 15))
    assert world.endpoint.active
    decision = record(world, Move(PLACE, 16, (failed(16),)))
    assert changes(decision) == ["webhook.endpoint.disabled"]
    assert world.endpoint.image.state_reason == "FAILING_FOR_FIVE_DAYS"


def test_states_are_values() -> None:
    world = World()
    world.create()
    before = world.endpoint
    record(world, Move(PLACE, 30, delivered=1))
    assert before.streams[PLACE].cursor == 9
    assert replace(before) == before


def test_a_state_can_be_stored_and_read_back() -> None:
    world = World()
    made = world.create(ordering=pb.WebhookEndpoint.ORDERING_STRICT)
    record(world, Move(PLACE, 30, (failed(25), failed(26, dead=True)), delivered=1))
    world.do(StartReplay(pb.Replay(name=f"{NAME}/replays/r"), ((PLACE, 40),)))
    world.do(RotateSecret(NAME, 1_000, ""))
    assert made.name in world.state.endpoints
    codec = Codec(reachable(State))
    assert codec.unpack(codec.pack(world.state)) == world.state
