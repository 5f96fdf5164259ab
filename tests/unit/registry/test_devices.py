"""Devices in numbers, in quarantine, and those that were registered before their certificate; gateways."""

from __future__ import annotations

import hashlib

import pytest
from google.protobuf.duration_pb2 import Duration
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import rollout_pb2

from libs.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from libs.eventlog import Event
from services.registry import domain as ask
from services.registry.domain import State, find
from tests.unit.registry.world import CONFIRMED, FAILED, ORG, PRINT, PUMP, REVERTED, World, furnished

VALVE = f"{ORG}/products/valve"
SN = f"{PUMP}/devices/SN-1"
FORWARD = rollout_pb2.Attempt.KIND_FORWARD
Batch = pb.BatchUpdateDevicesRequest


@pytest.fixture
def world() -> World:
    made = furnished()
    for number in (1, 2, 3):
        made.do(ask.CreateDevice(PUMP, f"SN-{number}", pb.Device(tags=["a", "b"])))
    return made


def device(world: World, name: str = SN) -> pb.Device:
    found = find(world.state.devices, name)
    assert found is not None
    return found


def names(*numbers: int) -> list[str]:
    return [f"{PUMP}/devices/SN-{number}" for number in numbers]


# Batches.


def test_a_batch_tags_and_moves_all(world: World) -> None:
    request = Batch(parent=PUMP, names=names(3, 1), add_tags=["c", "a"], remove_tags=["b", "z"])
    request.cohort = f"{PUMP}/cohorts/canary"
    answer = world.do(ask.BatchUpdateDevices(request))
    assert [one.identifier for one in answer.devices] == ["SN-3", "SN-1"]
    assert all(list(one.tags) == ["a", "c"] and one.cohort.endswith("/canary") for one in answer.devices)
    assert list(device(world, names(2)[0]).tags) == ["a", "b"]
    assert world.changes()[-2:] == ["device.updated", "device.updated"]
    seen = world.events
    again = world.do(ask.BatchUpdateDevices(request))
    assert (world.events, again) == (seen, answer)
    out = Batch(parent=PUMP, names=names(1))
    out.cohort = ""
    assert world.do(ask.BatchUpdateDevices(out)).devices[0].cohort == ""


@pytest.mark.parametrize(
    "foreign",
    [
        f"{VALVE}/devices/SN-9",
        "organizations/other/products/pump/devices/SN-1",
        f"{PUMP}/devices/none",
        f"{PUMP}/devicesX/SN-1",
        PUMP,
        "nonsense",
    ],
)
def test_t60_a_batch_with_a_foreign_name_is_refused_as_a_whole(world: World, foreign: str) -> None:
    """T60: own and foreign ids mixed; the answer says no more than for one that was never made."""
    world.do(ask.CreateDevice(VALVE, "SN-9", pb.Device()))
    request = Batch(parent=PUMP, names=[*names(1, 2), foreign], add_tags=["x"])
    error = world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.BatchUpdateDevices(request))
    assert error.message == f"{foreign} does not exist"
    assert list(device(world).tags) == ["a", "b"]


@pytest.mark.parametrize(
    "request_",
    [
        Batch(parent=PUMP, names=names(1)),
        Batch(parent=PUMP, names=[], add_tags=["x"]),
        Batch(parent=PUMP, names=names(1, 1), add_tags=["x"]),
        Batch(parent=PUMP, names=names(*range(501)), add_tags=["x"]),
        Batch(parent=PUMP, names=names(1), add_tags=["x"], remove_tags=["x"]),
        Batch(parent=PUMP, names=names(1), add_tags=["no tag"]),
        Batch(parent=PUMP, names=names(1), add_tags=[f"t{n}" for n in range(63)]),
        Batch(parent=PUMP, names=names(1), quarantine=Batch.QUARANTINE_SET),
        Batch(parent=PUMP, names=names(1), cohort=f"{VALVE}/cohorts/other"),
    ],
)
def test_a_batch_is_checked(world: World, request_: Batch) -> None:
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.BatchUpdateDevices(request_))


