"""Strict order: which delivery of each order key may be attempted. Pure.

Each order key has a queue of deliveries in the order of their events; only its head may go. A queue moves on when its
head has been delivered or given up, so one device's poisonous event holds back that device alone, and not for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from services.webhooks.lane import Key


class KeyQueues:
    """The queues of one endpoint."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Key]] = {}

    def add(self, order_key: str, key: Key) -> Key | None:
        """Join the queue; the head that must go first, None when that is the new one itself."""
        queue = self._queues.setdefault(order_key, deque())
        queue.append(key)
        return queue[0] if len(queue) > 1 else None

    def is_head(self, order_key: str, key: Key) -> bool:
        """Whether it may be attempted."""
        queue = self._queues.get(order_key)
        return queue is None or queue[0] == key

    def behind(self, order_key: str) -> Sequence[Key]:
        """Those that wait for the head."""
        queue = self._queues.get(order_key)
        return list(queue)[1:] if queue else ()

    def leave(self, order_key: str, key: Key) -> Key | None:
        """It was delivered or given up: the new head, if that changed the head."""
        queue = self._queues.get(order_key)
        if queue is None or key not in queue:
            return None
        was_head = queue[0] == key
        queue.remove(key)
        if not queue:
            del self._queues[order_key]
            return None
        return queue[0] if was_head else None

    def length(self, order_key: str) -> int:
        """Deliveries of the key that are not done."""
        return len(self._queues.get(order_key, ()))
