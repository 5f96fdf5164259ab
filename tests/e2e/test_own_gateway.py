"""A gateway that shares no code with ours walks devices through a rollout; what is forged or foreign gets nowhere.

The gateway is `examples/own_gateway.py`: aiokafka, Ed25519 and the protos, by the public ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from aiokafka import AIOKafkaProducer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import edge_pb2, rollout_pb2

from demo import checker
from demo.steps import wait_until
from deploy.local.settings import ROOT
from examples.own_gateway import Api, CheckInTopic, OwnGateway, SimulatedDevice, register, started_producer, update
from tests.e2e import logs
from tests.e2e.guide import Guide
from tests.e2e.stack import Stack
from tests.e2e.tenant import FACTORY_VERSION, TARGET, StageStatus, Tenant

SCOPES = ("rollout.offers.*", "rollout.attempts.list", "releases.devices.resolve", "registry.devices.get")
CANARY = ("own-1", "own-2")
STAGES = (("canary", len(CANARY)),)


# What the team has ------------------------------------------------------------------------------------------------


def api_key(tenant: Tenant, key_id: str, prefix: str, scopes: Sequence[str] = SCOPES) -> str:
    secret = secrets.token_hex(16)
    tenant.client.registry.CreateApiKey(
        registry_pb2.CreateApiKeyRequest(
            parent=tenant.name,
            api_key_id=key_id,
            api_key=registry_pb2.ApiKey(
                member=f"{tenant.name}/members/owner",
                scopes=scopes,
                resource_prefix=prefix,
                secret_sha256=hashlib.sha256(secret.encode()).digest(),
            ),
        )
    )
    return f"gsw_{tenant.organization}_{key_id}_{secret}"


def made_by_hand(tenant: Tenant, *serials: str) -> list[registry_pb2.Device]:
    """Devices that our gateway never sees: their certificates are the team's own business."""
    return [
        tenant.client.registry.CreateDevice(
            registry_pb2.CreateDeviceRequest(
                parent=tenant.product,
                device_id=serial,
                device=registry_pb2.Device(cohort=tenant.cohort("canary"), target=TARGET),
            )
        )
        for serial in serials
    ]


def simulated(device: registry_pb2.Device) -> SimulatedDevice:
    return SimulatedDevice(device.name, device.uid, registry_pb2.ReportedState(version=FACTORY_VERSION))


@dataclass(slots=True)
class Team:
    """A team's own gateway and its connections."""

    gateway: OwnGateway
    api: Api
    producer: AIOKafkaProducer
    key: Ed25519PrivateKey


@contextlib.asynccontextmanager
async def team_of(stack: Stack, tenant: Tenant, *, beat: bool = True) -> AsyncIterator[Team]:
    endpoints = dict(stack.profile.endpoints)
    name = f"{tenant.name}/gateways/edge"
    key = Ed25519PrivateKey.generate()
    operator = Api(endpoints, stack.ca_pem, tenant.api_key)
    seq = await register(operator, name, key)
    assert await register(operator, name, key) >= seq, "registering again is the same gateway"
    await operator.close()
    api = Api(endpoints, stack.ca_pem, api_key(tenant, "edge", tenant.product))
    producer = await started_producer(stack.settings.kafka)
    topic = CheckInTopic(producer, stack.settings.env, name, key, seq)
    gateway = OwnGateway(api, topic, name, tenant.product)
    if beat:
        gateway.start()
    try:
        yield Team(gateway, api, producer, key)
    finally:
        await gateway.stop()
        await producer.stop()
        await api.close()


# What is refused --------------------------------------------------------------------------------------------------


