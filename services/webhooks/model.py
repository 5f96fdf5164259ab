"""What webhooks keeps and is asked to do: state, commands and the limits between them. No rules here.

For each endpoint and source partition there is a *stream*: a cursor — what is not above it is delivered, filtered out
or an exception — and capped sets of exceptions, dead letters and the latest deliveries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, cast

import immutables
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import NotFoundError

MAX_EXCEPTIONS: Final = 1_000
MAX_DEAD: Final = 1_000
MAX_MADE: Final = 100
"""Latest deliveries of a stream that are kept to be looked at."""
MAX_HELD: Final = 500
"""Strict order: deliveries of an endpoint that may wait behind others; well below the exceptions, so that they never
fill those up."""
MAX_HELD_PER_KEY: Final = 100
MAX_ENDPOINTS: Final = 100
"""Of one organization."""
MAX_RUNNING_REPLAYS: Final = 3
MAX_REPLAYS: Final = 50
"""Of one endpoint, ended ones included: the oldest of those are forgotten."""
MAX_RESPONSE_KEPT: Final = 1_024
DISABLE_AFTER_MS: Final = 5 * 24 * 3_600_000
HEALTH_EVERY_MS: Final = 10_000
"""An endpoint that comes and goes tells of it this often at most."""
MAX_OVERLAP_MS: Final = 24 * 3_600_000
VERIFY_STEPS_MS: Final = (0, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 300_000, 1_800_000)
"""Wait before each attempt to verify an endpoint by itself; after the last one somebody has to ask."""
VERIFY: Final = "webhooks.verify"

OPERATOR: Final = "DISABLED_BY_OPERATOR"
GONE: Final = "RECEIVER_GONE"
FAILING: Final = "FAILING_FOR_FIVE_DAYS"
NOT_VERIFIED: Final = "VERIFICATION_OUTSTANDING"

Place = tuple[str, int]
"""Source topic and partition."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One endpoint's progress in one source partition."""

    cursor: int
    """Inclusive: positions up to here are dealt with."""
    exceptions: immutables.Map[int, events.DeliveryException] = field(default_factory=immutables.Map)
    """Open ones by position."""
    dead: immutables.Map[int, events.DeliveryException] = field(default_factory=immutables.Map)
    """The latest that were given up, by position."""
    made: tuple[events.DeliveryMade, ...] = ()
    """The latest that were delivered, oldest first."""
    numbered_from: int = -1
    """Strict order: positions above this are numbered, each order key from 1."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint with its progress."""

    image: pb.WebhookEndpoint
    """Without ``delivered_count`` and ``health``, which move without an event of the endpoint."""
    streams: immutables.Map[Place, Stream]
    delivered: int = 0
    failing_since_ms: int = 0
    """First failure after the last success; 0 while there is none."""
    health: int = 0
    """A ``WebhookEndpoint.Health``; its own type exists for type checkers only, and states are stored by type."""
    health_since_ms: int = 0
    verify_failures: int = 0
    """Attempts to verify it that failed since it was asked for."""
    verify_reason: str = ""
    replays: immutables.Map[str, pb.Replay] = field(default_factory=immutables.Map)

    @property
    def active(self) -> bool:
        """Whether deliveries may be sent to it."""
        return self.image.state == pb.WebhookEndpoint.STATE_ACTIVE

    @property
    def open_exceptions(self) -> int:
        """Deliveries that failed and are due again."""
        return sum(len(stream.exceptions) for stream in self.streams.values())

    @property
    def strict(self) -> bool:
        """Whether it wants strict order."""
        return self.image.ordering == pb.WebhookEndpoint.ORDERING_STRICT


@dataclass(frozen=True, slots=True)
class State:
    """One partition's endpoints by name."""

    endpoints: immutables.Map[str, Endpoint] = field(default_factory=immutables.Map)


@dataclass(frozen=True, slots=True)
class CreateEndpoint:
    """The URL is in its normal form; ``starts`` are the ends of the source logs."""

    endpoint: pb.WebhookEndpoint
    starts: tuple[tuple[Place, int], ...]


@dataclass(frozen=True, slots=True)
class UpdateEndpoint:
    """New values for named fields; a URL is in its normal form."""

    endpoint: pb.WebhookEndpoint
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteEndpoint:
    """Stop for good; secrets and progress are forgotten."""

    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class RotateSecret:
    """The next generation of secret and key pair."""

    name: str
    overlap_ms: int
    etag: str


@dataclass(frozen=True, slots=True)
class RecordVerification:
    """What came of asking the receiver at that URL. ``problem`` is empty when it wants the deliveries."""

    name: str
    uid: str
    url: str
    problem: str
    task_id: str = ""
    """The task that asked; empty when an operator did."""


@dataclass(frozen=True, slots=True)
class Move:
    """What became of deliveries from one source partition."""

    place: Place
    cursor: int
    exceptions: tuple[events.DeliveryException, ...] = ()
    resolved: tuple[int, ...] = ()
    delivered: int = 0
    made: tuple[events.DeliveryMade, ...] = ()


@dataclass(frozen=True, slots=True)
class RecordDeliveries:
    """From the sender. It names the uid: progress of a deleted endpoint is not that of its successor."""

    name: str
    uid: str
    moves: tuple[Move, ...]
    gone: bool = False
    """The receiver answered 410."""
    health: int = 0
    """A ``WebhookEndpoint.Health``; 0 when there is nothing to say."""


@dataclass(frozen=True, slots=True)
class StartReplay:
    """Wanted range and filters; ``ends`` are the ends of the source logs."""

    replay: pb.Replay
    ends: tuple[tuple[Place, int], ...]


@dataclass(frozen=True, slots=True)
class ResendOne:
    """One delivery again, by its resource name."""

    delivery: str


@dataclass(frozen=True, slots=True)
class CancelReplay:
    """End a replay by its resource name."""

    name: str


@dataclass(frozen=True, slots=True)
class RecordReplay:
    """From the sender: how far a replay has come."""

    replay: pb.Replay


def find(state: State, name: str) -> Endpoint:
    """The endpoint of that name. Raises RESOURCE_NOT_FOUND."""
    found = state.endpoints.get(name)
    if found is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return found


def shown(endpoint: Endpoint) -> pb.WebhookEndpoint:
    """The resource as callers see it."""
    image = pb.WebhookEndpoint()
    image.CopyFrom(endpoint.image)
    image.delivered_count = endpoint.delivered
    image.health = cast("pb.WebhookEndpoint.Health.ValueType", endpoint.health)
    if image.state == pb.WebhookEndpoint.STATE_PENDING and endpoint.verify_reason:
        image.state_reason = endpoint.verify_reason
    return image


def generation_of(image: pb.WebhookEndpoint) -> int:
    """Number of the current secret; endpoints from before rotation have the first."""
    return image.secret_generation or 1


def previous_until_ms(image: pb.WebhookEndpoint) -> int:
    """Until when the secret before signs, too; 0 when there is none."""
    if not image.HasField("previous_secret_expire_time"):
        return 0
    return image.previous_secret_expire_time.ToMilliseconds()
