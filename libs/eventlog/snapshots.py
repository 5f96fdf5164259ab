"""Snapshots: a partition's fold, stored so that the next start need not read the log from its beginning.

A snapshot is a cache and nothing rests on it: delete all of them and everything comes back from the log. Each names its
position, its schema and the event at that position, and ends with its SHA-256. A loader takes the newest that is whole,
of its own schema and *of this log* (the log holds that very event at that position), else the one before, else it
replays from 0. One that lies beyond the end of the log is refused, as a read-after token would be with LOG_RESET.

The schema is the domain's ``snapshot_schema`` number (1 when it names none) and a fingerprint of the state's types: a
changed field makes old snapshots void by itself; the number is for an ``evolve`` that folds the same events
differently. Snapshots are never upcast.

Only leaders write them, every so many records or minutes, one partition at a time, in short slices of the event loop;
compressing, hashing and sending happen beside it.
Names: ``snapshots/<env>.<service>/<partition>/<offset>.<schema>.bin``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from collections.abc import Iterator
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from libs.eventlog.codec import read_envelope
from libs.eventlog.config import RuntimeConfig
from libs.eventlog.deadline import monotonic
from libs.eventlog.freeze import Codec, FreezeError, reachable
from libs.eventlog.model import Task, Timer
from libs.eventlog.ports import EventLog, SnapshotStore, TopicPartition
from libs.eventlog.replica import Replica
from libs.eventlog.state import Claim, Parked, RequestEntry, Schema, Watermark

logger = logging.getLogger(__name__)

S = TypeVar("S")

KEPT: Final = 2
"""Of the own schema, and of all others together."""
LEAST_MOVED: Final = 100
"""Records that must have come before time alone makes a snapshot."""
SLICE_S: Final = 0.001
"""Longest work on a snapshot before everything else gets a turn …"""
PAUSE_S: Final = 0.002
"""… for this long."""
CHECK_S: Final = 1.0
RETRY_S: Final = 60.0
LOAD_S: Final = 120.0
"""A store that is slower than this is left alone: the log is there."""
_MAGIC: Final = b"GSNAP1\n"
_DIGEST: Final = hashlib.sha256().digest_size
_RUNTIME_TYPES: Final = (Claim, Parked, RequestEntry, Task, Timer, Watermark)


class SnapshotRefusedError(Exception):
    """This snapshot is not to be used; the text begins with a reason."""


class _Header(msgspec.Struct, frozen=True):
    service: str
    partition: int
    schema: str
    position: int
    event_id: str
    """Of the record at the position: proof that it is this log's."""


class Stored(NamedTuple):
    """A snapshot's name, taken apart."""

    position: int
    schema: str
    name: str


def stored(name: str) -> Stored | None:
    """The parts of a name; None when it is none of ours."""
    position, _, rest = name.rpartition("/")[2].partition(".")
    schema, _, kind = rest.partition(".")
    return Stored(int(position), schema, name) if position.isdigit() and schema and kind == "bin" else None


