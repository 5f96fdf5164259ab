"""Trust that is taken back reaches devices: revoked keys, destroyed binaries, images for other hardware."""

from __future__ import annotations

import pytest
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.artifacts.v1 import events_pb2 as artifacts_events

from clients.sdk.signing import sign_bundle, sign_digest
from clients.sdk.upload import Upload, upload_binary
from demo.steps import wait_until
from tests.e2e import logs
from tests.e2e.device import Answer, RawDevice
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant


@pytest.fixture
def running(tenant: Tenant) -> tuple[artifacts_pb2.Bundle, str]:
    """A bundle and a rollout that offers it to two canaries."""
    bundle = tenant.bundle("1.1.0")
    rollout = tenant.start_rollout(bundle, cohorts=[("canary", 2)])
    tenant.await_rollout(rollout, "its release", lambda now: now.stage_statuses[0].release)
    return bundle, rollout


def offered(device: RawDevice) -> str:
    """The attempt that the device is offered."""
    found: Answer = wait_until(
        "an offer", 60, lambda: (got := device.check_in()).body.get("answer") == "offer" and got, 0.2
    )
    return str(found.body["offer"]["attempt"])


def installed(device: RawDevice, attempt: str) -> None:
    """It has the firmware in its other slot, and has not asked to switch."""
    reports = []
    for state in ("ACCEPTED", "DOWNLOADING", "DOWNLOADED", "INSTALLED"):
        device.counter += 1
        reports.append({"counter": device.counter, "attempt": attempt, "state": state})
    last = device.counter
    wait_until(
        "the reports to be taken",
        60,
        lambda: device.check_in(reports=reports, attempt={"name": attempt}).body["reports_accepted_through"] >= last,
        0.2,
    )


def await_taken_back(stack: Stack, tenant: Tenant, bundle: str) -> None:
    """Until the rollout leader has it in its own log that the bundle may not be offered."""

    def heard() -> bool:
        records = [entry.message() for entry in logs.entries(stack, "rollout", tenant.organization)]
        said = [one.bundle for one in records if isinstance(one, artifacts_events.BundleChanged)]
        last = [one for one in said if one.name == bundle][-1:]
        return bool(last) and not last[0].offerable

    wait_until("the rollout leader to hear of it", 60, heard, 0.2)


def assert_nothing_more_of_it(tenant: Tenant, rollout: str, first: RawDevice, attempt: str, why: str) -> None:
    """Neither for the device that has it on its disk, nor for one that comes later."""
    answer = first.check_in(attempt={"name": attempt, "ask": "go"})
    assert (answer.status, answer.body["answer"]) == (200, "cancel"), answer.body
    assert answer.body["cancel"]["attempt"] == attempt
    second = tenant.enrolled("canary-2")
    refused = wait_until(
        "the reason", 60, lambda: "BUNDLE_NOT_OFFERABLE" in (got := second.check_in()).codes and got, 0.2
    )
    assert refused.body["answer"] == "none"
    assert any(why in reason["message"] for reason in refused.body["reasons"]), refused.body["reasons"]
    assert first.check_in().body["answer"] == "none"
    assert tenant.rollout(rollout).stage_statuses[0].claimed == 1, "the second was never granted anything"


def test_t40_a_key_revoked_while_a_rollout_runs_ends_its_offers(
    stack: Stack, tenant: Tenant, running: tuple[artifacts_pb2.Bundle, str]
) -> None:
    bundle, rollout = running
    first = tenant.enrolled("canary-1")
    attempt = offered(first)
    installed(first, attempt)

    tenant.client.artifacts.RevokeSigningKey(
        artifacts_pb2.RevokeSigningKeyRequest(name=f"{tenant.product}/signingKeys/release", reason="stolen")
    )
    await_taken_back(stack, tenant, bundle.name)

    assert_nothing_more_of_it(tenant, rollout, first, attempt, "SIGNING_KEY_REVOKED")


def test_a_binary_destroyed_while_a_rollout_runs_ends_its_offers(
    stack: Stack, tenant: Tenant, running: tuple[artifacts_pb2.Bundle, str]
) -> None:
    bundle, rollout = running
    first = tenant.enrolled("canary-1")
    attempt = offered(first)
    installed(first, attempt)

    tenant.client.artifacts.DestroyBinary(
        artifacts_pb2.DestroyBinaryRequest(name=bundle.entries[0].binary, force=True, reason="a key is in it")
    )
    await_taken_back(stack, tenant, bundle.name)

    assert_nothing_more_of_it(tenant, rollout, first, attempt, "BINARY_DESTROYED")


def test_t16_an_image_for_other_hardware_is_never_offered(tenant: Tenant) -> None:
    path = tenant.program("1.1.0", 0.0)
    upload = Upload(path, f"{tenant.product}/artifacts/main", "1.1.0", "board-b", target="board-b")
    binary = upload_binary(tenant.client, upload)
    signature = sign_digest(tenant.key(), binary.sha256)
    tenant.client.artifacts.SignBinary(artifacts_pb2.SignBinaryRequest(name=binary.name, signature=signature))
    bundle = tenant.client.artifacts.CreateBundle(
        artifacts_pb2.CreateBundleRequest(
            parent=tenant.product,
            bundle_id="for-b",
            version="1.1.0",
            security_version=1,
            entries=[artifacts_pb2.BundleEntrySpec(binary=binary.name)],
        )
    )
    signed = artifacts_pb2.SignBundleRequest(name=bundle.name, signature=sign_bundle(tenant.key(), bundle))
    bundle = tenant.client.artifacts.SignBundle(signed)
    assert bundle.offerable
    rollout = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
    tenant.await_rollout(rollout, "its release", lambda now: now.stage_statuses[0].release)
    device = tenant.enrolled("canary-1")

    refused = wait_until(
        "the reason", 60, lambda: "TARGET_NOT_SUPPORTED" in (got := device.check_in()).codes and got, 0.2
    )

    assert refused.body["answer"] == "none"
    assert tenant.rollout(rollout).stage_statuses[0].claimed == 0
