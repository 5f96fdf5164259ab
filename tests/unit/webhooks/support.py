"""A context for decisions, endpoints, and small makers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.eventlog import Decision
from libs.eventlog.model import Event
from libs.keystore import MemoryKeyStore
from services.webhooks.domain import Webhooks
from services.webhooks.model import CreateEndpoint, Endpoint, Place, RecordVerification, State
from services.webhooks.pump import Pump
from services.webhooks.render import WebhookEvent
from services.webhooks.signing import Signer

NAME = "organizations/acme/webhookEndpoints/ops"
PLACE: Place = ("t.registry.public.v1", 0)
OTHER: Place = ("t.rollout.public.v1", 0)
DOMAIN = Webhooks(lambda name, uid, generation: f"whpk_{name}{uid}{generation}")


@dataclass
class World:
    """Decides and folds, with a clock that the test moves."""

    state: State = field(default_factory=State)
    now_ms: int = 1_000_000
    organization: str = "acme"
    principal: str = "test"
    versions: dict[str, int] = field(default_factory=dict)
    _uuids: Any = field(default_factory=itertools.count)

    def new_uuid(self, purpose: str = "") -> str:
        return f"uuid-{next(self._uuids)}"

    def version(self, resource: str) -> int:
        return self.versions.get(resource, 0)

    def parked(self, resource: str) -> bool:
        return False

    def do(self, command: object) -> Decision:
        decision = DOMAIN.decide(self.state, command, self)
        for event in decision.events:
            self.versions[event.resource] = self.version(event.resource) + 1
            version = self.versions[event.resource]
            self.state = DOMAIN.evolve(
                self.state,
                Event(event.organization, event.resource, version, event.payload, self.now_ms, "test"),
            )
        return decision

    def create(self, name: str = NAME, **fields: Any) -> pb.WebhookEndpoint:
        """Created and verified."""
        made = self.create_pending(name, **fields)
        result: Any = self.do(RecordVerification(name, made.uid, made.url, "")).result
        verified: pb.WebhookEndpoint = result
        return verified

    def create_pending(self, name: str = NAME, **fields: Any) -> pb.WebhookEndpoint:
        wanted = pb.WebhookEndpoint(name=name, **{"url": "https://hooks.example/", **fields})
        result: Any = self.do(CreateEndpoint(wanted, ((PLACE, 10), (OTHER, 20)))).result
        made: pb.WebhookEndpoint = result.webhook_endpoint
        return made

    @property
    def endpoint(self) -> Endpoint:
        return self.state.endpoints[NAME]


def event(number: int, event_type: str = "device.created") -> WebhookEvent:
    payload = registry_events.DeviceChanged(device=registry_pb2.Device(name=f"d{number}"), change=event_type)
    return WebhookEvent(event_type, f"e{number}", "acme", f"d{number}", 1_000, payload)


def pump_of(world: World) -> Pump:
    endpoint = world.endpoint
    return Pump(endpoint, Signer(MemoryKeyStore()).ring(endpoint.image), (PLACE, OTHER))