def test_a_batch_with_a_retired_device_is_refused_as_a_whole(world: World) -> None:
    world.do(ask.RetireDevice(names(2)[0], ""))
    request = Batch(parent=PUMP, names=names(1, 2), add_tags=["x"])
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.BatchUpdateDevices(request))


def test_quarantine_by_hand_has_its_own_changes(world: World) -> None:
    quarantine = Batch(parent=PUMP, names=names(1, 2), quarantine=Batch.QUARANTINE_SET, quarantine_reason="smoke")
    answer = world.do(ask.BatchUpdateDevices(quarantine))
    assert [(one.quarantined, one.quarantine_reason) for one in answer.devices] == [(True, "smoke")] * 2
    assert world.changes()[-2:] == ["device.quarantined"] * 2
    freed = world.do(ask.UpdateDevice(pb.Device(name=SN), ("quarantined",)))
    assert (freed.quarantined, freed.quarantine_reason, world.changes()[-1]) == (False, "", "device.released")
    world.do(ask.BatchUpdateDevices(Batch(parent=PUMP, names=names(1, 2), quarantine=Batch.QUARANTINE_RELEASED)))
    assert world.changes()[-1] == "device.released"


def test_a_reason_of_retirement_is_kept_for_the_audit(world: World) -> None:
    kept: list[str] = []
    evolve = world.registry.evolve

    def watched(state: State, event: Event) -> State:
        kept.append(event.payload.reason)  # type: ignore[attr-defined]
        return evolve(state, event)

    world.registry.evolve = watched  # type: ignore[method-assign]
    world.do(ask.RetireDevice(SN, "", "sent back"))
    assert kept == ["sent back"]
    control = ask.RetireDevice(names(2)[0], "", "a\x00b")
    world.refused(InvalidArgumentError, "INVALID_FIELD", control)


# Automatic quarantine.


def policy(world: World, **limits: int) -> None:
    """Limits by name; `window_s` and `block_s` are spans."""
    wanted = pb.AutomaticQuarantine(failures=limits.get("failures", 0), burst=limits.get("burst", 0))
    for field, key in (("window", "window_s"), ("block_for", "block_s")):
        if key in limits:
            getattr(wanted, field).CopyFrom(Duration(seconds=limits[key]))
    product = pb.Product(name=PUMP, policy=pb.ConfigurationPolicy(automatic_quarantine=wanted))
    world.do(ask.UpdateProduct(product, ("policy.automatic_quarantine",)))


def test_without_a_policy_nothing_is_counted(world: World) -> None:
    before = world.events
    for number in range(20):
        world.attempt(SN, number, FAILED)
    assert world.events == before
    assert not device(world).quarantined


def test_failures_in_a_row_quarantine_with_a_reason(world: World) -> None:
    policy(world, failures=3)
    for number, state in enumerate((FAILED, REVERTED)):
        world.attempt(SN, number, state)
    assert not device(world).quarantined
    world.attempt(SN, 2, FAILED)
    assert device(world).quarantine_reason == "automatic: 3 failed attempts in a row"
    assert world.changes()[-1] == "device.quarantined"
    assert not world.timers
    assert not device(world, names(2)[0]).quarantined


def test_an_attempt_counts_once(world: World) -> None:
    policy(world, failures=2)
    for _ in range(5):
        world.attempt(SN, 1, FAILED)
    world.attempt(SN, 1, REVERTED, withdrawn=True)
    assert not device(world).quarantined


