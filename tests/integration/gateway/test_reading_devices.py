"""Devices through Redis, on a real broker and a real Redis: filled by several, deleted, put back, taken away."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2, registry_pb2
from redis.asyncio import Redis

from libs.errors import UnavailableError
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
from libs.eventlog.config import public_topic
from libs.eventlog.follower import PublicFollower
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import TopicPartition
from services.gateway.directory import DeviceDirectory, DeviceEntry
from services.gateway.shelf import Shelves
from tests.conftest import KafkaEnv

PRODUCT = "organizations/acme/products/pump"


def device_name(number: int) -> str:
    return f"{PRODUCT}/devices/d{number}"


def device(number: int, target: str = "board-a") -> registry_pb2.Device:
    return registry_pb2.Device(
        name=device_name(number), uid=str(uuid.UUID(int=number + 1)), identifier=f"d{number}", target=target
    )


class Registry:
    """A service that publishes devices and nothing else."""

    service = "registry"
    event_types: Sequence[type[Message]] = (events_pb2.DeviceChanged,)
    sources: Mapping[str, Sequence[type[Message]]] = MappingProxyType({})

    def initial_state(self, partition: int) -> None:
        return None

    def decide(self, _state: None, command: object, _ctx: Context) -> Decision:
        assert isinstance(command, registry_pb2.Device)
        changed = events_pb2.DeviceChanged(device=command, change="device.updated")
        return Decision((NewEvent("acme", command.name, changed, (Public(command.name, changed),)),))

    def evolve(self, _state: None, _event: Event) -> None:
        return None


class Owner:
    """The registry's internal API: what it says, and whether it is there."""

    def __init__(self) -> None:
        self.devices: dict[str, registry_pb2.Device] = {}
        self.away = False
        self.calls = 0

    def __call__(self, request: registry_pb2.GetDeviceRequest, timeout: float) -> _Call:
        self.calls += 1
        return _Call(self, request.name)


class _Call:
    def __init__(self, owner: Owner, name: str) -> None:
        self._owner, self._name = owner, name

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> registry_pb2.Device:
        code = grpc.StatusCode.UNAVAILABLE if self._owner.away else grpc.StatusCode.NOT_FOUND
        if self._owner.away or self._name not in self._owner.devices:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())
        return self._owner.devices[self._name]

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        return grpc.aio.Metadata()


class Site:
    """A registry and gateways that read its devices."""

    def __init__(self, kafka: KafkaEnv, redis_url: str) -> None:
        self.kafka, self.redis_url = kafka, redis_url
        self.log = KafkaLog(kafka.bootstrap)
        self.redis: Redis = Redis.from_url(redis_url)
        self.owner = Owner()
        self.partition = partition_of("acme", kafka.partitions)
        self._registry: Runtime[None] = Runtime(
            Registry(), self.log, RuntimeConfig(env=kafka.env, partitions=kafka.partitions, address="test")
        )
        self._stops: list[Any] = []
        self.follower: PublicFollower

    async def start(self) -> None:
        await self._registry.start()
        await self._registry.wait_leading(Deadline.after(30))

    async def stop(self) -> None:
        for stop in reversed(self._stops):
            await stop()
        await self._registry.stop()
        keys = [key async for key in self.redis.scan_iter(f"{self.kafka.env}:*")]
        if keys:
            await self.redis.delete(*keys)
        await self.redis.aclose()
        await self.log.close()

    async def say(self, *devices: registry_pb2.Device) -> None:
        for one in devices:
            self.owner.devices[one.name] = one
        await asyncio.gather(*(self._registry.submit(Command("acme", one), Deadline.after(30)) for one in devices))

    async def gateway(self, redis_url: str = "") -> DeviceDirectory:
        redis: Redis = Redis.from_url(redis_url or self.redis_url, socket_timeout=1, socket_connect_timeout=1)
        kafka = self.kafka
        directory = DeviceDirectory(self.log, redis, kafka.env, kafka.partitions, 1000, self.owner, self.owner)

        def take(record: Any) -> None:
            directory.devices.changed(
                record.partition,
                record.position,
                record.resource,
                lambda: DeviceEntry.of(record.payload.device),
            )

        followers = {}
        for service in ("registry", "pki"):
            follower = PublicFollower(
                self.log, service, kafka.partitions, take, env=kafka.env, types=(events_pb2.DeviceChanged,)
            )
            await follower.start()
            self._stops.append(follower.stop)
            await follower.caught_up(Deadline.after(30))
            followers[service] = follower
        self.follower = followers["registry"]
        await directory.start(followers)
        self._stops.append(directory.stop)
        return directory

    async def hash_key(self) -> str:
        shelves = Shelves(self.redis, self.kafka.env, "registry")
        await eventually(lambda: bool(self.follower.token(self.partition).log_id))
        return shelves.key(self.partition, self.follower.token(self.partition).log_id)

    async def filled(self, count: int) -> None:
        """Until Redis holds so many devices and stands at the end of the log."""
        key = await self.hash_key()
        place = TopicPartition(public_topic(self.kafka.env, "registry"), self.partition)

        async def holds() -> bool:
            end = (await self.log.end_positions([place]))[place]
            at = await self.redis.hget(key, "@")
            # The last positions are markers: the view stands at the last record before them.
            return at is not None and int(at) >= end - 3 and await self.redis.hlen(key) == count + 1

        await eventually(holds)


