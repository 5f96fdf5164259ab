"""Everything about webhooks through the public API and over real sockets: schemas, secrets, replays, the example."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.registry.v1 import registry_pb2
from groundswell.webhooks.v1 import webhooks_pb2 as pb
from jsonschema import Draft202012Validator

from deploy.local.settings import ROOT
from libs.rpc import error_of
from services.webhooks.schema import closed
from tests.integration.webhooks.site import PARENT, Receiver, Site, new_uuid, until
from tests.integration.webhooks.test_webhooks import allow, assert_sound

pytestmark = pytest.mark.timeout(180)
OPS = f"{PARENT}/webhookEndpoints/ops"


async def reason_of(site: Site, method: str, request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await site.call(method, request)
    return refused.value.code().name, error_of(refused.value).reason


async def replay_ended(site: Site, name: str) -> pb.Replay:
    found: list[pb.Replay] = []

    async def ended() -> bool:
        found.append(await site.call("GetReplay", pb.GetReplayRequest(name=name)))
        return bool(found[-1].state != pb.Replay.STATE_RUNNING)

    await until(ended, 40.0)
    return found[-1]


async def assert_every_body_obeys_its_served_schema(site: Site, receiver: Receiver, version: int) -> None:
    validators: dict[str, Draft202012Validator] = {}
    assert receiver.events
    for event in receiver.events:
        kind = event["type"]
        if kind not in validators:
            request = pb.GetEventTypeRequest(name=f"{PARENT}/eventTypes/{kind}", payload_version=version)
            served = await site.call("GetEventType", request)
            assert served.since
            validators[kind] = Draft202012Validator(closed(json.loads(served.schema)))
            validators[kind].validate(json.loads(served.example))
        validators[kind].validate(event)


async def test_schemas_rotation_log_resend_and_replay(site: Site, receiver: Receiver) -> None:
    await site.start(allow(receiver))
    made = await site.create(receiver, ordering=pb.WebhookEndpoint.ORDERING_STRICT)
    assert made.state == pb.WebhookEndpoint.STATE_ACTIVE
    names = [await site.product(f"p{number}") for number in range(3)]
    for name in names:
        wanted = registry_pb2.Product(name=name, display_name="again")
        update = registry_pb2.UpdateProductRequest(product=wanted, update_mask=FieldMask(paths=["display_name"]))
        await site.call("UpdateProduct", update, "registry")
        cohort = registry_pb2.CreateCohortRequest(parent=name, cohort_id="canary", cohort=registry_pb2.Cohort())
        await site.call("CreateCohort", cohort, "registry")
    await until(lambda: len(receiver.events) == 9)
    await assert_every_body_obeys_its_served_schema(site, receiver, 2)
    assert_sound(receiver)
    sequences = {(each["webhook-sequence-key"], int(each["webhook-sequence"])) for each in receiver.headers}
    assert {number for key, number in sequences if key.endswith(names[0])} == {1, 2}

    # One again: same id, same bytes, marked.
    async def recorded() -> bool:
        return len(await site.deliveries()) == 9

    await until(recorded)
    listed = await site.call(
        "ListDeliveries",
        pb.ListDeliveriesRequest(parent=OPS, filter='event_type = "product.created" AND state = "SUCCEEDED"'),
    )
    assert len(listed.deliveries) == 3
    one = await site.call("GetDelivery", pb.GetDeliveryRequest(name=listed.deliveries[0].name))
    assert [each.status for each in one.attempts] == [204]
    resent = await site.call("ResendDelivery", pb.ResendDeliveryRequest(name=one.name, request_id=new_uuid()))
    assert (await replay_ended(site, resent.name)).delivered_count == 1
    assert receiver.headers[-1]["webhook-id"] == one.name.rpartition("/")[2]
    assert receiver.headers[-1]["webhook-replay"] == resent.name

    # All of them again, over a crash in the middle.
    receiver.delay_s = 0.1
    everything = pb.ReplayDeliveriesRequest(parent=OPS, replay_id="all", request_id=new_uuid())
    everything.start_time.CopyFrom(made.create_time)
    started = await site.call("ReplayDeliveries", everything)
    assert await site.call("ReplayDeliveries", everything) == started, "the same request is the same replay"
    await until(lambda: sum(1 for each in receiver.headers if each.get("webhook-replay") == started.name) >= 2)
    site.kill()
    receiver.delay_s = 0
    await site.start(allow(receiver))
    ended = await replay_ended(site, started.name)
    assert (ended.state, ended.failed_count) == (pb.Replay.STATE_SUCCEEDED, 0)
    again = {each["webhook-id"] for each in receiver.headers if each.get("webhook-replay") == started.name}
    assert again == set(receiver.bodies)
    assert_sound(receiver)
    replays = await site.call("ListReplays", pb.ListReplaysRequest(parent=OPS))
    assert {each.name for each in replays.replays} == {resent.name, started.name}

    # Another secret: both are good, then one.
    request = pb.RotateWebhookSecretRequest(name=OPS, overlap=Duration(seconds=2), request_id=new_uuid())
    rotated = await site.call("RotateWebhookSecret", request)
    assert await site.call("RotateWebhookSecret", request) == rotated
    assert rotated.secret.secret != receiver.secret
    assert await reason_of(site, "RotateWebhookSecret", pb.RotateWebhookSecretRequest(name=OPS)) == (
        "FAILED_PRECONDITION",
        "WRONG_STATE",
    )
    inside = await site.product("inside")
    await until(lambda: inside in receiver.resources)
    receiver.secret, receiver.public_key = rotated.secret.secret, rotated.webhook_endpoint.public_key
    later = await site.product("later")
    await until(lambda: later in receiver.resources)
    assert receiver.problems == []

    async def only_one() -> bool:
        attempt = await site.call("TestWebhookEndpoint", pb.TestWebhookEndpointRequest(name=OPS))
        assert attempt.status == 200
        return receiver.signatures[-1] == 2

    await until(only_one)
    text = site.log_text
    assert receiver.secret not in text


async def test_another_url_must_be_verified_and_bad_input_changes_nothing(
    site: Site, receiver: Receiver, tmp_path: Path
) -> None:
    other = Receiver(tmp_path / "other")
    await site.start(allow(receiver, other))
    made = await site.create(receiver, products=[f"{PARENT}/products/p0"])
    image = pb.WebhookEndpoint(name=OPS, url=other.url, ca_pem=other.ca_file.read_text(), etag=made.etag)
    update = pb.UpdateWebhookEndpointRequest(webhook_endpoint=image, update_mask=FieldMask(paths=["url", "ca_pem"]))
    moved = await site.call("UpdateWebhookEndpoint", update)
    assert moved.state == pb.WebhookEndpoint.STATE_PENDING
    assert await reason_of(site, "UpdateWebhookEndpoint", update) == ("ABORTED", "ETAG_MISMATCH")
    wanted = await site.product("p0")
    await site.product("p1")

    async def told() -> bool:
        found = await site.call("GetWebhookEndpoint", pb.GetWebhookEndpointRequest(name=OPS))
        return str(found.state_reason).startswith("CONNECT_FAILED")

    await until(told)
    fields: dict[str, Any] = {"webhook_endpoint": pb.WebhookEndpoint(url="https://10.0.0.1/", etag="")}
    unknown = f"{PARENT}/webhookEndpoints/none"
    foreign = "organizations/other/webhookEndpoints/ops"
    missing = f"{OPS}/deliveries/msg_{'0' * 40}"
    positions = pb.PositionRange(topic="nobody.events.v1", to_position=5)
    cases: list[tuple[str, Any, str]] = [
        ("VerifyWebhookEndpoint", pb.VerifyWebhookEndpointRequest(name=unknown), "RESOURCE_NOT_FOUND"),
        ("VerifyWebhookEndpoint", pb.VerifyWebhookEndpointRequest(name=foreign), "RESOURCE_NOT_FOUND"),
        ("TestWebhookEndpoint", pb.TestWebhookEndpointRequest(name=foreign), "RESOURCE_NOT_FOUND"),
        ("RotateWebhookSecret", pb.RotateWebhookSecretRequest(name=unknown), "RESOURCE_NOT_FOUND"),
        ("RotateWebhookSecret", pb.RotateWebhookSecretRequest(name=foreign), "RESOURCE_NOT_FOUND"),
        ("RotateWebhookSecret", pb.RotateWebhookSecretRequest(name=OPS, etag="old"), "ETAG_MISMATCH"),
        (
            "RotateWebhookSecret",
            pb.RotateWebhookSecretRequest(name=OPS, overlap=Duration(seconds=86_401)),
            "INVALID_FIELD",
        ),
        ("GetDelivery", pb.GetDeliveryRequest(name=missing), "RESOURCE_NOT_FOUND"),
        ("GetDelivery", pb.GetDeliveryRequest(name="x"), "INVALID_FIELD"),
        ("ResendDelivery", pb.ResendDeliveryRequest(name=missing), "WRONG_STATE"),
        ("ReplayDeliveries", pb.ReplayDeliveriesRequest(parent=OPS), "WRONG_STATE"),
        ("ReplayDeliveries", pb.ReplayDeliveriesRequest(parent=foreign), "RESOURCE_NOT_FOUND"),
        ("GetReplay", pb.GetReplayRequest(name=f"{OPS}/replays/none"), "RESOURCE_NOT_FOUND"),
        ("CancelReplay", pb.CancelReplayRequest(name=f"{OPS}/replays/none"), "RESOURCE_NOT_FOUND"),
        ("GetEventType", pb.GetEventTypeRequest(name=f"{PARENT}/eventTypes/DEVICE"), "INVALID_FIELD"),
        (
            "GetEventType",
            pb.GetEventTypeRequest(name=f"{PARENT}/eventTypes/device.created", payload_version=9),
            "INVALID_FIELD",
        ),
        (
            "CreateWebhookEndpoint",
            pb.CreateWebhookEndpointRequest(parent=PARENT, webhook_endpoint_id="x", **fields),
            "INVALID_FIELD",
        ),
    ]
    for method, request, reason in cases:
        assert (await reason_of(site, method, request))[1] == reason, method

    await other.start()
    try:
        other.secret, other.public_key = receiver.secret, receiver.public_key
        verified = await site.call("VerifyWebhookEndpoint", pb.VerifyWebhookEndpointRequest(name=OPS))
        assert verified.state == pb.WebhookEndpoint.STATE_ACTIVE
        await until(lambda: wanted in other.resources)
        assert other.resources == {wanted}
        assert receiver.events == []
        bad = pb.ReplayDeliveriesRequest(parent=OPS, ranges=[positions])
        assert await reason_of(site, "ReplayDeliveries", bad) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    finally:
        await other.stop()


def started_example(receiver: Receiver, secret: str, output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "examples" / "webhook_receiver.py")),
                *("--listen", f"127.0.0.1:{receiver.port}"),
                *("--certificate", str(receiver.identity.certificate), "--key", str(receiver.identity.key)),
            ],
            env=os.environ | {"WEBHOOK_SECRETS": secret},
            stdout=file,
            stderr=file,
        )


async def test_the_example_receiver_takes_deliveries_once_and_refuses_forgeries(
    site: Site, receiver: Receiver, tmp_path: Path
) -> None:
    await site.start(f"127.0.0.1:{receiver.port}")
    await receiver.stop()
    request = pb.CreateWebhookEndpointRequest(
        parent=PARENT,
        webhook_endpoint_id="ops",
        webhook_endpoint=pb.WebhookEndpoint(url=receiver.url, ca_pem=receiver.ca_file.read_text()),
    )
    made = await site.call("CreateWebhookEndpoint", request)
    output = tmp_path / "output"
    process = started_example(receiver, made.secret.secret, output)
    try:

        async def active() -> bool:
            verified = await site.call("VerifyWebhookEndpoint", pb.VerifyWebhookEndpointRequest(name=OPS))
            await asyncio.sleep(0.1)
            return bool(verified.state == pb.WebhookEndpoint.STATE_ACTIVE)

        await until(active)
        name = await site.product("one")
        await until(lambda: name in output.read_text())

        async def kept() -> bool:
            return len(await site.deliveries()) == 1

        await until(kept)
        since = made.webhook_endpoint.create_time
        replay = await site.call("ReplayDeliveries", pb.ReplayDeliveriesRequest(parent=OPS, start_time=since))
        assert (await replay_ended(site, replay.name)).delivered_count == 1
        assert output.read_text().count(name) == 1, "a repetition has the same id and is no new event"
    finally:
        process.terminate()
        process.wait(10)
