"""Records of check-ins: what goes together, in which order, and what happens when Kafka takes nothing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.device.v1 import device_pb2

from libs.checkins import MAX_BYTES, CheckInSigner
from libs.eventlog import partition_of
from services.gateway import publisher as module
from services.gateway.publisher import MAX_ITEMS, CheckInPublisher

GATEWAY = "organizations/platform/gateways/g"


class Kafka:
    """Takes records in order, acknowledges when the test lets it."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes, dict[str, bytes]]] = []
        self.lets = asyncio.Event()
        self.lets.set()

    async def post(
        self, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]
    ) -> Awaitable[object]:
        self.records.append((partition, value, dict(headers)))
        return asyncio.ensure_future(self.lets.wait())

    @property
    def batches(self) -> list[device_pb2.CheckInBatch]:
        return [device_pb2.CheckInBatch.FromString(value) for _, value, _ in self.records]


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


def publisher_over(kafka: Kafka) -> tuple[CheckInPublisher, list[float]]:
    signer = CheckInSigner(Ed25519PrivateKey.generate(), GATEWAY, str(uuid.uuid4()), "t")
    clock = [100.0]
    return CheckInPublisher(kafka, lambda: signer, GATEWAY, 4, lambda: clock[0]), clock


def item(number: int, size: int = 0) -> bytes:
    made = device_pb2.CheckInItem(device=f"organizations/acme/products/p/devices/d{number}", counter=number + 1)
    made.attributes["x"] = "x" * size
    return made.SerializeToString()


async def test_items_of_a_moment_are_one_record_in_the_order_they_came(kafka: Kafka) -> None:
    publisher, _ = publisher_over(kafka)
    batches = [publisher.enqueue("acme", item(number)) for number in range(100)]
    assert all(batch is batches[0] for batch in batches)
    assert batches[0] is not None
    assert await publisher.confirm(batches[0], bool)
    (batch,) = kafka.batches
    assert (batch.gateway, batch.organization, batch.heartbeat) == (GATEWAY, "acme", False)
    assert [one.counter for one in batch.items] == list(range(1, 101))


async def test_a_record_has_one_organization_and_no_more_than_the_contract_allows(kafka: Kafka) -> None:
    publisher, _ = publisher_over(kafka)
    for number in range(1300):
        publisher.enqueue("acme", item(number))
    publisher.enqueue("umbrella", item(0))
    for number in range(40):
        publisher.enqueue("large", item(number, 15_000))
    await publisher.drain()
    for partition, value, _ in kafka.records:
        batch = device_pb2.CheckInBatch.FromString(value)
        assert partition == partition_of(batch.organization, 4)
        assert len(batch.items) <= MAX_ITEMS
        assert len(value) <= MAX_BYTES
    sizes = [len(batch.items) for batch in kafka.batches if batch.organization == "acme"]
    assert sizes == [500, 500, 300]
    assert sum(len(batch.items) for batch in kafka.batches if batch.organization == "large") == 40


async def test_records_under_way_are_signed_in_the_order_they_are_handed_over(kafka: Kafka) -> None:
    publisher, _ = publisher_over(kafka)
    kafka.lets.clear()
    for number in range(1500):
        publisher.enqueue("acme", item(number))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [headers["sequence"] for _, _, headers in kafka.records] == [b"1", b"2"]
    kafka.lets.set()
    await publisher.drain()
    assert [headers["sequence"] for _, _, headers in kafka.records] == [b"1", b"2", b"3"]


async def test_silence_of_two_seconds_says_that_nothing_is_taken_until_it_ends(kafka: Kafka) -> None:
    publisher, clock = publisher_over(kafka)
    home, other = partition_of("acme", 4), (partition_of("acme", 4) + 1) % 4
    kafka.lets.clear()
    publisher.enqueue("acme", item(1))
    draining = asyncio.create_task(publisher.drain())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert publisher.takes(home)
    clock[0] += 2.0
    assert not publisher.takes(home)
    assert publisher.takes(other)
    kafka.lets.set()
    await draining
    assert publisher.takes(home)


async def test_what_waits_for_kafka_is_bounded_and_the_rest_is_dropped_aloud(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 400_000)
    publisher, _ = publisher_over(kafka)
    kafka.lets.clear()
    taken = 0
    for number in range(200):
        taken += publisher.enqueue("acme", item(number, 15_000)) is not None
        await asyncio.sleep(0)
    assert 0 < taken < 200
    assert publisher.dropped == 200 - taken
    assert not publisher.takes(partition_of("acme", 4))
    kafka.lets.set()
    await publisher.drain()
    assert sum(len(batch.items) for batch in kafka.batches) == taken


async def test_an_unknown_outcome_confirms_nothing(kafka: Kafka) -> None:
    publisher, _ = publisher_over(kafka)

    async def lost(*_: object) -> Awaitable[object]:
        raise ConnectionError("gone")

    kafka.post = lost  # type: ignore[method-assign]
    batch = publisher.enqueue("acme", item(1))
    assert batch is not None
    assert not await publisher.confirm(batch, bool)
    assert publisher.failures == 1
    assert publisher.takes(partition_of("acme", 4)), "it may be tried again at once"
