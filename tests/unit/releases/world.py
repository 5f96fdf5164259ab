"""The releases service as it runs, on the log in memory, with references that know what they are told."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from libs.errors import DomainError, NotFoundError
from libs.eventlog import (
    Command,
    Context,
    Deadline,
    Decision,
    Event,
    Foreign,
    NewEvent,
    Public,
    Runtime,
    RuntimeConfig,
)
from libs.eventlog.memory import MemoryLog
from libs.rpc.identity import Principal, set_caller
from services.releases.domain import Graph, Releases, State
from services.releases.service import ReleasesInternalServicer, ReleasesServicer

PRODUCT = "organizations/acme/products/thermostat"
COHORT = f"{PRODUCT}/cohorts/canary"
ROLLOUT = f"{PRODUCT}/rollouts/two"
NOW = 1_700_000_000_000

T = TypeVar("T")


def name_of(release: str) -> str:
    return f"{COHORT}/releases/{release}"


def bundle_of(bundle: str) -> str:
    return f"{PRODUCT}/bundles/{bundle}"


async def refusal(call: Awaitable[Any]) -> str:
    with pytest.raises(DomainError) as refused:
        await call
    assert refused.value.message
    return refused.value.reason


@dataclass
class Inputs:
    """Context of one decision."""

    now_ms: int = NOW
    organization: str = "acme"
    principal: str = "test"

    def new_uuid(self, purpose: str = "") -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, purpose))

    def version(self, resource: str) -> int:
        return 0

    def parked(self, resource: str) -> bool:
        return False


@dataclass
class Fold:
    """Decide and evolve by hand."""

    state: State = field(default_factory=State)
    inputs: Inputs = field(default_factory=Inputs)
    domain: Releases = field(default_factory=Releases)

    def do(self, command: object) -> Decision:
        decision = self.domain.decide(self.state, command, self.inputs)
        for event in decision.events:
            image = Event("acme", event.resource, 1, event.payload, self.inputs.now_ms, "test")
            self.state = self.domain.evolve(self.state, image)
        return decision

    def hear(self, service: str, resource: str, payload: Message) -> Decision:
        topic = f"dev.{service}.public.v1"
        return self.do(Foreign(service, topic, 0, 0, 1, "acme", resource, payload, self.inputs.now_ms))

    def refused(self, command: object) -> str:
        before = self.state
        with pytest.raises(DomainError) as refused:
            self.do(command)
        assert self.state is before
        return refused.value.reason

    @property
    def graph(self) -> dict[str, pb.Release]:
        return {name.rpartition("/")[2]: one for name, one in self.state.graphs.get(COHORT, Graph()).items()}


def links(graph: dict[str, pb.Release]) -> dict[str, str]:
    """Who leads to whom."""
    return {name: one.next.rpartition("/")[2] for name, one in graph.items()}


class References:
    """Products, cohorts and bundles that exist."""

    def __init__(self) -> None:
        self.cohorts = {COHORT}
        self.products = {PRODUCT}
        self.devices = {f"{PRODUCT}/devices/{serial}" for serial in ("a", "b", "c")}
        self.bundles: dict[str, artifacts_pb2.Bundle] = {
            bundle_of(f"b{n}"): bundle_image(f"b{n}", f"1.{n}.0") for n in range(5)
        }

    async def check_cohort(self, name: str) -> None:
        self._check(name, self.cohorts)

    async def check_product(self, name: str) -> None:
        self._check(name, self.products)

    async def check_device(self, name: str) -> None:
        self._check(name, self.devices)

    async def bundle(self, name: str) -> artifacts_pb2.Bundle:
        self._check(name, set(self.bundles))
        return self.bundles[name]

    def _check(self, name: str, known: set[str]) -> None:
        if name not in known:
            raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)


def bundle_image(
    bundle: str, version: str, *, offerable: bool = True, security_version: int = 0
) -> artifacts_pb2.Bundle:
    return artifacts_pb2.Bundle(
        name=bundle_of(bundle),
        version=version,
        security_version=security_version,
        entries=[artifacts_pb2.BundleEntry(target="board", metadata='{"a":1}')],
        offerable=offerable,
        not_offerable_reason="" if offerable else "SIGNATURES_MISSING",
    )


def device_image(serial: str, **reported: Any) -> registry_pb2.Device:
    name = f"{PRODUCT}/devices/{serial}"
    return registry_pb2.Device(
        name=name,
        uid=str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        cohort=COHORT,
        target="board",
        state=registry_pb2.Device.STATE_ACTIVE,
        reported=registry_pb2.ReportedState(**reported),
    )


class Publisher:
    """A neighbour that only publishes."""

    sources: Mapping[str, Sequence[type[Message]]] = MappingProxyType({})

    def __init__(self, service: str, *types: type[Message]) -> None:
        self.service = service
        self.event_types: Sequence[type[Message]] = types

    def initial_state(self, partition: int) -> None:
        return None

    def decide(self, _state: None, command: object, ctx: Context) -> Decision:
        assert isinstance(command, Public)
        return Decision((NewEvent(ctx.organization, command.resource, command.payload, (command,)),))

    def evolve(self, _state: None, _event: Event) -> None:
        return None


def publishers() -> list[Publisher]:
    return [
        Publisher("registry", registry_events.DeviceChanged, registry_events.CohortChanged),
        Publisher("artifacts", artifacts_events.BundleChanged),
        Publisher("rollout", rollout_events.RolloutChanged, rollout_events.AttemptChanged),
    ]


@dataclass
class World:
    """The service's two servicers over a running runtime, and its neighbours."""

    runtime: Runtime[State]
    neighbours: dict[str, Runtime[None]]
    references: References = field(default_factory=References)
    context: Any = field(default_factory=lambda: SimpleNamespace(time_remaining=lambda: 10.0))

    def __post_init__(self) -> None:
        self.public = ReleasesServicer(self.runtime, self.references)
        self.internal = ReleasesInternalServicer(self.runtime, self.references)
        set_caller(Principal("organizations/acme/apiKeys/ci", "api_key", "acme", role="owner", scopes=("*",)))

    async def create(self, release: str, bundle: str = "b0", previous: str = "", **fields: Any) -> pb.Release:
        request = pb.CreateReleaseRequest(
            parent=COHORT, release_id=release, release=pb.Release(bundle=bundle_of(bundle), **fields), previous=previous
        )
        return await self.public.CreateRelease(request, self.context)

    async def managed(self, release: str, *, validate_only: bool = False, **fields: Any) -> pb.Release:
        image = pb.Release(**{"name": name_of(release), "bundle": bundle_of("b1"), "rollout": ROLLOUT} | fields)
        request = pb.CreateManagedReleaseRequest(release=image, validate_only=validate_only)
        return await self.internal.CreateManagedRelease(request, self.context)

    async def hear(self, service: str, resource: str, payload: Message) -> None:
        """A neighbour says something, and this service has taken it in."""
        said = await self.neighbours[service].submit(Command("acme", Public(resource, payload)), Deadline.after(10))
        await self.runtime.wait_for([said.token], Deadline.after(10))

    async def resolve(self, *serials: str) -> list[pb.Resolution]:
        devices = [f"{PRODUCT}/devices/{serial}" for serial in serials]
        request = pb.ResolveDevicesRequest(parent=PRODUCT, devices=devices)
        answer = await self.public.ResolveDevices(request, self.context)
        return list(answer.resolutions)


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    log = MemoryLog(partitions=1)
    config = RuntimeConfig(env="dev", partitions=1, address="127.0.0.1:1", verify_folds=True)
    runtime: Runtime[State] = Runtime(Releases(), log, config)
    neighbours = {one.service: Runtime[None](one, log, config) for one in publishers()}
    everybody: tuple[Runtime[Any], ...] = (runtime, *neighbours.values())
    try:
        for one in everybody:
            await one.start()
        for one in everybody:
            await one.wait_ready(Deadline.after(10))
            await one.wait_leading(Deadline.after(10))
        yield World(runtime, neighbours)
    finally:
        for one in everybody:
            await one.stop()


def rollout_image(state: int, *opened: bool) -> rollout_pb2.Rollout:
    """A rollout of 2.0.0 through canary of another name, then this cohort."""
    cohorts = (f"{PRODUCT}/cohorts/first", COHORT)
    statuses = [
        rollout_pb2.StageStatus(
            state=rollout_pb2.StageStatus.STATE_OPEN if open_ else rollout_pb2.StageStatus.STATE_PENDING
        )
        for open_ in opened
    ]
    return rollout_pb2.Rollout(
        name=ROLLOUT,
        version="2.0.0",
        state=state,  # type: ignore[arg-type]
        stages=[rollout_pb2.Stage(display_name=cohort.rpartition("/")[2], cohort=cohort) for cohort in cohorts],
        stage_statuses=statuses,
    )
