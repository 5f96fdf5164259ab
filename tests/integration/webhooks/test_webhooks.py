"""Webhooks from the registry's log to HTTPS receivers, over crashes, outages and refusals."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.rpc import error_of
from tests.integration.webhooks.site import PARENT, Receiver, Site, until

pytestmark = pytest.mark.timeout(120)


def allow(*receivers: Receiver) -> str:
    return ",".join(f"127.0.0.1:{receiver.port}" for receiver in receivers)


def assert_sound(receiver: Receiver) -> None:
    """Every delivery verified, every event under one id, every id with one body."""
    assert receiver.problems == []
    assert {event: ids for event, ids in receiver.ids.items() if len(ids) != 1} == {}
    assert {identifier for identifier, bodies in receiver.bodies.items() if len(bodies) != 1} == set()


async def test_prompt_verified_and_nothing_missing_over_a_crash(site: Site, receiver: Receiver) -> None:
    await site.product("before")
    await site.start(allow(receiver))
    made = await site.create(receiver)
    assert made.state == pb.WebhookEndpoint.STATE_ACTIVE

    began = time.monotonic()
    first = await site.product("first")
    await until(lambda: first in receiver.resources)
    assert time.monotonic() - began < 5.0
    assert [(event["type"], event["organization"]) for event in receiver.events] == [("product.created", "acme")]
    assert receiver.events[0]["data"]["product"]["displayName"] == "first"

    receiver.delay_s = 0.03
    wanted = {first}
    for number in range(12):
        wanted.add(await site.product(f"p{number}"))
    await until(lambda: len(receiver.resources) >= 4)
    site.kill()
    for number in range(12, 16):
        wanted.add(await site.product(f"p{number}"))
    await site.start(allow(receiver))
    await until(lambda: receiver.resources >= wanted)
    assert receiver.resources == wanted
    assert_sound(receiver)

    async def recorded() -> bool:
        return {each.state for each in await site.deliveries()} == {pb.Delivery.STATE_SUCCEEDED}

    await until(recorded)
    catalogue = await site.call("ListEventTypes", pb.ListEventTypesRequest(parent=PARENT))
    assert "product.created" in {each.name for each in catalogue.event_types}
    assert receiver.secret not in site.log_text


async def test_an_outage_of_one_receiver_delays_no_other_and_loses_nothing(
    site: Site, receiver: Receiver, tmp_path: Path
) -> None:
    down = Receiver(tmp_path / "down")
    await site.start(allow(receiver, down))
    await site.create(receiver)
    await down.start()
    await site.create(down, "down", event_types=["product.*"])
    await down.stop()
    wanted = set()
    for number in range(4):
        wanted.add(await site.product(f"p{number}"))
    await until(lambda: receiver.resources == wanted, 5.0)

    async def pending() -> bool:
        return {each.state for each in await site.deliveries("down")} == {pb.Delivery.STATE_PENDING}

    await until(pending)
    assert all(each.last_error.startswith("CONNECT_FAILED") for each in await site.deliveries("down"))
    await down.start()
    try:
        # A new event finds the receiver back, and what it missed follows at once.
        wanted.add(await site.product("last"))
        await until(lambda: down.resources == wanted)
        assert_sound(down)
        assert_sound(receiver)
        name = f"{PARENT}/webhookEndpoints/down"

        async def counted() -> bool:
            found = await site.call("GetWebhookEndpoint", pb.GetWebhookEndpointRequest(name=name))
            return bool(found.delivered_count == 5)

        await until(counted)
        off = pb.UpdateWebhookEndpointRequest(
            webhook_endpoint=pb.WebhookEndpoint(name=name, state=pb.WebhookEndpoint.STATE_DISABLED),
            update_mask=FieldMask(paths=["state"]),
        )
        await site.call("UpdateWebhookEndpoint", off)
        unheard = await site.product("unheard")
        await until(lambda: unheard in receiver.resources)
        assert unheard not in down.resources
        off.webhook_endpoint.state = pb.WebhookEndpoint.STATE_ACTIVE
        await site.call("UpdateWebhookEndpoint", off)
        await until(lambda: unheard in down.resources)
    finally:
        await down.stop()


async def test_refused_at_connect_at_the_handshake_and_at_a_redirect(
    site: Site, receiver: Receiver, tmp_path: Path
) -> None:
    other_ca = Receiver(tmp_path / "other").ca_file.read_text()
    await site.start(allow(receiver))
    for url in (f"https://localhost:{receiver.port}/", "https://localhost:8443/hooks", "https://127.0.0.1:8443/"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await site.create(receiver, "refused", url=url)
        assert error_of(refused.value).reason == "INVALID_FIELD"
    wrong = await site.create(receiver, "wrong-ca", ca_pem=other_ca)
    assert wrong.state == pb.WebhookEndpoint.STATE_PENDING
    assert wrong.state_reason.startswith("TLS_FAILED")
    assert receiver.paths == []

    assert (await site.create(receiver, "moved")).state == pb.WebhookEndpoint.STATE_ACTIVE
    receiver.status = 302
    await site.product("two")

    async def redirected() -> bool:
        return any(each.last_error.startswith("REDIRECT_NOT_FOLLOWED") for each in await site.deliveries("moved"))

    await until(redirected)
    assert set(receiver.paths) == {"/hooks"}

    receiver.status = 204
    assert (await site.create(receiver, "gone")).state == pb.WebhookEndpoint.STATE_ACTIVE
    receiver.status = 410
    await site.product("three")

    async def disabled() -> bool:
        name = f"{PARENT}/webhookEndpoints/gone"
        found = await site.call("GetWebhookEndpoint", pb.GetWebhookEndpointRequest(name=name))
        return (found.state, found.state_reason) == (pb.WebhookEndpoint.STATE_DISABLED, "RECEIVER_GONE")

    await until(disabled)