class Snapshots(Generic[S]):
    """Loads and keeps the snapshots of one service's partitions."""

    def __init__(self, schema: Schema[S], service: str, config: RuntimeConfig, store: SnapshotStore) -> None:
        domain = schema.domain
        types = reachable(type(domain.initial_state(0)), *getattr(domain, "snapshot_types", ()), *_RUNTIME_TYPES)
        self._codec = Codec(types)
        self.schema = f"{getattr(domain, 'snapshot_schema', 1)}-{self._codec.fingerprint}"
        self._service = service
        self._config = config
        self._store = store
        self._one_at_a_time = asyncio.Lock()
        self.loaded: dict[int, int] = {}
        """Partition → position of the snapshot that it began with."""

    def _folder(self, partition: int) -> str:
        return f"snapshots/{self._config.env}.{self._service}/{partition}/"

    async def _list(self, partition: int) -> list[Stored]:
        """Newest first."""
        names = await self._store.names(self._folder(partition))
        return sorted((found for name in names if (found := stored(name))), reverse=True)

    # Loading.

    async def load(self, replica: Replica[S], log: EventLog, place: TopicPartition, end: int) -> None:
        """Put the newest usable snapshot under a replica that has read nothing yet. Never fails."""
        try:
            async with asyncio.timeout(LOAD_S):
                for found in await self._list(replica.partition):
                    if found.schema != self.schema:
                        continue
                    try:
                        await self._load_one(replica, log, place, end, found)
                    except SnapshotRefusedError as error:
                        logger.error("snapshot %s is not used: %s", found.name, error)  # noqa: TRY400
                        continue
                    self.loaded[replica.partition] = found.position
                    logger.info("%s/%d begins with snapshot %s", self._service, replica.partition, found.name)
                    return
        except Exception as error:  # noqa: BLE001 - a cache must not stop a start: the log is there
            logger.warning("snapshots of %s/%d cannot be read: %r", self._service, replica.partition, error)

    async def _load_one(
        self, replica: Replica[S], log: EventLog, place: TopicPartition, end: int, found: Stored
    ) -> None:
        if found.position >= end:
            raise SnapshotRefusedError(
                f"LOG_RESET: it was taken at {found.position}, but the log ends at {end}: it is of another log"
            )
        data = await self._store.read(found.name)
        header, body = await asyncio.to_thread(_opened, data)
        if (header.service, header.partition, header.position) != (self._service, place.partition, found.position):
            raise SnapshotRefusedError("SNAPSHOT_CORRUPT: it is not what its name says")
        if header.schema != self.schema:
            raise SnapshotRefusedError("SNAPSHOT_CORRUPT: its schema is not the one in its name")
        if await _event_at(log, place, found.position) != header.event_id:
            raise SnapshotRefusedError("LOG_RESET: the log holds another event at its position")
        values: list[Any] = []
        until = monotonic() + SLICE_S
        try:
            for so_far in self._codec.thaw(_frames(body)):
                values = so_far
                if monotonic() >= until:
                    await asyncio.sleep(0)
                    until = monotonic() + SLICE_S * 10
            replica.state.restore(values)
        except (FreezeError, ValueError, TypeError) as error:
            raise SnapshotRefusedError(f"SNAPSHOT_CORRUPT: {error}") from error
        replica.next_position = found.position + 1

    # Writing.

    async def keep(self, replica: Replica[S]) -> None:
        """Until cancelled: what a leader does. A failure is logged and tried again, and stops nothing."""
        last, since = self.loaded.get(replica.partition, -1), monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            moved = replica.state.applied - last
            overdue = monotonic() - since >= self._config.snapshot_every_s and moved >= LEAST_MOVED
            if moved < self._config.snapshot_every_events and not overdue:
                continue
            try:
                async with self._one_at_a_time:
                    last, since = await self.write(replica), monotonic()
            except Exception as error:  # noqa: BLE001 - a cache must not stop a leader
                logger.warning("snapshot of %s/%d failed: %r", self._service, replica.partition, error)
                await asyncio.sleep(RETRY_S)

    async def write(self, replica: Replica[S]) -> int:
        """Store the fold as it is now, drop what is older than needed, and return the position."""
        state = replica.state
        header = _Header(self._service, replica.partition, self.schema, state.applied, state.last_event_id)
        values = state.image()
        frames: list[bytes] = []
        until = monotonic() + SLICE_S
        for frame in self._codec.freeze(values):
            frames.append(frame)
            if monotonic() >= until:
                await asyncio.sleep(PAUSE_S)
                until = monotonic() + SLICE_S
        data = await asyncio.to_thread(_closed, header, frames)
        name = f"{self._folder(replica.partition)}{header.position:020d}.{self.schema}.bin"
        await self._store.write(name, data)
        logger.info("snapshot %s: %d bytes", name, len(data))
        await self._drop_old(replica.partition)
        return header.position

    async def _drop_old(self, partition: int) -> None:
        found = await self._list(partition)
        own = [each for each in found if each.schema == self.schema]
        others = [each for each in found if each.schema != self.schema]
        for each in (*own[KEPT:], *others[KEPT:]):
            await self._store.delete(each.name)


def _closed(header: _Header, frames: list[bytes]) -> bytes:
    packed = msgspec.msgpack.encode(header)
    body = zlib.compress(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames), 1)
    data = b"".join((_MAGIC, len(packed).to_bytes(4, "big"), packed, body))
    return data + hashlib.sha256(data).digest()


def _opened(data: bytes) -> tuple[_Header, bytes]:
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    if not content.startswith(_MAGIC) or hashlib.sha256(content).digest() != digest:
        raise SnapshotRefusedError("SNAPSHOT_CORRUPT: its SHA-256 does not match")
    start = len(_MAGIC) + 4
    size = int.from_bytes(content[len(_MAGIC) : start], "big")
    try:
        header = msgspec.msgpack.decode(content[start : start + size], type=_Header)
        return header, zlib.decompress(content[start + size :])
    except (msgspec.MsgspecError, zlib.error) as error:
        raise SnapshotRefusedError(f"SNAPSHOT_CORRUPT: {error}") from error


def _frames(body: bytes) -> Iterator[bytes]:
    at = 0
    view = memoryview(body)
    while at < len(body):
        size = int.from_bytes(view[at : at + 4], "big")
        yield bytes(view[at + 4 : at + 4 + size])
        at += 4 + size


async def _event_at(log: EventLog, place: TopicPartition, position: int) -> str:
    """Id of the event that the log holds exactly there; empty when it holds none."""
    tail = await log.open_tail({place: position})
    try:
        while tail.position(place) <= position:
            for record in await tail.fetch(1.0):
                return read_envelope(record)[0].event_id if record.position == position else ""
    finally:
        await tail.close()
    return ""