def test_a_success_begins_to_count_anew(world: World) -> None:
    policy(world, failures=2)
    world.attempt(SN, 1, FAILED)
    world.attempt(SN, 2, CONFIRMED, kind=FORWARD)
    world.attempt(SN, 3, FAILED)
    assert not device(world).quarantined
    world.attempt(SN, 4, CONFIRMED, kind=rollout_pb2.Attempt.KIND_ROLLBACK)
    world.attempt(SN, 5, FAILED)
    assert device(world).quarantined, "going back is no success of an update"


def test_a_withdrawn_success_is_a_failure(world: World) -> None:
    policy(world, failures=1)
    world.attempt(SN, 1, CONFIRMED, kind=FORWARD)
    world.attempt(SN, 1, FAILED, withdrawn=True, kind=FORWARD)
    assert device(world).quarantined


def test_a_burst_within_its_window_quarantines(world: World) -> None:
    policy(world, burst=3, window_s=180)
    for number, pause_s in enumerate((0, 100, 100)):
        world.wait(pause_s * 1000)
        world.attempt(SN, number, FAILED)
    assert not device(world).quarantined, "the first is older than the window"
    world.wait(10_000)
    world.attempt(SN, 9, FAILED)
    assert device(world).quarantine_reason == "automatic: 3 failed attempts within 180 s"


def test_a_quarantine_ends_by_itself_and_counts_anew(world: World) -> None:
    policy(world, failures=2, block_s=3600)
    for number in (1, 2):
        world.attempt(SN, number, FAILED)
    assert device(world).quarantine_end_time.ToMilliseconds() == world.now_ms + 3_600_000
    world.wait(3_599_999)
    assert device(world).quarantined
    world.wait(1)
    assert not device(world).quarantined
    assert not device(world).HasField("quarantine_end_time")
    assert world.changes()[-1] == "device.released"
    world.attempt(SN, 3, FAILED)
    assert not device(world).quarantined
    world.attempt(SN, 4, FAILED)
    assert device(world).quarantined


def test_what_an_operator_decides_stands(world: World) -> None:
    policy(world, failures=1, block_s=3600)
    world.attempt(SN, 1, FAILED)
    kept = pb.Device(name=SN, quarantined=True, quarantine_reason="to the laboratory")
    changed = world.do(ask.UpdateDevice(kept, ("quarantined", "quarantine_reason")))
    assert not changed.HasField("quarantine_end_time")
    assert not world.timers
    world.wait(10_000_000)
    assert device(world).quarantined
    world.do(ask.UpdateDevice(pb.Device(name=SN), ("quarantined",)))
    world.attempt(SN, 1, FAILED)
    assert not device(world).quarantined, "the attempt was counted before"


def test_a_release_by_hand_clears_the_timer_and_the_count(world: World) -> None:
    policy(world, failures=2, block_s=60)
    for number in (1, 2):
        world.attempt(SN, number, FAILED)
    world.do(ask.BatchUpdateDevices(Batch(parent=PUMP, names=[SN], quarantine=Batch.QUARANTINE_RELEASED)))
    assert not world.timers
    world.attempt(SN, 3, FAILED)
    assert not device(world).quarantined


def test_a_retired_device_is_left_alone(world: World) -> None:
    policy(world, failures=1, block_s=60)
    world.attempt(SN, 1, FAILED)
    world.do(ask.RetireDevice(SN, ""))
    assert not world.timers
    before = world.events
    world.attempt(SN, 2, FAILED)
    world.attempt(f"{PUMP}/devices/unknown", 1, FAILED)
    assert world.events == before


def test_an_etag_stays_the_devices_own(world: World) -> None:
    policy(world, failures=9)
    world.attempt(SN, 1, FAILED)
    assert world.do(ask.UpdateDevice(pb.Device(name=SN, target="t", etag="1"), ("target",))).etag == "2"


# Registered first, bound later.


def provision(fingerprint: str = PRINT, parent: str = PUMP) -> ask.ProvisionDevice:
    given = pb.Device(cohort=f"{PUMP}/cohorts/canary", tags=["jitp"], target="other", description="from the CA")
    return ask.ProvisionDevice(parent, "SN-1", fingerprint, f"{PUMP}/caCertificates/factory", given, development=False)


