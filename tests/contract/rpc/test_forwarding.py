"""Whatever replica a client calls, it gets what the leader would have answered: one hop, nothing lent, nothing lost."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from groundswell.registry.v1 import registry_pb2 as pb
from grpc_status import rpc_status

from libs.eventlog import Deadline
from libs.eventlog.codec import read_envelope
from libs.eventlog.config import events_topic, partition_of
from libs.eventlog.ports import TopicPartition
from libs.rpc import error_of, interceptor
from tests.contract.eventlog.support import PARTITIONS, Gate, soon
from tests.contract.rpc.conftest import DIGEST, SECRET, Pair, Replica

ORG = "organizations/acme"
REQUEST = "11111111-1111-4111-8111-111111111111"
both = pytest.mark.parametrize("site", ["memory", "kafka"], indirect=True)
memory = pytest.mark.parametrize("site", ["memory"], indirect=True)


def product(product_id: str, request_id: str = "", title: str = "") -> pb.CreateProductRequest:
    return pb.CreateProductRequest(
        parent=ORG, product_id=product_id, product=pb.Product(display_name=title), request_id=request_id
    )


async def principals(replica: Replica) -> dict[str, str]:
    """Resource → who wrote it, by the log."""
    place = TopicPartition(events_topic(replica.settings.env, "registry"), partition_of("acme", PARTITIONS))
    end = (await replica.log.end_positions([place]))[place]
    tail = await replica.log.open_tail({place: 0})
    found = {}
    while tail.position(place) < end:
        for record in await tail.fetch(0.2):
            envelope = read_envelope(record)[0]
            found[envelope.resource] = envelope.principal
    await tail.close()
    return found


def retry_after(error: grpc.aio.AioRpcError) -> float | None:
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return retry.retry_delay.ToTimedelta().total_seconds()
    return None


@both
async def test_a_command_at_a_follower_is_the_same_command(pair: Pair) -> None:
    made, positions = await pair.follower.call("CreateProduct", product("pump", REQUEST), key=pair.key)
    assert made.name == f"{ORG}/products/pump"
    assert len(positions) == 1
    # What was written is read anywhere, by the position that came back.
    request = pb.GetProductRequest(name=made.name)
    for replica in (pair.follower, pair.leader):
        found, _ = await replica.call("GetProduct", request, key=pair.key, x_read_after=positions[0])
        assert found == made
    # A retry is answered from the log, wherever it arrives, and the caller is in the log under its own name.
    for replica in (pair.leader, pair.follower):
        again, _ = await replica.call("CreateProduct", product("pump", REQUEST), key=pair.key)
        assert again == made
    assert (await principals(pair.leader))[made.name] == f"{ORG}/apiKeys/first"


@both
async def test_a_refusal_comes_back_with_all_its_details(pair: Pair) -> None:
    await pair.leader.call("CreateProduct", product("pump"), key=pair.key)
    forwarded = await pair.follower.refused("CreateProduct", product("pump"), key=pair.key)
    direct = await pair.leader.refused("CreateProduct", product("pump"), key=pair.key)
    assert error_of(forwarded).reason == "ALREADY_EXISTS"
    assert rpc_status.from_call(forwarded) == rpc_status.from_call(direct)  # type: ignore[arg-type]
    reused = await pair.follower.refused("CreateProduct", product("other", "no uuid"), key=pair.key)
    assert error_of(reused).reason == "INVALID_FIELD", "judged where it arrived"


@both
async def test_the_roles_change_and_callers_notice_nothing_but_unavailable(pair: Pair) -> None:
    pair.leader.retire()
    await pair.follower.lead()
    old_leader = pair.leader

    limit = soon()
    made = None
    while made is None:
        error = await old_leader.error("CreateProduct", product("pump", REQUEST), key=pair.key)
        if error is None:
            made, _ = await old_leader.call("CreateProduct", product("pump", REQUEST), key=pair.key)
            break
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error
        assert not limit.expired
        await asyncio.sleep(0.05)
    again, _ = await pair.follower.call("CreateProduct", product("pump", REQUEST), key=pair.key)
    assert made == again


@both
async def test_calls_of_services_are_forwarded_too(pair: Pair) -> None:
    """The internal port tells no reads from commands beforehand; the handler finds out, having done nothing."""
    await pair.leader.call("CreateProduct", product("pump"), key=pair.key)
    request = pb.ProvisionDeviceRequest(
        parent=f"{ORG}/products/pump",
        device_id="SN-1",
        certificate_fingerprint="ab" * 32,
        provisioned_by=f"{ORG}/products/pump/caCertificates/c",
    )
    device, positions = await pair.follower.call("ProvisionDevice", request, identity="pki")
    assert positions
    again, _ = await pair.leader.call("ProvisionDevice", request, identity="pki")
    assert again == device
    assert (await principals(pair.leader))[device.name] == "spiffe://local/service/pki"


@both
async def test_a_key_made_a_moment_ago_is_known_to_every_replica(pair: Pair) -> None:
    """Without a token: the key is looked up before the call's tokens are."""
    for number in range(5):
        key = pb.ApiKey(member=f"{ORG}/members/owner", scopes=["*"], secret_sha256=DIGEST)
        request = pb.CreateApiKeyRequest(parent=ORG, api_key_id=f"k{number}", api_key=key)
        await pair.leader.call("CreateApiKey", request, key=pair.key)
        new = f"gsw_acme_k{number}_{SECRET}"
        await pair.follower.call("GetOrganization", pb.GetOrganizationRequest(name=ORG), key=new)
        name = pb.LookupApiKeyRequest(name=f"{ORG}/apiKeys/k{number}")
        await pair.follower.call("LookupApiKey", name, identity="rollout")


