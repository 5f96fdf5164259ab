"""A delivery to be attempted, and one source partition's progress. No I/O; time is told.

A lane's cursor moves over a position once that is delivered, filtered out, or an exception recorded along with it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from services.webhooks.model import MAX_RESPONSE_KEPT, Move, Place
from services.webhooks.render import WebhookEvent
from services.webhooks.transport import Outcome

LAZY_CURSOR: Final = 5_000
"""A cursor that moved only over records of no interest is recorded once it moved this far."""
MADE_AT_A_TIME: Final = 50
"""Of many deliveries that are recorded together the delivery log gets the latest."""
Key = tuple[Place, int]


@dataclass(frozen=True, slots=True)
class Item:
    """A delivery to be attempted now."""

    place: Place
    position: int
    webhook_id: str
    event_type: str
    event: WebhookEvent | None = None
    """None for a delivery that failed before: its record is read again."""
    attempts_made: int = 0
    probe: bool = False
    """The one attempt that an open breaker lets through."""
    early: bool = False
    """Ahead of its schedule, because the endpoint seems to be back; a failure does not use up an attempt."""
    order_key: str = ""
    sequence: int = 0
    """Strict order: 0 for what was delivered before numbers began."""
    replay: str = ""
    """Resource name of the replay that it is part of."""

    @property
    def key(self) -> Key:
        """Identity of the delivery within the endpoint."""
        return self.place, self.position

    @property
    def identity(self) -> tuple[str, Place, int]:
        """Identity of what is under way: a replay may repeat what is being delivered."""
        return self.replay, self.place, self.position


def attempt_of(outcome: Outcome, at_ms: int, replay: str = "") -> pb.DeliveryAttempt:
    """One attempt as the delivery log keeps it."""
    made = pb.DeliveryAttempt(
        status=outcome.status,
        error=outcome.error[:300],
        duration_ms=outcome.duration_ms,
        response=_excerpt(outcome.body),
        replay=replay,
    )
    made.time.FromMilliseconds(at_ms)
    return made


def _excerpt(body: bytes) -> str:
    """Text of at most the limit in bytes, whatever the receiver sent."""
    text = body[:MAX_RESPONSE_KEPT].decode("utf-8", "replace")
    return text.encode()[:MAX_RESPONSE_KEPT].decode("utf-8", "ignore")


def with_attempt(before: list[pb.DeliveryAttempt], now: pb.DeliveryAttempt) -> list[pb.DeliveryAttempt]:
    """The attempts and one more; only the last keeps what the receiver said."""
    kept = []
    for each in before[-15:]:
        bare = pb.DeliveryAttempt()
        bare.CopyFrom(each)
        bare.response = ""
        kept.append(bare)
    return [*kept, now]


@dataclass(slots=True)
class Lane:
    """Progress in one source partition."""

    seen: int
    """Inclusive: records up to here were given to the pump."""
    cursor: int
    recorded: int
    """The cursor in the log."""
    numbered_from: int = -1
    """Strict order: positions above it are counted."""
    waiting: deque[int] = field(default_factory=deque)
    """Positions between cursor and seen that were accepted, in order."""
    done: set[int] = field(default_factory=set)
    """Those of them that need not be waited for."""
    changed: dict[int, events.DeliveryException] = field(default_factory=dict)
    resolved: list[int] = field(default_factory=list)
    delivered: int = 0
    made: deque[events.DeliveryMade | tuple[Item, Outcome, int]] = field(
        default_factory=lambda: deque(maxlen=MADE_AT_A_TIME)
    )
    """For the delivery log. First-time successes become messages only if they are still here when it is written."""
    urgent: bool = False
    """Record the cursor although nothing was delivered."""

    def finish(self, position: int) -> None:
        """The position needs no more waiting."""
        self.done.add(position)
        while self.waiting and self.waiting[0] in self.done:
            self.cursor = self.waiting.popleft()
            self.done.discard(self.cursor)
        if not self.waiting:
            self.cursor = max(self.cursor, self.seen)

    def accept(self, position: int) -> None:
        """The position is waited for."""
        self.waiting.append(position)
        self.seen = position

    def advance(self, seen: int) -> None:
        """Everything up to here has been given out."""
        self.seen = max(self.seen, seen)
        if not self.waiting:
            self.cursor = max(self.cursor, self.seen)

    @property
    def worth_recording(self) -> bool:
        """Whether there is something to tell the log."""
        if self.delivered or self.changed or self.resolved or (self.urgent and self.cursor > self.recorded):
            return True
        return self.cursor - self.recorded >= LAZY_CURSOR

    def collect(self, place: Place) -> Move:
        """What to record since the last time."""
        made = tuple(each if isinstance(each, events.DeliveryMade) else made_of(*each) for each in self.made)
        move = Move(place, self.cursor, tuple(self.changed.values()), tuple(self.resolved), self.delivered, made)
        self.recorded, self.urgent = self.cursor, False
        self.changed, self.resolved, self.delivered = {}, [], 0
        self.made.clear()
        return move


def made_of(
    item: Item, outcome: Outcome, at_ms: int, before: events.DeliveryException | None = None
) -> events.DeliveryMade:
    """A delivery that succeeded, as the delivery log keeps it."""
    attempts = with_attempt(
        list(before.attempts) if before is not None else [], attempt_of(outcome, at_ms, item.replay)
    )
    return events.DeliveryMade(
        position=item.position,
        webhook_id=item.webhook_id,
        event_type=item.event_type,
        attempts=attempts,
        attempt_count=item.attempts_made + 1,
        order_key=item.order_key,
        sequence=item.sequence,
    )
