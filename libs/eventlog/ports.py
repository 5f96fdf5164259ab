"""What the runtime asks of a log. Kafka, memory and any later store stand behind these ports.

Two guarantees carry everything above:

* opening an appender for a transactional id *fences* every appender opened before it under that id: none of them can
  commit any more, and what they left open is aborted (or, if its commit had been decided, completed) before the new
  appender is returned;
* a tail delivers committed records only, in order, and never passes a transaction that is still open.

Positions have gaps (commit markers, aborted records). Compare positions; never wait for "position plus one".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol


class LogError(Exception):
    """The log could not do what it was asked; nothing is known beyond that."""


class FencedError(LogError):
    """A newer appender of the same transactional id exists: an ordinary end of leadership."""


class UnknownOutcomeError(LogError):
    """The transaction may or may not have been committed. Only reading the log after a new claim can tell."""


Fenced = FencedError
UnknownOutcome = UnknownOutcomeError


class TopicPartition(NamedTuple):
    """One totally ordered log."""

    topic: str
    partition: int


Headers = tuple[tuple[str, bytes], ...]


class NewRecord(NamedTuple):
    """A record to append. A tuple, because the write path makes two of them for each event."""

    topic: str
    partition: int
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]
    """A list because the client library takes nothing else."""


class Record(NamedTuple):
    """A committed record as read back."""

    topic: str
    partition: int
    position: int
    timestamp_ms: int
    """Time of the log (the broker's clock), not of the writer."""
    key: bytes
    value: bytes
    headers: Headers


class Appender(Protocol):
    """The only writer of its transactional id, until somebody else opens one. Not for concurrent use."""

    @property
    def producer_id(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    async def stage(self, records: Sequence[NewRecord]) -> None:
        """Open a transaction and write the records; returns when the log holds them, uncommitted.

        The end of the transaction is marked where the records are. A marker also ends there whatever the same
        transactional id left open before, however that came about.

        Raises `FencedError` or `UnknownOutcomeError`; either way this appender is dead.
        """

    async def commit(self) -> None:
        """Commit what was staged. Raises as `stage` does. After an error nothing is known but by reading."""

    async def close(self) -> None:
        """Release connections. An open transaction stays open until fenced or timed out."""


class Tail(Protocol):
    """Reads committed records of some partitions, from given positions on. Not for concurrent use."""

    async def fetch(self, max_wait: float) -> Sequence[Record]:
        """Return what is committed past the position, waiting at most `max_wait` seconds for the first record."""

    def position(self, at: TopicPartition) -> int:
        """Where the next fetch reads: past every delivered record, and past markers and aborted records seen."""

    async def close(self) -> None: ...


class Election(Protocol):
    """Membership in a group that shares out partitions: a hint who should lead, never proof."""

    async def changed(self) -> frozenset[int]:
        """Wait until the assignment differs from what was last returned; return the partitions now assigned."""

    async def close(self) -> None:
        """Leave the group at once."""


class SnapshotStore(Protocol):
    """Where caches of folds are kept. It may lose, damage or refuse anything at any time: the log is there."""

    async def names(self, prefix: str) -> Sequence[str]:
        """All names that begin so, in any order."""

    async def read(self, name: str) -> bytes: ...

    async def write(self, name: str, data: bytes) -> None:
        """A name that exists already may keep what it has."""

    async def delete(self, name: str) -> None:
        """One that is gone is fine."""

    async def close(self) -> None: ...


class EventLog(Protocol):
    """A store of topics."""

    async def open_appender(self, transactional_id: str) -> Appender: ...

    async def open_tail(self, positions: Mapping[TopicPartition, int]) -> Tail: ...

    async def end_positions(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Last stable ends: every transaction that began below them is decided and visible."""

    async def partition_count(self, topic: str) -> int:
        """0 when the topic does not exist."""

    async def open_election(self, group: str, topic: str) -> Election: ...

    async def close(self) -> None: ...