@memory
async def test_a_forwarded_call_is_never_forwarded_again(pair: Pair) -> None:
    third = await pair.site.start()
    before = await principals(pair.leader)
    for identity in ("registry", "pki"):
        error = await third.refused(
            "ProvisionDevice",
            pb.ProvisionDeviceRequest(
                parent=f"{ORG}/products/pump",
                device_id="SN-1",
                certificate_fingerprint="ab" * 32,
                provisioned_by=f"{ORG}/products/pump/caCertificates/c",
            ),
            identity=identity,
            x_forwarded_by="127.0.0.1:1",
            **({"x_original_principal": "spiffe://local/service/pki"} if identity == "registry" else {}),
        )
        assert (error.code(), error_of(error).reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_LEADER")
        assert retry_after(error)
    assert await principals(pair.leader) == before


@memory
async def test_the_original_principal_is_believed_from_the_same_service_only(pair: Pair) -> None:
    for identity in ("pki", "gateway", "rollout"):
        error = await pair.leader.refused(
            "CreateProduct",
            product("stolen"),
            identity=identity,
            x_forwarded_by="127.0.0.1:1",
            x_original_principal=f"{ORG}/apiKeys/first",
        )
        assert (error.code(), error_of(error).reason) == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
    error = await pair.leader.refused("CreateProduct", product("stolen"), x_original_principal=f"{ORG}/apiKeys/first")
    assert error_of(error).reason == "CREDENTIALS_MISSING", "the public port never looks at it"
    error = await pair.leader.refused("CreateProduct", product("stolen"), identity="registry")
    assert error_of(error).reason == "CALLER_NOT_ALLOWED", "a replica asks for others, not for itself"
    made, _ = await pair.leader.call(
        "CreateProduct", product("fine"), identity="registry", x_original_principal=f"{ORG}/apiKeys/first"
    )
    assert made.name


@memory
async def test_the_leader_authorizes_again_by_what_it_knows(pair: Pair) -> None:
    """A replica whose view is old lends nobody a right that was taken away."""
    key = pb.ApiKey(member=f"{ORG}/members/owner", scopes=["*"], secret_sha256=DIGEST)
    create = pb.CreateApiKeyRequest(parent=ORG, api_key_id="old", api_key=key)
    await pair.leader.call("CreateApiKey", create, key=pair.key)
    old = f"gsw_acme_old_{SECRET}"
    await pair.follower.call("GetOrganization", pb.GetOrganizationRequest(name=ORG), key=old)
    hold = Gate("fetched registry")
    pair.follower.log.hooks.append(hold)
    await pair.leader.call("RevokeApiKey", pb.RevokeApiKeyRequest(name=f"{ORG}/apiKeys/old"), key=pair.key)
    try:
        error = await pair.follower.refused("CreateProduct", product("late"), key=old)
        assert (error.code(), error_of(error).reason) == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_REVOKED")
    finally:
        hold.opened.set()
    assert f"{ORG}/products/late" not in await principals(pair.leader)


@memory
async def test_a_follower_that_cannot_read_its_log_judges_no_keys(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.rpc.directory.STALE_S", 0.5)
    hold = Gate("fetched registry")
    pair.follower.log.hooks.append(hold)
    await pair.leader.call("CreateProduct", product("pump"), key=pair.key)
    request = pb.GetOrganizationRequest(name=ORG)
    limit = soon()
    try:
        while (error := await pair.follower.error("GetOrganization", request, key=pair.key)) is None:
            assert not limit.expired
            await asyncio.sleep(0.1)
        assert (error.code(), error_of(error).reason) == (grpc.StatusCode.UNAVAILABLE, "ACCESS_VIEW_STALE")
    finally:
        hold.opened.set()


@memory
async def test_without_a_known_or_living_leader_it_is_unavailable_with_a_time_to_retry(pair: Pair) -> None:
    await pair.leader.server.stop()
    pair.site.replicas.remove(pair.leader)
    error = await pair.follower.refused("CreateProduct", product("pump", REQUEST), key=pair.key)
    assert (error.code(), error_of(error).reason) == (grpc.StatusCode.UNAVAILABLE, "LEADER_UNREACHABLE")
    assert retry_after(error)
    found, _ = await pair.follower.call("GetOrganization", pb.GetOrganizationRequest(name=ORG), key=pair.key)
    assert found.name == ORG, "reads go on"
    await pair.follower.lead()
    made, _ = await pair.follower.call("CreateProduct", product("pump", REQUEST), key=pair.key)
    assert made.name


@pytest.mark.parametrize("site", ["memory"], indirect=True)
async def test_before_anybody_led_it_is_not_ready(site: Any) -> None:
    alone: Replica = await site.start()
    request = pb.BootstrapRequest(api_key_id="bootstrap", secret_sha256=DIGEST)
    error = await alone.refused("Bootstrap", request, identity="registry")
    assert (error.code(), error_of(error).reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    assert retry_after(error)


@memory
async def test_a_leader_that_hangs_costs_no_more_than_the_deadline(pair: Pair) -> None:
    hold = Gate("stage")
    pair.leader.log.hooks.append(hold)
    began = time.monotonic()
    error = await pair.follower.refused("CreateProduct", product("pump", REQUEST), key=pair.key, within=2.0)
    assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert time.monotonic() - began < 10
    hold.opened.set()
    await pair.leader.runtime.barrier("acme", Deadline.after(10))
    made, _ = await pair.follower.call("CreateProduct", product("pump", REQUEST), key=pair.key)
    assert made.name, "whatever became of the first try"


@memory
async def test_only_listed_headers_travel(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    found = interceptor.Gate._identify

    async def identify(self: Any, context: Any) -> Any:
        seen.append({key: str(value) for key, value in context.invocation_metadata() if key != "user-agent"})
        return await found(self, context)

    _, positions = await pair.leader.call("CreateProduct", product("first"), key=pair.key)
    monkeypatch.setattr(interceptor.Gate, "_identify", identify)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await pair.follower.call(
        "CreateProduct", product("pump"), key=pair.key, x_read_after=positions[0], traceparent=trace, x_secret="s"
    )
    arrived, passed = seen
    assert {"authorization", "x-secret"} <= arrived.keys()
    assert passed == {
        "traceparent": trace,
        "x-read-after": positions[0],
        "x-forwarded-by": pair.follower.settings.address("registry", "internal"),
        "x-original-principal": f"{ORG}/apiKeys/first",
    }
