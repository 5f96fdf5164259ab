"""What a gateway says of a check-in, and what it records, with a log in memory and a leader that the test plays."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.device.v1 import device_pb2
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from libs.eventlog import Foreign
from libs.eventlog.follower import ParkedRecord
from libs.eventlog.memory import MemoryLog
from services.gateway.body import parse
from services.gateway.checkin import CheckInHandler
from services.gateway.claims import ClosedPlans, claims, switches
from services.gateway.directory import CertificateEntry, DeviceEntry
from services.gateway.publisher import Batch
from services.gateway.views import DeviceView, GatewayViews
from tests.openapi import problems

PRODUCT = "organizations/acme/products/pump"
COHORT = f"{PRODUCT}/cohorts/canary"
BUNDLE = f"{PRODUCT}/bundles/b"
RELEASE = f"{COHORT}/releases/r"
NOW = 1_800_000_000.5
UUID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"


class Nothing:
    """A cache that nobody reads."""

    def changed(self, *_: object) -> None:
        return None


class Publisher:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.items: list[bytes] = []
        self.open = self.acknowledges = True

    def takes(self, _partition: int) -> bool:
        return self.open

    def enqueue(self, organization: str, item: bytes) -> Batch:
        self.items.append(item)
        return Batch(organization)

    def confirm(self, _batch: Batch, then: Callable[[bool], bytes]) -> asyncio.Future[bytes]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(then(self.acknowledges))
        return future

    @property
    def last(self) -> device_pb2.CheckInItem:
        return device_pb2.CheckInItem.FromString(self.items[-1])


class Gateway:
    """A handler over views that the test fills."""

    def __init__(self) -> None:
        self.stale: list[str] = []
        self.claimed: list[rollout_pb2.ClaimItem] = []
        self.result = rollout_pb2.ClaimResult()
        go = rollout_pb2.AuthorizeSwitchResponse(answer=rollout_pb2.AuthorizeSwitchResponse.ANSWER_GO, valid_for_s=30)
        self.switch = rollout_pb2.AuthorizeSwitchResult(response=go)
        self.publisher = Publisher()
        self.now = NOW
        self.views = GatewayViews(
            MemoryLog(partitions=4), "t", 4, lambda *_: None, lambda _: None, Nothing(), Nothing()
        )
        self.views.stale_services = lambda *_: self.stale  # type: ignore[method-assign, assignment]
        self.partition = self.views.partition("acme")
        self._position = 0
        self.handler = CheckInHandler(
            self.views,
            claims(self._claim, "organizations/platform/gateways/g"),
            ClosedPlans(),
            switches(self._authorize),
            self.publisher,  # type: ignore[arg-type]
            lambda: self.now,
        )

    async def _claim(self, request: rollout_pb2.ClaimOffersRequest) -> rollout_pb2.ClaimOffersResponse:
        self.claimed.extend(request.items)
        return rollout_pb2.ClaimOffersResponse(results=[self.result] * len(request.items))

    async def _authorize(
        self, request: rollout_pb2.BatchAuthorizeSwitchRequest
    ) -> rollout_pb2.BatchAuthorizeSwitchResponse:
        assert all(one.check_in.attempt == one.attempt for one in request.requests)
        return rollout_pb2.BatchAuthorizeSwitchResponse(results=[self.switch] * len(request.requests))

    def say(self, service: str, resource: str, payload: Message) -> None:
        self._position += 1
        self.views._apply(
            Foreign(service, "t", self.partition, self._position, self._position, "acme", resource, payload, 0)
        )

    def release(self, **changes: Any) -> None:
        release = releases_pb2.Release(
            name=RELEASE, uid=UUID, bundle=BUNDLE, version="1.1.0", version_requirement="< 1.1.0", **changes
        )
        self.say("releases", COHORT, releases_events.GraphChanged(cohort=COHORT, releases=[release]))
        bundle = artifacts_pb2.Bundle(name=BUNDLE, version="1.1.0", offerable=True)
        bundle.entries.add(target="board-a", sha256="ab" * 32)
        self.say("artifacts", BUNDLE, artifacts_events.BundleChanged(bundle=bundle, blob_keys=["k"]))

    async def hear(self, view: DeviceView, **changes: Any) -> dict[str, Any]:
        raw = body(**changes)
        said = self.handler.handle(view, self.partition, raw, parse(raw))
        answer: dict[str, Any] = json.loads(said if isinstance(said, bytes) else await said)
        assert problems("Answer", answer) == []
        assert self.publisher.last.body_sha256 == hashlib.sha256(raw).digest()
        return answer


def body(**changes: Any) -> bytes:
    said = {"agent": {"instance": UUID, "boot_id": UUID, "counter": 7}, "running": {"version": "1.0.0"}, **changes}
    return json.dumps(said).encode()


def view_of(number: int = 0, **changes: Any) -> DeviceView:
    values: dict[str, Any] = {"cohort": COHORT, "target": "board-a"} | changes
    device = registry_pb2.Device(
        name=f"{PRODUCT}/devices/d{number}", uid=str(uuid.UUID(int=number + 1)), identifier=f"d{number}", **values
    )
    certificate = pki_pb2.DeviceCertificate(fingerprint=f"{number:064x}", state=pki_pb2.DeviceCertificate.STATE_ACTIVE)
    return DeviceView("acme", DeviceEntry.of(device), CertificateEntry.of(certificate))


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


async def test_an_idle_poll_is_recorded_whole_and_asks_nobody(gateway: Gateway) -> None:
    view = view_of(reported=registry_pb2.ReportedState(version="1.0.0"))
    answer = await gateway.hear(view, attributes={"board": "b"}, metrics={"t": 1.5})
    assert answer["answer"] == "none"
    assert [entry["code"] for entry in answer["reasons"]] == ["NO_RELEASES"]
    item = gateway.publisher.last
    assert (item.device, item.device_uid) == (view.device.name, view.device.uid)
    assert (item.instance, item.boot_id, item.counter) == (UUID, UUID, 7)
    assert item.running == registry_pb2.ReportedState(version="1.0.0")
    assert (dict(item.attributes), dict(item.metrics)) == ({"board": "b"}, {"t": 1.5})
    assert item.certificate_fingerprint == view.fingerprint
    assert item.idle
    assert (item.receipt.answer, item.receipt.decided_at_ms) == ("none", int(NOW * 1000))
    assert [step.code for step in item.receipt.steps] == ["NO_RELEASES"]
    assert [position.service for position in item.receipt.views] == list(gateway.views.followers)
    assert gateway.claimed == []


@pytest.mark.parametrize(
    "changes",
    [
        {"running": {"version": "1.0.1"}},
        {"reports": [{"counter": 1, "attempt": "a", "state": "ACCEPTED"}]},
        {"attempt": {"name": "a"}},
    ],
)
async def test_what_may_matter_is_never_idle(gateway: Gateway, changes: dict[str, Any]) -> None:
    await gateway.hear(view_of(reported=registry_pb2.ReportedState(version="1.0.0")), **changes)
    assert not gateway.publisher.last.idle


async def test_a_device_with_a_live_attempt_is_never_idle(gateway: Gateway) -> None:
    view = view_of(reported=registry_pb2.ReportedState(version="1.0.0"))
    live = rollout_pb2.Attempt(name="a", device=view.device.name, state=device_pb2.ATTEMPT_STATE_DOWNLOADING)
    gateway.say("rollout", "a", rollout_events.AttemptChanged(attempt=live))
    await gateway.hear(view)
    assert not gateway.publisher.last.idle


async def test_a_candidate_is_claimed_with_what_was_said_and_the_offer_is_given(gateway: Gateway) -> None:
    gateway.release()
    gateway.result = rollout_pb2.ClaimResult(
        offer=rollout_pb2.Offer(attempt="att", release=RELEASE, bundle=BUNDLE, version="1.1.0", lease_s=60),
        reasons=[device_pb2.Reason(code="GRANTED_HERE", message="m")],
    )
    answer = await gateway.hear(view_of())
    assert (answer["answer"], answer["offer"]["attempt"]) == ("offer", "att")
    (claim,) = gateway.claimed
    assert [candidate.release for candidate in claim.candidates] == [RELEASE]
    assert claim.check_in.running.version == "1.0.0"
    assert [step.code for step in claim.check_in.receipt.steps] == ["MATCHED_BY_VERSION", "CANDIDATE"]
    assert len(claim.check_in.receipt.views) == 5
    item = gateway.publisher.last
    assert [step.code for step in item.receipt.steps] == ["MATCHED_BY_VERSION", "CANDIDATE", "GRANTED_HERE"]
    assert (item.receipt.answer, item.receipt.attempt) == ("offer", "att")


@pytest.mark.parametrize("reports", [[], [{"counter": 1, "attempt": "a", "state": "FAILED"}]])
async def test_what_the_leader_has_taken_in_is_not_given_to_it_again(
    gateway: Gateway, reports: list[dict[str, Any]]
) -> None:
    gateway.release()
    gateway.result = rollout_pb2.ClaimResult(offer=rollout_pb2.Offer(attempt="att", release=RELEASE))
    answer = await gateway.hear(view_of(), reports=reports)
    assert answer["answer"] == "offer"
    assert not gateway.publisher.last.idle, "a grant need not hold the counter of the check-in that claimed"
    await gateway.hear(view_of(), attempt={"name": "att", "ask": "go"}, reports=reports)
    assert gateway.publisher.last.idle is not bool(reports)


async def test_what_the_leader_may_not_have_taken_in_is_given_to_it(gateway: Gateway) -> None:
    gateway.release()
    gateway.result = rollout_pb2.ClaimResult(reasons=[device_pb2.Reason(code="DEVICE_NOT_YET_KNOWN", message="m")])
    await gateway.hear(view_of())
    assert not gateway.publisher.last.idle
    gateway.switch = rollout_pb2.AuthorizeSwitchResult(
        response=rollout_pb2.AuthorizeSwitchResponse(answer=rollout_pb2.AuthorizeSwitchResponse.ANSWER_WAIT)
    )
    await gateway.hear(view_of(), attempt={"name": "att", "ask": "go"})
    assert not gateway.publisher.last.idle


async def test_a_closed_plan_is_not_asked_again(gateway: Gateway) -> None:
    gateway.release()
    gateway.result = rollout_pb2.ClaimResult(closed_plan=RELEASE, closed_for_ms=60_000)
    await gateway.hear(view_of(1))
    answer = await gateway.hear(view_of(2))
    assert [entry["code"] for entry in answer["reasons"]] == ["PLAN_CLOSED"]
    assert len(gateway.claimed) == 1


async def test_go_is_asked_for_by_name(gateway: Gateway) -> None:
    answer = await gateway.hear(view_of(), attempt={"name": "att", "ask": "go"})
    assert (answer["answer"], answer["go"]) == ("go", {"attempt": "att", "valid_for_s": 30})
    assert gateway.publisher.last.running.version == "1.0.0"


async def test_leave_that_the_leader_refuses_is_a_wait_with_its_reason(gateway: Gateway) -> None:
    refusal = device_pb2.Reason(code="ATTEMPT_NOT_YOURS", message="the attempt is of another device", blocking=True)
    gateway.switch = rollout_pb2.AuthorizeSwitchResult(refusal=refusal)
    answer = await gateway.hear(view_of(), attempt={"name": "att", "ask": "go"})
    assert (answer["answer"], answer["wait"]) == ("wait", {"attempt": "att"})
    assert [entry["code"] for entry in answer["reasons"]] == ["ATTEMPT_NOT_YOURS"]


async def test_a_view_that_is_behind_gives_nothing_and_says_why(gateway: Gateway) -> None:
    gateway.release()
    gateway.stale = ["registry"]
    for changes in ({}, {"attempt": {"name": "att", "ask": "go"}}):
        answer = await gateway.hear(view_of(), **changes)
        assert (answer["answer"], [entry["code"] for entry in answer["reasons"]]) == ("none", ["GATEWAY_STALE"])
    assert gateway.claimed == []


async def test_without_the_log_nothing_is_decided(gateway: Gateway) -> None:
    gateway.release()
    gateway.publisher.open = False
    answer = await gateway.hear(view_of())
    assert (answer["answer"], [entry["code"] for entry in answer["reasons"]]) == ("none", ["CHECKINS_UNAVAILABLE"])
    assert gateway.claimed == []


@pytest.mark.parametrize("acknowledged", [True, False])
async def test_reports_are_accepted_only_when_the_log_has_them(gateway: Gateway, *, acknowledged: bool) -> None:
    gateway.publisher.acknowledges = acknowledged
    reports = [{"counter": number, "attempt": "a", "state": "ACCEPTED"} for number in (5, 6)]
    answer = await gateway.hear(view_of(), reports=reports)
    assert answer["reports_accepted_through"] == (6 if acknowledged else 0)
    assert [report.counter for report in gateway.publisher.last.reports] == [5, 6]


async def test_the_products_policy_says_when_to_come_back(gateway: Gateway) -> None:
    policy = registry_pb2.ConfigurationPolicy(poll_interval=Duration(seconds=10), poll_jitter=Duration(seconds=5))
    product = registry_pb2.Product(name=PRODUCT, policy=policy)
    gateway.say("registry", PRODUCT, registry_events.ProductChanged(product=product))
    heard = [(await gateway.hear(view_of()))["poll_after_s"] for _ in range(50)]
    assert all(10 <= one <= 15 for one in heard)
    assert len(set(heard)) > 25


# What is decided once for many.


async def codes(gateway: Gateway, view: DeviceView, **running: Any) -> Sequence[str]:
    await gateway.hear(view, running={"version": "1.0.0", **running})
    return [step.code for step in gateway.publisher.last.receipt.steps]


async def test_devices_of_one_kind_share_a_decision_and_others_do_not(gateway: Gateway) -> None:
    gateway.release()
    candidate = ["MATCHED_BY_VERSION", "CANDIDATE"]
    assert await codes(gateway, view_of(1)) == await codes(gateway, view_of(2)) == candidate
    assert await codes(gateway, view_of(3, target="board-b")) == ["MATCHED_BY_VERSION", "TARGET_NOT_SUPPORTED"]
    assert await codes(gateway, view_of(4), version="1.2.0") == ["NO_MATCH"]
    assert await codes(gateway, view_of(5, quarantined=True)) == ["QUARANTINED"]
    assert await codes(gateway, view_of(6, cohort="")) == ["NO_COHORT"]
    assert gateway.publisher.last.receipt.steps[0].subject == view_of(6).device.name
    assert await codes(gateway, view_of(7)) == candidate


async def test_another_services_word_does_not_make_a_record_understood(gateway: Gateway) -> None:
    """A cohort is a resource of the registry, and its graph of releases comes from another service."""
    gateway.release()
    gateway.views._on_parked(ParkedRecord("releases", "t", gateway.partition, 99, 99, "acme", COHORT, "x.Y"))
    gateway.say("registry", COHORT, registry_events.CohortChanged(cohort=registry_pb2.Cohort(name=COHORT)))
    assert (await codes(gateway, view_of(1)))[-1] == "NO_RELEASES"
    gateway.release()
    assert (await codes(gateway, view_of(1)))[-1] == "CANDIDATE"


@pytest.mark.parametrize("what", ["graph", "bundle", "rollout", "parked cohort", "parked cohort, understood again"])
async def test_a_record_that_could_change_a_shared_decision_ends_it(gateway: Gateway, what: str) -> None:
    gateway.release()
    assert (await codes(gateway, view_of(1)))[-1] == "CANDIDATE"
    if what == "graph":
        gateway.release(disabled=True)
        assert (await codes(gateway, view_of(2)))[-1] == "RELEASE_DISABLED"
    elif what == "bundle":
        bundle = artifacts_pb2.Bundle(name=BUNDLE, offerable=False, not_offerable_reason="KEY_REVOKED")
        bundle.entries.add(target="board-a")
        gateway.say("artifacts", BUNDLE, artifacts_events.BundleChanged(bundle=bundle))
        assert (await codes(gateway, view_of(2)))[-1] == "BUNDLE_NOT_OFFERABLE"
    elif what == "rollout":
        rollout = rollout_pb2.Rollout(
            name=f"{PRODUCT}/rollouts/x",
            version="9.0.0",
            state=rollout_pb2.Rollout.STATE_PAUSED,
            stages=[rollout_pb2.Stage(cohort=COHORT)],
            stage_statuses=[rollout_pb2.StageStatus(state=rollout_pb2.StageStatus.STATE_OPEN)],
        )
        gateway.say("rollout", rollout.name, rollout_events.RolloutChanged(rollout=rollout))
        assert (await codes(gateway, view_of(2)))[-1] == "ROLLOUT_PAUSED"
    else:
        gateway.views._on_parked(ParkedRecord("releases", "t", gateway.partition, 99, 99, "acme", COHORT, "x.Y"))
        assert (await codes(gateway, view_of(2)))[-1] == "NO_RELEASES"
        if what.endswith("again"):
            gateway.release()
            assert (await codes(gateway, view_of(3)))[-1] == "CANDIDATE"


async def test_a_device_with_an_override_is_decided_by_itself(gateway: Gateway) -> None:
    gateway.release()
    override = releases_pb2.BundleOverride(name="o", bundle=BUNDLE, devices=[view_of(1).device.name])
    gateway.say("releases", "o", releases_events.BundleOverrideChanged(bundle_override=override))
    assert "OVERRIDE_ACTIVE" in await codes(gateway, view_of(1))
    assert "OVERRIDE_ACTIVE" not in await codes(gateway, view_of(2))


async def test_shares_are_decided_for_each_device(gateway: Gateway) -> None:
    gateway.release(phase=releases_pb2.Phase(share_ppm=500_000))
    found = {("NOT_IN_SHARE" in await codes(gateway, view_of(number))) for number in range(40)}
    assert found == {True, False}


async def test_a_schedule_opens_on_time_although_decisions_are_shared(gateway: Gateway) -> None:
    at = Timestamp()
    at.FromMilliseconds(int(NOW * 1000) + 300)
    gateway.release(schedule_time=at)
    assert (await codes(gateway, view_of(1)))[-1] == "NOT_YET_SCHEDULED"
    gateway.now = NOW + 0.299
    assert (await codes(gateway, view_of(2)))[-1] == "NOT_YET_SCHEDULED"
    gateway.now = NOW + 0.3
    assert (await codes(gateway, view_of(3)))[-1] == "CANDIDATE"


async def test_what_is_shared_is_bounded(gateway: Gateway) -> None:
    for number in range(4200):
        await gateway.hear(view_of(), running={"version": f"1.0.{number}"})
    assert all(len(shared) <= 4096 for shared in gateway.views._shared)
    await gateway.hear(view_of(), running={"version": "x" * 8000})
    assert all(len(key[5]) < 8000 for shared in gateway.views._shared for key in shared)  # type: ignore[arg-type]


async def test_claims_of_many_devices_go_in_one_call(gateway: Gateway) -> None:
    gateway.release()
    await asyncio.gather(*(gateway.hear(view_of(number)) for number in range(20)))
    assert len(gateway.claimed) == 20
