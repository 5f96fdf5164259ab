"""What operators and time do to CAs and device certificates."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from groundswell.pki.v1 import events_pb2, pki_pb2
from groundswell.registry.v1 import registry_pb2

from libs.errors import FailedPreconditionError, ResourceExhaustedError
from services.pki import agenda
from services.pki.model import Ca as CaState
from services.pki.model import Leaf
from tests.unit.pki.factory import DAY, Ca, new_key
from tests.unit.pki.test_admission import jitp
from tests.unit.pki.world import ORG, PRODUCT, World, context, refused, running

DAY_MS = 24 * 3600 * 1000
CA_CHANGED = events_pb2.CaCertificateChanged


async def suspend(world: World, name: str, **fields: str) -> pki_pb2.CaCertificate:
    return await world.public.SuspendCaCertificate(pki_pb2.SuspendCaCertificateRequest(name=name, **fields), context())


async def resume(world: World, name: str) -> pki_pb2.CaCertificate:
    return await world.public.ResumeCaCertificate(pki_pb2.ResumeCaCertificateRequest(name=name), context())


async def revoke(world: World, name: str) -> pki_pb2.CaCertificate:
    return await world.public.RevokeCaCertificate(
        pki_pb2.RevokeCaCertificateRequest(name=name, reason="sold"), context()
    )


async def test_a_ca_is_suspended_resumed_and_revoked_each_told_once() -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca)
        known = await world.admit(ca.leaf("SN-1"))
        assert (await suspend(world, registered.name, reason="audit")).state_reason == "audit"
        await suspend(world, registered.name)
        assert await refused(world.admit(ca.leaf("SN-2"))) == "CA_SUSPENDED"
        assert (await resume(world, registered.name)).state == CaState.STATE_ACTIVE
        await world.admit(ca.leaf("SN-2"))
        revoked = await revoke(world, registered.name)
        assert (revoked.state, revoked.admitted_count) == (CaState.STATE_REVOKED, 2)
        assert await refused(world.admit(ca.leaf("SN-3"))) == "CA_REVOKED"
        assert await refused(resume(world, registered.name)) == "WRONG_STATE"
        before = world.written()
        await revoke(world, registered.name)
        assert world.written() == before, "a repeat changes nothing"
        assert [change for change, _ in world.told(CA_CHANGED)] == [
            "ca_certificate.registered",
            "ca_certificate.suspended",
            "ca_certificate.resumed",
            "ca_certificate.revoked",
        ]
        assert world.now(known).state == Leaf.STATE_ACTIVE, "the gateway refuses it by its CA"


async def test_bad_changes_of_state_change_nothing() -> None:
    async with running() as world:
        registered = await world.register(Ca())
        before = world.written()
        assert await refused(suspend(world, f"{registered.name}x")) == "RESOURCE_NOT_FOUND"
        assert await refused(suspend(world, registered.name, etag="99")) == "ETAG_MISMATCH"
        assert world.written() == before


async def test_a_ca_expires_by_an_event_once_and_a_suspended_one_stays_suspended() -> None:
    async with running() as world:
        await world.register(Ca(end=2 * DAY))
        suspended = await world.register(Ca("Other", end=2 * DAY), ca_id="other")
        await suspend(world, suspended.name)
        world.clock.ahead_ms += 3 * DAY_MS
        await world.until(lambda: all(ca.expired for ca in world.state().cas.values()))
        assert world.state().cas[suspended.name].state == CaState.STATE_SUSPENDED
        assert sorted(told for told in world.told(CA_CHANGED) if told[0] == "ca.expired") == [
            ("ca.expired", "factory"),
            ("ca.expired", "other"),
        ]
        assert not world.state().agenda


async def test_a_certificate_is_expiring_after_two_thirds_of_its_life_and_then_expired() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        leaf = await world.admit(ca.leaf("SN-1", begin=-DAY, end=29 * DAY))
        world.clock.ahead_ms += 18 * DAY_MS
        await world.admit(ca.leaf("SN-2"))
        assert not world.now(leaf).expiring
        world.clock.ahead_ms += 2 * DAY_MS
        await world.until(lambda: world.now(leaf).expiring)
        assert not world.now(leaf).expired
        listed = await world.public.ListDeviceCertificates(
            pki_pb2.ListDeviceCertificatesRequest(parent=ORG, filter="expiring = true AND state = STATE_ACTIVE"),
            context(),
        )
        assert [one.common_name for one in listed.device_certificates] == ["SN-1"]
        world.clock.ahead_ms += 10 * DAY_MS
        await world.until(lambda: world.now(leaf).expired)
        about = [change for change, name in world.told() if name == "SN-1"]
        assert about == ["device_certificate.bound", "certificate.expiring", "certificate.expired"]
        assert world.now(leaf).state == Leaf.STATE_ACTIVE


async def test_the_threshold_is_the_products_own_also_when_it_changes() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        await world.policy(expiring_soon=Duration(seconds=10 * 24 * 3600))
        leaf = await world.admit(ca.leaf("SN-1", end=100 * DAY))
        world.clock.ahead_ms += 80 * DAY_MS
        await world.admit(ca.leaf("SN-2", end=200 * DAY))
        assert not world.now(leaf).expiring
        await world.policy(expiring_soon=Duration(seconds=30 * 24 * 3600))
        await world.until(lambda: world.now(leaf).expiring)


async def test_a_revoked_certificate_is_off_the_agenda() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        leaf = await world.admit(ca.leaf("SN-1", end=10 * DAY))
        assert leaf.name in world.state().agenda
        await world.public.RevokeDeviceCertificate(pki_pb2.RevokeDeviceCertificateRequest(name=leaf.name), context())
        assert leaf.name not in world.state().agenda
        world.clock.ahead_ms += 20 * DAY_MS
        await world.register(Ca("Later"), ca_id="later")
        assert not world.now(leaf).expired


async def test_more_than_one_decision_holds_is_told_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenda, "MOST_AT_ONCE", 3)
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        key = new_key()
        leaves = [await world.admit(ca.leaf(f"SN-{number}", key=key, end=10 * DAY)) for number in range(8)]
        world.clock.ahead_ms += 12 * DAY_MS
        await world.until(lambda: all(world.now(leaf).expired for leaf in leaves))
        expired = [name for change, name in world.told() if change == "certificate.expired"]
        assert sorted(expired) == [f"SN-{number}" for number in range(8)]


async def test_a_next_leader_goes_on_with_the_agenda() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        leaf = await world.admit(ca.leaf("SN-1", end=10 * DAY))
    world.clock.ahead_ms += 12 * DAY_MS
    async with running(world.log, world.registry, world.keystore, world.clock) as second:
        await second.until(lambda: second.now(leaf).expired)
        assert [change for change, _ in second.told()] == ["device_certificate.bound", "certificate.expired"]


async def test_t51_a_flood_is_told_when_to_come_again() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca, jitp=jitp(rate_per_minute=6))
        key = new_key()
        for number in range(6):
            await world.admit(ca.leaf(f"SN-{number}", key=key))
        before = world.written()
        with pytest.raises(ResourceExhaustedError) as slowed:
            await world.admit(ca.leaf("SN-6", key=key))
        assert slowed.value.reason == "CA_RATE_EXCEEDED"
        wait_s = float(slowed.value.metadata["retry_after_s"])
        assert 0 < wait_s <= 10
        assert world.written() == before, "a flood writes nothing"
        world.clock.ahead_ms += int(wait_s * 1000) + 50
        await world.admit(ca.leaf("SN-6", key=key))


async def test_t51_a_device_has_no_cohort_until_a_rule_puts_it_into_one() -> None:
    async with running() as world:
        ca = Ca()
        rule = pki_pb2.CohortRule(common_name_pattern="canary-*", cohort=f"{PRODUCT}/cohorts/canary")
        await world.register(ca, jitp=pki_pb2.JitpSettings(enabled=True, cohort_rules=[rule]))
        await world.admit(ca.leaf("canary-1"))
        await world.admit(ca.leaf("SN-1"))
        cohorts = {device.identifier: device.cohort for device in world.registry.devices.values()}
        assert cohorts == {"canary-1": rule.cohort, "SN-1": ""}


async def test_a_development_ca_creates_development_devices_only() -> None:
    async with running() as world:
        seen: list[bool] = []
        provision = world.registry.provision_device

        async def refuse_development(request: registry_pb2.ProvisionDeviceRequest) -> registry_pb2.Device:
            seen.append(request.development)
            if request.development:
                raise FailedPreconditionError("DEVELOPMENT_CA_NOT_ALLOWED", "none of those here")
            return await provision(request)

        world.registry.provision_device = refuse_development  # type: ignore[method-assign]
        kind = pki_pb2.CaCertificate.Environment
        production, development = Ca("Production"), Ca("Development")
        await world.register(production, ca_id="production")
        code = await world.code("development")
        request = pki_pb2.RegisterCaCertificateRequest(
            parent=PRODUCT,
            ca_certificate_id="development",
            certificate_pem=development.pem,
            verification_certificate_pem=development.proof(code),
            ca_certificate=pki_pb2.CaCertificate(
                environment=kind.ENVIRONMENT_DEVELOPMENT, jitp=pki_pb2.JitpSettings(enabled=True)
            ),
        )
        made = await world.public.RegisterCaCertificate(request, context())
        await world.admit(production.leaf("SN-1"))
        assert await refused(world.admit(development.leaf("SN-2"))) == "DEVELOPMENT_CA_NOT_ALLOWED"
        assert seen == [False, True]
        assert world.state().admitted[made.name] == 0, "the quota is given back"


async def test_t53_names_that_are_programs_elsewhere_are_refused_as_data() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        before = world.written()
        for name in ("!!python/object", "cos\nsystem", "\x83h\x00", "__import__('os')", "{{7*7}}", "-rf", "a/../b"):
            assert await refused(world.admit(ca.leaf(name))) in {
                "COMMON_NAME_INVALID",
                "COMMON_NAME_CONTROL_CHARACTER",
            }
        assert world.written() == before
        assert not world.registry.devices
