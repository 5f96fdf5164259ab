"""Keys as another service knows them: folded from the registry's public log, asked for on a miss."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.registry.v1 import registry_pb2_grpc as pb_grpc

from libs.errors import PermissionDeniedError, UnavailableError
from libs.eventlog import Deadline
from libs.eventlog.kafka import KafkaLog
from libs.rpc import AccessDirectory, KeyRecord, Principal, channel, retry_unavailable
from libs.rpc.access import authorize
from libs.rpc.directory import STALE_S
from tests.integration.registry.running import Running, Tenant


@pytest.fixture
async def log(running: Running) -> AsyncIterator[KafkaLog]:
    found = KafkaLog(running.settings.kafka)
    yield found
    await found.close()


@pytest.fixture
async def registry_channel(running: Running) -> AsyncIterator[grpc.aio.Channel]:
    async with channel(running.settings, "registry", identity="pki") as found:
        yield found


async def made(running: Running) -> Tenant:
    return await asyncio.to_thread(running.organization)


async def test_a_key_that_is_not_folded_yet_is_asked_for(
    running: Running, log: KafkaLog, registry_channel: grpc.aio.Channel
) -> None:
    tenant = await made(running)
    directory = AccessDirectory(log, running.settings, pb_grpc.RegistryInternalServiceStub(registry_channel))
    known = await directory.lookup(tenant.organization, f"{tenant.name}/apiKeys/owner")
    assert known is not None
    assert (known.role, known.secret_sha256) == ("owner", hashlib.sha256(tenant.key.split("_", 3)[3].encode()).digest())
    assert await directory.lookup(tenant.organization, f"{tenant.name}/apiKeys/nobody") is None


async def test_a_revocation_is_seen_within_its_bound(
    running: Running, log: KafkaLog, registry_channel: grpc.aio.Channel
) -> None:
    tenant = await made(running)
    spare = f"{tenant.name}/apiKeys/spare"
    await asyncio.to_thread(tenant.with_key, "spare")
    directory = AccessDirectory(log, running.settings, pb_grpc.RegistryInternalServiceStub(registry_channel))
    await directory.start()
    try:
        await directory.follower.caught_up(Deadline.after(15))
        known = await directory.lookup(tenant.organization, spare)
        assert known is not None
        assert not known.revoked
        await asyncio.to_thread(tenant.call, "RevokeApiKey", pb.RevokeApiKeyRequest(name=spare))
        since = time.monotonic()
        while True:
            known = await directory.lookup(tenant.organization, spare)
            if known is not None and known.revoked:
                break
            assert time.monotonic() - since < STALE_S
            await asyncio.sleep(0.02)
        assert directory.live
    finally:
        await directory.stop()
    assert not directory.live


async def seen_within_the_bound(
    directory: AccessDirectory, tenant: Tenant, holds: Callable[[KeyRecord | None], bool]
) -> None:
    since = time.monotonic()
    while not holds(await directory.lookup(tenant.organization, f"{tenant.name}/apiKeys/tech")):
        assert time.monotonic() - since < STALE_S
        await asyncio.sleep(0.02)


def may(known: KeyRecord | None, tenant: Tenant, permission: str) -> bool:
    """Whether the key, as another service knows it, may do something in its organization."""
    assert known is not None
    principal = Principal(
        known.name,
        "api_key",
        tenant.organization,
        known.member,
        known.role,
        known.scopes,
        permissions=known.permissions,
    )
    try:
        authorize(principal, permission, f"{tenant.name}/products/pump")
    except PermissionDeniedError:
        return False
    return True


async def test_t68_a_custom_role_is_known_elsewhere_and_its_change_within_the_bound(
    running: Running, log: KafkaLog, registry_channel: grpc.aio.Channel
) -> None:
    """T68: a role is narrowed, a secret rotated, a member removed; another service knows within 5 s."""
    tenant = await made(running)
    role = f"{tenant.name}/roles/tech"

    async def call(method: str, request: Any) -> Any:
        return await asyncio.to_thread(tenant.call, method, request)

    wanted = pb.Role(permissions=["rollout.rollouts.pause", "rollout.rollouts.get"])
    await call("CreateRole", pb.CreateRoleRequest(parent=tenant.name, role_id="tech", role=wanted))
    await asyncio.to_thread(tenant.with_key, "tech", role=role)
    directory = AccessDirectory(log, running.settings, pb_grpc.RegistryInternalServiceStub(registry_channel))
    asked = await directory.lookup(tenant.organization, f"{tenant.name}/apiKeys/tech")
    await directory.start()
    try:
        await directory.follower.caught_up(Deadline.after(15))
        folded = await directory.lookup(tenant.organization, f"{tenant.name}/apiKeys/tech")
        assert folded == asked
        assert may(folded, tenant, "rollout.rollouts.pause")
        assert not may(folded, tenant, "rollout.rollouts.abort")
        narrowed = pb.Role(name=role, permissions=["rollout.rollouts.get"])
        mask = FieldMask(paths=["permissions"])
        await call("UpdateRole", pb.UpdateRoleRequest(role=narrowed, update_mask=mask))
        await seen_within_the_bound(directory, tenant, lambda known: not may(known, tenant, "rollout.rollouts.pause"))
        new = hashlib.sha256(b"another secret").digest()
        await call("RotateApiKey", pb.RotateApiKeyRequest(name=f"{tenant.name}/apiKeys/tech", secret_sha256=new))
        await seen_within_the_bound(directory, tenant, lambda known: known is not None and known.secret_sha256 == new)
        rotated = await directory.lookup(tenant.organization, f"{tenant.name}/apiKeys/tech")
        assert rotated is not None
        assert folded is not None
        assert rotated.previous_sha256 == folded.secret_sha256
        assert rotated.previous_expire_ms > time.time() * 1000
        member = pb.Member(name=f"{tenant.name}/members/tech", role="operator")
        await call("UpdateMember", pb.UpdateMemberRequest(member=member, update_mask=FieldMask(paths=["role"])))
        await seen_within_the_bound(directory, tenant, lambda known: may(known, tenant, "rollout.rollouts.pause"))
        await call("DeleteMember", pb.DeleteMemberRequest(name=member.name))
        await seen_within_the_bound(directory, tenant, lambda known: known is None or known.revoked)
    finally:
        await directory.stop()


async def test_a_registry_that_cannot_be_asked_is_no_unknown_key(running: Running, log: KafkaLog) -> None:
    settings = running.settings.model_copy(update={"registry_internal": "127.0.0.1:1"})
    async with channel(settings, "registry", identity="pki") as nowhere:
        directory = AccessDirectory(log, settings, pb_grpc.RegistryInternalServiceStub(nowhere))
        with pytest.raises(UnavailableError) as error:
            await directory.lookup("acme", "organizations/acme/apiKeys/k")
    assert error.value.reason == "REGISTRY_UNAVAILABLE"


async def test_only_unavailable_is_repeated(registry_channel: grpc.aio.Channel) -> None:
    stub = pb_grpc.RegistryInternalServiceStub(registry_channel)
    calls = 0

    async def ask() -> pb.Product:
        nonlocal calls
        calls += 1
        found: pb.Product = await stub.LookupProduct(pb.GetProductRequest(name="organizations/nobody/products/nothing"))
        return found

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await retry_unavailable(ask)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert calls == 1
