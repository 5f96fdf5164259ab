"""Releases beside the real registry, on the real log, over both of its ports; artifacts and rollout only publish."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.releases.v1 import releases_pb2_grpc
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from deploy.local.credentials import ensure_all
from deploy.local.settings import ROOT
from deploy.local.settings import Settings as StackSettings
from libs.errors import GroundswellError
from libs.eventlog import Command, Deadline, Foreign, Public, Runtime, RuntimeConfig, partition_of
from libs.eventlog.follower import PublicFollower
from libs.eventlog.kafka import KafkaLog
from libs.rpc import RpcServer, channel, error_of
from libs.settings import Settings
from services.registry.app import build as build_registry
from services.releases.app import build as build_releases
from tests.conftest import KafkaEnv
from tests.ports import free_address
from tests.unit.releases.world import (
    COHORT,
    PRODUCT,
    ROLLOUT,
    Publisher,
    References,
    bundle_image,
    bundle_of,
    name_of,
    rollout_image,
)

T = TypeVar("T")


def settings_of(kafka: KafkaEnv, folder: Path) -> Settings:
    stack = StackSettings(ROOT, folder, folder, 19000, {"GROUNDSWELL_KEYSTORE_DIR": str(folder / "keystore")})
    ensure_all(stack)
    ports = {
        f"{service}_{port}": free_address()
        for service in ("registry", "releases", "artifacts")
        for port in ("internal", "public")
    }
    return Settings(
        env=kafka.env,
        kafka=kafka.bootstrap,
        partitions=kafka.partitions,
        tls_dir=stack.tls_dir,
        keystore_dir=stack.keystore_dir,
        **ports,  # type: ignore[arg-type]
    )


async def answer(call: Any) -> Any:
    """The answer of a call, with its position; errors as their reasons."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from error


async def refusal(call: Awaitable[Any]) -> str:
    with pytest.raises(GroundswellError) as refused:
        await answer(call)
    return refused.value.reason


async def eventually(condition: Callable[[], Awaitable[T]], limit_s: float = 30.0) -> T:
    async with asyncio.timeout(limit_s):
        while True:
            found = await condition()
            if found:
                return found
            await asyncio.sleep(0.05)


async def serving(server: RpcServer) -> None:
    await server.start()
    deadline = Deadline.after(30)
    await server._runtime.wait_ready(deadline)
    await server._runtime.wait_leading(deadline)


@dataclass
class Site:
    """What a test drives."""

    settings: Settings
    stack: AsyncExitStack
    references: References = field(default_factory=References)
    key: str = ""
    app: RpcServer | None = None

    async def start(self) -> None:
        self.app = await build_releases(self.settings, references=self.references)
        await serving(self.app)

    async def stop(self) -> None:
        if self.app is not None:
            await self.app.stop()
            self.app = None

    async def public(self, service: str, key: str) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(self.settings.ca)
        options = (("grpc.ssl_target_name_override", "localhost"),)
        address = self.settings.address(service, "public")
        opened = grpc.aio.secure_channel(address, credentials, options=options, interceptors=[_Key(key)])
        return await self.stack.enter_async_context(opened)

    async def publisher(self, publisher: Publisher) -> Runtime[None]:
        config = RuntimeConfig(
            env=self.settings.env, partitions=self.settings.partitions, address=self.settings.artifacts_internal
        )
        log = KafkaLog(self.settings.kafka)
        self.stack.push_async_callback(log.close)
        runtime: Runtime[None] = Runtime(publisher, log, config)
        await runtime.start()
        self.stack.push_async_callback(runtime.stop)
        await runtime.wait_leading(Deadline.after(30))
        return runtime


class _Key(grpc.aio.UnaryUnaryClientInterceptor):
    """Puts the API key into every call."""

    def __init__(self, key: str) -> None:
        self._key = key

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", f"Bearer {self._key}"))
        return await continuation(details._replace(metadata=metadata, timeout=20), request)


async def say(neighbour: Runtime[None], resource: str, payload: Message) -> str:
    done = await neighbour.submit(Command("acme", Public(resource, payload)), Deadline.after(20))
    return str(done.token)


