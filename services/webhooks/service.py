"""The gRPC servicer of webhooks: it translates, and adds the secret that no log may hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from groundswell.webhooks.v1 import webhooks_pb2 as pb
from groundswell.webhooks.v1 import webhooks_pb2_grpc

from libs.eventlog import Runtime
from libs.names import organization_of
from libs.rpc import page, snapshot_state, submit
from services.webhooks.catalogue import EVENT_TYPES
from services.webhooks.domain import (
    CreateEndpoint,
    DeleteEndpoint,
    Place,
    State,
    UpdateEndpoint,
    find,
    shown,
)
from services.webhooks.policy import UrlPolicy
from services.webhooks.pump import exception_as_delivery
from services.webhooks.signing import Signer

Starts = Callable[[str], Awaitable[tuple[tuple[Place, int], ...]]]
"""Ends of the source logs that hold an organization's records, now."""


class WebhooksServicer(webhooks_pb2_grpc.WebhooksServiceServicer):
    """Public API."""

    def __init__(
        self,
        runtime: Runtime[State],
        policy: UrlPolicy,
        signer: Signer,
        starts: Starts,
        recent: Callable[[str], Sequence[pb.Delivery]],
    ) -> None:
        self._runtime = runtime
        self._policy = policy
        self._signer = signer
        self._starts = starts
        self._recent = recent

    async def CreateWebhookEndpoint(self, request: Any, context: Any) -> pb.CreateWebhookEndpointResponse:
        """Create an endpoint; the secret is derived, so that a retry answers with the same one.

        In this release an endpoint is ACTIVE from the start: proof that the receiver wants it (a challenge, PENDING
        until it is answered) comes later. Its events begin with those committed after the call began.
        """
        wanted = pb.WebhookEndpoint(
            name=f"{request.parent}/webhookEndpoints/{request.webhook_endpoint_id}",
            url=self._policy.normal_form(request.webhook_endpoint.url),
            event_types=request.webhook_endpoint.event_types,
            ca_pem=request.webhook_endpoint.ca_pem,
        )
        organization = organization_of(request.parent)
        command = CreateEndpoint(wanted, await self._starts(organization))
        stored: pb.CreateWebhookEndpointResponse = await submit(self._runtime, organization, command, request, context)
        # A copy: what is answered is also what the log's fold holds, and must stay without the secret.
        answer = pb.CreateWebhookEndpointResponse()
        answer.CopyFrom(stored)
        image = answer.webhook_endpoint
        answer.secret.secret = self._signer.keys(image.name, image.uid).shown_secret
        return answer

    async def GetWebhookEndpoint(self, request: Any, context: Any) -> pb.WebhookEndpoint:
        return shown(find(snapshot_state(self._runtime, request.name), request.name))

    async def ListWebhookEndpoints(self, request: Any, context: Any) -> pb.ListWebhookEndpointsResponse:
        state = snapshot_state(self._runtime, request.parent)
        prefix = f"{request.parent}/webhookEndpoints/"
        mine = ((name, shown(found)) for name, found in state.endpoints.items() if name.startswith(prefix))
        found, token = page(mine, request)
        return pb.ListWebhookEndpointsResponse(webhook_endpoints=found, next_page_token=token)

    async def UpdateWebhookEndpoint(self, request: Any, context: Any) -> pb.WebhookEndpoint:
        command = UpdateEndpoint(request.webhook_endpoint, tuple(request.update_mask.paths))
        organization = organization_of(request.webhook_endpoint.name)
        updated: pb.WebhookEndpoint = await submit(self._runtime, organization, command, request, context)
        return updated

    async def DeleteWebhookEndpoint(self, request: Any, context: Any) -> Any:
        command = DeleteEndpoint(request.name, request.etag)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def ListDeliveries(self, request: Any, context: Any) -> pb.ListDeliveriesResponse:
        """Deliveries that wait or are dead, from the log, and the latest successes that this leader remembers."""
        self._runtime.require_leader(organization_of(request.parent))
        endpoint = find(snapshot_state(self._runtime, request.parent), request.parent)
        deliveries = {each.name: each for each in self._recent(request.parent)}
        for place, stream in endpoint.streams.items():
            for exception in (*stream.exceptions.values(), *stream.dead.values()):
                each = exception_as_delivery(request.parent, place, exception)
                # What this leader has just delivered may not be recorded yet.
                deliveries.setdefault(each.name, each)
        found, token = page(deliveries.items(), request)
        return pb.ListDeliveriesResponse(deliveries=found, next_page_token=token)

    async def ListEventTypes(self, request: Any, context: Any) -> pb.ListEventTypesResponse:
        types = [pb.EventType(name=name, description=words) for name, words in sorted(EVENT_TYPES.items())]
        return pb.ListEventTypesResponse(event_types=types)
