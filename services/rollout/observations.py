"""What one record of the check-in topic means, as a pure fold: what the leader must see, what the read models take.

Idle items only refresh last-seen. Nothing here knows Faust, Kafka or Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from groundswell.rollout.v1 import rollout_pb2

from libs.checkins import VerifiedBatch

MAX_ITEMS = 500


@dataclass(frozen=True, slots=True)
class Observed:
    """One judged record. ``record`` is None when it holds nothing for the leader."""

    position: int
    record: rollout_pb2.ObservedRecord | None = None
    seen_ms: int = 0
    seen: Sequence[tuple[str, bytes]] = ()
    """Device and serialized receipt, empty when the item has none."""


def observe(verified: VerifiedBatch, position: int, append_time_ms: int) -> Observed:
    """Split a verified batch."""
    record = None
    if verified.heartbeat or verified.items:
        record = rollout_pb2.ObservedRecord(
            position=position,
            append_time_ms=append_time_ms,
            gateway=verified.gateway,
            organization=verified.organization,
            heartbeat=verified.heartbeat,
            items=verified.items,
        )
    return Observed(position, record, append_time_ms, verified.seen)


@dataclass(slots=True)
class Backlog:
    """Records of one partition that the leader has not acknowledged, in order."""

    partition: int
    waiting: list[Observed] = field(default_factory=list)
    _news: int = 0
    _items: int = 0

    def add(self, observed: Observed) -> None:
        """The next record."""
        self.waiting.append(observed)
        self._count(observed, 1)

    def _count(self, observed: Observed, sign: int) -> None:
        if observed.record is not None:
            self._news += sign
            self._items += sign * len(observed.record.items)

    @property
    def quiet(self) -> bool:
        """Nothing that waits is new to the leader."""
        return not self._news

    @property
    def full(self) -> bool:
        """The next call has as many items as it may have."""
        return self._items >= MAX_ITEMS

    def take(self) -> tuple[rollout_pb2.RecordObservationsRequest, int]:
        """The next call and how many records it answers: as many as fit into 500 items."""
        request = rollout_pb2.RecordObservationsRequest(source_partition=self.partition)
        items = count = 0
        for observed in self.waiting:
            more = len(observed.record.items) if observed.record is not None else 0
            if count and (items + more > MAX_ITEMS or count >= MAX_ITEMS):
                break
            if observed.record is not None:
                request.records.append(observed.record)
            items += more
            count += 1
            request.through_position = observed.position
        return request, count

    def done(self, count: int) -> Sequence[Observed]:
        """The leader has them in its log."""
        finished = self.waiting[:count]
        for observed in finished:
            self._count(observed, -1)
        del self.waiting[:count]
        return finished
