"""A fleet around a real rollout leader on real Kafka: what the benchmarks of rollouts share.

The services around it only publish: their facts reach the leader by their public topics and its Inbox, as in an
installation. Tasks of the leader run the service's own handlers; the release they ask for is published by the feeder.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from aiokafka import AIOKafkaProducer
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import rollout_pb2

from deploy.topics import ensure_topics
from libs.eventlog import (
    Command,
    Context,
    Deadline,
    Decision,
    Event,
    NewEvent,
    Public,
    Runtime,
    RuntimeConfig,
    partition_of,
)
from libs.eventlog.config import events_topic, public_topic
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import Record, TopicPartition
from services.rollout.domain import ClaimOffers, RecordObservations, RolloutDomain, State
from services.rollout.keys import routing_key
from services.rollout.tasks import handlers

PARTITIONS = 4
ORGANIZATION = "bench"
HOME = partition_of(ORGANIZATION, PARTITIONS)
PRODUCT = f"organizations/{ORGANIZATION}/products/p"
GATEWAY = "organizations/platform/gateways/g1"
BATCH = 500
FEEDS: Mapping[str, tuple[type[Message], ...]] = {
    "registry": (registry_events.ProductChanged, registry_events.DeviceChanged),
    "artifacts": (artifacts_events.BundleChanged,),
    "releases": (releases_events.GraphChanged,),
}


@dataclass(frozen=True, slots=True)
class Say:
    resource: str
    payload: Message


class Feeder:
    """A service that only publishes."""

    sources: Mapping[str, Sequence[type[Message]]] = MappingProxyType({})

    def __init__(self, service: str) -> None:
        self.service = service
        self.event_types = FEEDS[service]

    def initial_state(self, partition: int) -> None:
        del partition

    def decide(self, _state: None, command: object, ctx: Context) -> Decision:
        assert isinstance(command, Say)
        payload = command.payload
        return Decision((NewEvent(ctx.organization, command.resource, payload, (Public(command.resource, payload),)),))

    def evolve(self, _state: None, _event: Event) -> None:
        return None


def cohort(index: int) -> str:
    return f"{PRODUCT}/cohorts/c{index}"


class Fleet:
    """One organization; ``devices[c]`` are the check-ins of cohort ``c``, kept as agents would."""

    def __init__(self, kafka: str) -> None:
        self.kafka = kafka
        self.env = f"bench{secrets.token_hex(4)}"
        self.config = RuntimeConfig(env=self.env, partitions=PARTITIONS, address="bench")
        self.logs: list[KafkaLog] = []
        self.feeders = {name: Runtime(Feeder(name), self._log(), self.config) for name in FEEDS}
        self.rollout: Runtime[State] = Runtime(RolloutDomain(), self._log(), self.config, handlers(self))  # type: ignore[arg-type]
        self.devices: list[list[device_pb2.CheckInItem]] = []
        self.graphs: dict[str, dict[str, releases_pb2.Release]] = {}
        self._position = 0
        self._key = routing_key(HOME, PARTITIONS)

    def _log(self) -> KafkaLog:
        self.logs.append(KafkaLog(self.kafka))
        return self.logs[-1]

    async def __aenter__(self) -> Self:
        await ensure_topics(self.kafka, self.env, PARTITIONS)
        for runtime in (*self.feeders.values(), self.rollout):
            await runtime.start()
        for runtime in (*self.feeders.values(), self.rollout):
            await runtime.wait_leading(Deadline.after(90))
        product = registry_pb2.Product(name=PRODUCT)
        product.policy.poll_interval.FromSeconds(3600)
        await self.say("registry", PRODUCT, registry_events.ProductChanged(product=product))
        return self

    async def __aexit__(self, *_: object) -> None:
        for runtime in (self.rollout, *self.feeders.values()):
            await runtime.stop()
        for log in self.logs:
            await log.close()

    async def say(self, service: str, resource: str, payload: Message) -> None:
        await self.feeders[service].submit(Command(ORGANIZATION, Say(resource, payload)), Deadline.after(120))

    @property
    def state(self) -> State:
        state: State = self.rollout.snapshot(ORGANIZATION).state
        return state

    async def until(self, holds: Callable[[State], Any], limit_s: float = 120.0) -> None:
        """Wait for the leader's own committed state, change by change."""
        deadline = Deadline.after(limit_s)
        while not holds(self.state):
            await self.rollout.changed(ORGANIZATION, deadline)

    # Facts.

    async def furnish(self, cohorts: int, each: int) -> None:
        """Devices in cohorts, known to the leader."""
        says = []
        for index in range(cohorts):
            items = []
            for number in range(each):
                name = f"{PRODUCT}/devices/{index}-{number:05}"
                uid = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
                image = registry_pb2.Device(
                    name=name, uid=uid, cohort=cohort(index), target="t", state=registry_pb2.Device.STATE_ACTIVE
                )
                says.append(self.say("registry", name, registry_events.DeviceChanged(device=image)))
                item = device_pb2.CheckInItem(device=name, device_uid=uid, instance="i")
                item.running.version = "1.0.0"
                item.receipt.steps.add(code="CANDIDATE", message="may be offered", subject=cohort(index))
                items.append(item)
            self.devices.append(items)
        await asyncio.gather(*says)
        await self.until(lambda state: len(state.devices) == cohorts * each)

    async def bundle(self, version: str) -> artifacts_pb2.Bundle:
        bundle = artifacts_pb2.Bundle(name=f"{PRODUCT}/bundles/{version}", version=version, offerable=True)
        bundle.entries.add(target="t", sha256="ab" * 32, size=3)
        await self.say("artifacts", bundle.name, artifacts_events.BundleChanged(bundle=bundle, blob_keys=["k"]))
        await self.until(lambda state: bundle.name in state.bundles)
        return bundle

    # What the leader's tasks ask of releases.

    async def CreateManagedRelease(  # noqa: N802 - gRPC's name
        self, request: releases_pb2.CreateManagedReleaseRequest
    ) -> releases_pb2.Release:
        release = request.release
        name = release.name.partition("/releases/")[0]
        graph = self.graphs.setdefault(name, {})
        graph.setdefault(release.name, release)
        await self.say("releases", name, releases_events.GraphChanged(cohort=name, releases=graph.values()))
        return release

    async def ReleaseManagement(  # noqa: N802 - gRPC's name
        self, request: releases_pb2.RetractReleaseRequest
    ) -> releases_pb2.Release:
        return self.graphs[request.name.partition("/releases/")[0]][request.name]

    RetractRelease = DisableManagedRelease = ReleaseManagement

    # Devices.

    def check_in(self, item: device_pb2.CheckInItem, *states: int, attempt: str = "") -> device_pb2.CheckInItem:
        """The device's next check-in, with reports."""
        item.ClearField("reports")
        for state in states:
            item.counter += 1
            item.reports.add(counter=item.counter, attempt=attempt, state=state)  # type: ignore[arg-type]
        item.counter += 1
        item.attempt = attempt
        item.body_sha256 = item.counter.to_bytes(32, "big")
        return item

    def claims(self, items: Sequence[device_pb2.CheckInItem], release: str) -> rollout_pb2.ClaimOffersRequest:
        """One coalesced call of a gateway."""
        request = rollout_pb2.ClaimOffersRequest(organization=ORGANIZATION, gateway=GATEWAY)
        for item in items:
            claim = request.items.add(device=item.device, device_uid=item.device_uid, check_in=item)
            if release:
                claim.candidates.add(release=release)
        return request

    async def submit(self, payload: object, organization: str = ORGANIZATION) -> Any:
        return (await self.rollout.submit(Command(organization, payload), Deadline.after(120))).result

    async def claim(self, request: rollout_pb2.ClaimOffersRequest) -> rollout_pb2.ClaimOffersResponse:
        answer: rollout_pb2.ClaimOffersResponse = await self.submit(ClaimOffers(request))
        return answer

    async def beat(self, seconds: int) -> None:
        """Heartbeats, delivered as the worker does: stream time goes on."""
        now = max(self.state.append_ms, time.time_ns() // 1_000_000)
        records = [
            rollout_pb2.ObservedRecord(
                position=self._position + number, append_time_ms=now + number * 1000, gateway=GATEWAY, heartbeat=True
            )
            for number in range(1, seconds + 1)
        ]
        self._position += seconds
        request = rollout_pb2.RecordObservationsRequest(
            source_partition=HOME, records=records, through_position=self._position
        )
        await self.submit(RecordObservations(request, self._key), self._key)


class Bare:
    """The same bytes by a bare transactional producer, into topics of another service."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._log = KafkaLog(fleet.kafka)
        self._producer = AIOKafkaProducer(
            bootstrap_servers=fleet.kafka, transactional_id=f"{fleet.env}.raw", max_batch_size=900_000
        )
        self._places = [TopicPartition(topic(fleet.env, "rollout"), HOME) for topic in (events_topic, public_topic)]

    async def start(self) -> None:
        await self._producer.start()

    async def stop(self) -> None:
        await self._producer.stop()
        await self._log.close()

    async def here(self) -> dict[TopicPartition, int]:
        return dict(await self._log.end_positions(self._places))

    async def read_since(self, start: dict[TopicPartition, int]) -> list[list[Record]]:
        """What the leader wrote."""
        ends = await self._log.end_positions(start)
        tail = await self._log.open_tail(start)
        found: dict[str, list[Record]] = {place.topic: [] for place in start}
        while any(tail.position(place) < ends[place] for place in start):
            for record in await tail.fetch(1.0):
                found[record.topic].append(record)
        await tail.close()
        return [found[place.topic] for place in self._places]

    async def produce(self, written: list[list[Record]]) -> float:
        """Seconds that it took."""
        topics = [topic(self._fleet.env, "pki") for topic in (events_topic, public_topic)]
        began = time.perf_counter()
        for first in range(0, len(written[0]), BATCH):
            await self._producer.begin_transaction()
            for topic, records in zip(topics, written, strict=True):
                for record in records[first : first + BATCH]:
                    await self._producer.send(
                        topic, record.value, record.key, record.partition, headers=list(record.headers)
                    )
            await self._producer.commit_transaction()
        return time.perf_counter() - began
