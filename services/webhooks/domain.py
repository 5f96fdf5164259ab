"""Webhook endpoints, how far their deliveries have come, and replays: the pure core that dispatches.

Rules are where they belong: ``endpoints`` (life, verification, secrets), ``deliveries`` (cursors, exceptions, health)
and ``replays``. A new endpoint begins where the source logs stood when its creation was asked for; it hears of
everything later, once it has been verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.message import Message
from groundswell.webhooks.v1 import events_pb2 as events

from libs.eventlog import Context, Decision, Event, TimerFired
from services.webhooks import deliveries, endpoints, replays
from services.webhooks.model import (
    VERIFY,
    CancelReplay,
    CreateEndpoint,
    DeleteEndpoint,
    RecordDeliveries,
    RecordReplay,
    RecordVerification,
    ResendOne,
    RotateSecret,
    StartReplay,
    State,
    UpdateEndpoint,
)


class Webhooks:
    """The domain; see the module."""

    service = "webhooks"
    event_types: Sequence[type[Message]] = (
        events.WebhookEndpointSaved,
        events.DeliveriesRecorded,
        events.EndpointHealthChanged,
        events.EndpointVerificationFailed,
        events.ReplaySaved,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {}

    def __init__(self, public_key_of: endpoints.PublicKeyOf) -> None:
        self._public_key_of = public_key_of

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - all partitions begin empty
        """Nothing."""
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        """See :class:`libs.eventlog.Domain`."""
        match command:
            case RecordDeliveries():
                return deliveries.record(state, command, ctx)
            case RecordReplay():
                return replays.record(state, command, ctx)
            case CreateEndpoint():
                return endpoints.create(state, command, self._public_key_of, ctx)
            case UpdateEndpoint():
                return endpoints.update(state, command, ctx)
            case DeleteEndpoint():
                return endpoints.delete(state, command, ctx)
            case RotateSecret():
                return endpoints.rotate(state, command, self._public_key_of, ctx)
            case RecordVerification():
                return endpoints.record_verification(state, command, ctx)
            case StartReplay():
                return replays.start(state, command, ctx)
            case ResendOne():
                return replays.resend(state, command, ctx)
            case CancelReplay():
                return replays.cancel(state, command, ctx)
            case TimerFired(_, kind, payload) if kind == VERIFY:
                return endpoints.verify_again(state, payload.decode())
        raise TypeError(f"no such command: {type(command).__name__}")

    def evolve(self, state: State, event: Event) -> State:
        """After-images replace; recorded deliveries move cursors."""
        match event.payload:
            case events.DeliveriesRecorded() as recorded:
                return deliveries.evolve_recorded(state, recorded, event.occurred_at_ms)
            case events.WebhookEndpointSaved() as saved:
                return endpoints.evolve_saved(state, saved)
            case events.EndpointHealthChanged() as changed:
                return deliveries.evolve_health(state, changed, event.occurred_at_ms)
            case events.EndpointVerificationFailed() as failed:
                return endpoints.evolve_verification_failed(state, failed)
            case events.ReplaySaved() as saved:
                return replays.evolve_replay(state, saved)
        return state
