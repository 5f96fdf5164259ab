"""Last-seen and receipts in a real Redis: whatever bytes a receipt has, once for each record."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from services.rollout.keys import last_seen_key, receipt_key
from services.rollout.observations import Observed, SeenDevice
from services.rollout.worker.readmodels import MOST_DEVICES, ReadModels


@pytest.fixture
async def redis(redis_url: str, env_prefix: str) -> AsyncIterator[Redis]:
    client: Redis = Redis.from_url(redis_url)
    yield client
    found = [key async for key in client.scan_iter(f"{env_prefix}:*", count=10_000)]
    if found:
        await client.delete(*found)
    await client.aclose()


def observed(position: int, *devices: tuple[str, bytes], seen_ms: int = 1_800_000_000_123) -> Observed:
    return Observed(position, None, tuple(SeenDevice(name, seen_ms + position, receipt) for name, receipt in devices))


async def test_what_a_record_says_is_stored_as_it_is(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    odd = bytes(range(256))
    await models.update(1, [observed(5, ("d/ü", odd), ("d/2", b"")), observed(6), observed(7, ("d/3", b"\xc4\xdd"))])
    assert models.failures == 0
    assert await redis.get(receipt_key(env_prefix, "d/ü")) == odd
    assert await redis.get(receipt_key(env_prefix, "d/2")) is None
    assert await redis.get(receipt_key(env_prefix, "d/3")) == b"\xc4\xdd"
    assert await redis.get(last_seen_key(env_prefix, "d/2")) == b"1800000000128"
    assert await redis.ttl(last_seen_key(env_prefix, "d/2")) > 13 * 24 * 3600


async def test_what_is_delivered_again_changes_nothing_and_the_latest_counts(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    await models.update(1, [observed(5, ("d", b"five")), observed(6, ("d", b"six"))])
    assert await redis.get(receipt_key(env_prefix, "d")) == b"six"
    await models.update(1, [observed(5, ("d", b"five"))])
    assert await redis.get(receipt_key(env_prefix, "d")) == b"six"
    await models.update(2, [observed(1, ("e", b"other partition"))])
    assert await redis.get(receipt_key(env_prefix, "e")) == b"other partition"


async def test_many_devices_go_in_several_scripts(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    count = MOST_DEVICES * 2 + 300
    records = [observed(n, *((f"d{n * 100 + k}", b"r") for k in range(100))) for n in range(count // 100)]
    await models.update(3, records)
    assert models.failures == 0
    found = await redis.mget([receipt_key(env_prefix, f"d{number}") for number in range(count)])
    assert set(found) == {b"r"}