def test_a_device_that_was_there_is_bound_and_keeps_what_it_has(world: World) -> None:
    before = device(world)
    bound = world.do(provision())
    assert (bound.uid, list(bound.tags), bound.cohort, bound.target) == (before.uid, ["a", "b"], "", "")
    assert (bound.certificate_fingerprint, bound.preregistered) == (PRINT, True)
    assert bound.provisioned_by.endswith("/factory")
    assert world.changes()[-1] == "device.updated"
    seen = world.events
    assert world.do(provision()) == bound
    assert world.events == seen


def test_a_bound_device_takes_no_other_certificate(world: World) -> None:
    world.do(provision())
    world.refused(AlreadyExistsError, "DEVICE_IDENTIFIER_TAKEN", provision("cd" * 32))


def test_only_a_device_of_the_cas_product_is_bound(world: World) -> None:
    world.refused(AlreadyExistsError, "DEVICE_IDENTIFIER_TAKEN", provision(parent=VALVE))
    world.do(ask.RetireDevice(SN, ""))
    world.refused(FailedPreconditionError, "DEVICE_RETIRED", provision())


def test_a_development_ca_binds_only_where_it_may_create(world: World) -> None:
    given = provision()
    development = ask.ProvisionDevice(
        given.parent, given.device_id, PRINT, given.provisioned_by, given.device, development=True
    )
    world.refused(FailedPreconditionError, "DEVELOPMENT_CA_NOT_ALLOWED", development)


def test_undoing_parts_a_device_that_was_there_from_its_certificate(world: World) -> None:
    world.do(provision())
    parted = world.do(ask.UndoProvisioning(SN, PRINT))
    assert (parted.state, parted.certificate_fingerprint, parted.preregistered) == (pb.Device.STATE_ACTIVE, "", False)
    assert list(parted.tags) == ["a", "b"]
    assert world.do(provision("cd" * 32)).certificate_fingerprint == "cd" * 32


# Gateways.


def test_a_gateway_is_disabled_and_gets_another_key(world: World) -> None:
    gateway = world.do(ask.CreateGateway(ORG, "edge", pb.Gateway(public_key=b"a" * 32)))
    world.do(ask.CreateGateway(ORG, "other", pb.Gateway(public_key=b"b" * 32)))
    off = world.do(ask.UpdateGateway(pb.Gateway(name=gateway.name, disabled=True, etag="1"), ("disabled",)))
    assert (off.disabled, off.etag, off.key_id, world.changes()[-1]) == (True, "2", gateway.key_id, "gateway.updated")
    rotated = world.do(ask.UpdateGateway(pb.Gateway(name=gateway.name, public_key=b"c" * 32), ("public_key",)))
    assert rotated.key_id == hashlib.sha256(b"c" * 32).hexdigest()
    assert rotated.disabled
    taken = ask.UpdateGateway(pb.Gateway(name=gateway.name, public_key=b"b" * 32), ("public_key",))
    world.refused(AlreadyExistsError, "GATEWAY_KEY_TAKEN", taken)
    short = ask.UpdateGateway(pb.Gateway(name=gateway.name, public_key=b"c"), ("public_key",))
    world.refused(InvalidArgumentError, "INVALID_FIELD", short)
    stale = ask.UpdateGateway(pb.Gateway(name=gateway.name, etag="1"), ("disabled",))
    world.refused(AbortedError, "ETAG_MISMATCH", stale)
    forged = ask.UpdateGateway(pb.Gateway(name=gateway.name, key_id="x"), ("key_id",))
    world.refused(InvalidArgumentError, "INVALID_FIELD", forged)
    on = world.do(ask.UpdateGateway(pb.Gateway(name=gateway.name), ("disabled",)))
    assert not on.disabled
