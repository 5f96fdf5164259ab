"""What one record of the check-in topic means, as a pure fold: what the leader must see, what the read models take.

Idle items only refresh last-seen. Nothing here knows Faust, Kafka or Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from groundswell.rollout.v1 import rollout_pb2

from libs.checkins import VerifiedBatch

MAX_ITEMS = 500


class SeenDevice(NamedTuple):
    """For the read models. A tuple: one is made for each check-in there is."""

    device: str
    seen_ms: int
    receipt: bytes
    """Serialized receipt, empty when the item has none."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One judged record. ``record`` is None when it holds nothing for the leader."""

    position: int
    record: rollout_pb2.ObservedRecord | None = None
    devices: tuple[SeenDevice, ...] = ()


def observe(verified: VerifiedBatch, position: int, append_time_ms: int) -> Observed:
    """Split a verified batch."""
    batch = verified.batch
    items = [item for item in batch.items if not item.idle]
    record = None
    if batch.heartbeat or items:
        record = rollout_pb2.ObservedRecord(
            position=position,
            append_time_ms=append_time_ms,
            gateway=verified.gateway,
            organization=batch.organization,
            heartbeat=batch.heartbeat,
            items=items,
        )
    devices = tuple([SeenDevice(item.device, append_time_ms, item.receipt.SerializeToString()) for item in batch.items])
    return Observed(position, record, devices)


@dataclass(slots=True)
class Backlog:
    """Records of one partition that the leader has not acknowledged, in order."""

    partition: int
    waiting: list[Observed] = field(default_factory=list)

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
        del self.waiting[:count]
        return finished
