"""The cache rules of protocols.md section 3: each forbidden interleaving, played out."""

from __future__ import annotations

import asyncio

import pytest

from libs.errors import UnavailableError
from services.gateway.readthrough import ReadThrough, Shelved


class Backing:
    """Redis and the owner, each answering when the test lets it."""

    def __init__(self) -> None:
        self.shelf: Shelved[str] | None = None
        self.owned: str | None = "from the owner"
        self.owner_is_away = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.reads = self.questions = 0

    async def read(self, partition: int, key: str) -> Shelved[str] | None:
        self.reads += 1
        found = self.shelf  # what Redis held when it was asked
        await self.gate.wait()
        return found

    async def ask(self, partition: int, key: str) -> str | None:
        self.questions += 1
        found = self.owned
        await self.gate.wait()
        if self.owner_is_away:
            raise UnavailableError("LOOKUP_UNAVAILABLE", "away")
        return found


@pytest.fixture
def backing() -> Backing:
    return Backing()


def cache_over(backing: Backing, capacity: int = 10, recent: int = 4) -> ReadThrough[str]:
    return ReadThrough("thing", 1, capacity, backing.read, backing.ask, recent=recent)


async def test_a_value_is_read_once_and_then_served_from_memory(backing: Backing) -> None:
    cache = cache_over(backing)
    backing.shelf = Shelved("one", 7)
    assert [await cache.fetch(0, "a") for _ in range(3)] == ["one"] * 3
    assert (backing.reads, backing.questions, cache.get("a")) == (1, 0, "one")


async def test_simultaneous_readers_share_one_read(backing: Backing) -> None:
    cache = cache_over(backing)
    backing.shelf = Shelved("one", 7)
    assert await asyncio.gather(*(cache.fetch(0, "a") for _ in range(50))) == ["one"] * 50
    assert backing.reads == 1


async def test_a_read_that_a_record_overtook_is_not_stored_and_not_served(backing: Backing) -> None:
    cache = cache_over(backing)
    backing.shelf = Shelved("old", 7)
    backing.gate.clear()
    reading = asyncio.create_task(cache.fetch(0, "a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cache.changed(0, 8, "a", lambda: "new")
    backing.gate.set()
    assert await reading == "new"
    assert cache.get("a") == "new"


async def test_a_read_overtaken_by_a_record_that_is_not_understood_ends_without_a_value(backing: Backing) -> None:
    cache = cache_over(backing)
    backing.shelf = Shelved("old", 7)
    backing.gate.clear()
    reading = asyncio.create_task(cache.fetch(0, "a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cache.changed(0, 8, "a", None)
    backing.gate.set()
    with pytest.raises(UnavailableError, match="VIEW_CHANGING"):
        await reading
    assert cache.get("a") is None


async def test_redis_behind_the_last_record_of_the_key_does_not_count(backing: Backing) -> None:
    cache = cache_over(backing)
    cache.changed(0, 8, "a", lambda: "new")
    backing.shelf, backing.owned = Shelved("old", 7), "new"
    assert await cache.fetch(0, "a") == "new"
    assert backing.questions == 1


async def test_redis_behind_but_beyond_the_last_record_of_the_key_counts(backing: Backing) -> None:
    cache = cache_over(backing)
    cache.changed(0, 8, "a", lambda: "one")
    cache.changed(0, 9, "b", lambda: "two")
    backing.shelf = Shelved("one", 8)
    assert await cache.fetch(0, "a") == "one"
    assert backing.questions == 0


async def test_a_key_that_is_no_longer_remembered_counts_as_changed_at_the_oldest_one_forgotten(
    backing: Backing,
) -> None:
    cache = cache_over(backing, recent=2)
    for position, key in ((8, "a"), (9, "b"), (10, "c"), (11, "d")):
        cache.changed(0, position, key, lambda: "x")
    assert cache.changed_at(0, "a") == 9
    backing.shelf = Shelved("old", 8)
    assert await cache.fetch(0, "a") == "from the owner"
    backing.shelf = Shelved("fresh", 9)
    assert await cache.fetch(0, "z") == "fresh"


async def test_a_record_replaces_what_is_cached_but_never_by_what_is_older(backing: Backing) -> None:
    cache = cache_over(backing)
    backing.shelf = Shelved("at nine", 9)
    await cache.fetch(0, "a")
    cache.changed(0, 8, "a", lambda: "at eight")
    assert cache.get("a") == "at nine"
    cache.changed(0, 10, "a", lambda: "at ten")
    assert cache.get("a") == "at ten"


async def test_without_redis_the_owner_is_asked_and_without_both_the_request_is_put_off(backing: Backing) -> None:
    cache = cache_over(backing)
    assert await cache.fetch(0, "a") == "from the owner"
    backing.owner_is_away = True
    with pytest.raises(UnavailableError, match="LOOKUP_UNAVAILABLE"):
        await cache.fetch(0, "b")
    assert cache.get("a") == "from the owner", "what is cached is still served"


async def test_what_does_not_exist_is_not_cached(backing: Backing) -> None:
    cache = cache_over(backing)
    backing.shelf = Shelved(None, 7)
    assert await cache.fetch(0, "a") is None
    backing.shelf = Shelved("born", 8)
    assert await cache.fetch(0, "a") == "born"


async def test_memory_is_bounded_and_the_least_used_goes_first(backing: Backing) -> None:
    cache = cache_over(backing, capacity=3)
    backing.shelf = Shelved("x", 7)
    for key in ("a", "b", "c"):
        await cache.fetch(0, key)
    cache.get("a")
    await cache.fetch(0, "d")
    assert len(cache) == 3
    assert [cache.get(key) for key in ("a", "b", "c", "d")] == ["x", None, "x", "x"]


async def test_questions_to_the_owner_are_bounded(backing: Backing) -> None:
    cache = cache_over(backing)
    backing.gate.clear()
    reads = [asyncio.create_task(cache.fetch(0, f"k{number}")) for number in range(200)]
    await asyncio.sleep(0)
    backing.gate.set()
    done = await asyncio.gather(*reads, return_exceptions=True)
    refused = [one for one in done if isinstance(one, UnavailableError)]
    assert {one.reason for one in refused} <= {"LOOKUP_BUSY"}
    assert backing.questions + len(refused) == 200
