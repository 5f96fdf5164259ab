"""Keys of rollout's read models in Redis, and the routing key of a partition."""

from __future__ import annotations

from libs.eventlog import partition_of


def seen_key(env: str, device: str) -> str:
    """When a device was last seen, and its last receipt: see :mod:`services.rollout.seen`."""
    return f"{env}:seen:{device}"


def positions_key(env: str) -> str:
    """How far the read models have taken in each partition of the check-in topic."""
    return f"{env}:checkins:positions"


def routing_key(partition: int, partitions: int) -> str:
    """A routing key, no organization's name, that belongs to the partition: for events about the partition itself."""
    number = 0
    while partition_of(f"~{number}", partitions) != partition:
        number += 1
    return f"~{number}"