@asynccontextmanager
async def installed(kafka: KafkaEnv, folder: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        site = Site(settings_of(kafka, folder), stack)
        registry = await build_registry(site.settings)
        stack.push_async_callback(registry.stop)
        await serving(registry)
        platform, owner = secrets.token_hex(16), secrets.token_hex(16)
        site.key = f"gsw_acme_owner_{owner}"
        async with channel(site.settings, "registry", identity="registry") as opened:
            bootstrap = registry_pb2.BootstrapRequest(
                api_key_id="bootstrap", secret_sha256=hashlib.sha256(platform.encode()).digest()
            )
            await registry_pb2_grpc.RegistryInternalServiceStub(opened).Bootstrap(bootstrap, timeout=20)
        create = registry_pb2.CreateOrganizationRequest(
            organization_id="acme", owner_key_id="owner", owner_key_sha256=hashlib.sha256(owner.encode()).digest()
        )
        as_platform = await site.public("registry", f"gsw_platform_bootstrap_{platform}")
        await answer(registry_pb2_grpc.RegistryServiceStub(as_platform).CreateOrganization(create))
        stub = registry_pb2_grpc.RegistryServiceStub(await site.public("registry", site.key))
        await answer(
            stub.CreateProduct(
                registry_pb2.CreateProductRequest(
                    parent="organizations/acme",
                    product_id="thermostat",
                    product=registry_pb2.Product(display_name="T"),
                )
            )
        )
        await answer(
            stub.CreateCohort(
                registry_pb2.CreateCohortRequest(
                    parent=PRODUCT, cohort_id="canary", cohort=registry_pb2.Cohort(display_name="Canary")
                )
            )
        )
        stack.push_async_callback(site.stop)
        await site.start()
        yield site


@pytest.fixture
async def site(kafka_env: KafkaEnv, tmp_path: Path) -> AsyncIterator[Site]:
    async with installed(kafka_env, tmp_path / "local") as made:
        yield made


def wanted(release: str, bundle: str, **fields: Any) -> pb.CreateReleaseRequest:
    return pb.CreateReleaseRequest(
        parent=COHORT, release_id=release, release=pb.Release(bundle=bundle_of(bundle), **fields)
    )


async def test_graph_managed_releases_and_dry_runs_over_a_restart(site: Site) -> None:
    artifacts = await site.publisher(Publisher("artifacts", artifacts_events.BundleChanged))
    rollout = await site.publisher(Publisher("rollout", rollout_events.RolloutChanged))
    for index in range(3):
        image = bundle_image(f"b{index}", f"1.{index}.0")
        await say(artifacts, image.name, artifacts_events.BundleChanged(bundle=image))
    plan = rollout_image(rollout_pb2.Rollout.STATE_HALTED, True, False)
    heard = await say(rollout, ROLLOUT, rollout_events.RolloutChanged(rollout=plan))

    releases = releases_pb2_grpc.ReleasesServiceStub(await site.public("releases", site.key))
    request = wanted("r0", "b0", version="1.0.0", version_requirement="< 1.0.0")
    request.request_id = "6f2a41a8-6f1c-4c53-9a0e-0f4c3f5b0c11"
    first = await answer(releases.CreateRelease(request))
    assert await answer(releases.CreateRelease(request)) == first
    await answer(releases.CreateRelease(wanted("r1", "b1", version="1.1.0", version_requirement="< 1.1.0")))
    assert await refusal(releases.CreateRelease(wanted("r1", "b1"))) == "ALREADY_EXISTS"
    assert await refusal(releases.CreateRelease(wanted("x", "b1", version_requirement="newer"))) == "INVALID_FIELD"
    mask = FieldMask(paths=["next"])
    circle = pb.UpdateReleaseRequest(release=pb.Release(name=name_of("r1"), next=name_of("r0")), update_mask=mask)
    assert await refusal(releases.UpdateRelease(circle)) == "GRAPH_WOULD_BREAK"

    # A rollout's release, over the internal port.
    async with channel(site.settings, "releases", identity="rollout") as opened:
        internal = releases_pb2_grpc.ReleasesInternalServiceStub(opened)
        managed = pb.CreateManagedReleaseRequest(
            release=pb.Release(name=name_of("two"), bundle=bundle_of("b2"), version="2.0.0", rollout=ROLLOUT)
        )
        made = await answer(internal.CreateManagedRelease(managed, timeout=20))
        assert await answer(internal.CreateManagedRelease(managed, timeout=20)) == made
        steer = pb.RetractReleaseRequest(name=made.name, rollout=ROLLOUT)
        retracted = await answer(internal.RetractRelease(steer, timeout=20))
        assert (retracted.retracted, retracted.disabled) == (True, True)
        assert await answer(internal.RetractRelease(steer, timeout=20)) == retracted
    async with channel(site.settings, "releases", identity="gateway") as opened:
        stranger = releases_pb2_grpc.ReleasesInternalServiceStub(opened)
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await stranger.RetractRelease(steer, timeout=20)
        assert denied.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)

    # A device made in the registry a moment ago is resolved: its token goes along.
    registry = registry_pb2_grpc.RegistryServiceStub(await site.public("registry", site.key))
    call = registry.CreateDevice(
        registry_pb2.CreateDeviceRequest(
            parent=PRODUCT, device_id="SN-1", device=registry_pb2.Device(cohort=COHORT, target="board")
        )
    )
    device = await answer(call)
    token = dict(await call.trailing_metadata())["x-log-position"]
    ask = pb.ResolveDevicesRequest(parent=PRODUCT, devices=[device.name])
    after = (("x-read-after", token), ("x-read-after", heard))
    (found,) = (await answer(releases.ResolveDevices(ask, metadata=after))).resolutions
    assert [step.code for step in found.steps] == ["NOTHING_REPORTED", "STAGE_NOT_OPEN"]
    assert found.steps[-1].metadata["state"] == "HALTED"
    override = pb.CreateBundleOverrideRequest(
        parent=PRODUCT,
        bundle_override_id="lab",
        bundle_override=pb.BundleOverride(bundle=bundle_of("b2"), devices=[device.name]),
    )
    kept = await answer(releases.CreateBundleOverride(override))

    # Everything comes back from the log, and a dry run says the same.
    async def resolved() -> list[pb.Resolution]:
        return list((await answer(releases.ResolveDevices(ask, metadata=after))).resolutions)

    before = await resolved()
    assert [one.bundle_override for one in before[0].candidates] == [kept.name]
    listed = await answer(releases.ListReleases(pb.ListReleasesRequest(parent=COHORT)))
    assert {one.name: one.next for one in listed.releases} == {
        name_of("r0"): name_of("r1"),
        name_of("r1"): name_of("two"),
        name_of("two"): "",
    }
    await site.stop()
    await site.start()
    releases = releases_pb2_grpc.ReleasesServiceStub(await site.public("releases", site.key))

    async def listed_again() -> Any:
        try:
            return await releases.ListReleases(pb.ListReleasesRequest(parent=COHORT))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return None

    assert await eventually(listed_again) == listed
    assert await resolved() == before