async def eventually(holds: Any, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while True:
            value = holds()
            if await value if asyncio.iscoroutine(value) else value:
                return
            await asyncio.sleep(0.02)


@pytest.fixture
async def site(kafka_env: KafkaEnv, redis_url: str) -> AsyncIterator[Site]:
    made = Site(kafka_env, redis_url)
    await made.start()
    yield made
    await made.stop()


async def test_two_gateways_fill_one_view_and_read_it(site: Site) -> None:
    first, second = await site.gateway(), await site.gateway()
    await site.say(*(device(number) for number in range(200)))
    await site.say(device(7, "board-b"))
    await site.filled(200)
    for directory in (first, second):
        found = await directory.devices.fetch(site.partition, device_name(7))
        assert found is not None
        assert found.device == device(7, "board-b")
        assert found.facts.target == "board-b"
        assert await directory.devices.fetch(site.partition, device_name(999)) is None
    assert site.owner.calls == 0, "everything came from Redis"


async def test_redis_deleted_while_it_runs_is_filled_again_and_meanwhile_the_owner_is_asked(site: Site) -> None:
    directory = await site.gateway()
    await site.say(*(device(number) for number in range(50)))
    await site.filled(50)
    await site.redis.delete(await site.hash_key())
    found = await directory.devices.fetch(site.partition, device_name(3))
    assert found is not None
    await site.filled(50)
    assert directory.summary()["rewinds"] >= 1
    asked = site.owner.calls
    assert await directory.devices.fetch(site.partition, device_name(4)) is not None
    assert site.owner.calls == asked


async def test_redis_put_back_to_yesterday_is_not_believed_and_is_brought_up_to_date(site: Site) -> None:
    directory = await site.gateway()
    await site.say(*(device(number) for number in range(10)))
    await site.filled(10)
    key = await site.hash_key()
    yesterday = await site.redis.dump(key)
    await site.say(device(3, "board-b"), device(10))
    await site.filled(11)
    await site.redis.restore(key, 0, yesterday, replace=True)
    found = await directory.devices.fetch(site.partition, device_name(3))
    assert found is not None
    assert found.facts.target == "board-b"
    await site.filled(11)
    stored = await site.redis.hget(key, device_name(3))
    assert registry_pb2.Device.FromString(stored).target == "board-b"


async def test_without_redis_the_owner_answers_and_without_both_nothing_is_guessed(site: Site) -> None:
    directory = await site.gateway("redis://127.0.0.1:1/0")
    await site.say(device(1), device(2))
    found = await directory.devices.fetch(site.partition, device_name(1))
    assert found is not None
    site.owner.away = True
    with pytest.raises(UnavailableError, match="LOOKUP_UNAVAILABLE"):
        await directory.devices.fetch(site.partition, device_name(2))
    assert directory.devices.get(device_name(1)) is not None


async def test_a_change_reaches_a_gateway_that_has_the_device_cached(site: Site) -> None:
    directory = await site.gateway()
    await site.say(device(1))
    await site.filled(1)
    await directory.devices.fetch(site.partition, device_name(1))
    await site.say(device(1, "board-b"))

    def changed() -> bool:
        entry = directory.devices.get(device_name(1))
        return entry is not None and entry.facts.target == "board-b"

    await eventually(changed)
