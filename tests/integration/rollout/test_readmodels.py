"""Last-seen and receipts in a real Redis: whatever bytes a receipt has, once for each record."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from groundswell.device.v1 import device_pb2
from redis.asyncio import Redis

from services.rollout.keys import seen_key
from services.rollout.observations import Observed
from services.rollout.seen import read
from services.rollout.worker.readmodels import MOST_DEVICES, ReadModels
from tests.ports import free_port


@pytest.fixture
async def redis(redis_url: str, env_prefix: str) -> AsyncIterator[Redis]:
    client: Redis = Redis.from_url(redis_url)
    yield client
    found = [key async for key in client.scan_iter(f"{env_prefix}:*", count=10_000)]
    if found:
        await client.delete(*found)
    await client.aclose()


def observed(position: int, *devices: tuple[str, bytes], seen_ms: int = 1_800_000_000_123) -> Observed:
    return Observed(position, None, seen_ms + position, devices)


async def stored(redis: Redis, env: str, device: str) -> tuple[int, bytes]:
    """When it was seen, and the bytes of its receipt."""
    value = await redis.get(seen_key(env, device))
    assert isinstance(value, bytes)
    return int(value[:13]), value[13:]


async def test_what_a_record_says_is_stored_as_it_is(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    odd = bytes(range(256))
    long = bytes(5000)
    await models.update(
        1, [observed(5, ("d/ü", odd), ("d/2", b"")), observed(6), observed(7, ("d/3", b"\xc4\xdd"), ("d/4", long))]
    )
    assert models.failures == 0
    assert await stored(redis, env_prefix, "d/ü") == (1_800_000_000_128, odd)
    assert await stored(redis, env_prefix, "d/2") == (1_800_000_000_128, b"")
    assert await stored(redis, env_prefix, "d/3") == (1_800_000_000_130, b"\xc4\xdd")
    assert await stored(redis, env_prefix, "d/4") == (1_800_000_000_130, long)
    assert await redis.ttl(seen_key(env_prefix, "d/2")) > 13 * 24 * 3600


async def test_what_is_delivered_again_changes_nothing_and_the_latest_counts(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    await models.update(1, [observed(5, ("d", b"five")), observed(6, ("d", b"six"))])
    assert (await stored(redis, env_prefix, "d"))[1] == b"six"
    await models.update(1, [observed(5, ("d", b"five"))])
    assert (await stored(redis, env_prefix, "d"))[1] == b"six"
    await models.update(2, [observed(1, ("e", b"other partition"))])
    assert (await stored(redis, env_prefix, "e"))[1] == b"other partition"


async def test_a_check_in_without_a_receipt_leaves_the_last_one(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    await models.update(1, [observed(5, ("d", b"five")), observed(6, ("d", b""))])
    await models.update(1, [observed(7, ("d", b""))])
    assert await stored(redis, env_prefix, "d") == (1_800_000_000_130, b"five")


async def test_what_is_read_back_is_judged(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    receipt = device_pb2.Receipt(answer="none", decided_at_ms=5)
    await models.update(1, [observed(5, ("d/1", receipt.SerializeToString()), ("d/2", b"\xff\xff"), ("d/3", b""))])
    found = [read(await redis.get(seen_key(env_prefix, f"d/{number}"))) for number in (1, 2, 3)]
    assert found == [(1_800_000_000_128, receipt), (1_800_000_000_128, None), (1_800_000_000_128, None)]
    assert [read(b""), read(b"x" * 20)] == [None, None]


async def test_many_devices_go_in_several_scripts(redis: Redis, env_prefix: str) -> None:
    models = ReadModels(redis, env_prefix)
    count = MOST_DEVICES * 2 + 300
    records = [observed(n, *((f"d{n * 100 + k}", b"r") for k in range(100))) for n in range(count // 100)]
    await models.update(3, records)
    assert models.failures == 0
    found = await redis.mget([seen_key(env_prefix, f"d{number}") for number in range(count)])
    assert {value[13:] for value in found} == {b"r"}


async def test_a_redis_that_is_away_is_counted_and_found_again(redis: Redis, redis_url: str, env_prefix: str) -> None:
    away: Redis = Redis(host="127.0.0.1", port=free_port(), socket_connect_timeout=0.5)
    models = ReadModels(away, env_prefix)
    await models.update(1, [observed(5, ("d", b"five"))])
    assert models.failures == 1
    models = ReadModels(redis, env_prefix)
    await models.update(1, [observed(5, ("d", b"five"))])
    killer: Redis = Redis.from_url(redis_url)
    await killer.client_kill_filter(_id=await redis.client_id())
    await killer.aclose()
    await models.update(1, [observed(6, ("d", b"six"))])
    await models.update(1, [observed(7, ("d", b"seven"))])
    assert await stored(redis, env_prefix, "d") == (1_800_000_000_130, b"seven")
    await away.aclose()