async def refusal(call: Any) -> str:
    """Reason of a refused call."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    details = dict(refused.value.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Unpack(info):
            break
    return str(info.reason)


def dead_letters(stack: Stack, gateway: str) -> list[str]:
    """Why records of a gateway were rejected, in the order of their positions."""
    topic = f"{stack.settings.env}.device.checkins.dead.v1"
    records = asyncio.run(checker.read_topic(stack.settings.kafka, topic))
    headers = [{name: value.decode(errors="replace") for name, value in record.headers} for record in records]
    return [found["rejected-reason"] for found in headers if found.get("gateway") == gateway]


async def await_dead_letters(stack: Stack, gateway: str, *expected: str) -> None:
    """Until the worker has put exactly these aside."""

    def all_there() -> bool:
        found = dead_letters(stack, gateway)
        assert found == list(expected[: len(found)]), found
        return found == list(expected)

    await asyncio.to_thread(wait_until, f"{expected} to be put aside", 60, all_there)


# Tests ------------------------------------------------------------------------------------------------------------


async def test_devices_behind_a_gateway_of_their_own_take_a_stage_through(stack: Stack, tenant: Tenant) -> None:
    devices = await asyncio.to_thread(made_by_hand, tenant, *CANARY)
    bundle = await asyncio.to_thread(tenant.bundle, "1.1.0")
    async with team_of(stack, tenant) as team:
        rollout = await asyncio.to_thread(lambda: tenant.start_rollout(bundle, cohorts=STAGES))
        said: list[str] = []
        offers = await asyncio.gather(*(update(team.gateway, simulated(device), said.append) for device in devices))
        ended = await asyncio.to_thread(tenant.await_completion, rollout)

        assert [offer.version for offer in offers] == ["1.1.0"] * len(CANARY)
        assert all(offer.statement == bundle.statement and offer.signatures for offer in offers)
        assert all(binary.link.startswith("/v1/downloads/") for offer in offers for binary in offer.binaries)
        assert [status.state for status in ended.stage_statuses] == [StageStatus.STATE_PASSED]
        assert [status.confirmed for status in ended.stage_statuses] == [len(CANARY)]
        assert await asyncio.to_thread(dead_letters, stack, team.gateway.name) == []
    confirmed = await asyncio.to_thread(logs.confirmations, stack, tenant.organization, rollout)
    assert confirmed == {device.name: 1 for device in devices}
    explained = await asyncio.to_thread(tenant.explain, CANARY[0])
    assert explained.running.version == "1.1.0"
    assert explained.grants[0].views, "the receipt names what was decided on"


def test_the_example_of_the_guide_does_what_it_says(stack: Stack, tenant: Tenant) -> None:
    (device,) = made_by_hand(tenant, "own-1")
    rollout = tenant.start_rollout(tenant.bundle("1.1.0"), cohorts=[("canary", 1)])
    environment = dict(
        os.environ,
        GROUNDSWELL_OPERATOR_KEY=tenant.api_key,
        GROUNDSWELL_API_KEY=api_key(tenant, "edge", tenant.product),
    )
    done = subprocess.run(
        [
            sys.executable, ROOT / "examples" / "own_gateway.py",
            "--profile", stack.profile.path, "--kafka", stack.settings.kafka, "--env", stack.settings.env,
            "--gateway", f"{tenant.name}/gateways/edge", "--signing-key", tenant.directory / "edge.pem",
            "--device", device.name,
        ],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "own-1: confirmed 1.1.0"
    tenant.await_completion(rollout)


async def test_records_that_are_forged_foreign_or_replayed_are_put_aside(
    stack: Stack, new_tenant: Callable[..., Tenant]
) -> None:
    tenant = await asyncio.to_thread(new_tenant)
    neighbour = await asyncio.to_thread(new_tenant, tenant)
    (victim,) = await asyncio.to_thread(made_by_hand, neighbour, "victim")
    (device,) = await asyncio.to_thread(made_by_hand, tenant, "own-1")
    async with team_of(stack, tenant, beat=False) as team:
        gateway, topic = team.gateway.name, team.gateway.topic
        partition = await topic.partition_of(tenant.organization)

        async def send(value: bytes, headers: list[tuple[str, bytes]]) -> None:
            await team.producer.send_and_wait(topic.topic, value, partition=partition, headers=headers)

        def batch(organization: str, about: registry_pb2.Device) -> bytes:
            items = [simulated(about).says()]
            return device_pb2.CheckInBatch(gateway=gateway, organization=organization, items=items).SerializeToString()

        own = batch(tenant.organization, device)
        forger = CheckInTopic(team.producer, stack.settings.env, gateway, Ed25519PrivateKey.generate())
        forged = [*topic.headers(partition, own)[:-1], forger.headers(partition, own)[-1]]
        await send(own, forged)
        await await_dead_letters(stack, gateway, "BAD_SIGNATURE")

        # Two organizations share the partition: only the signature's organization tells them apart.
        foreign = batch(neighbour.organization, victim)
        await send(foreign, topic.headers(partition, foreign))
        smuggled = batch(tenant.organization, victim)
        await send(smuggled, topic.headers(partition, smuggled))
        reasons = ["BAD_SIGNATURE", "ORGANIZATION_MISMATCH", "ORGANIZATION_MISMATCH"]
        await await_dead_letters(stack, gateway, *reasons)

        good = topic.headers(partition, own)
        await send(own, good)
        await send(own, good)
        reasons.append("REPLAYED_SEQUENCE")
        await await_dead_letters(stack, gateway, *reasons)

        # Nothing of it was taken for the neighbour's device, and the one good record was.
        assert not (await asyncio.to_thread(neighbour.explain, "victim")).running.version

        def taken() -> bool:
            return tenant.explain("own-1").running.version == FACTORY_VERSION

        await asyncio.to_thread(wait_until, "the good record to be taken", 30, taken)


async def test_a_disabled_gateway_is_heard_no_more_until_it_is_enabled(stack: Stack, tenant: Tenant) -> None:
    (device,) = await asyncio.to_thread(made_by_hand, tenant, "own-1")

    def disable(disabled: bool) -> None:
        image = registry_pb2.Gateway(name=f"{tenant.name}/gateways/edge", disabled=disabled)
        mask = FieldMask(paths=["disabled"])
        tenant.client.registry.UpdateGateway(registry_pb2.UpdateGatewayRequest(gateway=image, update_mask=mask))

    async with team_of(stack, tenant, beat=False) as team:
        gateway = team.gateway
        await gateway.check_in(simulated(device).says())
        await asyncio.to_thread(disable, True)
        item = simulated(device).says()
        claim = edge_pb2.EdgeClaimOffersRequest(
            parent=tenant.product,
            gateway=gateway.name,
            items=[rollout_pb2.ClaimItem(device=device.name, device_uid=device.uid, check_in=item)],
        )
        # Rollout and its worker hear of it each by their own view of the registry's log.
        async with asyncio.timeout(30):
            while True:
                try:
                    await team.api.call(team.api.edge.ClaimOffers, claim)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                        break
                    raise
        assert await refusal(team.api.call(team.api.edge.ClaimOffers, claim)) == "GATEWAY_DISABLED"
        switch = edge_pb2.EdgeAuthorizeSwitchRequest(
            gateway=gateway.name, device=device.name, attempt=f"{device.name}/attempts/x", check_in=item
        )
        assert await refusal(team.api.call(team.api.edge.AuthorizeSwitch, switch)) == "GATEWAY_DISABLED"
        batch = device_pb2.CheckInBatch(gateway=gateway.name, organization=tenant.organization, items=[item])
        async with asyncio.timeout(60):
            while "KEY_DISABLED" not in (await asyncio.to_thread(dead_letters, stack, gateway.name)):
                await gateway.topic.send(tenant.organization, batch)
                await asyncio.sleep(0.2)

        await asyncio.to_thread(disable, False)
        late = SimulatedDevice(device.name, device.uid, registry_pb2.ReportedState(version="1.0.1"))
        async with asyncio.timeout(60):
            while (await asyncio.to_thread(tenant.explain, "own-1")).running.version != "1.0.1":
                late_batch = device_pb2.CheckInBatch(
                    gateway=gateway.name, organization=tenant.organization, items=[late.says()]
                )
                await gateway.topic.send(tenant.organization, late_batch)
                await asyncio.sleep(0.2)


async def test_calls_for_devices_that_are_not_the_gateways_own_decide_nothing(
    stack: Stack, new_tenant: Callable[..., Tenant]
) -> None:
    tenant = await asyncio.to_thread(new_tenant)
    neighbour = await asyncio.to_thread(new_tenant, tenant)
    (victim,) = await asyncio.to_thread(made_by_hand, neighbour, "victim")
    (device,) = await asyncio.to_thread(made_by_hand, tenant, "own-1")
    operator = Api(dict(stack.profile.endpoints), stack.ca_pem, neighbour.api_key)
    await register(operator, f"{neighbour.name}/gateways/edge", Ed25519PrivateKey.generate())
    await operator.close()
    poor_key = await asyncio.to_thread(api_key, tenant, "poor", "", ["releases.*"])
    other_key = await asyncio.to_thread(api_key, tenant, "other", f"{tenant.name}/products/other")

    async with team_of(stack, tenant, beat=False) as team:

        def claim(*devices: registry_pb2.Device, parent: str = tenant.product, gateway: str = "") -> Any:
            items = [
                rollout_pb2.ClaimItem(device=one.name, device_uid=one.uid, check_in=simulated(one).says())
                for one in devices
            ]
            return edge_pb2.EdgeClaimOffersRequest(parent=parent, gateway=gateway or team.gateway.name, items=items)

        def go(about: registry_pb2.Device, attempt: str) -> Any:
            item = simulated(about).says(attempt=attempt)
            return edge_pb2.EdgeAuthorizeSwitchRequest(
                gateway=team.gateway.name, device=about.name, attempt=attempt, check_in=item
            )

        ask = team.api.edge.ClaimOffers
        before = await asyncio.to_thread(logs.settled, stack, neighbour.organization)
        assert await refusal(team.api.call(ask, claim(device, victim))) == "RESOURCE_NOT_FOUND"
        foreign = claim(victim, parent=neighbour.product, gateway=f"{neighbour.name}/gateways/edge")
        assert await refusal(team.api.call(ask, foreign)) == "RESOURCE_NOT_FOUND"
        borrowed = claim(device, gateway=f"{neighbour.name}/gateways/edge")
        assert await refusal(team.api.call(ask, borrowed)) == "RESOURCE_NOT_FOUND"
        resolve = releases_pb2.ResolveDevicesRequest(parent=tenant.product, devices=[victim.name])
        assert await refusal(team.api.call(team.api.releases.ResolveDevices, resolve)) == "INVALID_FIELD"
        switch = team.api.edge.AuthorizeSwitch
        theirs = f"{victim.name}/attempts/{uuid.uuid4()}"
        assert await refusal(team.api.call(switch, go(victim, theirs))) == "RESOURCE_NOT_FOUND"
        assert await refusal(team.api.call(switch, go(device, theirs))) == "RESOURCE_NOT_FOUND"
        assert await asyncio.to_thread(logs.settled, stack, neighbour.organization) == before
        unplaced = claim(device, parent=tenant.name)
        assert await refusal(team.api.call(ask, unplaced)) == "RESOURCE_NOT_FOUND"
        for key, reason in ((poor_key, "PERMISSION_MISSING"), (other_key, "RESOURCE_NOT_FOUND")):
            api = Api(dict(stack.profile.endpoints), stack.ca_pem, key)
            assert await refusal(api.call(api.edge.ClaimOffers, claim(device))) == reason
            await api.close()
        assert len((await team.api.call(ask, claim(device))).results) == 1


def test_a_link_from_an_offer_serves_its_device_and_no_other(stack: Stack, tenant: Tenant) -> None:
    """The same calls by hand, with `swell edge`; the bytes come from the installation's gateway."""
    certified, other = tenant.enrolled("canary-1"), tenant.enrolled("canary-2")
    device = simulated(tenant.devices()["canary-1"])
    gateway = registry_pb2.Gateway(public_key=Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    tenant.client.registry.CreateGateway(
        registry_pb2.CreateGatewayRequest(parent=tenant.name, gateway_id="edge", gateway=gateway)
    )
    tenant.start_rollout(tenant.bundle("1.1.0"), cohorts=[("canary", 1)])
    supposed = releases_pb2.SupposedDevice(device=device.name, running=device.running)
    resolve = releases_pb2.ResolveDevicesRequest(parent=tenant.product, supposed_devices=[supposed])
    candidates = wait_until(
        "a candidate", 30, lambda: tenant.client.releases.ResolveDevices(resolve).resolutions[0].candidates
    )
    shell = Guide.open("releases.md", stack, tenant)

    def swell(name: str, request: Message, *command: str) -> dict[str, Any]:
        (shell.directory / name).write_text(MessageToJson(request, preserving_proto_field_name=True))
        return json.loads(shell.run(["swell", "--output", "json", "edge", *command, "--file", name]))

    item = rollout_pb2.ClaimItem(
        device=device.name, device_uid=device.uid, candidates=candidates, check_in=device.says()
    )
    claimed = swell("claims.json", edge_pb2.EdgeClaimOffersRequest(items=[item]), "claim", "edge")
    offer = claimed["results"][0]["offer"]
    link = offer["binaries"][0]["link"]
    assert certified.send(b"", "GET", link).status == 307
    refused = other.send(b"", "GET", link)
    assert (refused.status, refused.reason) == (403, "LINK_NOT_YOURS")
    asked = edge_pb2.EdgeAuthorizeSwitchRequest(check_in=device.says(attempt=offer["attempt"]))
    assert swell("go.json", asked, "go", "edge", offer["attempt"])["answer"] == "ANSWER_GO"
