"""Settings of a runtime, what it reports about itself, and the shape of task handlers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol
from zlib import crc32

from libs.eventlog.codec import new_id
from libs.eventlog.model import Command, Snapshot, Task


def partition_of(organization: str, partitions: int) -> int:
    """The one rule that places organizations; part of the data format."""
    return crc32(organization.encode()) % partitions


def events_topic(env: str, service: str) -> str:
    """Private log of a service."""
    return f"{env}.{service}.events.v1"


def public_topic(env: str, service: str) -> str:
    """What a service tells the others."""
    return f"{env}.{service}.public.v1"


def wall_clock_ms() -> int:
    """Time of this machine."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Times are seconds unless the name says otherwise."""

    env: str
    partitions: int
    address: str = ""
    """Internal address under which other replicas reach this one."""
    build: str = ""
    node: str = field(default_factory=new_id)
    """New at every process start; never configured in production."""
    max_batch_events: int = 500
    max_batch_s: float = 0.025
    """Deciding stops for a batch after this long, so that slow decisions do not hold the quick ones' answers."""
    max_queue: int = 20_000
    max_record_bytes: int = 900_000
    read_back_s: float = 15.0
    """A committed batch that the own tail has not applied by then counts as of unknown outcome."""
    claim_read_back_s: float = 12.0
    """A committed claim that a tail at the end of the log cannot see for this long is given up for another one. Longer
    than a transaction may stay open: the log ends those by itself."""
    max_clock_difference_s: float = 2.0
    retry_first_s: float = 0.1
    retry_most_s: float = 30.0
    claim_retry_most_s: float = 2.0
    task_concurrency: int = 16
    """Tasks that run at a time, per led partition."""
    inbox_chunk: int = 500
    inbox_pace_s: float = 0.0
    """A busy Inbox takes in at once what came in such a time: each taking in is a transaction, which costs the same for
    one record as for hundreds. Single records are taken in at once, and so is what a reader waits for."""
    lag_every_s: float = 1.0
    beat_every_s: float = 24 * 3600.0
    """An idle leader commits a beat, because brokers forget idle transactional ids."""
    snapshot_every_events: int = 100_000
    """Records after which a leader stores a snapshot, when it has a store."""
    snapshot_every_s: float = 900.0
    """… or this long after the last one, when something has happened."""
    verify_folds: bool = False
    """For tests: what a leader has folded ahead is folded from the log too; a difference halts the partition."""
    wall_clock_ms: Callable[[], int] = wall_clock_ms


@dataclass(frozen=True, slots=True)
class PartitionHealth:
    """One partition as this process sees it."""

    partition: int
    role: str
    """following, claiming, leading, halted or stopped."""
    caught_up: bool
    """The tail reached the end as it was at start; reads are served."""
    applied: int
    open_tasks: int
    parked: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """`live`: restart me if false. `ready`: send me reads. `leading`: all that is assigned to me is claimed."""

    live: bool
    ready: bool
    leading: bool
    partitions: tuple[PartitionHealth, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a task handler may look at. The snapshot is read when asked for, not when the task began."""

    partition: int
    attempt: int
    """0 at the first try under this leader."""
    snapshot: Callable[[], Snapshot]


class TaskHandler(Protocol):
    """Outgoing work of one kind. Called again until its command's decision closes the task.

    Must be idempotent by a natural key: it may run again after a fail-over, even when it had succeeded. An exception
    is retried with back-off for ever. None means done with nothing to record: the runtime closes the task.
    """

    def __call__(self, task: Task, ctx: TaskContext, /) -> Awaitable[Command | None]: ...