async def test_public_records_are_complete_after_images(site: Site) -> None:
    graphs: list[releases_events.GraphChanged] = []

    def take(record: Foreign) -> None:
        if isinstance(record.payload, releases_events.GraphChanged):
            assert record.resource == COHORT
            graphs.append(record.payload)

    log = KafkaLog(site.settings.kafka)
    follower = PublicFollower(
        log,
        "releases",
        site.settings.partitions,
        take,
        env=site.settings.env,
        types=(releases_events.GraphChanged, releases_events.BundleOverrideChanged),
    )
    await follower.start()
    try:
        releases = releases_pb2_grpc.ReleasesServiceStub(await site.public("releases", site.key))
        # Two at once: one of them becomes the other's next, whichever came first.
        await asyncio.gather(*(answer(releases.CreateRelease(wanted(f"r{n}", f"b{n}"))) for n in range(2)))
        await answer(releases.DeleteRelease(pb.DeleteReleaseRequest(name=name_of("r0"))))

        async def all_there() -> bool:
            return len(graphs) == 3

        await eventually(all_there)
    finally:
        await follower.stop()
        await log.close()
    assert [graph.change for graph in graphs] == ["release.created", "release.created", "release.deleted"]
    assert [len(graph.releases) for graph in graphs] == [1, 2, 1]
    assert sum(1 for one in graphs[1].releases if not one.next) == 1
    assert graphs[2].releases[0].next == ""
    assert partition_of("acme", site.settings.partitions) < site.settings.partitions


async def test_a_reader_may_read_and_nothing_else(site: Site) -> None:
    registry = registry_pb2_grpc.RegistryServiceStub(await site.public("registry", site.key))
    secret = secrets.token_hex(16)
    await answer(
        registry.CreateApiKey(
            registry_pb2.CreateApiKeyRequest(
                parent="organizations/acme",
                api_key_id="reader",
                api_key=registry_pb2.ApiKey(
                    member="organizations/acme/members/owner",
                    scopes=["*.list", "*.get"],
                    secret_sha256=hashlib.sha256(secret.encode()).digest(),
                ),
            )
        )
    )
    reader = releases_pb2_grpc.ReleasesServiceStub(await site.public("releases", f"gsw_acme_reader_{secret}"))
    assert list((await answer(reader.ListReleases(pb.ListReleasesRequest(parent=COHORT)))).releases) == []
    assert await refusal(reader.CreateRelease(wanted("r0", "b0"))) == "PERMISSION_MISSING"
    foreign = COHORT.replace("acme", "beta")
    with pytest.raises(GroundswellError) as hidden:
        await answer(reader.ListReleases(pb.ListReleasesRequest(parent=foreign)))
    assert hidden.value.status == "NOT_FOUND"
