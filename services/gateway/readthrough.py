"""Reading devices and certificates without holding them all: a bounded cache, Redis behind it, the owner behind that.

Rules (protocols.md section 3); each forbids an interleaving that would serve what the gateway already knows to be old:

* The followed public records rule the cache: a record replaces what is cached under its key, or drops it.
* A read is stored only if no record of its key came by since the read began; else what the record said counts.
* A value from Redis is read together with the position of its view, and counts only when that position has reached the
  last record of the key that was followed here. Redis behind, empty or away: the owner is asked, and its answer counts
  when the owner was at least as far as this gateway.
* When nobody can say, the request ends with UNAVAILABLE: the device tries later, and nothing is decided on a guess.

What is remembered of the last records is bounded: a key not among them counts as changed at the oldest one forgotten.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from libs.errors import UnavailableError

RECENT: Final = 4096
"""Changed keys remembered for each partition."""
MOST_QUESTIONS: Final = 64
"""Questions to the owner under way at a time; more are turned away, for it has others to answer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shelved(Generic[T]):
    """What the read model holds under a key, and the position it stands at. ``value`` None: there is no such thing."""

    value: T | None
    position: int


Shelf = Callable[[int, str], Awaitable[Shelved[T] | None]]
"""Reads (partition, key) from Redis; None when Redis says nothing that can be used."""
Owner = Callable[[int, str], Awaitable[T | None]]
"""Asks the service that owns the key, at least as new as what was followed; None when there is no such thing."""


@dataclass(slots=True)
class _Entry(Generic[T]):
    value: T
    position: int


class ReadThrough(Generic[T]):
    """One kind of thing, by key."""

    def __init__(
        self, what: str, partitions: int, capacity: int, shelf: Shelf[T], owner: Owner[T], recent: int = RECENT
    ) -> None:
        self._what = what
        self._capacity = capacity
        self._shelf = shelf
        self._owner = owner
        self._most_recent = recent
        self._cached: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._reads: dict[str, asyncio.Task[T | None]] = {}
        self._passed: set[str] = set()
        """Keys being read of which a record came by."""
        self._recent: list[OrderedDict[str, int]] = [OrderedDict() for _ in range(partitions)]
        self._floor = [-1] * partitions
        self._questions = asyncio.Semaphore(MOST_QUESTIONS)
        self.hits = self.shelf_reads = self.owner_reads = 0

    def __len__(self) -> int:
        return len(self._cached)

    def get(self, key: str) -> T | None:
        """What is cached: the whole cost of a known device's poll."""
        entry = self._cached.get(key)
        if entry is None:
            return None
        self._cached.move_to_end(key)
        self.hits += 1
        return entry.value

    def changed(self, partition: int, position: int, key: str, value: Callable[[], T] | None) -> None:
        """A followed record: its after-image, or None when it is not understood and nothing may be served.

        Most records are of things that are not cached, so the image is made only when it is wanted.
        """
        recent = self._recent[partition]
        recent[key] = position
        recent.move_to_end(key)
        if len(recent) > self._most_recent:
            self._floor[partition] = recent.popitem(last=False)[1]
        reading = key in self._reads
        if reading:
            self._passed.add(key)
        entry = self._cached.get(key)
        if value is None:
            self._cached.pop(key, None)
        elif entry is not None:
            if entry.position < position:
                self._cached[key] = _Entry(value(), position)
        elif reading:
            # Somebody waits for it: what they will read may be older than this.
            self._store(key, value(), position)

    async def fetch(self, partition: int, key: str) -> T | None:
        """The thing under a key, None when there is none. Raises UNAVAILABLE when nobody can say."""
        cached = self.get(key)
        if cached is not None:
            return cached
        reading = self._reads.get(key)
        if reading is None:
            reading = asyncio.create_task(self._read(partition, key))
            self._reads[key] = reading
            reading.add_done_callback(lambda _: self._ended(key))
        return await asyncio.shield(reading)

    def _ended(self, key: str) -> None:
        self._reads.pop(key, None)
        self._passed.discard(key)

    def changed_at(self, partition: int, key: str) -> int:
        """Position of the key's last record, as far as it is remembered: nothing older may be served."""
        return self._recent[partition].get(key, self._floor[partition])

    async def _read(self, partition: int, key: str) -> T | None:
        self.shelf_reads += 1
        found = await self._shelf(partition, key)
        if found is None or found.position < self.changed_at(partition, key):
            found = await self._ask(partition, key)
        if key in self._passed:
            # It has been cached meanwhile, or it is a record that nobody here understands.
            entry = self._cached.get(key)
            if entry is None:
                raise UnavailableError(
                    "VIEW_CHANGING", f"the {self._what} changed while it was read: try again", retry_after_s=1.0
                )
            return entry.value
        if found.value is not None:
            self._store(key, found.value, found.position)
        return found.value

    async def _ask(self, partition: int, key: str) -> Shelved[T]:
        if self._questions.locked():
            raise UnavailableError(
                "LOOKUP_BUSY", f"too many questions for a {self._what} are under way: try later", retry_after_s=2.0
            )
        async with self._questions:
            began = self.changed_at(partition, key)
            self.owner_reads += 1
            # The owner has read at least as far as we had when we asked.
            return Shelved(await self._owner(partition, key), began)

    def _store(self, key: str, value: T, position: int) -> None:
        self._cached[key] = _Entry(value, position)
        self._cached.move_to_end(key)
        while len(self._cached) > self._capacity:
            self._cached.popitem(last=False)
