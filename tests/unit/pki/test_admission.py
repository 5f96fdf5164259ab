"""First contact: one certificate, one device, within quota and policy, whatever fails in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from cryptography import x509
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.pki.v1 import events_pb2, pki_pb2
from groundswell.registry.v1 import registry_pb2

from libs.errors import FailedPreconditionError, ResourceExhaustedError, UnavailableError
from libs.eventlog import partition_of
from services.pki.model import Ca as CaState
from services.pki.model import Leaf
from tests.unit.pki.factory import DAY, Ca, new_key
from tests.unit.pki.world import NEIGHBOUR, ORG, PRODUCT, World, both, context, refused, running


def jitp(**changes: object) -> pki_pb2.JitpSettings:
    settings = pki_pb2.JitpSettings(enabled=True, cohort=f"{PRODUCT}/cohorts/main", target="board", tags=["b", "a"])
    settings.MergeFrom(pki_pb2.JitpSettings(**changes))  # type: ignore[arg-type]
    return settings


async def set_jitp(world: World, name: str, settings: pki_pb2.JitpSettings) -> None:
    request = pki_pb2.UpdateCaCertificateRequest(
        ca_certificate=pki_pb2.CaCertificate(name=name, jitp=settings), update_mask=FieldMask(paths=["jitp"])
    )
    await world.public.UpdateCaCertificate(request, context())


async def suspend(world: World, name: str) -> None:
    request = pki_pb2.UpdateCaCertificateRequest(
        ca_certificate=pki_pb2.CaCertificate(name=name, state=CaState.STATE_SUSPENDED),
        update_mask=FieldMask(paths=["state"]),
    )
    await world.public.UpdateCaCertificate(request, context())


def published(world: World) -> list[pki_pb2.DeviceCertificate]:
    kind = events_pb2.DeviceCertificateChanged
    return [
        kind.FromString(record.value).device_certificate
        for record in world.log.records("t.pki.public.v1", partition_of("acme", 4))
        if dict(record.headers)["event-type"].decode() == kind.DESCRIPTOR.full_name
    ]


async def test_a_first_contact_creates_the_device_by_the_cas_settings() -> None:
    async with running() as world:
        ca = Ca()
        rules = [
            pki_pb2.CohortRule(common_name_pattern="canary-*", cohort=f"{PRODUCT}/cohorts/canary", tags=["early", "a"]),
            pki_pb2.CohortRule(common_name_pattern="*", cohort=f"{PRODUCT}/cohorts/main"),
        ]
        registered = await world.register(ca, jitp=jitp(cohort_rules=rules, description="made at the factory"))
        certificate = await world.admit(ca.leaf("canary-1"))
        device = world.registry.devices[f"{PRODUCT}/devices/canary-1"]
        assert certificate.state == Leaf.STATE_ACTIVE
        assert (certificate.device, certificate.device_uid) == (device.name, device.uid)
        assert certificate.ca_certificate == device.provisioned_by == registered.name
        assert device.certificate_fingerprint == certificate.fingerprint
        assert (device.cohort, list(device.tags)) == (f"{PRODUCT}/cohorts/canary", ["a", "b", "early"])
        assert (device.target, device.description) == ("board", "made at the factory")
        await world.admit(ca.leaf("Canary-2"))
        assert world.registry.devices[f"{PRODUCT}/devices/Canary-2"].cohort == f"{PRODUCT}/cohorts/main"
        assert [leaf.common_name for leaf in published(world)] == ["canary-1", "Canary-2"]
        request = pki_pb2.GetDeviceCertificateRequest(name=certificate.name)
        assert await world.internal.LookupDeviceCertificate(request, context()) == certificate
        listed = await world.public.ListDeviceCertificates(pki_pb2.ListDeviceCertificatesRequest(parent=ORG), context())
        assert len(listed.device_certificates) == 2


async def test_a_known_certificate_is_answered_at_once_and_writes_nothing() -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca)
        leaf = ca.leaf("SN-1")
        first = await world.admit(leaf)
        await set_jitp(world, registered.name, pki_pb2.JitpSettings())
        before, calls = world.written(), world.registry.calls
        assert await world.admit(leaf) == first
        assert (world.written(), world.registry.calls) == (before, calls)


async def test_two_first_contacts_with_one_certificate_make_one_device() -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca)
        leaf = ca.leaf("SN-1")
        answers = await asyncio.gather(*(world.admit(leaf) for _ in range(20)))
        assert all(answer == answers[0] for answer in answers)
        assert world.registry.calls == 1
        assert len(world.registry.devices) == 1
        assert world.state().admitted[registered.name] == 1


async def test_two_certificates_of_one_name_race_and_one_wins() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        results = await both(world.admit(ca.leaf("SN-1")), world.admit(ca.leaf("SN-1")))
        reasons = [getattr(result, "reason", "") for result in results]
        assert sorted(reasons) == ["", "SECOND_CERTIFICATE"]
        assert len(world.registry.devices) == 1


async def test_the_same_name_under_another_ca_is_refused_not_merged() -> None:
    async with running() as world:
        first, second = Ca("A"), Ca("B")
        await world.register(first, ca_id="a")
        await world.register(second, ca_id="b")
        await world.admit(first.leaf("SN-1"))
        before = world.written()
        assert await refused(world.admit(second.leaf("SN-1"))) == "DEVICE_IDENTIFIER_TAKEN"
        assert world.written() == before


FACTORY = Ca()
WRONG: dict[str, tuple[Callable[[], x509.Certificate], str]] = {
    "expired": (lambda: FACTORY.leaf("SN-1", begin=-2 * DAY, end=-DAY), "CERTIFICATE_EXPIRED"),
    "unknown CA": (lambda: Ca("Stranger").leaf("SN-1"), "CA_UNKNOWN"),
    "twin of the CA": (lambda: Ca().leaf("SN-1"), "CA_UNKNOWN"),
    "copied key id": (lambda: Ca(key_id=FACTORY.key_id).leaf("SN-1"), "CERTIFICATE_SIGNATURE"),
    "forged": (lambda: FACTORY.leaf("SN-1", signer=new_key()), "CERTIFICATE_SIGNATURE"),
    "no client": (lambda: FACTORY.leaf("SN-1", extended=None), "CERTIFICATE_EKU_MISSING"),
    "intermediate": (lambda: FACTORY.leaf("SN-1", basic=True), "CERTIFICATE_IS_CA"),
}


async def test_a_wrong_leaf_is_refused_with_its_reason_and_writes_nothing() -> None:
    async with running() as world:
        await world.register(FACTORY)
        before = world.written()
        for case, (make, expected) in WRONG.items():
            assert await refused(world.admit(make())) == expected, case
        assert await refused(world.admit(FACTORY.leaf("SN-1"), "beta")) == "CA_UNKNOWN"
        assert await refused(world.admit(FACTORY.leaf("SN-1"), NEIGHBOUR)) == "CA_UNKNOWN"
        assert world.written() == before
        assert not world.registry.devices


async def test_policy_of_the_ca() -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca, jitp=pki_pb2.JitpSettings())
        assert await refused(world.admit(ca.leaf("SN-1"))) == "JITP_DISABLED"
        await set_jitp(world, registered.name, jitp())
        await world.admit(ca.leaf("SN-1"))
        await suspend(world, registered.name)
        assert await refused(world.admit(ca.leaf("SN-2"))) == "CA_SUSPENDED"


async def test_organizations_of_a_partition_may_have_devices_of_one_name() -> None:
    async with running() as world:
        ours, theirs = Ca(), Ca()
        await world.register(ours)
        await world.register(theirs, parent=f"organizations/{NEIGHBOUR}/products/valve")
        first = await world.admit(ours.leaf("SN-1"))
        second = await world.admit(theirs.leaf("SN-1"), NEIGHBOUR)
        assert first.device_uid != second.device_uid


async def test_an_expired_ca_creates_no_devices_and_keeps_the_known_ones() -> None:
    async with running() as world:
        ca = Ca(end=2 * DAY)
        await world.register(ca)
        known = ca.leaf("SN-1")
        await world.admit(known)
        late = ca.leaf("SN-2")
        world.clock.ahead_ms += 3 * 24 * 3600 * 1000
        assert (await world.admit(known)).state == Leaf.STATE_ACTIVE
        assert await refused(world.admit(late)) == "CA_EXPIRED"


async def test_t51_a_flood_stops_at_the_quota() -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca, jitp=jitp(quota=5))
        key = new_key()
        results = await both(*(world.admit(ca.leaf(f"SN-{index}", key=key)) for index in range(12)))
        reasons = sorted(getattr(result, "reason", "") for result in results)
        assert reasons == [""] * 5 + ["CA_QUOTA_EXCEEDED"] * 7
        assert len(world.registry.devices) == 5
        shown = await world.public.GetCaCertificate(pki_pb2.GetCaCertificateRequest(name=registered.name), context())
        assert shown.admitted_count == 5


async def test_t51_a_flood_is_slowed_to_the_rate() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca, jitp=jitp(rate_per_minute=6))
        key = new_key()
        results = await both(*(world.admit(ca.leaf(f"SN-{index}", key=key)) for index in range(10)))
        reasons = sorted(getattr(result, "reason", "") for result in results)
        assert reasons == [""] * 6 + ["CA_RATE_EXCEEDED"] * 4
        world.clock.ahead_ms += 10_000
        await world.admit(ca.leaf("late-1", key=key))
        assert await refused(world.admit(ca.leaf("late-2", key=key))) == "CA_RATE_EXCEEDED"


async def test_a_refusal_of_the_registry_gives_the_quota_back_and_may_be_retried() -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca, jitp=jitp(quota=1))

        async def archived() -> None:
            raise FailedPreconditionError("PRODUCT_ARCHIVED", "archived")

        async def full() -> None:
            raise ResourceExhaustedError("QUOTA_EXCEEDED", "full")

        leaf = ca.leaf("SN-1")
        world.registry.before = archived
        assert await refused(world.admit(leaf)) == "PRODUCT_ARCHIVED"
        world.registry.before = full
        assert await refused(world.admit(leaf)) == "QUOTA_EXCEEDED"
        assert world.state().admitted[registered.name] == 0
        assert published(world) == []
        world.registry.before = None
        assert (await world.admit(leaf)).state == Leaf.STATE_ACTIVE


async def test_a_device_made_by_hand_is_not_taken_over() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        name = f"{PRODUCT}/devices/SN-1"
        world.registry.devices[name] = registry_pb2.Device(name=name, uid="u", identifier="SN-1")
        assert await refused(world.admit(ca.leaf("SN-1"))) == "DEVICE_IDENTIFIER_TAKEN"


async def test_an_unreachable_registry_is_asked_again_and_the_device_told_to_wait() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        leaf = ca.leaf("SN-1")

        async def down() -> None:
            raise UnavailableError("REGISTRY_UNAVAILABLE", "down")

        world.registry.before = down
        assert await refused(world.admit(leaf, within_s=0.6)) == "ADMISSION_PENDING"
        assert world.registry.calls > 1
        world.registry.before = None
        assert (await world.admit(leaf)).state == Leaf.STATE_ACTIVE


async def paused_admission(world: World, leaf: x509.Certificate) -> tuple[asyncio.Task[str], asyncio.Event]:
    """An admission whose device has just been asked for; the event lets the registry answer."""
    go, asked = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        asked.set()
        await go.wait()

    world.registry.before = hold
    admission = asyncio.create_task(refused(world.admit(leaf)))
    await asked.wait()
    return admission, go


@pytest.mark.parametrize("change", ["suspended", "jitp off", "quota lowered"])
async def test_what_is_switched_off_in_between_is_not_let_in_and_the_device_is_undone(change: str) -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca, jitp=jitp(quota=2))
        await world.admit(ca.leaf("SN-0"))
        leaf = ca.leaf("SN-1")
        admission, go = await paused_admission(world, leaf)
        expected = {"suspended": "CA_SUSPENDED", "jitp off": "JITP_DISABLED", "quota lowered": "CA_QUOTA_EXCEEDED"}
        if change == "suspended":
            await suspend(world, registered.name)
        elif change == "jitp off":
            await set_jitp(world, registered.name, pki_pb2.JitpSettings())
        else:
            await set_jitp(world, registered.name, jitp(quota=1))
        go.set()
        assert await admission == expected[change]
        await world.until(lambda: not world.runtime.snapshot("acme").open_tasks)
        device = world.registry.devices[f"{PRODUCT}/devices/SN-1"]
        assert device.state == registry_pb2.Device.STATE_RETIRED
        assert world.state().admitted[registered.name] == 1
        assert published(world)[-1].state == Leaf.STATE_REFUSED
        await set_jitp(world, registered.name, jitp())
        assert await refused(world.admit(leaf)) == expected[change], "its device is gone for good"


async def test_a_crash_between_opening_and_binding_is_resumed_by_the_next_leader() -> None:
    ca, leaf = Ca(), None
    async with running() as first:
        await first.register(ca)
        leaf = ca.leaf("SN-1")
        admission, _ = await paused_admission(first, leaf)
        await first.runtime.kill()
        admission.cancel()
        await asyncio.gather(admission, return_exceptions=True)
        for group in first.log._groups.values():
            for member in list(group._members):
                first.log.expire_member(member)
    assert not first.registry.devices
    first.registry.before = None
    async with running(first.log, first.registry, first.keystore, first.clock) as second:
        name = f"{ORG}/deviceCertificates/"
        await second.until(lambda: not second.runtime.snapshot("acme").open_tasks)
        (certificate,) = second.state().certificates.values()
        assert certificate.name.startswith(name)
        assert certificate.state == Leaf.STATE_ACTIVE
        assert await second.admit(leaf) == certificate
        assert len(second.registry.devices) == 1


async def test_a_revoked_certificate_is_refused_for_good() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        leaf = ca.leaf("SN-1")
        certificate = await world.admit(leaf)
        stale = pki_pb2.RevokeDeviceCertificateRequest(name=certificate.name, etag="99")
        assert await refused(world.public.RevokeDeviceCertificate(stale, context())) == "ETAG_MISMATCH"
        request = pki_pb2.RevokeDeviceCertificateRequest(name=certificate.name, reason="stolen")
        before_ms = world.clock()
        answer = await world.public.RevokeDeviceCertificate(request, context())
        assert answer.device_certificate.state == Leaf.STATE_REVOKED
        assert answer.device_certificate.reason == "stolen"
        bound_ms = answer.effective_by.ToMilliseconds() - before_ms
        assert 12_000 <= bound_ms < 14_000
        assert await refused(world.admit(leaf)) == "CERTIFICATE_REVOKED"
        written = world.written()
        await world.public.RevokeDeviceCertificate(request, context())
        assert world.written() == written
        assert [entry.state for entry in published(world)] == [Leaf.STATE_ACTIVE, Leaf.STATE_REVOKED]
        assert await refused(world.admit(ca.leaf("SN-1"))) == "SECOND_CERTIFICATE"
        request.name = f"{ORG}/deviceCertificates/{'0' * 64}"
        assert await refused(world.public.RevokeDeviceCertificate(request, context())) == "RESOURCE_NOT_FOUND"


async def test_a_revocation_during_an_admission_wins() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        admission, go = await paused_admission(world, ca.leaf("SN-1"))
        (pending,) = world.state().certificates
        await world.public.RevokeDeviceCertificate(pki_pb2.RevokeDeviceCertificateRequest(name=pending), context())
        go.set()
        assert await admission == "CERTIFICATE_REVOKED"
        await world.until(lambda: not world.runtime.snapshot("acme").open_tasks)
        assert world.state().certificates[pending].state == Leaf.STATE_REVOKED


async def test_replay_of_the_log_gives_the_same_state() -> None:
    ca = Ca()
    async with running() as first:
        await first.register(ca, jitp=jitp(rate_per_minute=60))
        for index in range(3):
            await first.admit(ca.leaf(f"SN-{index}"))
        before = first.state()
    async with running(first.log, first.registry, first.keystore, first.clock) as second:
        after = second.state()
        assert before == after
