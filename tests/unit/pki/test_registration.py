"""Registering a CA: the proof of its key, and one organization per key."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.pki.v1 import events_pb2, pki_pb2

from libs.eventlog import Command, Deadline, partition_of
from libs.eventlog.ports import TopicPartition
from services.pki.model import CODE_LIFE_MS, AbandonCa, ConfirmSpki, ReleaseSpki, ReserveSpki, routing_key
from services.pki.model import Ca as CaState
from tests.unit.pki.factory import DAY, Ca, name_of, pem
from tests.unit.pki.world import NEIGHBOUR, ORG, PRODUCT, World, both, context, refused, running

BETA = "organizations/beta/products/valve"


def all_bytes(world: World) -> bytes:
    """Everything in every topic, headers too."""
    out = b""
    for place in world.log._topics:
        for record in world.log.records(place.topic, place.partition):
            out += record.value + b"".join(content for _, content in record.headers)
    return out


def public_records(world: World, organization: str = "acme") -> list[str]:
    topic = TopicPartition("t.pki.public.v1", partition_of(organization, 4))
    return [dict(r.headers)["event-type"].decode() for r in world.log.records(topic.topic, topic.partition)]


async def test_a_proven_ca_becomes_active_and_is_published() -> None:
    async with running() as world:
        ca = Ca()
        registered = await world.register(ca)
        assert registered.state == CaState.STATE_ACTIVE
        assert registered.subject == "CN=Factory CA"
        assert registered.environment == CaState.ENVIRONMENT_PRODUCTION
        assert registered == await world.public.GetCaCertificate(
            pki_pb2.GetCaCertificateRequest(name=registered.name), context()
        )
        assert public_records(world) == [events_pb2.CaCertificateChanged.DESCRIPTOR.full_name]


async def test_the_code_is_never_in_the_log_and_a_retry_gets_the_same() -> None:
    async with running() as world:
        request = pki_pb2.CreateVerificationCodeRequest(
            parent=ORG, verification_code_id="one", request_id=str(uuid.uuid4())
        )
        first = await world.public.CreateVerificationCode(request, context())
        again = await world.public.CreateVerificationCode(request, context())
        assert first == again
        assert len(bytes.fromhex(first.code)) == 32
        assert await world.code("one") == first.code
        assert await world.code("two") != first.code
        assert all(not code.code for code in world.state().codes.values())
        recorded = all_bytes(world)
        assert first.name.encode() in recorded
        assert first.code.encode() not in recorded
        assert bytes.fromhex(first.code) not in recorded


async def test_t48_ownership_proof_matrix() -> None:
    async with running() as world:
        ca = Ca()
        code = await world.code("one")
        foreign = await world.code("theirs", "organizations/beta")
        neighbours = await world.code("theirs", f"organizations/{NEIGHBOUR}")
        before = world.written()
        cases = {
            ca.proof("f" * 64): "PROOF_CODE_UNKNOWN",
            ca.proof(foreign): "PROOF_CODE_UNKNOWN",
            ca.proof(neighbours): "PROOF_CODE_UNKNOWN",
            Ca().proof(code): "PROOF_NOT_SIGNED_BY_CA",
            pem(ca.leaf(code, begin=-2 * DAY, end=-DAY)): "PROOF_EXPIRED",
            pem(ca.leaf(code, basic=True)): "PROOF_IS_CA",
            ca.pem: "PROOF_IS_CA",
            "no certificate": "CERTIFICATE_MALFORMED",
        }
        for proof, expected in cases.items():
            assert await refused(world.register(ca, proof=proof)) == expected
        assert world.written() == before, "a refusal writes nothing"
        await world.register(ca, proof=ca.proof(code))
        other = Ca("Other CA")
        assert await refused(world.register(other, ca_id="other", proof=other.proof(code))) == "PROOF_CODE_USED"


async def test_an_expired_code_is_refused_to_the_millisecond() -> None:
    async with running() as world:
        code = await world.code("one")
        ca = Ca()
        now = world.clock() + CODE_LIFE_MS + 1
        proof = pem(ca.leaf(code, now=datetime.fromtimestamp(now / 1000, UTC)))
        world.clock.ahead_ms += CODE_LIFE_MS
        assert await refused(world.register(ca, proof=proof)) == "PROOF_CODE_EXPIRED"
        assert await refused(world.code("one")) == "ALREADY_EXISTS"


@pytest.mark.parametrize(
    ("ca", "expected"),
    [
        (lambda: Ca(basic=False), "CA_NOT_A_CA"),
        (lambda: Ca(sign=False), "CA_KEY_USAGE"),
        (lambda: Ca(begin=-2 * DAY, end=-DAY), "CA_EXPIRED"),
    ],
)
async def test_a_wrong_ca_is_refused_with_its_reason(ca: object, expected: str) -> None:
    async with running() as world:
        made = ca()  # type: ignore[operator]
        assert await refused(world.register(made)) == expected


async def test_references_are_checked() -> None:
    async with running() as world:
        assert await refused(world.register(Ca(), parent=f"{ORG}/products/none")) == "RESOURCE_NOT_FOUND"
        none = pki_pb2.JitpSettings(cohort=f"{PRODUCT}/cohorts/none")
        assert await refused(world.register(Ca(), code_id="a", jitp=none)) == "COHORT_NOT_FOUND"
        world.registry.cohorts.add(f"{BETA}/cohorts/main")
        foreign = pki_pb2.JitpSettings(
            cohort_rules=[pki_pb2.CohortRule(common_name_pattern="*", cohort=f"{BETA}/cohorts/main")]
        )
        assert await refused(world.register(Ca(), code_id="b", jitp=foreign)) == "INVALID_FIELD"
        assert not world.state().cas


async def test_inside_an_organization_subjects_and_keys_are_distinct() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        assert await refused(world.register(Ca(), ca_id="twin")) == "CA_SUBJECT_CONFLICT"
        spelled = Ca(name=name_of("FACTORY  ca"))
        assert await refused(world.register(spelled, ca_id="spelled")) == "CA_SUBJECT_CONFLICT"
        copied = Ca("Other", key_id=ca.key_id)
        assert await refused(world.register(copied, ca_id="copied")) == "CA_SUBJECT_CONFLICT"
        assert await refused(world.register(Ca("New", key=ca.key), ca_id="new")) == "CA_ALREADY_REGISTERED"
        assert await refused(world.register(Ca("Third"), ca_id="factory", code_id="x")) == "ALREADY_EXISTS"


@pytest.mark.parametrize("rival", ["beta", NEIGHBOUR])
async def test_t48_two_organizations_and_one_key_at_once_exactly_one_wins(rival: str) -> None:
    for _ in range(3):
        async with running() as world:
            ca = Ca()
            copy = Ca("Copy", key=ca.key)
            parent = f"organizations/{rival}/products/valve"
            results = await both(world.register(ca), world.register(copy, parent=parent, ca_id="stolen"))
            won = [result for result in results if isinstance(result, pki_pb2.CaCertificate)]
            lost = [result.reason for result in results if not isinstance(result, pki_pb2.CaCertificate)]
            assert [ca.state for ca in won] == [CaState.STATE_ACTIVE]
            assert lost == ["CA_KEY_TAKEN"]
            fingerprint = won[0].spki_fingerprint
            key = routing_key(fingerprint)
            held = world.state(key).spki[fingerprint]
            assert (held.ca_certificate, held.confirmed) == (won[0].name, True)


async def test_a_taken_key_stays_with_its_owner_and_the_loser_may_not_publish() -> None:
    async with running() as world:
        ca = Ca()
        await world.register(ca)
        assert await refused(world.register(ca, parent=BETA, ca_id="stolen")) == "CA_KEY_TAKEN"
        assert world.state("beta").cas[f"{BETA}/caCertificates/stolen"].state == CaState.STATE_ABANDONED
        assert public_records(world, "beta") == []
        await world.until(lambda: not world.runtime.snapshot("beta").open_tasks, "beta")


async def test_a_reservation_is_released_only_by_its_holder_and_never_once_confirmed() -> None:
    async with running() as world:
        key = routing_key("f" * 64)

        async def at_key(payload: object) -> str:
            done = await world.runtime.submit(Command(key, payload), Deadline.after(5))
            return done.result.ca_certificate if isinstance(done.result, events_pb2.SpkiReserved) else ""

        assert await at_key(ReserveSpki("f" * 64, "a")) == "a"
        assert await at_key(ReserveSpki("f" * 64, "b")) == "a"
        await at_key(ReleaseSpki("f" * 64, "b"))
        assert await at_key(ReserveSpki("f" * 64, "b")) == "a"
        assert await at_key(ConfirmSpki("f" * 64, "b")) == "a"
        await at_key(ReleaseSpki("f" * 64, "a"))
        assert await at_key(ConfirmSpki("f" * 64, "a")) == "", "what was released cannot be confirmed"
        assert await at_key(ReserveSpki("f" * 64, "b")) == "b"
        assert await at_key(ConfirmSpki("f" * 64, "b")) == "b"
        await at_key(ReleaseSpki("f" * 64, "b"))
        assert await at_key(ReserveSpki("f" * 64, "a")) == "b"


async def test_an_abandoned_registration_gives_its_key_back() -> None:
    async with running() as world:
        ca = Ca()
        name = f"{PRODUCT}/caCertificates/factory"
        proof = ca.proof(await world.code("factory"))
        submit = world.runtime.submit

        async def held_up(command: Command, deadline: Deadline) -> object:
            done = await submit(command, deadline)
            await asyncio.Event().wait()  # the reservation is made, its answer never arrives
            return done

        tasks = world.runtime._handlers["pki.reserve"].__self__  # type: ignore[attr-defined]
        tasks.submit = held_up
        assert await refused(world.register(ca, proof=proof, within_s=0.6)) == "REGISTRATION_PENDING"
        tasks.submit = submit
        await world.runtime.submit(Command("acme", AbandonCa(name, "TEST")), Deadline.after(5))
        fingerprint = world.state().cas[name].spki_fingerprint
        key = routing_key(fingerprint)
        await world.until(lambda: fingerprint not in world.state(key).spki, key)
        assert (await world.register(ca, parent=BETA, ca_id="theirs")).state == CaState.STATE_ACTIVE


async def test_a_retry_of_a_registration_is_the_same_registration() -> None:
    async with running() as world:
        ca = Ca()
        proof = ca.proof(await world.code("one"))
        request_id = str(uuid.uuid4())
        first = await world.register(ca, proof=proof, request_id=request_id)
        assert await world.register(ca, proof=proof, request_id=request_id) == first


async def update(world: World, ca: pki_pb2.CaCertificate, *paths: str) -> pki_pb2.CaCertificate:
    request = pki_pb2.UpdateCaCertificateRequest(ca_certificate=ca, update_mask=FieldMask(paths=paths))
    return await world.public.UpdateCaCertificate(request, context())


async def test_updates() -> None:
    async with running() as world:
        ca = await world.register(Ca())
        stale = ca.etag
        ca.state = CaState.STATE_SUSPENDED
        ca = await update(world, ca, "state")
        assert ca.state == CaState.STATE_SUSPENDED
        assert ca.jitp.enabled
        changed = pki_pb2.CaCertificate(name=ca.name, jitp=pki_pb2.JitpSettings(quota=5, tags=["a"]))
        ca = await update(world, changed, "jitp.quota")
        assert (ca.jitp.quota, ca.jitp.enabled, list(ca.jitp.tags)) == (5, True, [])
        ca = await update(world, changed, "jitp")
        assert (ca.jitp.quota, ca.jitp.enabled, list(ca.jitp.tags)) == (5, False, ["a"])
        before = world.written()
        ca.etag = stale
        assert await refused(update(world, ca, "state")) == "ETAG_MISMATCH"
        ca.etag, ca.state = "", CaState.STATE_ABANDONED
        assert await refused(update(world, ca, "state")) == "INVALID_FIELD"
        assert await refused(update(world, ca, "der")) == "INVALID_FIELD"
        assert await refused(update(world, ca)) == "INVALID_FIELD"
        ca.name += "x"
        assert await refused(update(world, ca, "jitp")) == "RESOURCE_NOT_FOUND"
        assert world.written() == before


async def test_lists_hold_what_is_below_the_parent() -> None:
    async with running() as world:
        first = await world.register(Ca("A"), ca_id="a")
        second = await world.register(Ca("B"), ca_id="b")
        request = pki_pb2.ListCaCertificatesRequest(parent=PRODUCT, page_size=1)
        answer = await world.public.ListCaCertificates(request, context())
        assert list(answer.ca_certificates) == [first]
        request.page_token = answer.next_page_token
        answer = await world.public.ListCaCertificates(request, context())
        assert (list(answer.ca_certificates), answer.next_page_token) == ([second], "")
        other = pki_pb2.ListCaCertificatesRequest(parent=f"{ORG}/products/thermo")
        assert not (await world.public.ListCaCertificates(other, context())).ca_certificates


async def test_neighbours_in_a_partition_do_not_see_each_other() -> None:
    assert partition_of("acme", 4) != partition_of("beta", 4)
    async with running() as world:
        await world.register(Ca())
        parent = f"organizations/{NEIGHBOUR}/products/valve"
        twin = await world.register(Ca(), parent=parent)
        assert twin.state == CaState.STATE_ACTIVE, "the same subject is a conflict inside one organization only"
        listed = await world.public.ListCaCertificates(pki_pb2.ListCaCertificatesRequest(parent=parent), context())
        assert list(listed.ca_certificates) == [twin]
